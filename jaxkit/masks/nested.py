"""Many networks in one: spaces of sub-networks of shared weights, and the gradient over them.

A sub-network is a unit mask ``{axis name: (size,) bool}``; a space of them is a `Space`, in which
each is a vector of whole numbers. `sorted_space` holds the nested prefixes of SortedNet;
`jaxkit.masks.subnets` has others, and the searches in them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import Mask, keep_where
from jaxkit.masks.structured import UnitMask, units
from jaxkit.trace.names import named, nearest, resolve

__all__ = ["Space", "draw", "prefix", "sandwich", "sorted_space", "subnet", "subnet_grad"]


class Space(NamedTuple):
    """A set of sub-networks, each of them a vector of whole numbers between `low` and `high`.

    low: the vector of the smallest sub-network.
    high: that of the full network.
    draw: ``draw(key) -> vector``, the distribution to train with.
    masks: ``masks(vector) -> unit mask``; the vector may be traced.
    """

    low: Int[np.ndarray, " n"]
    high: Int[np.ndarray, " n"]
    draw: Callable[[PRNGKeyArray], Int[Array, " n"]]
    masks: Callable[[Int[Array, " n"]], dict[str, Bool[Array, " units"]]]


def removable(params: PyTree, names: Sequence[str], axes: PyTree) -> dict[str, int]:
    """Return the sizes of the named axes, if the model without some of their units exists.

    Raises:
      ValueError: an unknown axis, or one that is not removable, with the operations that forbid it.
    """
    known = named(resolve(params, axes))
    for name in names:
        if name not in known:
            raise ValueError(f"no axis is named {name!r}; the nearest: {nearest(name, known)}")
        if known[name].pinned:
            raise ValueError(f"axis {name!r} is not removable: {'; '.join(known[name].pinned)}")
    return {name: known[name].size for name in names}


def prefix(
    params: PyTree, keep: Mapping[str, int | Int[Array, ""]], axes: PyTree
) -> dict[str, Bool[Array, " units"]]:
    """Keep the first units of axes: ``arange(size) < keep``. Fewer kept units are a subset.

    Args:
      params: a tree of arrays, or of their shapes.
      keep: how many units stay, by name of axis. Traced numbers need one compilation for all
        widths; they are not checked, and 0 removes all units.
      axes: the axes tree of params.

    Returns:
      A unit mask, for `subnet`, `units` and `shrink`.

    Raises:
      ValueError: an unknown axis; one that is not removable (a LayerNorm over masked units takes
        other means than over a slice: the masked model would not be the smaller one); a number
        outside 1 ... size.

    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    >>> axes = {"w": (None, "hidden"), "b": ("hidden",)}
    >>> prefix(params, {"hidden": 2}, axes)["hidden"].tolist()
    [True, True, False]
    """
    sizes = removable(params, list(keep), axes)
    for name, b in keep.items():
        if violates(lambda b, n: (b >= 1) & (b <= n), b, sizes[name]):
            raise ValueError(f"axis {name!r}: {b} units are to stay, and 1 ... {sizes[name]} can")
    return {name: jnp.arange(sizes[name]) < b for name, b in keep.items()}


def subnet(
    params: PyTree,
    unit_mask: UnitMask,
    axes: PyTree,
    *,
    branches: Mapping[str, tree.Where] | None = None,
) -> Mask:
    """Turn a unit mask into a mask over entries, in which a branch without units is no branch.

    Without units, ``W_out relu(W_in x) + b_out`` is still ``b_out``. In a residual network
    ``x + branch(norm(x))`` the layer is skipped only if all of it is zero, so `branches` names the
    leaves that go with an axis: they are masked whole when none of its units is left.

    Masks of weights skip nothing in a post-norm block ``norm(x + branch(x))``: without its branch
    it is ``norm(x)``, and without the norm's leaves it is zero. Such a model has to be told:
    give it ``unit_mask[axis].any()``, for ``jnp.where(live, norm(x + branch(x)), x)``.

    Args:
      params: a tree of arrays, or of their shapes.
      unit_mask: a boolean vector by name of axis, True for the units to keep; may be traced.
      axes: the axes tree of params.
      branches: by name of axis, the leaves that belong to it (`where` of `jaxkit.tree`), its
        output bias above all: ``{"layer_0/mlp": "layer_0/mlp/**"}``.

    Returns:
      A mask tree like params.

    Raises:
      ValueError: an unknown axis, a mask of another size, a `where` that matches nothing.
      TypeError: a mask that is not boolean.

    >>> params = {"w": jnp.ones((2, 3)), "v": jnp.ones((3, 2)), "b": jnp.ones(2)}
    >>> axes = {"w": (None, "hidden"), "v": ("hidden", None), "b": (None,)}
    >>> none = {"hidden": np.zeros(3, bool)}
    >>> subnet(params, none, axes)["b"].tolist()
    [True, True]
    >>> subnet(params, none, axes, branches={"hidden": ["w", "v", "b"]})["b"].tolist()
    [False, False]
    """
    mask = units(params, unit_mask, axes)
    known = named(resolve(params, axes)) if branches else {}
    for name, where in (branches or {}).items():
        if name not in known:
            raise ValueError(f"branches: no axis {name!r}; the nearest: {nearest(name, known)}")
        if name in unit_mask:
            live = jnp.any(unit_mask[name])
            own = tree.select(params, where)
            mask = jax.tree.map(lambda m, bit, live=live: m & live if bit else m, mask, own)
    return mask


def sorted_space(
    params: PyTree, choices: Mapping[str | tuple[str, ...], Sequence[int]], axes: PyTree
) -> Space:
    """Return the nested sub-networks of SortedNet: the first b units of each axis, b from a list.

    Several lists are independent: every tuple of widths is a sub-network, all equally likely.
    Sub-network b contains every smaller one, so one set of weights is truncated to what fits.

    Args:
      params: a tree of arrays, or of their shapes.
      choices: the widths of each axis in increasing order, the full size last; a tuple of axes
        shares its width. Heads are an axis: what is kept is whole heads.
      axes: the axes tree of params.

    Returns:
      A `Space`, whose vectors are positions in the lists.

    Raises:
      ValueError: an unknown or not removable axis; widths that do not increase, start below 1 or
        leave out the full size.

    >>> params = {"w": jnp.ones((2, 8)), "v": jnp.ones((8, 1))}
    >>> space = sorted_space(params, {"h": (2, 4, 8)}, {"w": (None, "h"), "v": ("h", None)})
    >>> space.masks(space.low)["h"].astype(int).tolist()
    [1, 1, 0, 0, 0, 0, 0, 0]

    Reference: Valipour, Rezagholizadeh, Rajabzadeh, Kavehzadeh, Tahaei, Chen, Ghodsi, "SortedNet,
    a Place for Every Network and Every Network in its Place: Towards a Generalized Solution for
    Training Many-in-One Neural Networks", arXiv:2309.00255.
    """
    groups = {(key,) if isinstance(key, str) else key: list(b) for key, b in choices.items()}
    sizes = removable(params, [name for group in groups for name in group], axes)
    for group, widths in groups.items():
        if widths != sorted(set(widths)) or not widths or widths[0] < 1:
            raise ValueError(f"axes {group}: increasing widths from 1 are due, not {widths}")
        for name in group:
            if widths[-1] != sizes[name]:
                raise ValueError(
                    f"axis {name!r}: the full network has {sizes[name]} units, and the widths are "
                    f"{widths}: it has to be among those that are trained"
                )
    low = np.zeros(len(groups), int)
    high = np.array([len(widths) - 1 for widths in groups.values()], int)

    def masks(vector):
        out = {}
        for i, (group, widths) in enumerate(groups.items()):
            b = jnp.array(widths)[vector[i]]
            out |= {name: jnp.arange(sizes[name]) < b for name in group}
        return out

    return Space(low, high, lambda key: uniform(key, low, high), masks)


def uniform(key: PRNGKeyArray, low: Any, high: Any) -> Int[Array, " n"]:
    """Draw each number uniformly from low ... high, both included."""
    return jax.random.randint(key, np.shape(low), jnp.asarray(low), jnp.asarray(high) + 1)


def draw(
    key: PRNGKeyArray, space: Space, n: int = 1, *, p: float | Array = 1.0
) -> dict[str, Bool[Array, "n units"]]:
    """Draw n sub-networks of a space, with replacement: stacked unit masks for `subnet_grad`.

    Args:
      key: a typed key.
      space: what to draw from.
      n: how many; SortedNet accumulates the gradients of a few.
      p: the probability of a random sub-network instead of the full network. ``step / steps``
        makes it grow linearly in training; 0 trains the full network alone. May be traced.

    Raises:
      TypeError: a legacy uint32 key.

    >>> params, axes = {"w": jnp.ones((2, 8))}, {"w": (None, "h")}
    >>> space = sorted_space(params, {"h": (2, 4, 8)}, axes)
    >>> draw(jax.random.key(0), space, 3)["h"].shape
    (3, 8)
    """
    tree.check_key(key)

    def one(key):
        network, other = jax.random.split(key)
        chosen = jax.random.bernoulli(other, p)
        return space.masks(jnp.where(chosen, space.draw(network), space.high))

    return jax.vmap(one)(jax.random.split(key, n))


def sandwich(
    key: PRNGKeyArray, space: Space, *, random: int = 2
) -> dict[str, Bool[Array, "n units"]]:
    """Return the full network, some random sub-networks and the smallest: the sandwich rule.

    In a space whose smallest sub-network is empty, that one trains only what no unit masks:
    embeddings and readout.

    Args:
      key: a typed key.
      space: what to draw from.
      random: how many random sub-networks lie between the two.

    Returns:
      Stacked unit masks, for `subnet_grad`.

    Raises:
      TypeError: a legacy uint32 key.

    >>> params, axes = {"w": jnp.ones((2, 8))}, {"w": (None, "h")}
    >>> space = sorted_space(params, {"h": (2, 4, 8)}, axes)
    >>> sandwich(jax.random.key(0), space)["h"].sum(1)[jnp.array([0, 3])].tolist()
    [8, 2]

    Reference: Yu, Huang, "Universally Slimmable Networks and Improved Training Techniques",
    arXiv:1903.05134.
    """
    tree.check_key(key)
    drawn = jax.vmap(space.draw)(jax.random.split(key, random))
    ends = (jnp.asarray(space.high)[None], drawn, jnp.asarray(space.low)[None])
    return jax.vmap(space.masks)(jnp.concatenate(ends))


def subnet_grad(
    loss_fn: Callable[[PyTree, Any], Any],
    params: PyTree,
    unit_masks: Mapping[str, Bool[Array, "n units"]],
    batches: Any,
    axes: PyTree,
    *,
    branches: Mapping[str, tree.Where] | None = None,
    same_batch: bool = False,
    mean: bool = False,
    has_aux: bool = False,
) -> tuple[Any, PyTree]:
    r"""Sum the gradients of the shared weights over sub-networks, one after the other.

    .. math:: g = \sum_{i=1}^n \nabla_\theta L(m_i \odot \theta; \text{batch}_i)

    Each term is zero outside its sub-network. It is a `lax.scan`: one compilation, and the memory
    of one backward pass, whatever n. SortedNet takes the sum; the mean is the same step at a
    learning rate n times smaller for SGD, and almost the same step for Adam.

    An optimizer with moments moves the entries that the last sub-networks left out, too: rarely
    visited units decay their moments in between.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      params: any tree; leaves that are not inexact arrays get zeros.
      unit_masks: stacked unit masks, from `draw` or `sandwich`.
      batches: a tree of arrays with a leading axis of n batches, a fresh one for each sub-network.
      axes: the axes tree of params.
      branches: the leaves that go with an axis, as for `subnet`.
      same_batch: `batches` is one batch, for all.
      mean: return the mean in place of the sum.
      has_aux: loss_fn returns ``(loss, aux)``.

    Returns:
      The n losses (or ``(losses, aux)``, stacked), and the gradients, like params.

    Raises:
      ValueError: as for `subnet`; or another number of batches than of sub-networks.

    >>> params = {"w": jnp.ones((1, 3)), "v": jnp.ones((3, 1))}
    >>> axes = {"w": (None, "h"), "v": ("h", None)}
    >>> loss = lambda p, x: (x @ p["w"] @ p["v"]).sum()
    >>> nets = {"h": jnp.array([[True, False, False], [True, True, False]])}
    >>> losses, grads = subnet_grad(loss, params, nets, jnp.ones((1, 1)), axes, same_batch=True)
    >>> losses.tolist(), grads["w"].tolist()
    ([1.0, 2.0], [[2.0, 1.0, 0.0]])

    Reference: as for `sorted_space`.
    """
    n = {name: np.shape(m)[0] for name, m in unit_masks.items()}
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(batches)} if not same_batch else set()
    if len({*n.values()} | sizes) != 1:
        raise ValueError(
            f"one number of sub-networks and batches is due: the masks have {n}, and the leading "
            f"axes of the batches {sorted(sizes)} (one batch for all: same_batch=True)"
        )
    floats = tree.chosen(params, tree.every(params))
    loss = lambda w, mask, batch: loss_fn(keep_where(mask, tree.replace(params, w)), batch)

    def add(total, each):
        unit_mask, batch = each
        mask = subnet(params, unit_mask, axes, branches=branches)
        own = batches if same_batch else batch
        value, grads = jax.value_and_grad(loss, has_aux=has_aux)(floats, mask, own)
        return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), value

    start = jax.tree.map(lambda x: jnp.zeros_like(tree.float32(x)), floats)
    given = (dict(unit_masks), None if same_batch else batches)
    total, values = jax.lax.scan(add, start, given)
    count = next(iter(n.values())) if mean else 1
    out = {path: (total[path] / count).astype(w.dtype) for path, w in floats.items()}
    return values, tree.replace(jax.tree.map(jnp.zeros_like, params), out)
