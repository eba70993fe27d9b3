"""Scales read off data: every layer's output gets the deviation that is due, in one forward pass.

The operation of a leaf is linear in it, so that dividing the leaf by the deviation of the output is
the same as dividing the output; and that can be done while the pass runs, layer after layer, with
`jaxkit.trace.taps.replay`. A second pass measures what has come out.

Reference: D. Mishkin, J. Matas, "All you need is a good init", arXiv:1511.06422.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.init import _layout
from jaxkit.init._operations import Operation, operations
from jaxkit.trace import _uses
from jaxkit.trace.taps import replay, taps

__all__ = ["Calibration", "calibrate", "lsuv"]

_LINEAR = _uses.CONTRACTIONS | {"gather", "dynamic_slice", "mul"}
_PASSES = 3


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["before", "after", "passes", "target"],
    meta_fields=["tolerance", "skipped"],
)
@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found, by path in order of execution; ``str()`` of it is a table.

    Attributes:
      before: the deviation of the output of each leaf's operation as the leaf was (the leaves
        before it being calibrated); one number, or one per layer of a stack that is scanned over.
      after: the deviation with the params that are returned.
      passes: the number of forward passes.
      target, tolerance: what was asked for.
      skipped: ``(path, reason)`` of the weights that cannot be calibrated.
    """

    before: Mapping[str, Float[Array, "*stack"]]
    after: Mapping[str, Float[Array, "*stack"]]
    passes: Int[Array, ""]
    target: Float[Array, ""]
    tolerance: float
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        rows = [("leaf", "deviation", "calibrated")]
        for path, before in self.before.items():
            names = _slices(path, np.shape(before))
            pair = np.ravel(before), np.ravel(self.after[path])
            rows += [
                (name, f"{b:.4g}", f"{a:.4g}") for name, b, a in zip(names, *pair, strict=True)
            ]
        width = max(len(row[0]) for row in rows)
        lines = [f"{a:<{width}}  {b:>9}  {c:>10}" for a, b, c in rows]
        lines += [f"{path} is left out, it {reason}" for path, reason in self.skipped]
        return "\n".join(lines)


def _slices(path: str, stack: Sequence[int]) -> list[str]:
    """The names of the layers of a leaf: ``kernel[0]``, ``kernel[1]``, ..., or the leaf's path."""
    return [path + "".join(f"[{i}]" for i in index) for index in np.ndindex(*stack)]


def _moments(
    y: Array, stack: int, axis_name: Any
) -> tuple[Float[Array, "*stack"], Float[Array, "*stack"]]:
    """Return mean and standard deviation over all axes after `stack`, and over devices."""
    y = tree.float32(y)
    axes = tuple(range(stack, y.ndim))
    average = lambda z: z if axis_name is None else lax.pmean(z, axis_name)
    mean = average(y.mean(axes, keepdims=True))
    largest = jnp.abs(y - mean).max(axes, keepdims=True)  # squares of 1e-25 are 0 in float32
    largest = largest if axis_name is None else lax.pmax(largest, axis_name)
    unit = jnp.where(largest > 0, largest, 1)
    second = average(jnp.square(jnp.abs(y - mean) / unit).mean(axes))
    return mean.reshape(y.shape[:stack]), unit.reshape(y.shape[:stack]) * jnp.sqrt(second)


def _per_slice(numbers: Array, leaf: Array) -> Array:
    """Lay one number per layer of a stack along the leading axes of the leaf."""
    return numbers.reshape(numbers.shape + (1,) * (leaf.ndim - numbers.ndim))


def calibrate(
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    where: tree.Where = None,
    target: float | Array = 1.0,
    tolerance: float = 1e-3,
    center: bool = False,
    warn: bool = True,
    axis_name: str | Sequence[str] | None = None,
) -> tuple[PyTree, Calibration]:
    """Rescale every weight so that its operation's output has the deviation `target` on a batch.

    In order of execution, with the layers before it already rescaled:

        s = std(x @ W) over the batch, channels and space;    W <- W * target / s.

    The output is that of the contraction alone, without the bias (`lsuv` starts with biases of
    zero). The pass is repeated, three in all at most, until every s is within ``tolerance *
    target``: two passes (one to rescale, one to see) where leaves are used as they are; more where
    the model normalizes a leaf, adds to it or rounds it on the way. Leaves within the tolerance
    stay bit for bit, so that a second call changes nothing. Layers of a stack that `lax.scan` runs
    over are calibrated one by one.

    Everything is one compiled program, under jit, pmap and shard_map too. It holds all outputs of a
    scan at a time, and otherwise those of one layer.

    Args:
      apply_fn: ``apply_fn(params, *args)`` as for `jaxkit.trace.taps`: as it predicts.
      where: the leaves to calibrate; default: the weights that are contracted with an activation,
        the others are named in the report.
      target: standard deviation of the outputs, a number or a traced scalar.
      tolerance: relative, static.
      center: also shift the biases next to the leaves by minus the mean of the output, as the
        authors' later code does.
      warn: take a backward pass as well, to warn of leaves whose scale does not change what the
        model returns. Not under jit. False for models without a reverse derivative.
      axis_name: of the mapped axes that the batch is split over.

    Returns:
      The params, and a `Calibration`.

    Raises:
      ValueError: naming the leaf: an output that is constant (a dead layer before it), or not
        finite; one that does not reach the target, and by how much it misses it; a leaf that
        several layers or time steps share, as rescaling it for one changes the others; a chosen
        leaf that is added, or feeds no operation; fewer than two rows (examples times positions) in
        the output. Under jit the report shows the first two: a zero, a NaN, or what is off.

    Warns:
      UserWarning: leaves whose scale the model undoes, by a normalization (BatchNorm as it trains,
        LayerNorm), or that have no effect.

    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> params = {"up": 5 * jnp.ones((2, 4)), "down": jnp.arange(4.0)[:, None] / 7}
    >>> params, report = calibrate(apply_fn, params, jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> print(report)
    leaf  deviation  calibrated
    up            5           1
    down     0.8571           1
    """
    found, skipped = operations(apply_fn, params, args, where)
    _check(found, skipped, where, axis_name)
    leaves = tree.flatten(params)
    biases = {path: _bias(path, leaves) for path in found} if center else {}
    biases = _shifted(apply_fn, params, args, {b for b in biases.values() if b})
    goal = jnp.asarray(target, float)
    final, before, after, passes, effects = jax.jit(
        partial(_calibrate, apply_fn, found, biases, tolerance, warn, axis_name)
    )(params, args, goal)
    report = Calibration(before, after, passes, goal, tolerance, tuple(skipped.items()))
    if tree.concrete(before, after, final):
        _judge(report, effects)
    return final, report


def _calibrate(apply_fn, found, biases, tolerance, warn, axis_name, params, args, target):
    leaves, structure = tree.flatten(params), jax.tree.structure(params)
    fill = lambda chosen: jax.tree.unflatten(structure, list((leaves | chosen).values()))
    near = lambda s: jnp.abs(s / target - 1) <= tolerance
    factor = lambda s: jnp.where(near(s) | ~(jnp.isfinite(s) & (s > 0)), 1, target / s)
    step = lambda mean: jnp.where(jnp.abs(mean) <= tolerance * target, 0, mean)

    def scaled(op, x, w):
        y = op.run(x, w)
        return (y * factor(_moments(y, 0, axis_name)[1])).astype(y.dtype)

    def shifted(op, x, b):
        y = op.run(x, b)
        return (y - step(_moments(y, 0, axis_name)[0])).astype(y.dtype)

    ops = dict.fromkeys(found, scaled) | dict.fromkeys(biases, shifted)

    def measure(chosen):
        fn = taps(replay(apply_fn, ops), where=lambda path, _: path in ops)
        tapped = fn(fill(chosen), *args)[1]
        stats = {p: _moments(tapped[p].output, len(op.stack), axis_name) for p, op in found.items()}
        means = {
            p: _moments(tapped[p].output, len(o.stack), axis_name)[0] for p, o in biases.items()
        }
        return {path: std for path, (_, std) in stats.items()}, means

    def once(carry):
        chosen, before, _, n, _ = carry
        stds, means = measure(chosen)
        done = jnp.stack([near(s).all() for s in stds.values()]).all()
        for mean in means.values():
            done &= (step(mean) == 0).all()
        before = {path: jnp.where(n == 0, s, before[path]) for path, s in stds.items()}
        rescale = lambda w, s: (w * _per_slice(factor(s), w)).astype(w.dtype)
        shift = lambda b, mean: (b - _per_slice(step(mean), b)).astype(b.dtype)
        new = {path: rescale(chosen[path], s) for path, s in stds.items()}
        new |= {path: shift(chosen[path], mean) for path, mean in means.items()}
        last = n + 1 == _PASSES
        new = {path: jnp.where(last, chosen[path], new[path]) for path in chosen}
        return new, before, stds, n + 1, done

    chosen = {path: jnp.asarray(leaves[path]) for path in ops}
    real = lambda path: jnp.promote_types(jnp.finfo(chosen[path].dtype).dtype, jnp.float32)
    zeros = {path: jnp.zeros(op.stack, real(path)) for path, op in found.items()}
    start = (chosen, zeros, zeros, jnp.zeros((), int), jnp.zeros((), bool))
    unfinished = lambda carry: (carry[3] < _PASSES) & ~carry[4]
    chosen, before, after, passes, _ = lax.while_loop(unfinished, once, start)
    final = fill(chosen)
    effects = _effects(apply_fn, final, args, found) if warn else None
    ordered = lambda stds: OrderedDict((path, stds[path]) for path in found)
    return final, ordered(before), ordered(after), passes, effects


def _effects(apply_fn, params, args, found):
    """How much the scale of each leaf changes the output: the derivative of a random direction."""

    def outputs(logs):
        grow = lambda path, w: w * _per_slice(jnp.exp(logs[path]), w).astype(w.dtype)
        grown = tree.map(grow, params, where=lambda path, _: path in logs)
        return [y for y in jax.tree.leaves(apply_fn(grown, *args)) if tree.is_inexact(y)]

    out, pull = jax.vjp(outputs, {path: jnp.zeros(op.stack) for path, op in found.items()})
    keys = jax.random.split(jax.random.key(0), len(out))
    probe = [jax.random.normal(key, y.shape, y.dtype) for key, y in zip(keys, out, strict=True)]
    size = jnp.sqrt(sum(jnp.sum(jnp.square(jnp.abs(y).astype(jnp.float32))) for y in out))
    return {path: jnp.abs(slope) / size for path, slope in pull(probe)[0].items()}


def _bias(path: str, leaves: Mapping[str, Any]) -> str | None:
    """Return the path of the bias that lies next to a leaf, if there is one."""
    parent = path.rpartition("/")[0]
    names = [f"{parent}/{name}" if parent else name for name in ("bias", "b")]
    return next((name for name in names if name in leaves and name != path), None)


def _shifted(apply_fn, params, args, biases: set[str]) -> Mapping[str, Operation]:
    """Return the operations of the biases to shift, which must be added once."""
    if not biases:
        return {}
    found, skipped = operations(apply_fn, params, args, lambda path, _: path in biases)
    for path, op in found.items():
        if op.uses > 1 or len(op.scans) > len(op.stack) or op.primitive not in ("add", "add_any"):
            skipped[path] = f"is no bias that is added once, but goes into `{op.primitive}`"
    if skipped:
        raise ValueError(f"center=True: these cannot be shifted:\n{_listed(skipped.items())}")
    return found


def _listed(pairs) -> str:
    return "\n".join(f"  {path!r} {reason}" for path, reason in pairs)


def _check(found, skipped, where, axis_name) -> None:
    """Raise for leaves that cannot be calibrated; move those that nobody asked for to skipped."""
    for path, op in list(found.items()):
        if op.primitive not in _LINEAR:
            skipped[path] = f"goes into `{op.primitive}`, where its scale is not the output's"
        elif where is None and op.primitive not in _uses.CONTRACTIONS:
            skipped[path] = f"goes into `{op.primitive}`: choose it with `where` if it is meant"
        if path in skipped:
            del found[path]
    if skipped and where is not None:
        raise ValueError(
            f"these leaves cannot be calibrated; choose others:\n{_listed(skipped.items())}"
        )
    if not found:
        raise ValueError(f"there is no weight to calibrate\n{_listed(skipped.items())}".rstrip())
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    for path, op in found.items():
        if op.uses > 1 or len(op.scans) > len(op.stack):
            times = f"{op.uses} operations" if op.uses > 1 else "every iteration of a scan"
            raise ValueError(
                f"{path!r} is shared by {times}: to rescale it for one would change the others; "
                "leave it out with `where`"
            )
        channels = {axis for axis in op.y_axes if axis is not None}
        rank = len(op.y_shape)
        rows = math.prod(n for i, n in enumerate(op.y_shape) if i - rank not in channels)
        if rows * devices < 2:
            raise ValueError(
                f"{path!r}: its output of shape {op.y_shape} has one row, the batch is too small "
                "for a deviation over examples"
            )


def _judge(report: Calibration, effects: Mapping[str, Array] | None) -> None:
    """Raise or warn, now that the numbers are there."""
    target, off = float(report.target), []
    for path, after in report.after.items():
        for name, std in zip(_slices(path, after.shape), np.ravel(after), strict=True):
            if std == 0:
                raise ValueError(f"the output of {name!r} is constant over the batch, or zero")
            if not np.isfinite(std):
                raise ValueError(f"the output of {name!r} is not finite")
            if abs(std / target - 1) > report.tolerance:
                off.append((name, f"has the deviation {std:.6g}, off by {std / target - 1:+.2%}"))
    if off:
        raise ValueError(
            f"after {int(report.passes)} passes these leaves miss the target {target:g} by more "
            f"than {report.tolerance:.2%} (is a leaf normalized before its operation?):\n"
            + _listed(off)
        )
    without = [path for path, effect in (effects or {}).items() if float(effect.max()) < 1e-4]
    if without:
        warnings.warn(
            "the scale of these leaves does not change what the model returns (a normalization "
            f"after them undoes it, or they have no effect yet): {', '.join(without)}",
            stacklevel=3,
        )


# -------------------------------------------------------------------------------------- LSUV


def lsuv(
    key: PRNGKeyArray,
    apply_fn: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    where: tree.Where = None,
    **options: Any,
) -> tuple[PyTree, Calibration]:
    """LSUV, layer-sequential unit variance: orthonormal weights, rescaled on a batch.

    1. Every chosen leaf is drawn as a matrix (inputs and taps, outputs) with orthonormal rows or
       columns, whichever are fewer; which of its dimensions are outputs is read off its operation.
       Biases beside it (``bias``, ``b``) are set to zero.
    2. `calibrate`: in order of execution, the output gets unit variance.

    The authors run as many as ten passes a layer, to a tolerance of 0.1; dividing once is exact.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path.
      **options: those of `calibrate`: ``target``, ``tolerance``, ``center``, ``warn``,
        ``axis_name``.

    Returns:
      The params, and a `Calibration`.

    Raises:
      TypeError: a legacy key.
      ValueError: as `calibrate`.

    Reference: D. Mishkin, J. Matas, "All you need is a good init", arXiv:1511.06422.

    >>> def apply_fn(params, x):
    ...     for kernel in params:
    ...         x = jax.nn.relu(x @ kernel)
    ...     return x
    >>> x = jax.random.normal(jax.random.key(1), (64, 16))
    >>> params, report = lsuv(jax.random.key(0), apply_fn, [jnp.zeros((16, 16))] * 3, x)
    >>> bool(0.4 < apply_fn(params, x).std() < 0.8), int(report.passes)
    (True, 2)
    """
    tree.check_key(key)
    found, skipped = operations(apply_fn, params, args, where)
    _check(found, skipped, where, options.get("axis_name"))
    leaves = tree.flatten(params)
    keys = tree.flatten(tree.keys(key, params, "jaxkit.init.lsuv"))
    new = {path: _orthonormal(keys[path], leaves[path], op) for path, op in found.items()}
    biases = {name for path in found if (name := _bias(path, leaves)) and name not in found}
    new |= {path: jnp.zeros_like(leaves[path]) for path in biases}
    start = tree.replace(params, new)
    return calibrate(apply_fn, start, *args, where=lambda path, _: path in found, **options)


def _orthonormal(key: PRNGKeyArray, leaf: Array, op: Operation) -> Array:
    """Draw a leaf with orthonormal inputs or outputs, for every layer of a stack by itself."""
    layers = len(op.stack)
    roles = list(zip(op.x_axes, op.y_axes, strict=True))
    batch = [i + layers for i, (x, y) in enumerate(roles) if x is not None and y is not None]
    outs = [i + layers for i, (x, y) in enumerate(roles) if x is None and y is not None]
    outs = outs or [i for i in [leaf.ndim - 1] if i not in batch]
    ins = [i for i in range(layers, leaf.ndim) if i not in batch and i not in outs]
    field = lambda key, taps, n, m, dtype: jax.nn.initializers.orthogonal()(key, (n, m), dtype)
    init = _layout.initializer(
        field, in_axis=ins, out_axis=outs, batch_axis=[*range(layers), *batch]
    )
    return init(key, leaf.shape, leaf.dtype)
