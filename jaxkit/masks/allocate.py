"""Allocations: how sparse each leaf is, given how sparse they are together.

An allocation is a tree like params of sparsities: the sum of (1 - s_l) n_l over the chosen leaves
is (1 - sparsity) times the sum of n_l, and leaves that are not chosen have 0. Hand it to `topk`. No
allocation is one too: a single number makes `topk` rank all chosen leaves together.

All but `uniform`, `pyramidal` and `ratios` pour the budget into the leaves like water: the density
of leaf l is min(1, eps r_l), with one eps that meets the budget. The methods differ in the ratios
r_l and in the leaves that have a density of their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import check_sparsity

__all__ = [
    "balanced",
    "er",
    "erk",
    "erk_plus",
    "pointwise",
    "pyramidal",
    "ratios",
    "uniform",
    "uniform_plus",
]

Shape = tuple[int, ...]


def _spread(
    params: PyTree, where: tree.Where, sparsities: Callable[[dict[str, Shape]], Any]
) -> PyTree:
    """Return the tree with the chosen leaves' sparsities and 0 at every other leaf."""
    shapes = {path: w.shape for path, w in tree.chosen(params, where).items() if w.size}
    values = dict(zip(shapes, sparsities(shapes), strict=True))
    return jax.tree.map(lambda path: values.get(path, 0.0), tree.paths(params))


def _sizes(shapes: dict[str, Shape]) -> np.ndarray:
    return np.array([math.prod(shape) for shape in shapes.values()], np.float64)


def _numbers(sparsity: Any) -> Any:
    """Return the library to compute in: exact float64 for a number, jax for a traced one."""
    return jnp if isinstance(sparsity, jax.Array) else np


def _sparsities(density: Any) -> list:
    if isinstance(density, jax.Array):
        return list(jnp.maximum(1 - density, 0))
    return [max(0.0, 1 - float(d)) for d in density]


def _fill(ratio: np.ndarray, sizes: np.ndarray, budget: Any) -> Any:
    """Return the densities min(1, eps r_l) with sum_l density_l n_l = budget.

    Leaves that would exceed density 1 are dense, the largest ratio first, and the others share.
    """
    if not len(sizes):
        return sizes
    xp = _numbers(budget)
    order = np.argsort(-ratio, kind="stable")
    n, raw = sizes[order], (ratio * sizes)[order]
    # with the first j leaves dense, the others share what is left of the budget
    dense = np.concatenate([[0.0], np.cumsum(n)[:-1]])
    eps = (budget - dense) / np.cumsum(raw[::-1])[::-1]
    feasible = eps * ratio[order] <= 1
    # rounding may leave none feasible where all are dense: then none shares
    first = xp.where(feasible.any(), xp.argmax(xp.asarray(feasible)), len(n))
    shared = xp.asarray(eps)[xp.minimum(first, len(n) - 1)] * ratio[order]
    density = xp.where(xp.arange(len(n)) < first, 1.0, shared)
    return density[np.argsort(order)]


def _poured(
    params: PyTree,
    sparsity: Any,
    where: tree.Where,
    ratio: Callable[[dict[str, Shape]], np.ndarray],
    fixed: Callable[[dict[str, Shape], Any], dict[str, Any]] = lambda shapes, sparsity: {},
) -> PyTree:
    """Pour the budget that the leaves of `fixed` density leave over into the others."""
    check_sparsity(sparsity)

    def sparsities(shapes):
        own, sizes = fixed(shapes, sparsity), dict(zip(shapes, _sizes(shapes), strict=True))
        total, taken = sum(sizes.values()), sum(own[path] * sizes[path] for path in own)
        budget = (1 - sparsity) * total - taken
        if isinstance(budget, float) and budget < -1e-9 * total:
            raise ValueError(
                f"sparsity {sparsity} cannot be met: what stays of {sorted(own)} alone is more, "
                f"and the largest feasible sparsity is {1 - taken / total:.6g}"
            )
        others = {path: shape for path, shape in shapes.items() if path not in own}
        xp = _numbers(sparsity)
        rest = _fill(ratio(others), _sizes(others), xp.maximum(budget, 0.0))
        shared = dict(zip(others, rest, strict=True))
        return _sparsities(xp.asarray([own.get(path, shared.get(path)) for path in shapes]))

    return _spread(params, where, sparsities)


def _kernel_ratio(shapes: dict[str, Shape]) -> np.ndarray:
    return np.array([sum(shape) for shape in shapes.values()]) / _sizes(shapes)


def _constant_ratio(shapes: dict[str, Shape]) -> np.ndarray:
    return np.ones(len(shapes))


def _path(shapes: dict[str, Shape], where: str, what: str) -> str:
    """Return the path of the one leaf that a glob chooses."""
    found = list(tree.chosen({p: np.zeros(0, np.float32) for p in shapes}, where))
    if len(found) != 1:
        raise ValueError(f"{what}={where!r} is due to choose one leaf to sparsify, not {found}")
    return found[0]


def uniform(params: PyTree, sparsity: float | Array, *, where: tree.Where = None) -> PyTree:
    """Give every chosen leaf the same sparsity: s_l = sparsity.

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number or a traced scalar.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), or a `where` that matches nothing.

    >>> uniform({"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)}, 0.9)
    {'bias': 0.0, 'kernel': 0.9}
    """
    check_sparsity(sparsity)
    return _spread(params, where, lambda shapes: [sparsity] * len(shapes))


def uniform_plus(
    params: PyTree,
    sparsity: float | Array,
    *,
    first: str,
    last: str,
    minimum: float = 0.2,
    where: tree.Where = None,
) -> PyTree:
    """Uniform, but the first leaf is dense and the last keeps 20 % or more.

    The others share what the first leaves of the budget; where their share is below `minimum`, the
    last leaf gets `minimum` and the others what is left. (The authors' code leaves the first leaf
    out of the budget and so misses it; here the budget is exact.)

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      first, last: globs over the path, one leaf each: the first convolution, the classifier.
      minimum: the least density of the last leaf.
      where: the leaves to sparsify, `first` and `last` among them; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1) or beyond what `first` and `last` allow (with the largest
        that can be met), a minimum outside [0, 1], or a glob that does not choose one leaf.

    Reference: S. Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most
    Naive Baseline for Sparse Training", arXiv:2202.02643.

    >>> params = {"w0": jnp.ones((1, 10)), "w1": jnp.ones((10, 10)), "w2": jnp.ones((10, 1))}
    >>> {k: round(s, 6) for k, s in uniform_plus(params, 0.75, first="w0", last="w2").items()}
    {'w0': 0.0, 'w1': 0.82, 'w2': 0.8}
    """

    if violates(lambda m: (m >= 0) & (m <= 1), minimum):
        raise ValueError(f"minimum is {minimum}, and a density in [0, 1] is due")

    def fixed(shapes, sparsity):
        head, tail = _path(shapes, first, "first"), _path(shapes, last, "last")
        if head == tail:
            raise ValueError(f"first and last are the same leaf, {head!r}")
        total, dense = sum(map(math.prod, shapes.values())), math.prod(shapes[head])
        share = ((1 - sparsity) * total - dense) / (total - dense)
        return {head: 1.0, tail: _numbers(sparsity).maximum(share, minimum)}

    return _poured(params, sparsity, where, _constant_ratio, fixed)


def er(
    params: PyTree,
    sparsity: float | Array,
    *,
    axes: tuple[int, int] = (-2, -1),
    where: tree.Where = None,
) -> PyTree:
    """Erdős-Rényi: 1 - s_l = min(1, eps (in + out) / (in out)), the size of the kernel left out.

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      axes: the axes of in and out: the last two of JAX's kernels ((0, 1) of PyTorch's OIHW).
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), a `where` that matches nothing, or a chosen leaf without
        these axes.

    Reference: D. C. Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive
    Sparse Connectivity inspired by Network Science", arXiv:1707.04780.

    >>> params = {"conv": jnp.ones((3, 3, 4, 4)), "out": jnp.ones((4, 4))}
    >>> {path: round(s, 6) for path, s in er(params, 0.9).items()}
    {'conv': 0.9, 'out': 0.9}
    """

    def pair(path: str, shape: Shape) -> Shape:
        if any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(f"{path!r} has shape {shape}, without the axes {tuple(axes)} of er")
        return shape[axes[0]], shape[axes[1]]

    ratio = lambda shapes: _kernel_ratio({path: pair(path, s) for path, s in shapes.items()})
    return _poured(params, sparsity, where, ratio)


def erk(params: PyTree, sparsity: float | Array, *, where: tree.Where = None) -> PyTree:
    """Erdős-Rényi-Kernel: thin leaves stay denser. 1 - s_l = min(1, eps * sum(shape_l) / n_l).

    eps solves sum_l (1 - s_l) n_l = (1 - sparsity) sum_l n_l: leaves that would exceed density 1
    are dense, the largest ratio first, and the others share the rest.

    Args:
      params: any tree (only shapes are read; every dimension counts, kernel sizes too).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), or a `where` that matches nothing.

    Reference: U. Evci, T. Gale, J. Menick, P. S. Castro, E. Elsen, "Rigging the Lottery: Making
    All Tickets Winners", arXiv:1911.11134, after the Erdős-Rényi graphs of D. C. Mocanu et al.,
    "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
    Network Science", arXiv:1707.04780.

    >>> params = {"w0": jnp.ones((784, 300)), "w1": jnp.ones((300, 100)), "w2": jnp.ones((100, 10))}
    >>> {path: round(s, 6) for path, s in erk(params, 0.9).items()}
    {'w0': 0.920432, 'w1': 0.769811, 'w2': 0.0}
    """
    return _poured(params, sparsity, where, _kernel_ratio)


def erk_plus(
    params: PyTree,
    sparsity: float | Array,
    *,
    last: str,
    density: float = 1.0,
    where: tree.Where = None,
) -> PyTree:
    """ERK, but the last leaf has a density of its own: the classifier stays dense.

    Args:
      params: any tree (only shapes are read; every dimension counts, kernel sizes too).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      last: a glob over the path that chooses one leaf, the classifier.
      density: the kept fraction of the last leaf.
      where: the leaves to sparsify, `last` among them; default: the weights.

    Raises:
      ValueError: density outside (0, 1], sparsity outside [0, 1) or beyond what `last` allows
        (with the largest that can be met), or a glob that does not choose one leaf.

    Reference: S. Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most
    Naive Baseline for Sparse Training", arXiv:2202.02643.

    >>> params = {"w0": jnp.ones((784, 300)), "w1": jnp.ones((300, 100)), "w2": jnp.ones((100, 10))}
    >>> {k: round(s, 6) for k, s in erk_plus(params, 0.9, last="w2", density=0.5).items()}
    {'w0': 0.918879, 'w1': 0.765319, 'w2': 0.5}
    """
    if violates(lambda d: (d > 0) & (d <= 1), density):
        raise ValueError(f"density is {density}, and a kept fraction in (0, 1] is due")
    fixed = lambda shapes, sparsity: {_path(shapes, last, "last"): density}
    return _poured(params, sparsity, where, _kernel_ratio, fixed)


def balanced(params: PyTree, sparsity: float | Array, *, where: tree.Where = None) -> PyTree:
    """Give every leaf the same number of survivors: 1 - s_l = min(1, c / n_l).

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number (then exact, in float64) or a traced scalar.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), or a `where` that matches nothing.

    Reference: A. Gadhikar, S. Mukherjee, R. Burkholz, "Why Random Pruning Is All We Need to Start
    Sparse", arXiv:2210.02412.

    >>> params = {"w0": jnp.ones((784, 300)), "w1": jnp.ones((300, 100)), "w2": jnp.ones((100, 10))}
    >>> {path: round(s, 6) for path, s in balanced(params, 0.9).items()}
    {'w0': 0.945536, 'w1': 0.573, 'w2': 0.0}
    """
    return _poured(params, sparsity, where, lambda shapes: 1 / _sizes(shapes))


def pyramidal(
    params: PyTree,
    sparsity: float | Array,
    *,
    order: Sequence[str] | None = None,
    where: tree.Where = None,
) -> PyTree:
    """Let the density fall from layer to layer: 1 - s_l = r^l for l = 1, 2, ... from the input.

    r is the one root in (0, 1] of sum_l n_l r^l = (1 - sparsity) sum_l n_l.

    Args:
      params: any tree (only shapes are read).
      sparsity: in [0, 1); a number (then in float64) or a traced scalar.
      order: the paths of the chosen leaves from the input to the output; default: leaf order, which
        in dicts is that of the names. ``list(trace.taps(apply_fn)(params, x)[1])`` has them.
      where: the leaves to sparsify; default: the weights.

    Raises:
      ValueError: sparsity outside [0, 1), an order of other leaves, or a leaf that keeps no entry
        since r^l is too small, with its path.

    Reference: A. Gadhikar, S. Mukherjee, R. Burkholz, "Why Random Pruning Is All We Need to Start
    Sparse", arXiv:2210.02412.

    >>> params = {"w0": jnp.ones((784, 300)), "w1": jnp.ones((300, 100)), "w2": jnp.ones((100, 10))}
    >>> {path: round(s, 6) for path, s in pyramidal(params, 0.9).items()}
    {'w0': 0.888414, 'w1': 0.987549, 'w2': 0.998611}
    """
    check_sparsity(sparsity)

    def sparsities(shapes):
        paths = list(shapes) if order is None else list(order)
        if sorted(paths) != sorted(shapes):
            raise ValueError(f"order is {paths}, and an order of {list(shapes)} is due")
        sizes = _sizes(shapes)
        level = np.array([1 + paths.index(path) for path in shapes], np.float64)
        budget = (1 - sparsity) * sizes.sum()

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            above = (sizes * middle**level).sum() > budget
            where = _numbers(above).where
            return where(above, low, middle), where(above, middle, high)

        if isinstance(sparsity, jax.Array):
            ends = (jnp.zeros_like(budget), jnp.ones_like(budget))
            root = jax.lax.fori_loop(0, 40, halve, ends)[1]
        else:
            ends = (0.0, 1.0)
            for step in range(200):
                ends = halve(step, ends)
            root = ends[1]
        density = root**level
        if not isinstance(density, jax.Array):
            for path, d, n in zip(shapes, density, sizes, strict=True):
                if round(d * n) == 0:
                    raise ValueError(
                        f"{path!r} would keep no entry: its density is {d:.3g} = {root:.3g}^"
                        f"{1 + paths.index(path)} of {n:.0f} entries"
                    )
        return _sparsities(density)

    return _spread(params, where, sparsities)


def ratios(mask: PyTree[Bool[Array, "..."]]) -> PyTree:
    """Return the sparsity of every leaf of a mask, as an allocation for another.

    So a random mask has the layer ratios of SNIP's:
    ``topk(random(key, params), sparsity=ratios(topk(snip(...), sparsity=0.9)))``.

    Args:
      mask: a tree of bools; a leaf that is all True gives 0, and so does one of size 0. A leaf that
        is all False gives 1, of which no mask is drawn: `connect` such a mask first.

    Returns:
      A tree of floats, or of float32 scalars under jit.

    >>> ratios({"w": jnp.array([[True, False, False, False]]), "b": jnp.ones(2, bool)})
    {'b': 0.0, 'w': 0.75}
    """

    def ratio(m):
        if not tree.is_array(m) or m.size == 0:
            return 0.0
        zeros = jnp.sum(~m)
        return float(zeros) / m.size if tree.concrete(zeros) else zeros / m.size

    return jax.tree.map(ratio, mask)


def pointwise(path: str, leaf: Any) -> bool:
    """Choose the 1x1 convolutions, as a `where`: kernels (1, ..., 1, in, out) of 3 or more axes.

    Full and depthwise convolutions and dense layers stay out; so does what is no weight by name.
    For Fast Sparse ConvNets narrow it by the names of the squeeze-and-excite blocks, if there are.

    Reference: E. Elsen, M. Dukhan, T. Gale, K. Simonyan, "Fast Sparse ConvNets", arXiv:1911.09723.

    >>> params = {"stem": jnp.ones((3, 3, 3, 8)), "pw": jnp.ones((1, 1, 8, 16))}
    >>> uniform(params, 0.9, where=pointwise)
    {'pw': 0.9, 'stem': 0.0}
    """
    return (
        tree.is_weight(path, leaf) and len(leaf.shape) >= 3 and all(n == 1 for n in leaf.shape[:-2])
    )
