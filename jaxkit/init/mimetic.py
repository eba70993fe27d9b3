"""Mimetic initialization of attention: products of weights that resemble the identity at once.

`mimetic_attention` re-draws several leaves together, so it is a tree initializer; its primitive is
`factor_pair`, a matrix as a balanced product. State spaces have theirs in
`jaxkit.init.state_space`.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.init.rules import TreeInitializer

__all__ = ["factor_pair", "mimetic_attention", "sincos_2d"]


def factor_pair(
    a: Float[Array, "*batch n m"], rank: int | None = None
) -> tuple[Float[Array, "*batch n k"], Float[Array, "*batch k m"]]:
    """Return ``L = U_k sqrt(S_k)`` and ``R = sqrt(S_k) V_k^T`` of the singular values of `a`.

    ``L @ R`` is the best approximation of rank k (all of `a` without `rank`): its squared Frobenius
    error is the sum of the squares of the other singular values.

    Raises:
      ValueError: a rank that is not in [1, min(n, m)].

    >>> left, right = factor_pair(jnp.array([[2.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> [[abs(round(x, 4)) for x in row] for row in (left @ right).tolist()]
    [[2.0, 0.0], [0.0, 0.0]]
    """
    least = min(a.shape[-2:])
    rank = least if rank is None else rank
    if not 1 <= rank <= least:
        raise ValueError(f"rank={rank} is not in [1, {least}] for a matrix {a.shape[-2:]}")
    u, s, vt = jnp.linalg.svd(a, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


# --------------------------------------------------------------------------------- attention


def _near_identity(key, d: int, noise, identity) -> Float[Array, "d d"]:
    return noise * jax.random.normal(key, (d, d)) / math.sqrt(d) + identity * jnp.eye(d)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _attention(key, d: int, heads: int, size: int, qk, vo) -> dict[str, Array]:
    """Return the kernels of one layer: q, k, v as (d, heads, size), o as (heads, size, d)."""
    first, second = jax.random.split(key)
    near = jax.vmap(lambda key: _near_identity(key, d, *qk))(jax.random.split(first, heads))
    left, right = factor_pair(near, size)  # (heads, d, size), (heads, size, d)
    value, out = factor_pair(_near_identity(second, d, vo[0], -vo[1]))
    return {
        "q": left.transpose(1, 0, 2),
        "k": right.transpose(2, 0, 1),
        "v": value.reshape(d, heads, size),
        "o": out.reshape(heads, size, d),
    }


def _sizes(path: str, shape, layout: str, known: dict[str, int]) -> dict[str, int]:
    """Return the size of every letter of `layout`, of which `known` gives some."""
    parts = [a or b for a, b in re.findall(r"\((\w+)\)|(\w)", layout)]
    if len(parts) != len(shape):
        raise ValueError(
            f"{path!r} has shape {tuple(shape)}, and the layout {layout!r} has {len(parts)} "
            "dimensions; give the layout of the stored kernel"
        )
    sizes = dict(known)
    for part, size in sorted(zip(parts, shape, strict=True), key=lambda pair: len(pair[0])):
        free = [letter for letter in part if letter not in sizes]
        rest = math.prod(sizes[letter] for letter in part if letter in sizes)
        if len(free) > 1:
            raise ValueError(f"{path!r}: {free} of the layout {layout!r} are not known; give heads")
        if size % rest or (not free and size != rest):
            raise ValueError(
                f"{path!r} has shape {tuple(shape)}, which does not fit the layout {layout!r} with "
                f"{ {letter: sizes[letter] for letter in part if letter in sizes} }"
            )
        sizes.update(dict.fromkeys(free, size // rest))
    return sizes


def _letters(layout: str) -> str:
    return re.sub(r"\W", "", layout)


def partners(first: list[str], others: list[str], role: str) -> dict[str, str]:
    """Return, for each path of `first`, the one of `others` in the same module."""

    def shared(a: str, b: str) -> int:
        pairs = zip(a.split("/"), b.split("/"), strict=False)
        return next((n for n, (x, y) in enumerate(pairs) if x != y), len(a.split("/")))

    found = {}
    for path in first:
        near = max((shared(path, other) for other in others), default=0)
        best = [other for other in others if shared(path, other) == near]
        if len(best) != 1:
            raise ValueError(f"{path!r} has no one {role} kernel in its module, but {best}")
        found[path] = best[0]
    if len(first) != len(others) or len(set(found.values())) < len(others):
        raise ValueError(f"{len(first)} modules have {len(others)} {role} kernels: {others[:4]}")
    return found


def mimetic_attention(
    *,
    query: tree.Where = "**/query/kernel",
    key: tree.Where = "**/key/kernel",
    value: tree.Where = "**/value/kernel",
    out: tree.Where = "**/out/kernel",
    fused: tree.Where = None,
    layout: str = "dhk",
    out_layout: str = "hkd",
    heads: int | None = None,
    qk: tuple[float, float] = (0.7, 0.7),
    vo: tuple[float, float] = (0.4, 0.4),
) -> TreeInitializer:
    """Attention that starts near ``W_Q W_K^T ~ I`` and ``W_V W_O ~ -I``.

    Returns ``init(key, params) -> params`` which re-draws the four kernels of every attention
    module, and no other leaf. With model width d, head size k, and Z of independent ``N(0, 1/d)``
    entries for each layer and head::

        W_Q^h W_K^hT = best rank k of   qk[0] Z + qk[1] I        for each head
        W_V W_O      = exactly          vo[0] Z - vo[1] I        over all heads together

    both split evenly by `factor_pair`, in the convention ``x @ W``. The attention scale
    ``1 / sqrt(k)`` stays, biases are for you to set to zero. The recipe for small vision
    Transformers adds fixed position embeddings (`sincos_2d`). Gains in language models are smaller;
    there `qk` and `vo` are worth a search.

    A layout names the dimensions of a stored kernel: d, h (heads), k (head size), l (layers that
    are stacked, each drawn on its own), 3 (query, key, value), and parentheses around dimensions
    that are merged::

        flax MultiHeadDotProductAttention    layout="dhk"     out_layout="hkd"
        dense kernels (in, out)              layout="d(hk)"   out_layout="(hk)d"   heads=...
        one kernel for all three             fused=where, layout="d(3hk)" or "d3hk", ...

    Args:
      query: chooses the query kernels (globs may match many modules).
      key: chooses the key kernels.
      value: chooses the value kernels.
      out: chooses the output kernels.
      fused: chooses kernels that hold query, key and value; the three above are then not read.
      layout: that of the query, key and value kernels, or of the fused one.
      out_layout: that of the output kernels.
      heads: the number of heads, where a layout merges it with others.
      qk: the factors of the noise and of the identity in ``W_Q W_K^T``.
      vo: the factors of the noise and of minus the identity in ``W_V W_O``.

    Raises:
      ValueError: naming the path: a shape that does not fit its layout, key or value kernels with
        other heads than the query (grouped or multi-query attention, which this does not serve),
        ``heads * k != d`` (the joint split of value and output needs equality), ``k > d``, or
        modules that lack one of the kernels.
      TypeError: a legacy uint32 key.

    >>> shapes = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
    >>> params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    >>> new = mimetic_attention(vo=(0.0, 0.4))(jax.random.key(0), params)
    >>> product = new["value"]["kernel"].reshape(8, 8) @ new["out"]["kernel"].reshape(8, 8)
    >>> bool(jnp.allclose(product, -0.4 * jnp.eye(8), atol=1e-6))
    True

    Reference: Asher Trockman, J. Zico Kolter, "Mimetic Initialization of Self-Attention Layers",
    arXiv 2305.09828. Public codes in PyTorch multiply the factors of value and output in the other
    order, which has the eigenvalues of the matrix above but is not it.
    """
    chosen = {"q": query, "k": key, "v": value} if fused is None else {"q": fused}
    chosen["o"] = out
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    if ("3" in layout) != (fused is not None):
        raise ValueError(f"layout={layout!r}: a 3 is due for fused kernels, and for those alone")

    def init(key: PRNGKeyArray, params: PyTree) -> PyTree:
        leaves = tree.flatten(params)
        hits = {role: list(tree.chosen(params, where)) for role, where in chosen.items()}
        others = {r: partners(hits["q"], hits[r], names[r]) for r in chosen if r != "q"}
        keys = tree.flatten(tree.keys(key, params, "jaxkit.init.mimetic_attention"))
        known = {"3": 3} if heads is None else {"3": 3, "h": heads}
        new = dict(leaves)
        for path in hits["q"]:
            sizes = _sizes(path, leaves[path].shape, layout, known)
            d, h, k = (sizes[letter] for letter in "dhk")
            for role, partner in others.items():
                _sizes(
                    partner[path],
                    leaves[partner[path]].shape,
                    out_layout if role == "o" else layout,
                    sizes,
                )
            if h * k != d:
                raise ValueError(
                    f"{path!r}: {h} heads of {k} are {h * k}, and the width {d} was due: value and "
                    "output are split over all heads together"
                )
            draw = lambda key, d=d, h=h, k=k: _attention(key, d, h, k, qk, vo)
            if "l" in sizes:
                kernels = jax.vmap(draw)(jax.random.split(keys[path], sizes["l"]))
                axes = {"qkv": "ldhk", "o": "lhkd"}
            else:
                kernels, axes = draw(keys[path]), {"qkv": "dhk", "o": "hkd"}
            if fused is not None:
                kernels["q"] = jnp.stack([kernels[role] for role in "qkv"])
                axes["qkv"] = "3" + axes["qkv"]
            for role in chosen:
                where, order = (path, layout) if role == "q" else (others[role][path], layout)
                have = axes["o" if role == "o" else "qkv"]
                order = _letters(out_layout if role == "o" else order)
                kernel = kernels[role].transpose([have.index(letter) for letter in order])
                leaf = leaves[where]
                new[where] = kernel.reshape(leaf.shape).astype(leaf.dtype)
        return tree.replace(params, new)

    return init


def sincos_2d(
    height: int, width: int, dim: int, *, temperature: float = 10_000.0
) -> Float[Array, "tokens dim"]:
    """Return fixed position embeddings of a grid, row by row: ``(height * width, dim)``.

    With ``w_i = temperature^(-i / (dim / 4 - 1))`` the columns are ``sin(x w), cos(x w), sin(y w),
    cos(y w)`` of the column x and the row y.

    Raises:
      ValueError: `dim` is not a multiple of 4, or less than 8.

    >>> sincos_2d(2, 3, 8).shape
    (6, 8)
    """
    if dim % 4 or dim < 8:
        raise ValueError(f"dim={dim}: a multiple of 4 from 8 on is due")
    y, x = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    frequencies = temperature ** -(jnp.arange(dim // 4) / (dim // 4 - 1))
    phases = [grid.reshape(-1, 1) * frequencies for grid in (x, y)]
    return jnp.concatenate([f(phase) for phase in phases for f in (jnp.sin, jnp.cos)], axis=1)
