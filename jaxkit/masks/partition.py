"""Piecewise affine networks: how they partition their input, and when that has settled.

A network of ReLUs is affine on each cell of a partition of its input space; the signs of the
pre-activations tell the cell. When the partition stops changing, training has found its ticket, and
pruning may begin.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Bool, Float, PyTree, UInt32

from jaxkit._known import violates
from jaxkit.trace import _jaxpr

__all__ = [
    "Partition",
    "canvas",
    "early_bird",
    "partition",
    "partition_distance",
]


class Partition(NamedTuple):
    """The cells in which inputs lie: the signs of every activation layer, and a sum of the inputs.

    Attributes:
      signs: an array of the shape of the layer, in the order of execution: True above the kink.
      canvas: a checksum of the inputs, for partitions compare on equal inputs alone.
    """

    signs: tuple[Bool[Array, "..."], ...]
    canvas: UInt32[Array, ""]


_SMOOTH = frozenset(
    ["tanh", "logistic", "erf", "erfc", "erf_inv", "exp", "exp2", "expm1", "log", "log1p", "sin"]
    + ["cos", "tan", "sinh", "cosh", "asinh", "atan2", "sqrt", "rsqrt", "cbrt", "pow"]
    + ["integer_pow", "square"]
)
_BILINEAR = frozenset(["mul", "dot_general", "conv_general_dilated"])
_KINKS = frozenset(["max", "min", "abs", "sign", "gt", "ge", "lt", "le", "clamp"])
_PARAMS, _DATA = 1, 2


def partition(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> Partition:
    """Return the sign pattern of every activation: x > c for max(x, c), whatever the front end.

    The kinks are found in the jaxpr, inside jit, remat and custom derivatives: max, min and clamp
    with a constant or between two activations (maxout), abs, sign, and comparisons (leaky ReLU),
    of values that depend on params and inputs. Maxima over positions (pooling) are not counted.

    Args:
      apply_fn: ``apply_fn(params, *args)``, as the network predicts: a BatchNorm with running
        statistics is affine, one in training mode is not, and is refused.
      params: a tree of arrays.
      *args: the inputs: any fixed batch, or a `canvas`.

    Raises:
      ValueError: what is not piecewise affine (the operation and its source line): a smooth
        activation, a normalization by statistics of the activations, a product of two of them; a
        kink inside a scan, cond or while; no kink at all.

    Reference: H. You, R. Balestriero, Z. Lu, Y. Kou, H. Shi, S. Zhang, S. Wu, Y. Lin, R. Baraniuk,
    "Max-Affine Spline Insights Into Deep Network Pruning", arXiv:2101.02338.

    >>> net = lambda params, x: jax.nn.relu(x - params["b"])
    >>> partition(net, {"b": jnp.array([0.0, 1.0])}, jnp.array([[0.5]])).signs[0].tolist()
    [[True, False]]
    """
    traced = _jaxpr.trace(apply_fn, params, args)
    n = len(traced.paths)
    tags = [_PARAMS] * n + [_DATA] * (len(traced.values) - n)
    _, signs = _walk(traced.jaxpr, traced.values, tags)
    if not signs:
        raise ValueError("no activation with a kink depends on params and inputs: no partition")
    return Partition(tuple(signs), _checksum(traced.values[n:]))


def _checksum(values: Sequence[Array]) -> UInt32[Array, ""]:
    total = jnp.uint32(0)
    for x in values:
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        word = jax.lax.bitcast_convert_type(jnp.ravel(x).astype(jnp.float32), jnp.uint32)
        place = 2 * jnp.arange(word.size, dtype=jnp.uint32) + 1
        total = total * np.uint32(31) + jnp.sum(word * place, dtype=jnp.uint32)
    return total


Cell = tuple[Any, int]  # a value, and whether it depends on params, on inputs, or on both


def _walk(
    jaxpr: core.ClosedJaxpr, values: Sequence[Any], tags: Sequence[int]
) -> tuple[list[Cell], list[Array]]:
    """Evaluate a jaxpr; return its outputs and the signs found."""
    read = lambda v: (v.val, 0) if _jaxpr.is_literal(v) else env[v]
    env: dict[Any, Cell] = {}
    env |= zip(jaxpr.jaxpr.constvars, ((c, 0) for c in jaxpr.consts), strict=True)
    env |= zip(jaxpr.jaxpr.invars, zip(values, tags, strict=True), strict=True)
    signs: list[Array] = []
    for eqn in jaxpr.jaxpr.eqns:
        inputs, marks = zip(*(read(v) for v in eqn.invars), strict=True) if eqn.invars else ((), ())
        mark = int(np.bitwise_or.reduce(np.array(marks, int))) if marks else 0
        if mark == _PARAMS | _DATA and eqn.primitive.name in _jaxpr.CALLS:
            cells, found = _walk(_jaxpr.called(eqn), inputs, marks)
            signs += found
        else:
            if mark == _PARAMS | _DATA:
                _check(eqn, marks)
            out = _jaxpr.evaluate(eqn, inputs)
            cells = [(x, mark) for x in out]
            if mark == _PARAMS | _DATA and eqn.primitive.name in _KINKS:
                signs += _signs(eqn, inputs, marks, out[0])
        env |= zip(eqn.outvars, cells, strict=True)
    return [read(v) for v in jaxpr.jaxpr.outvars], signs


def _signs(
    eqn: core.JaxprEqn, inputs: Sequence[Any], marks: Sequence[int], out: Any
) -> list[Array]:
    name = eqn.primitive.name
    if name in ("gt", "ge", "lt", "le"):
        return [out] if jnp.issubdtype(jnp.result_type(inputs[0]), jnp.inexact) else []
    if name in ("abs", "sign"):
        return [inputs[0] > 0]
    if name == "clamp":
        low, x, high = inputs
        return [x > low, x < high]
    # the activation goes first, also in max(0, x)
    x, y = inputs if marks[0] == _PARAMS | _DATA else inputs[::-1]
    return [x > y if name == "max" else x < y]


def _check(eqn: core.JaxprEqn, marks: Sequence[int]) -> None:
    name, both = eqn.primitive.name, _PARAMS | _DATA
    product = name in _BILINEAR and list(marks).count(both) > 1
    if name in _SMOOTH or product or (name == "div" and marks[1] == both):
        raise ValueError(
            f"`{name}` of activations at {_jaxpr.source(eqn)} is not piecewise affine: "
            "the partition is not defined"
        )
    inside = set(_inside(eqn))
    if inside & (_SMOOTH | _KINKS):
        raise ValueError(
            f"the activations inside `{name}` at {_jaxpr.source(eqn)} cannot be followed; unroll it"
        )


def _inside(eqn: core.JaxprEqn) -> Iterator[str]:
    """Yield the names of the primitives inside an equation's functions."""
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
        if _is_jaxpr(inner):
            for each in _jaxpr.closed(inner).jaxpr.eqns:
                yield each.primitive.name
                yield from _inside(each)


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)


def partition_distance(a: Partition, b: Partition) -> Float[Array, " layers"]:
    """Return, per layer, the share of signs that differ; its mean is the distance of two networks.

    Args:
      a: the partition of a network, or of an earlier state of it.
      b: that of another, on the same inputs.

    Raises:
      ValueError: partitions of other layers, or (eagerly) of other inputs.

    Reference: as `partition`.

    >>> net = lambda b, x: jax.nn.relu(x - b)
    >>> x = jnp.array([[0.1], [0.3], [0.5], [0.7]])
    >>> partition_distance(partition(net, jnp.array(0.2), x), partition(net, jnp.array(0.6), x))
    Array([0.5], dtype=float32)
    """
    shapes = [[s.shape for s in p.signs] for p in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the partitions are of other layers: {shapes[0]} and {shapes[1]}")
    if violates(lambda x, y: x == y, a.canvas, b.canvas):
        raise ValueError("the partitions are of other inputs: compare on one fixed batch")
    return jnp.stack(
        [jnp.mean(s != t, dtype=jnp.float32) for s, t in zip(a.signs, b.signs, strict=True)]
    )


def early_bird(
    recent: Sequence[Partition],
    now: Partition,
    *,
    threshold: float | Array = 0.16,
    window: int = 3,
) -> Bool[Array, ""]:
    """Tell whether the partition has settled, so that training may stop and pruning begin.

    True if the distances from `now` to each of the last `window` partitions, averaged over layers,
    are all below the threshold; never before there are that many.

    Args:
      recent: the partitions of earlier epochs, the latest last, on the same inputs.
      now: the partition of this epoch.
      threshold: of the largest distance.
      window: how many epochs to look back.

    Raises:
      ValueError: as `partition_distance`.

    Reference: as `partition`.

    >>> net = lambda b, x: jax.nn.relu(x - b)
    >>> x = jnp.linspace(0, 1, 10)
    >>> epochs = [partition(net, jnp.array(b), x) for b in (0.5, 0.5, 0.5, 0.6)]
    >>> [bool(early_bird(epochs[:e], epochs[e])) for e in range(4)]
    [False, False, False, True]
    """
    if len(recent) < window:
        return jnp.array(False)
    far = [partition_distance(old, now).mean() for old in recent[-window:]]
    return jnp.max(jnp.stack(far)) < threshold


def canvas(
    x0: Float[Array, "..."], x1: Float[Array, "..."], n: int = 100
) -> Float[Array, "n2 ..."]:
    """Return the n x n inputs alpha x0 + beta x1, alpha and beta on a grid of [0, 1].

    >>> canvas(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 2).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    grid = jnp.linspace(0, 1, n)
    plane = jax.vmap(lambda a: jax.vmap(lambda b: a * x0 + b * x1)(grid))(grid)
    return plane.reshape(n * n, *jnp.shape(x0))
