"""Sparse iso-FLOP transformations: a dense layer as a larger sparse one of the same cost.

A layer is its kernel's shape, ``(in, out)`` or ``(*taps, in, out)``. `parallel`, `factorized` and
`doped` return an `IsoFlop`: the shapes of the kernels that replace it, by name, the sparsity of
each, and the function of the input. `wide` returns the width for the whole model. Nothing else is
needed to train one::

    layer = masks.factorized((3, 3, 64, 64), sparsity=0.9)
    pairs = zip(layer.shapes.items(), jax.random.split(key, len(layer.shapes)))
    kernels = {name: init(own, shape) for (name, shape), own in pairs}
    mask = masks.topk(masks.random(key, kernels), sparsity=layer.sparsity)
    y = layer.apply(masks.apply(kernels, mask), x, conv)

(each kernel from a key of its own: branches from one key are one kernel) and
``conv(x, kernel)`` the model's own operation, at the layer's stride: the second kernel of a
factorized or doped layer is 1x1, and is applied at stride 1.

Reference: V. Thangarasa, S. Saxena, A. Gupta, S. Lie, "Sparse Iso-FLOP Transformations for
Maximizing Training Efficiency", arXiv:2303.11525.
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit._rank import decimal
from jaxkit.masks.select import check_sparsity

__all__ = ["IsoFlop", "doped", "factorized", "folded_decay", "parallel", "wide"]

Linear = Callable[[Array, Array], Array]


class IsoFlop(NamedTuple):
    """The kernels that replace one kernel.

    Attributes:
      shapes: by name, the shape of each kernel.
      sparsity: by name, the sparsity of each (0: dense), for `topk`.
      apply: ``apply(kernels, x, linear, ...)``, with ``linear(x, kernel)`` the user's operation.
      flops: the multiply-adds of the kept entries, relative to the dense layer; 1 up to rounding.
    """

    shapes: dict[str, tuple[int, ...]]
    sparsity: dict[str, float]
    apply: Callable[..., Array]
    flops: float


def _exact(sparsity: float) -> Fraction:
    check_sparsity(sparsity)
    return decimal(sparsity)


def _sizes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the fan-in and the outputs of a kernel."""
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"a kernel (*taps, in, out) is due, and the shape {shape} came")
    return math.prod(shape[:-1]), shape[-1]


def _member(shape, shapes, sparsity, apply) -> IsoFlop:
    kept = sum(round((1 - _exact(sparsity[name])) * math.prod(s)) for name, s in shapes.items())
    return IsoFlop(shapes, sparsity, apply, kept / math.prod(shape))


def wide(width: int, sparsity: float) -> int:
    """Return the width at which a model of this sparsity costs what a dense one costs at `width`.

    floor(width sqrt(1 / (1 - sparsity))): kernels between two wide layers have as many times more
    entries as they are sparser. Widen the whole model, stem and head too, and sparsify the kernels
    between. (The authors round 1 / (1 - sparsity), which costs 0.8 of the dense model at 0.6; where
    it is whole the widths are theirs.)

    Raises:
      ValueError: sparsity outside [0, 1).

    >>> [wide(64, s) for s in (0, 0.5, 0.75, 0.9)]
    [64, 90, 128, 202]
    """
    return math.isqrt(round(width**2 / (1 - _exact(sparsity))))


def parallel(shape: tuple[int, ...], sparsity: float) -> IsoFlop:
    """Replace a layer by the sum of b = 1 / (1 - sparsity) sparse ones.

    y = act(sum_i norm_i(linear(x, w_i))). ``apply(kernels, x, linear, norms=None)`` returns the
    sum; `norms` holds a function by name of the branch (their BatchNorms). What follows, the ReLU,
    is the model's.

    Args:
      shape: of the kernel, (*taps, in, out).
      sparsity: of each branch; 1 / (1 - sparsity) is due to be a whole number.

    Raises:
      ValueError: sparsity outside [0, 1), or between whole numbers of branches, with the nearest
        that will do.

    >>> parallel((64, 64), 0.75).shapes
    {'branch_0': (64, 64), 'branch_1': (64, 64), 'branch_2': (64, 64), 'branch_3': (64, 64)}
    """
    _sizes(shape)
    exact = 1 / (1 - _exact(sparsity))
    branches = round(exact)
    if abs(exact - branches) > 1e-6 * branches:
        whole = [1 - 1 / b for b in (math.floor(exact), math.ceil(exact))]
        raise ValueError(
            f"sparsity {sparsity} makes {float(exact):.4g} branches; the nearest that makes a "
            f"whole number is {min(whole, key=lambda s: abs(s - sparsity)):.6g}"
        )

    def apply(
        kernels: Mapping[str, Array],
        x: Array,
        linear: Linear,
        norms: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> Array:
        own = {} if norms is None else norms
        each = (own.get(name, lambda y: y)(linear(x, w)) for name, w in kernels.items())
        return functools.reduce(operator.add, each)

    names = [f"branch_{i}" for i in range(branches)]
    return _member(shape, dict.fromkeys(names, shape), dict.fromkeys(names, sparsity), apply)


def factorized(shape: tuple[int, ...], sparsity: float) -> IsoFlop:
    """Replace a layer by two sparse ones with a nonlinearity between.

    y = linear(act(linear(x, u)), v): u (*taps, in, e), v (1, ..., 1, e, out), with e = ceil(k out /
    ((1 - sparsity) (k + out))) for the fan-in k = taps * in. ``apply(kernels, x, linear, inner=
    jax.nn.relu, pointwise=linear)``; `inner` is what comes between (normalization and activation;
    without, the layer is only of low rank), `pointwise` applies v. The quotient is exact: floats,
    as in the authors' code, make 577 of the 576 below.

    Raises:
      ValueError: sparsity outside [0, 1), or no shape of a kernel.

    >>> layer = factorized((3, 3, 64, 64), 0.9)
    >>> layer.shapes, round(layer.flops, 3)
    ({'u': (3, 3, 64, 576), 'v': (1, 1, 576, 64)}, 1.0)
    """
    fan_in, out = _sizes(shape)
    inside = math.ceil(fan_in * out / ((1 - _exact(sparsity)) * (fan_in + out)))

    def apply(
        kernels: Mapping[str, Array],
        x: Array,
        linear: Linear,
        inner: Callable[[Array], Array] = jax.nn.relu,
        pointwise: Linear | None = None,
    ) -> Array:
        return (pointwise or linear)(inner(linear(x, kernels["u"])), kernels["v"])

    shapes = {"u": (*shape[:-1], inside), "v": (*(1 for _ in shape[:-2]), inside, out)}
    return _member(shape, shapes, dict.fromkeys(shapes, sparsity), apply)


def doped(shape: tuple[int, ...], sparsity: float) -> IsoFlop:
    """Replace a layer by a sparse one plus a dense one of low rank.

    y = linear(x, w) + linear(linear(x, u), v): w sparse, u (*taps, in, r) and v (1, ..., 1, r, out)
    dense, r = floor(sparsity k out / (k + out)) for the fan-in k = taps * in; without u and v where
    r = 0. ``apply(kernels, x, linear, pointwise=linear)``; `pointwise` applies v.

    Raises:
      ValueError: sparsity outside [0, 1), or no shape of a kernel.

    >>> layer = doped((3, 3, 64, 64), 0.9)
    >>> layer.shapes["u"], layer.sparsity, round(layer.flops, 3)
    ((3, 3, 64, 51), {'w': 0.9, 'u': 0.0, 'v': 0.0}, 0.985)
    """
    fan_in, out = _sizes(shape)
    rank = math.floor(_exact(sparsity) * fan_in * out / (fan_in + out))

    def apply(
        kernels: Mapping[str, Array], x: Array, linear: Linear, pointwise: Linear | None = None
    ) -> Array:
        y = linear(x, kernels["w"])
        if "u" in kernels:
            y = y + (pointwise or linear)(linear(x, kernels["u"]), kernels["v"])
        return y

    shapes: dict[str, Any] = {"w": shape}
    sparsities = {"w": sparsity}
    if rank:
        shapes |= {"u": (*shape[:-1], rank), "v": (*(1 for _ in shape[:-2]), rank, out)}
        sparsities |= {"u": 0.0, "v": 0.0}
    return _member(shape, shapes, sparsities, apply)


def folded_decay(
    u: Float[Array, "*taps inputs rank"], v: Float[Array, "*ones rank outputs"]
) -> Float[Array, ""]:
    """Return half the squared norm of a product of kernels: 1/2 |U V|^2, never forming it.

    Weight decay of what a linear factorization (the low-rank part of `doped`, `factorized` without
    an inner nonlinearity) computes, rather than of its factors: add ``decay * folded_decay(u, v)``
    to the loss. It is 1/2 <U'U, V V'>, two Gram matrices of the rank; the gradient with respect to
    U is U V V'.

    Raises:
      ValueError: kernels that do not multiply, or a v of more than one tap.

    >>> float(folded_decay(jnp.ones((3, 1)), jnp.full((1, 2), 2.0)))
    12.0
    """
    if u.shape[-1] != v.shape[-2] or math.prod(v.shape[:-2]) != 1:
        raise ValueError(
            f"(*taps, in, r) and (1, ..., 1, r, out) are due, and {u.shape} and {v.shape} came"
        )
    a, b = u.reshape(-1, u.shape[-1]), v.reshape(v.shape[-2:])
    return jnp.sum((a.T @ a) * (b @ b.T)) / 2
