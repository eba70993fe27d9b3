"""Scores of whole units: what a filter, a head or a neuron is worth. Larger = keep.

A unit score is a dict {name of an axis: (units,) floats}, over the axes of `trace.axes` that may be
cut (nothing in `Axis.pinned`). Such a dict is a tree, so selection is that of entries, and an axis
that several layers add into (a residual stream) has one score a unit, over all that produce it::

    axes, roles = trace.axes(apply_fn, params, x), trace.roles(apply_fn, params, x)
    scores = masks.unit_norm(params, axes, roles, order=1)
    keep = masks.topk(scores, sparsity=0.5, where="**")
    small, sizes, report = masks.shrink(params, keep, axes)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit.trace import named, reads, resolve
from jaxkit.trace.blocks import unit_rows
from jaxkit.trace.names import Entry, members, pairs

__all__ = [
    "apoz",
    "bn_scale",
    "fpgm",
    "group_lasso",
    "hrank",
    "taylor",
    "unit_matrices",
    "unit_norm",
]

Scores = dict[str, Float[Array, " units"]]


def unit_matrices(
    params: PyTree,
    axes: PyTree,
    roles: PyTree | None,
    *,
    role: str = "produced",
    where: tree.Where = None,
) -> dict[str, Float[Array, "units n"]]:
    """Lay out the entries of every unit as a row: {name of the axis: (units, entries)}.

    Args:
      params: a tree of arrays.
      axes: its axes tree; pinned axes are left out.
      roles: its roles (`trace.roles`): of kernels and embeddings, the dimensions with the role
        count. None: every dimension of the leaves of `where` counts.
      role: "produced" or "consumed".
      where: the leaves; default: with roles all kernels and embeddings, else the weights.

    Raises:
      ValueError: an axes tree that does not fit.

    >>> params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros(3)}
    >>> unit_matrices(params, {"w": (None, "hidden"), "b": ("hidden",)}, None)["hidden"].tolist()
    [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    """
    axes = resolve(params, axes)
    structure = jax.tree.structure(params)
    found: dict[str, list[Array]] = {}
    kinds = [None] * structure.num_leaves if roles is None else structure.flatten_up_to(roles)
    if where is None and roles is not None:
        where = jax.tree.map(tree.is_inexact, params)
    chosen = jax.tree.leaves(tree.select(params, where))
    for (_, leaf, entries), kind, bit in zip(pairs(params, axes), kinds, chosen, strict=True):
        if not bit or (kind is not None and kind.kind not in ("kernel", "embedding")):
            continue
        for d, entry in enumerate(entries):
            if entry is None or (kind is not None and kind.dims[d] != role):
                continue
            for name, units in _free(tree.float32(leaf), d, entry):
                found.setdefault(name, []).append(units)
    order = [name for name in named(axes) if name in found]
    return {name: jnp.concatenate(found[name], 1) for name in order}


def _free(x: Array, axis: int, entry: Entry) -> list[tuple[str, Array]]:
    """Return the rows of the units along a dimension, of the axes that may be cut."""
    pinned = {a.name for a in members(entry) if a.pinned}
    return [(name, units) for name, units in unit_rows(x, axis, entry) if name not in pinned]


# --------------------------------------------------------------------------------- of weights


def unit_norm(
    params: PyTree,
    axes: PyTree,
    roles: PyTree | None,
    *,
    order: int = 2,
    where: tree.Where = None,
) -> Scores:
    """Score a unit by the norm of the weights that produce it: sum |W_j| or sqrt(sum W_j^2).

    Args:
      params: a tree of arrays.
      axes: its axes tree, from `trace.axes`.
      roles: its roles, from `trace.roles`.
      order: 1 or 2.
      where: the leaves that count; default: all kernels and embeddings.

    Raises:
      ValueError: another order, an axes tree that does not fit.

    Reference: H. Li, A. Kadav, I. Durdanovic, H. Samet, H. P. Graf, "Pruning Filters for Efficient
    ConvNets", arXiv:1608.08710 (order 1).

    >>> params = {"w": jnp.array([[3.0, 1.0], [4.0, 0.0]])}
    >>> unit_norm(params, {"w": (None, "hidden")}, None)["hidden"].tolist()
    [5.0, 1.0]
    """
    if order not in (1, 2):
        raise ValueError(f"order={order}, and 1 or 2 was due")
    rows = unit_matrices(params, axes, roles, where=where)
    absolute = lambda w: jnp.where(w == 0, 0, jnp.abs(w))  # its gradient at 0 is 0
    norm = (lambda w: absolute(w).sum(1)) if order == 1 else _norm
    return {name: norm(w) for name, w in rows.items()}


def _norm(w: Array) -> Array:
    """The L2 norm of rows, with gradient 0 at 0."""
    square = jnp.sum(jnp.abs(w) ** 2, -1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def bn_scale(params: PyTree, axes: PyTree, *, where: tree.Where = "**/scale") -> Scores:
    """Score a channel by its BatchNorm scale: |gamma_j|, summed over the norms of a stream.

    The paper trains with an L1 penalty on the scales, here a term of the loss:
    ``1e-4 * sum(s.sum() for s in masks.bn_scale(params, axes).values())``.

    Args:
      params: a tree of arrays.
      axes: its axes tree.
      where: the scales. (Not from roles: a running variance is a gain as well.)

    Raises:
      ValueError: a `where` that matches nothing, an axes tree that does not fit.

    Reference: Z. Liu, J. Li, Z. Shen, G. Huang, S. Yan, C. Zhang, "Learning Efficient Convolutional
    Networks through Network Slimming", arXiv:1708.06519.

    >>> params = {"bn": {"scale": jnp.array([-2.0, 0.5]), "var": jnp.ones(2)}}
    >>> bn_scale(params, {"bn": {"scale": ("c",), "var": ("c",)}})["c"].tolist()
    [2.0, 0.5]
    """
    return unit_norm(params, axes, None, order=1, where=where)


def fpgm(params: PyTree, axes: PyTree, roles: PyTree | None, *, where: tree.Where = None) -> Scores:
    """Score a unit by its distances to the others: sum_i |W_j - W_i|, small near their median.

    What lies at the geometric median can be replaced by the others, however large its norm.

    Args:
      params: a tree of arrays.
      axes: its axes tree.
      roles: its roles.
      where: the leaves that count; default: all kernels and embeddings.

    Raises:
      ValueError: an axes tree that does not fit.

    Reference: Y. He, P. Liu, Z. Wang, Z. Hu, Y. Yang, "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", arXiv:1811.00250.

    >>> fpgm({"w": jnp.array([[0.0, 1.0, 10.0]])}, {"w": (None, "hidden")}, None)["hidden"].tolist()
    [11.0, 10.0, 19.0]
    """
    rows = unit_matrices(params, axes, roles, where=where)
    far = lambda w: jax.lax.map(lambda row: _norm(w - row).sum(), w)
    return {name: far(w) for name, w in rows.items()}


def group_lasso(
    params: PyTree, axes: PyTree, roles: PyTree | None, *, where: tree.Where = None
) -> Float[Array, ""]:
    """Return the penalty sum_j sqrt(n_j) |W_j|_2 over all units, which drives whole units to zero.

    n_j is the number of weights that produce unit j. Its gradient at W_j = 0 is 0.

    Args:
      params: a tree of arrays.
      axes: its axes tree.
      roles: its roles.
      where: the leaves that count; default: all kernels and embeddings.

    Raises:
      ValueError: an axes tree that does not fit.

    Reference: M. Yuan, Y. Lin, "Model selection and estimation in regression with grouped
    variables", 2006; W. Wen, C. Wu, Y. Wang, Y. Chen, H. Li, "Learning Structured Sparsity in Deep
    Neural Networks", arXiv:1608.03665.

    >>> params = {"w": jnp.array([[3.0], [4.0], [0.0], [0.0]])}
    >>> group_lasso(params, {"w": (None, "hidden")}, None).item()
    10.0
    """
    rows = unit_matrices(params, axes, roles, where=where)
    terms = (np.sqrt(w.shape[1]) * _norm(w).sum() for w in rows.values())
    return sum(terms, jnp.zeros((), jnp.float32))


# ------------------------------------------------------------------------------------ of data


def taylor(
    loss_fn: Callable[[PyTree, Any], Array],
    params: PyTree,
    batch: Any,
    axes: PyTree,
    roles: PyTree,
    *,
    axis_name: str | None = None,
) -> Scores:
    """Score a unit by the first-order effect on the loss of removing it, |sum A_j dL/dA_j|.

    The sum is over examples and positions of the activation A_j that the next layers read; the
    scores of an axis are then divided by their L2 norm. Every layer is linear in its weights, so
    that sum is also sum w dL/dw over the weights that consume unit j: one backward pass, and no
    activation is kept for it.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      params: a tree of arrays.
      batch: one batch.
      axes: the axes tree of params.
      roles: their roles.
      axis_name: average the gradient over this axis of pmap or shard_map.

    Raises:
      ValueError: an axes tree that does not fit.

    Reference: P. Molchanov, S. Tyree, T. Karras, T. Aila, J. Kautz, "Pruning Convolutional Neural
    Networks for Resource Efficient Inference", arXiv:1611.06440. (They take the absolute value of
    each example's sum and average it; here one sum over the batch.)

    >>> from jaxkit import trace
    >>> params = {"w": jnp.ones((1, 2)), "v": jnp.array([[3.0], [4.0]])}
    >>> net = lambda p, x: jnp.sum(jax.nn.relu(x @ p["w"]) @ p["v"])
    >>> x = jnp.ones((5, 1))
    >>> scores = taylor(net, params, x, trace.axes(net, params, x), trace.roles(net, params, x))
    >>> [round(s, 4) for s in scores["w:1"].tolist()]
    [0.6, 0.8]
    """
    floats = tree.chosen(params, tree.every(params))
    grads = jax.grad(lambda w: loss_fn(tree.replace(params, w), batch))(floats)
    if axis_name is not None:
        grads = jax.lax.pmean(grads, axis_name)
    effects = {path: tree.float32(w) * tree.float32(grads[path]) for path, w in floats.items()}
    rows = unit_matrices(tree.replace(params, effects), axes, roles, role="consumed")
    sums = {name: jnp.abs(w.sum(1)) for name, w in rows.items()}
    unit = lambda s: s / jnp.where((n := _norm(s)) > 0, n, 1)
    return {name: unit(s) for name, s in sums.items()}


def apoz(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple,
    axes: PyTree,
    roles: PyTree,
    *,
    axis_name: str | None = None,
) -> Scores:
    """Score a unit by how often it is active: 1 - APoZ, the share of nonzeros in its activation.

    APoZ_j = mean of 1[A_j = 0] over examples and positions, of the activation after the
    nonlinearity, as the next layers read it (after pooling, where there is some).

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      params: a tree of arrays.
      args: the further arguments, a tuple: ``(x,)``.
      axes: the axes tree of params.
      roles: their roles.
      axis_name: average over this axis of pmap or shard_map.

    Raises:
      ValueError: no kernel consumes an axis, an axes tree that does not fit.

    Reference: H. Hu, R. Peng, Y.-W. Tai, C.-K. Tang, "Network Trimming: A Data-Driven Neuron
    Pruning Approach towards Efficient Deep Architectures", arXiv:1607.03250.

    >>> from jaxkit import trace
    >>> params = {"w": jnp.array([[1.0, -1.0]]), "v": jnp.ones((2, 1))}
    >>> net = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    >>> x = jnp.array([[1.0], [2.0], [-1.0], [3.0]])
    >>> axes, roles = trace.axes(net, params, x), trace.roles(net, params, x)
    >>> apoz(net, params, (x,), axes, roles)["w:1"].tolist()
    [0.75, 0.25]
    """
    counts: dict[str, list[Array]] = {}
    for read in reads(apply_fn, params, args, axes, roles):
        active = (read.tap.input != 0).astype(jnp.float32)
        for name, units in _free(active, read.axis, read.entry):
            counts.setdefault(name, []).append(units)
    return _means(counts, axis_name)


def hrank(
    apply_fn: Callable[..., Any],
    params: PyTree,
    args: tuple,
    axes: PyTree,
    roles: PyTree,
    *,
    axis_name: str | None = None,
) -> Scores:
    """Score a channel by the rank of its feature maps: the mean over examples of rank(A_j).

    A_j is the (height, width) map as the convolutions after it read it; an axis that no convolution
    reads has no feature maps and no score.

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      params: a tree of arrays.
      args: the further arguments, a tuple: ``(x,)``.
      axes: the axes tree of params.
      roles: their roles.
      axis_name: average over this axis of pmap or shard_map.

    Raises:
      ValueError: no convolution over two dimensions consumes an axis.

    Reference: M. Lin, R. Ji, Y. Wang, Y. Zhang, B. Zhang, Y. Tian, L. Shao, "HRank: Filter Pruning
    using High-Rank Feature Map", arXiv:2002.10179.

    >>> from jaxkit import trace
    >>> params = {"w": jnp.ones((1, 1, 1, 2)), "v": jnp.ones((1, 1, 2, 1))}
    >>> conv = lambda x, w: jax.lax.conv_general_dilated(
    ...     x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    >>> net = lambda p, x: conv(jax.nn.relu(conv(x, p["w"])), p["v"])
    >>> x = jnp.eye(3)[None, ..., None]
    >>> axes, roles = trace.axes(net, params, x), trace.roles(net, params, x)
    >>> hrank(net, params, (x,), axes, roles)["w:3"].tolist()
    [3.0, 3.0]
    """
    ranks: dict[str, list[Array]] = {}
    for read in reads(apply_fn, params, args, axes, roles):
        tap = read.tap
        if tap.primitive != "conv_general_dilated" or tap.input.ndim != 4:
            continue
        maps = jnp.moveaxis(tree.float32(tap.input), read.axis, 0)  # channels, examples, map
        mean = jnp.linalg.matrix_rank(maps).astype(jnp.float32).mean(1)
        for name, units in _free(mean, 0, read.entry):
            ranks.setdefault(name, []).append(units)
    if not ranks:
        raise ValueError("no convolution over two dimensions reads an axis: no feature maps")
    return _means(ranks, axis_name)


def _means(found: dict[str, list[Array]], axis_name: str | None) -> Scores:
    means = {name: jnp.concatenate(parts, 1).mean(1) for name, parts in found.items()}
    return means if axis_name is None else jax.lax.pmean(means, axis_name)
