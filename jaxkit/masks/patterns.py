"""Other ways to select: by chance, by a threshold, and in patterns (blocks, n of m)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.score import gumbel
from jaxkit.masks.select import Mask, check_sparsity, topk

__all__ = ["bernoulli", "blocks", "n_of_m", "sample", "threshold"]


def _mask(fn: Any, params: PyTree, number: Any, where: tree.Where) -> Mask:
    """Return ``fn(path, leaf, number)`` at the chosen leaves and True elsewhere.

    One number stands for all of them, and then `where` is the weights unless told; a tree of
    numbers has one a leaf, and then every float leaf is chosen.
    """
    single = jax.tree.structure(number) == jax.tree.structure(0)
    if single:
        number = jax.tree.map(lambda _: number, params)
    elif jax.tree.structure(number) != jax.tree.structure(params):
        tree.check_like(params, number, "tree of numbers")
    elif where is None:
        where = tree.every(params)
    chosen = tree.select(params, where)
    exempt = tree.topk(params, 0, where=jax.tree.map(lambda _: False, params))  # all True
    return jax.tree.map(
        lambda bit, path, x, n, m: fn(path, x, n) if bit else m,
        chosen,
        tree.paths(params),
        params,
        number,
        exempt,
    )


def bernoulli(
    key: PRNGKeyArray,
    params: PyTree,
    sparsity: float | Array | PyTree,
    *,
    where: tree.Where = None,
) -> Mask:
    """Keep every entry with probability 1 - sparsity, each for itself.

    The count is right on average, n (1 - sparsity) with variance n sparsity (1 - sparsity), and not
    exactly; ``topk(random(key, params), sparsity=...)`` draws exact counts.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path alone.
      params: any tree (only shapes are read).
      sparsity: in [0, 1); one number for all chosen leaves or a tree of them (`uniform`, `erk`);
        may be traced.
      where: the leaves to mask. Default: the weights if there is one number, and every leaf if
        there is a tree of them.

    Raises:
      ValueError: sparsity outside [0, 1), or a tree that does not fit.
      TypeError: a legacy uint32 key.

    >>> bernoulli(jax.random.key(0), {"kernel": jnp.ones((2, 3))}, 0.0)["kernel"].tolist()
    [[True, True, True], [True, True, True]]
    """
    check_sparsity(sparsity)
    keys = tree.flatten(tree.keys(key, params, "jaxkit.masks.bernoulli"))

    def draw(path, w, s):
        return ~jax.random.bernoulli(keys[path], jnp.asarray(s, jnp.float32), w.shape)

    return _mask(draw, params, sparsity, where)


def threshold(scores: PyTree, value: float | Array | PyTree, *, where: tree.Where = None) -> Mask:
    """Keep the entries whose score is at least a value: m = (s >= value).

    ``threshold(scores, tree.quantile(scores, 0.9))`` is the percentile rule of many codes; where
    scores tie it keeps more than `topk`.

    Args:
      scores: a tree of floats; NaN is not kept.
      value: one number for all chosen leaves, or a tree of them; may be traced.
      where: the leaves to mask. Default: the weights if there is one number, and every leaf if
        there is a tree of them.

    Raises:
      ValueError: a tree that does not fit, or a `where` that matches nothing.

    >>> threshold({"kernel": jnp.array([[0.1, 0.5, 0.9]])}, 0.5)["kernel"].tolist()
    [[False, True, True]]
    """
    return _mask(lambda path, s, t: s >= t, scores, value, where)


def sample(
    key: PRNGKeyArray,
    scores: PyTree,
    *,
    sparsity: float | Array | PyTree | None = None,
    keep: int | Array | PyTree | None = None,
    temperature: float | Array = 1.0,
    where: tree.Where = None,
    within: Mask | None = None,
) -> Mask:
    """Draw the mask without replacement, each entry in proportion to its score: counts are exact.

    ``topk(gumbel(key, scores, temperature), ...)``. With equal scores it is a uniformly random
    mask, and at temperature 0 the top k. For a score that is taken in rounds, draw in the last one:
    ``sample(key, synflow(apply_fn, apply(params, mask), x), sparsity=0.99, within=mask)`` with the
    mask of a lower sparsity.

    Args:
      key: a typed key.
      scores: non-negative floats, any data-free score for one; an entry with score 0 is never kept.
      sparsity, keep, where, within: as for `topk`.
      temperature: as for `gumbel`.

    Raises:
      ValueError: negative scores, or fewer positive ones than are asked for (eagerly; under jit,
        entries with score 0 make up for them); and what `topk` raises.
      TypeError: a legacy uint32 key.

    Reference: N. Bar, R. Giryes, "Pruning at Initialization -- A Sketching Perspective",
    arXiv:2305.17559, whose linear model is `sketch`.

    >>> scores = {"kernel": jnp.array([[3.0, 0.0, 1.0]])}
    >>> sample(jax.random.key(0), scores, keep=2)["kernel"].tolist()
    [[True, False, True]]
    """
    given = sparsity if keep is None else keep
    single = jax.tree.structure(given) == jax.tree.structure(0)
    noisy = gumbel(key, scores, temperature)
    mask = topk(noisy, sparsity=sparsity, keep=keep, where=where, within=within)
    if tree.concrete(noisy, mask):
        where = tree.every(scores) if where is None and not single else where
        drawn, positive = {}, {}
        picked = tree.chosen(scores, where)
        rest = zip(tree.flatten(scores), jax.tree.leaves(mask), strict=True)
        for path, m in rest:
            if path in picked:
                group = "all chosen leaves" if single else repr(path)
                drawn[group] = drawn.get(group, 0) + int(m.sum())
                positive[group] = positive.get(group, 0) + int((m & (picked[path] > 0)).sum())
        for group, n in drawn.items():
            if positive[group] < n:
                raise ValueError(
                    f"{n} entries of {group} are to be drawn, and {positive[group]} scores are "
                    "positive: those of score 0 cannot be drawn"
                )
    return mask


# --------------------------------------------------------------------------------------- patterns


def _blocked(path: str, shape: tuple[int, ...], block: Mapping[int, int]) -> list[int]:
    """Return the block's size along every dimension, 1 where none is given."""
    sizes = [1] * len(shape)
    for dim, size in block.items():
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"{path!r} of shape {shape} has no dimension {dim}")
        if size < 1 or shape[dim] % size:
            raise ValueError(
                f"{path!r}: blocks of {size} do not divide dimension {dim} of the shape {shape}"
            )
        sizes[dim] = size
    return sizes


def _split(x: Array, sizes: list[int]) -> Array:
    """Reshape every dimension n to (n / b, b)."""
    return x.reshape([m for n, b in zip(x.shape, sizes, strict=True) for m in (n // b, b)])


def blocks(
    scores: PyTree,
    block: Mapping[int, int],
    *,
    sparsity: float | Array | PyTree | None = None,
    keep: int | Array | PyTree | None = None,
    where: tree.Where = None,
) -> Mask:
    """Keep or drop whole blocks: those with the largest sum of scores stay.

    A block takes ``block[dim]`` neighbours along each dimension `dim` that is given, and one along
    the others. ``{-1: 4}`` is one input by four outputs of a kernel (..., in, out), the shape that
    sparse kernels on CPUs make fast; ``{-2: 16, -1: 16}`` are tiles. A mask as such makes nothing
    faster in JAX: it says what a sparse kernel would skip.

    Args:
      scores: a tree of floats (`magnitude`).
      block: sizes by dimension; they have to divide the dimension.
      sparsity, keep: as for `topk`, counted in blocks: round-half-even((1 - sparsity) blocks) stay,
        over all chosen leaves together or per leaf.
      where: the leaves to mask, as for `topk`.

    Raises:
      ValueError: a block that does not divide its dimension, or a dimension that a leaf does not
        have (its path); and what `topk` raises.

    Reference: E. Elsen, M. Dukhan, T. Gale, K. Simonyan, "Fast Sparse ConvNets", arXiv:1911.09723.

    >>> scores = {"kernel": jnp.array([[3.0, 0.0, 1.0, 1.0], [0.0, 0.5, 4.0, 0.0]])}
    >>> blocks(scores, {-1: 2}, sparsity=0.5)["kernel"].astype(int).tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    given = sparsity if keep is None else keep
    if where is None and jax.tree.structure(given) != jax.tree.structure(0):
        where = tree.every(scores)
    where = tree.select(scores, where)
    sizes = {path: _blocked(path, s.shape, block) for path, s in tree.chosen(scores, where).items()}

    def pool(path, s):
        return _split(tree.float32(s), sizes[path]).sum(range(1, 2 * s.ndim, 2))

    pooled = tree.map(pool, scores, where=where)
    mask = topk(pooled, sparsity=sparsity, keep=keep, where=where)

    def expand(bit, path, m, s):
        if not bit:
            return m
        inner = jnp.expand_dims(m, range(1, 2 * m.ndim, 2))
        full = [k for n, b in zip(m.shape, sizes[path], strict=True) for k in (n, b)]
        return jnp.broadcast_to(inner, full).reshape(s.shape)

    return jax.tree.map(expand, where, tree.paths(scores), mask, scores)


def n_of_m(
    scores: PyTree, n: int | Array, m: int, *, axis: int = -2, where: tree.Where = None
) -> Mask:
    """Keep of every m consecutive entries along an axis the n with the largest scores (2:4).

    Ties keep the lower index. Along the inputs of a kernel (..., in, out), the default, it is the
    pattern of NVIDIA's sparse tensor cores.

    Args:
      scores: a tree of floats; NaN ranks lowest.
      n: how many stay, in 0 ... m; may be traced.
      m: of how many.
      axis: the dimension, which m has to divide.
      where: the leaves to mask; default: the weights.

    Raises:
      ValueError: n outside 0 ... m, or a dimension that m does not divide (its path).

    Reference: A. Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv:2104.08378.

    >>> scores = {"kernel": jnp.array([[1.0], [4.0], [3.0], [2.0]])}
    >>> n_of_m(scores, 2, 4)["kernel"].ravel().tolist()
    [False, True, True, False]
    """
    if m < 1 or (isinstance(n, int) and not 0 <= n <= m):
        raise ValueError(f"n={n} of m={m}: 0 <= n <= m is due")

    def select(path, s, n):
        dim = axis % max(s.ndim, 1)
        sizes = _blocked(path, s.shape, {axis: m})
        groups = _split(s, sizes)
        order = jnp.argsort(-groups, axis=2 * dim + 1, stable=True)  # NaN last
        place = jnp.argsort(order, axis=2 * dim + 1)
        return (place < n).reshape(s.shape)

    return _mask(select, scores, n, where)
