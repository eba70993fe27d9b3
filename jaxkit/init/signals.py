"""What happens to the signal in an untrained model, layer by layer: the measurements.

One forward and one backward pass measure everything: `jaxkit.trace.taps.replay` puts an identity
behind the operation of each leaf whose derivative with respect to a dummy argument is, by
definition, the statistics of the values and of the gradients that pass through it. So they come out
of scans, remat and cond as gradients do, and no activation is kept for them.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import tree
from jaxkit.init._operations import operations
from jaxkit.init.kernel import class_fractions
from jaxkit.trace import _uses
from jaxkit.trace.taps import replay

__all__ = ["Layer", "Signals", "signals"]

_OUTSIDE = frozenset({"while"})  # it has no reverse derivative


class Layer(NamedTuple):
    """What passes through the operation of a leaf: float32 numbers, one per layer of a stack.

    Root mean squares stand for second moments, whose square would underflow. Averages over all uses
    of a leaf that is shared.

    Attributes:
      input: root mean square of what the operation reads; NaN for indices.
      output: root mean square of its output (before the bias).
      gradient: root mean square of the gradient with respect to that output.
      norm: the norm of that gradient.
      apart: 1 - c, where c is the correlation of the outputs of two different examples, the mean of
        their inner products over the mean of their squares; NaN where no axis of the output is as
        long as the batch.
      dead: fraction of the units that it reads that are zero for every example; NaN for indices.
      zeros: fraction of the entries that it reads that are exactly zero (relu: a half).
      leaf: root mean square of the leaf.
      reached: whether the backward pass comes by; where not, all of the above but `leaf` is NaN.
    """

    input: Float[Array, "*stack"]
    output: Float[Array, "*stack"]
    gradient: Float[Array, "*stack"]
    norm: Float[Array, "*stack"]
    apart: Float[Array, "*stack"]
    dead: Float[Array, "*stack"]
    zeros: Float[Array, "*stack"]
    leaf: Float[Array, "*stack"]
    reached: Bool[Array, "*stack"]


class Signals(NamedTuple):
    """The measurements of `signals`: arrays only.

    Attributes:
      layers: by path, in order of execution.
      result: the same for the output of the model (`input` to `zeros` where they make sense).
      classes: fraction of the examples that each class wins, if the model returns one array
        (batch, ..., classes); examples that tie are left out, NaN if all do. None otherwise.
    """

    layers: Mapping[str, Layer]
    result: Layer
    classes: Float[Array, " classes"] | None


# ------------------------------------------------------------------------------ measurements


def _rms(x: Array, axis_name: Any) -> Float[Array, ""]:
    """Root mean square over all entries and devices, without squares that under- or overflow."""
    if x.size == 0:
        return jnp.full((), jnp.nan)
    x = jnp.abs(x).astype(jnp.float32)
    largest = x.max() if axis_name is None else lax.pmax(x.max(), axis_name)
    unit = jnp.where(largest > 0, largest, 1)
    second = jnp.square(x / unit).mean()
    return unit * jnp.sqrt(second if axis_name is None else lax.pmean(second, axis_name))


def _apart(y: Array, axis: int | None, axis_name: Any) -> Float[Array, ""]:
    """1 - c: variance over the examples (unbiased) over the second moment."""
    if axis is None:
        return jnp.full((), jnp.nan)
    average = lambda z: z if axis_name is None else lax.pmean(z, axis_name)
    n = y.shape[axis] * (1 if axis_name is None else lax.axis_size(axis_name))
    y = tree.float32(y)
    centered = y - average(y.mean(axis, keepdims=True))
    ratio = _rms(centered, axis_name) / _rms(y, axis_name)
    return jnp.square(ratio) * n / (n - 1)


def _example_axis(shape: Sequence[int], channels: Sequence[int | None], n: int) -> int | None:
    """The first axis that is as long as the batch and is no channel of the leaf."""
    taken = {axis for axis in channels if axis is not None}
    axes = (i for i, size in enumerate(shape) if size == n and i - len(shape) not in taken)
    return next(axes, None)


def _read(x: Array, units: Sequence[int | None], axis_name: Any) -> list[Float[Array, ""]]:
    """Root mean square, dead fraction and zero fraction of what an operation reads."""
    average = lambda z: z if axis_name is None else lax.pmean(z, axis_name)
    kept = {axis % x.ndim for axis in units if axis is not None}
    others = tuple(i for i in range(x.ndim) if i not in kept)
    alive = (x != 0).any(others).astype(jnp.float32)
    alive = alive if axis_name is None else lax.pmax(alive, axis_name)
    dead = 1 - alive.mean() if kept else jnp.full((), jnp.nan)
    zeros = average((x == 0).astype(jnp.float32).mean())
    return [_rms(x, axis_name), dead, zeros]


def _probe(axis_name: Any) -> Callable[[Array, Array, Array], Array]:
    """Return ``identity(y, seen, dummy) -> y``: the derivative in `dummy` is what it has seen."""

    @jax.custom_vjp
    def identity(y, seen, dummy):
        return y

    def forward(y, seen, dummy):
        return y, seen

    def backward(seen, g):
        rms = _rms(g, axis_name)
        size = g.size * (1 if axis_name is None else lax.axis_size(axis_name))
        return g, jnp.zeros_like(seen), jnp.stack([*seen, rms, rms * size**0.5])

    identity.defvjp(forward, backward)
    return identity


def _watch(identity, op, x, w, dummy, *, n, axis_name):
    """Run an operation, and let `identity` see what it reads and what comes out."""
    y = op.run(x, w)
    x_, y_ = lax.stop_gradient((x, y))
    nothing = [jnp.full((), jnp.nan)] * 3
    numbers = op.primitive in _uses.CONTRACTIONS
    seen = _read(x_, op.x_axes, axis_name) if numbers else nothing
    axis = _example_axis(jnp.shape(y), op.y_axes, n)
    seen = [jnp.ones(()), *seen, _rms(y_, axis_name), _apart(y_, axis, axis_name)]
    return identity(y, jnp.stack(seen), dummy)


def _as_layer(stats: Array, leaf: Array) -> Layer:
    count, read, dead, zeros, output, apart, gradient, norm = jnp.moveaxis(stats, -1, 0)
    reached = count > 0
    mean = lambda z: jnp.where(reached, z / jnp.where(reached, count, 1), jnp.nan)
    return Layer(
        input=mean(read),
        output=mean(output),
        gradient=mean(gradient),
        norm=mean(norm),
        apart=mean(apart),
        dead=mean(dead),
        zeros=mean(zeros),
        leaf=leaf,
        reached=reached,
    )


def signals(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batch: PyTree,
    *,
    loss: Callable[[PyTree], Array] | None = None,
    where: tree.Where = None,
    axis_name: str | Sequence[str] | None = None,
) -> Signals:
    """Measure the forward and the backward signal at the operation of every weight.

    The backward signal is the gradient of ``loss(outputs)``, or without one of sum(V * outputs)
    with a fixed V of independent standard normal entries. It runs under jit, pmap and shard_map.

    Args:
      apply_fn: ``apply_fn(params, batch)``, as it trains or predicts; close over rngs and state.
      batch: arrays, or a tree of them, whose first axis is the examples: two at least.
      loss: a function of what `apply_fn` returns to a scalar.
      where: the leaves to watch; default: the weights whose operations can be reached.
      axis_name: of the mapped axes that the batch is split over (with a mean in `loss`, gradients
        are those of a device's loss).

    Raises:
      ValueError: fewer than two examples; leaves of the batch of different lengths; a chosen leaf
        without an operation, or with one inside `while`; no weight at all.

    >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w0"]) @ params["w1"]
    >>> params = {"w0": jnp.array([[1.0, -1.0]]), "w1": jnp.ones((2, 3))}
    >>> found = signals(apply_fn, params, jnp.array([[3.0], [4.0]]))
    >>> found.layers["w1"].dead.item(), found.layers["w1"].zeros.item()
    (0.5, 0.5)
    """
    found, _ = find(apply_fn, params, batch, where)
    return measure(apply_fn, found, loss, axis_name, params, batch)


def find(apply_fn, params, batch, where):
    found, skipped = operations(apply_fn, params, (batch,), where, _OUTSIDE)
    if skipped and where is not None:
        lines = "\n".join(f"  {path!r} {reason}" for path, reason in skipped.items())
        raise ValueError(f"these leaves cannot be watched; choose others:\n{lines}")
    if not found:
        raise ValueError("there is no weight to watch; choose leaves with `where`")
    return found, skipped


def _examples(batch: PyTree, axis_name: Any) -> int:
    sizes = {p: np.shape(x)[0] for p, x in tree.flatten(batch).items() if np.ndim(x)}
    if len(set(sizes.values())) != 1:
        raise ValueError(
            f"the first axis of every array of the batch is the examples, and {sizes} came; close "
            "over what is not one per example"
        )
    n = next(iter(sizes.values()))
    if n * (1 if axis_name is None else lax.axis_size(axis_name)) < 2:
        raise ValueError(f"two examples at least are due to compare them, and {n} came")
    return n


def measure(apply_fn, found, loss, axis_name, params, batch) -> Signals:
    n, identity = _examples(batch, axis_name), _probe(axis_name)
    watch = partial(_watch, identity, n=n, axis_name=axis_name)
    width = 8

    def objective(dummies):
        ops = {path: (watch, dummies[0][path]) for path in found}
        out = replay(apply_fn, ops)(params, batch)
        leaves, structure = jax.tree.flatten(out)
        inexact = [i for i, y in enumerate(leaves) if tree.is_inexact(y)]
        whole = [leaves[i] for i in inexact]
        if not whole:
            raise ValueError("apply_fn returns no float array: there is no signal to follow")
        rows = all(y.ndim and y.shape[0] == n for y in whole)
        flat = [y.reshape(n, -1) if rows else y.reshape(1, -1) for y in whole]
        flat = jnp.concatenate(flat, 1)
        y = lax.stop_gradient(flat)
        apart = _apart(y, 0 if rows else None, axis_name)
        seen = [jnp.ones(()), *[jnp.full((), jnp.nan)] * 3, _rms(y, axis_name), apart]
        flat = identity(flat, jnp.stack(seen), dummies[1])
        ends = np.cumsum([y.size // flat.shape[0] for y in whole])[:-1]
        parts = jnp.split(flat, ends, axis=1)
        for i, part in zip(inexact, parts, strict=True):
            leaves[i] = part.reshape(leaves[i].shape).astype(leaves[i].dtype)
        if loss is not None:
            value = loss(jax.tree.unflatten(structure, leaves))
            if jnp.shape(value):
                raise ValueError(f"loss returned shape {jnp.shape(value)}, and a scalar was due")
        else:
            value = jnp.sum(flat * _directions(flat, rows, axis_name))
        return value.real.astype(jnp.float32), out

    start = {path: jnp.zeros((*op.stack, width)) for path, op in found.items()}
    (stats, last), out = jax.grad(objective, has_aux=True)((start, jnp.zeros(width)))
    leaves = tree.flatten(params)
    layers = OrderedDict()
    for path, op in found.items():
        size = partial(_rms, axis_name=None)
        for _ in op.stack:
            size = jax.vmap(size)
        layers[path] = _as_layer(stats[path], size(jnp.asarray(leaves[path])))
    classes, outputs = None, jax.tree.leaves(out)
    if len(outputs) == 1 and tree.is_inexact(outputs[0]) and outputs[0].ndim >= 2:
        (logits,) = outputs
        if logits.shape[0] == n and logits.shape[-1] > 1 and logits.dtype != jnp.complex64:
            logits = logits.reshape(-1, logits.shape[-1])
            classes = class_fractions(logits, axis_name=axis_name)
    return Signals(layers, _as_layer(last, jnp.full((), jnp.nan)), classes)


def _directions(y: Array, rows: bool, axis_name: Any) -> Array:
    """Independent standard normal entries; split over devices as the examples are."""
    if axis_name is None or not rows:
        return jax.random.normal(jax.random.key(0), y.shape, y.dtype)
    shape = (lax.axis_size(axis_name) * y.shape[0], *y.shape[1:])
    whole = jax.random.normal(jax.random.key(0), shape, y.dtype)
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(axis_name) * y.shape[0], y.shape[0])
