"""Layers that read the weights of a network as data, whatever the order of its units.

The leaves of a network bear features: one or more channels, in a further dimension at the end of
every float leaf. A layer maps them to features on the same leaves and commutes with every
permutation of units; the head maps them to a vector that no permutation changes::

    axes = trace.axes(apply_fn, params, x)          # or by hand; trace.check proves a tree
    keys = jax.random.split(key)
    theta = {
        "layer": nn.equivariant_init(keys[0], params, axes, 1, 8),
        "head": nn.invariant_init(keys[1], params, axes, 8, classes),
    }

    def logits(theta, params):                      # of one network; vmap it over many
        h = jax.tree.map(lambda w: w[..., None], params)
        h = jax.tree.map(jax.nn.relu, nn.equivariant_apply(theta["layer"], h, axes))
        return nn.invariant_apply(theta["head"], h, axes)

The leaves are cut into blocks (`jaxkit.trace.blocks`), each of whose dimensions is fixed or runs
along one axis; fixed dimensions are channels as well, those of the input, of the output and the
taps of a convolution. Between two blocks there is one dense map of channels for every way to say
which of their dimensions share an index. A way is spelled as in einsum, dimensions of the source
before the arrow and those of the target behind it:

* ``ab->ab``: each entry by itself;
* ``ab->cb``: a is not in the target, so that the mean over it is taken, and c is not in the source,
  so that the result is the same along it; ``ab->cd`` is the mean over all;
* ``aa->a``: the diagonal of a block of which two dimensions run along one axis (the kernel of a
  residual layer), and ``a->aa`` puts onto the diagonal.

For each axis by itself, these are the partitions of the dimensions along it into classes that share
an index, hence all orbits of index tuples, which makes the maps a basis of all equivariant linear
maps: 2 ways for an axis of which each block has one dimension, 1 where only one of them has one, 15
between two residual kernels. (They are a basis where the axis has as many units as the two blocks
have dimensions along it. With fewer units they still are all, but not independent.)

Reference: A. Navon, A. Shamsian, I. Achituve, E. Fetaya, G. Chechik, H. Maron, "Equivariant
Architectures for Learning in Deep Weight Spaces", arXiv:2301.12780. (Theirs is for the layers of an
MLP. They divide by the number of leaves, and by 4 within a kernel; here the draw has that scale.)
"""

import math
import string
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import trace, tree

Maps = dict[str, Any]
Pool = Literal["mean", "max"]

__all__ = ["equivariant_apply", "equivariant_init", "invariant_apply", "invariant_init"]


def equivariant_init(
    key: PRNGKeyArray, params: PyTree, axes: PyTree, channels_in: int, channels_out: int
) -> dict[str, Maps]:
    """Draw a linear layer from `channels_in` to `channels_out` features on every leaf.

    Kernels are normal with variance 1 / (all inputs of an entry of the target), biases zero. A bias
    is constant along the axes, and free along fixed dimensions.

    Args:
      key: a typed key.
      params: a network, without channels; its shapes count.
      axes: its axes tree, found by `jaxkit.trace.axes` or written by hand. Prove the latter by
        ``trace.check(apply_fn, params, axes, args)``: two hidden layers of one width are easily
        taken for each other, and no shape tells.
      channels_in, channels_out: features of every entry. (The first layer has 1, the weight.)

    Returns:
      {target: {"kernel": {source: {way: (fan_in, fan_out)}}, "bias": {way: (fixed, channels)}}}
      over the blocks, in float32. Blocks of integer leaves take no part.

    Raises:
      ValueError: an axes tree that does not fit, or that has no axis at all (as that of a network
        without hidden layer: the layer would be dense, and equivariant to nothing).
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3), "v": jnp.ones((3, 1))}
    >>> axes = {"w": (None, "hidden"), "b": ("hidden",), "v": ("hidden", None)}
    >>> layer = equivariant_init(jax.random.key(0), params, axes, 1, 4)
    >>> jax.tree.map(jnp.shape, layer["w"]["kernel"]["b"])
    {'a->a': (1, 8), 'a->b': (1, 8)}
    """
    sizes = _signature(params, axes)
    shapes = {
        name: _shapes(sizes, target, (fixed, channels_out), channels_in)
        for name, (target, fixed) in sizes.items()
    }
    return _draw(key, shapes)


def equivariant_apply(
    layer: Mapping[str, Maps],
    features: PyTree[Float[Array, "*shape channels_in"]],
    axes: PyTree,
    *,
    pool: Pool = "mean",
) -> PyTree[Float[Array, "*shape channels_out"]]:
    """Apply the layer: permuting the units of the network permutes what comes out alike.

    Args:
      layer: of `equivariant_init`.
      features: a tree like params, with a dimension of channels at the end of every float leaf.
        Other leaves pass through. For many networks `jax.vmap` over it.
      axes: the axes tree of params, without channels.
      pool: how a dimension that is not in the target is pooled. With "max" the layer is no longer
        linear, but equivariant all the same.

    Returns:
      Features of the leaves' dtypes; everything is computed in float32 or wider.

    Raises:
      ValueError: a layer that was drawn for other blocks or channels, naming the block; another
        pool.

    Reference: the module's.

    >>> params = {"w": jnp.arange(6.0).reshape(2, 3), "v": jnp.ones((3, 1))}
    >>> axes = {"w": (None, "hidden"), "v": ("hidden", None)}
    >>> layer = equivariant_init(jax.random.key(0), params, axes, 1, 4)
    >>> channels = lambda p: jax.tree.map(lambda w: w[..., None], p)
    >>> f = jax.jit(lambda p: equivariant_apply(layer, channels(p), axes))
    >>> jax.tree.map(jnp.shape, f(params))
    {'v': (3, 1, 4), 'w': (2, 3, 4)}
    >>> reverse = lambda p: trace.permute(p, axes, {"hidden": jnp.array([2, 1, 0])})
    >>> bool(jnp.allclose(f(reverse(params))["v"], f(params)["v"][::-1]))
    True
    """
    cut, sources = _fold(features, axes)
    if set(layer) != set(sources):
        raise ValueError(f"the layer is of the blocks {sorted(layer)}, and {sorted(sources)} came")
    parts = {name: block.array for name, block in cut.items()}
    for name, (target, x) in sources.items():
        y = _combine(layer[name], sources, target, x.shape[:-1], pool, f"{name!r}, ")
        channels = next(iter(layer[name]["bias"].values())).shape[-1]
        parts[name] = _unfold(y, cut[name], channels)
    return trace.assemble(jax.tree.map(_first_channel, features), axes, parts)


def invariant_init(
    key: PRNGKeyArray, params: PyTree, axes: PyTree, channels_in: int, channels_out: int
) -> Maps:
    """Draw a head from `channels_in` features on every leaf to one vector of `channels_out`.

    Args, draw and errors are those of `equivariant_init`.

    Returns:
      {"kernel": {source: {way: (fan_in, channels_out)}}, "bias": {"->": (channels_out,)}}

    >>> params, axes = {"w": jnp.ones((2, 3))}, {"w": (None, "hidden")}
    >>> head = invariant_init(jax.random.key(0), params, axes, 4, 5)
    >>> jax.tree.map(jnp.shape, head)
    {'bias': {'->': (5,)}, 'kernel': {'w': {'a->': (8, 5)}}}
    """
    shapes = _shapes(_signature(params, axes), (), (channels_out,), channels_in)
    return _draw(key, {"head": shapes})["head"]


def invariant_apply(
    head: Maps,
    features: PyTree[Float[Array, "*shape channels_in"]],
    axes: PyTree,
    *,
    pool: Pool = "mean",
) -> Float[Array, " channels_out"]:
    """Apply the head: pool every block over its axes, and map all that is left to a vector.

    Args and errors are those of `equivariant_apply`; `head` is of `invariant_init`.

    >>> params, axes = {"w": jnp.arange(6.0).reshape(2, 3)}, {"w": (None, "hidden")}
    >>> head = invariant_init(jax.random.key(0), params, axes, 1, 5)
    >>> f = lambda w: invariant_apply(head, {"w": w[..., None]}, axes)
    >>> bool(jnp.allclose(f(params["w"]), f(params["w"][:, ::-1])))
    True
    """
    _, sources = _fold(features, axes)
    return _combine(head, sources, (), (), pool, "the head, ")


# ------------------------------------------------------------------------------------- the rule


def _ways(source: tuple[str, ...], target: tuple[str, ...]) -> Iterator[str]:
    """Spell the ways in which the dimensions of two blocks may share indices."""
    dims = source + target
    names = list(dict.fromkeys(dims))
    for choice in product(*(_partitions(dims.count(name)) for name in names)):
        labels = {name: iter(classes) for name, classes in zip(names, choice, strict=True)}
        indices = [(name, next(labels[name])) for name in dims]
        letters = dict(zip(dict.fromkeys(indices), string.ascii_letters, strict=False))
        spelled = "".join(letters[i] for i in indices)
        yield f"{spelled[: len(source)]}->{spelled[len(source) :]}"


def _partitions(n: int) -> Iterator[tuple[int, ...]]:
    """Partition n items: the class of each, classes being numbered as they appear."""
    if n == 0:
        yield ()
        return
    for classes in _partitions(n - 1):
        for last in range(max(classes, default=-1) + 2):
            yield (*classes, last)


def _combine(
    maps: Maps,
    sources: Mapping[str, tuple[tuple[str, ...], Array]],
    target: tuple[str, ...],
    sizes: tuple[int, ...],
    pool: Pool,
    at: str,
) -> Float[Array, "*sizes fan_out"]:
    """Sum the maps of all sources into one target: one product for all that is laid out alike."""
    if pool not in ("mean", "max"):
        raise ValueError(f'pool={pool!r}, and "mean" or "max" was due')
    if set(maps["kernel"]) != set(sources):
        drawn, came = sorted(maps["kernel"]), sorted(sources)
        raise ValueError(f"{at}drawn for the blocks {drawn}, and {came} came")
    biases = maps["bias"]
    layout = lambda before, after: tuple((after.index(i), i in before) for i in after)
    alike = {layout("", way[2:]): [(jnp.ones(1), b.reshape(1, -1))] for way, b in biases.items()}
    for name, (source, x) in sources.items():
        kernels = maps["kernel"][name]
        ways = list(_ways(source, target))
        fan_in = {kernel.shape[0] for kernel in kernels.values()}
        if set(kernels) != set(ways) or fan_in != {x.shape[-1]}:
            raise ValueError(
                f"{at}block {name!r}: drawn for {sorted(fan_in)} channels (fixed dimensions "
                f"included) and {sorted(kernels)}, and {x.shape[-1]} and {sorted(ways)} came"
            )
        for way in ways:
            before, after = way.split("->")
            terms = alike.setdefault(layout(before, after), [])
            terms.append((_pool(x, before, after, pool), kernels[way]))
    total = jnp.zeros((*sizes, next(iter(biases.values())).size))
    for where, terms in alike.items():
        inputs = jnp.concatenate([x for x, _ in terms], -1)
        kernel = jnp.concatenate([kernel for _, kernel in terms])
        total = total + _spread(inputs @ kernel, where, sizes)
    return total


def _pool(x: Array, source: str, target: str, pool: Pool) -> Array:
    """Take diagonals, pool over what the target has not, and order the rest as there."""
    distinct = "".join(dict.fromkeys(source))
    if distinct != source:
        x = jnp.einsum(f"{source}...->{distinct}...", x)
    gone = tuple(d for d, letter in enumerate(distinct) if letter not in target)
    if gone:
        x = x.mean(gone) if pool == "mean" else x.max(gone)
    left = [target.index(letter) for letter in distinct if letter in target]
    return x.transpose(*np.argsort(left), -1)


def _spread(y: Array, layout: tuple[tuple[int, bool], ...], sizes: tuple[int, ...]) -> Array:
    """Give y the dimensions of the target: broadcastable, and zero beside diagonals.

    layout: of each dimension of the target, the first that shares its index, and whether y has it.
    """
    has = [given and first == d for d, (first, given) in enumerate(layout)]
    rows = [n if given else 1 for n, given in zip(sizes, has, strict=True)]
    y = y.reshape(*rows, y.shape[-1])
    for d, (first, _) in enumerate(layout):
        if first != d:
            shape = [n if i in (first, d) else 1 for i, n in enumerate(sizes)]
            y = y * jnp.eye(sizes[d]).reshape(*shape, 1)
    return y


# ------------------------------------------------------------------------------------ the blocks


def _named(block: trace.Block) -> tuple[str, ...]:
    return tuple(name for name in block.axes if name is not None)


def _signature(params: PyTree, axes: PyTree) -> dict[str, tuple[tuple[str, ...], int]]:
    """Return the axes of every block, and the number of its fixed positions."""
    found = {}
    for name, block in trace.blocks(params, axes).items():
        if tree.is_inexact(block.array):
            pairs = zip(block.array.shape, block.axes, strict=True)
            found[name] = _named(block), math.prod(n for n, axis in pairs if axis is None)
    if not any(names for names, _ in found.values()):
        raise ValueError(
            "no float leaf has an axis: there is no unit to permute (a hidden layer was due), and "
            "the layer would be a dense one"
        )
    return found


def _shapes(
    sizes: Mapping[str, tuple[tuple[str, ...], int]],
    target: tuple[str, ...],
    out: tuple[int, ...],
    channels: int,
) -> Maps:
    """Return the shapes of all maps into one target, and of its biases."""
    if channels < 1 or out[-1] < 1:
        raise ValueError(f"{channels} channels in and {out[-1]} out, and 1 or more were due")
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)
    return {
        "kernel": {
            name: {way: shape(fixed * channels, math.prod(out)) for way in _ways(source, target)}
            for name, (source, fixed) in sizes.items()
        },
        "bias": {way: shape(*out) for way in _ways((), target)},
    }


def _draw(key: PRNGKeyArray, shapes: dict[str, Maps]) -> dict[str, Maps]:
    """Draw the maps into each target: of unit variance out of unit variance, biases zero."""
    keys = tree.keys(key, dict.fromkeys(shapes, 0), "equivariant")
    out = {}
    for name, maps in shapes.items():
        kernels, structure = jax.tree.flatten(maps["kernel"])
        std = max(sum(kernel.shape[0] for kernel in kernels), 1) ** -0.5
        ends = np.cumsum([kernel.size for kernel in kernels])
        parts = jnp.split(std * jax.random.normal(keys[name], (ends[-1],)), ends[:-1])
        drawn = [x.reshape(s.shape) for x, s in zip(parts, kernels, strict=True)]
        bias = {way: jnp.zeros(s.shape, s.dtype) for way, s in maps["bias"].items()}
        out[name] = {"kernel": jax.tree.unflatten(structure, drawn), "bias": bias}
    return out


def _fold(
    features: PyTree, axes: PyTree
) -> tuple[dict[str, trace.Block], dict[str, tuple[tuple[str, ...], Array]]]:
    """Cut the features; and of float blocks, bring the axes in front of all channels."""
    structure = jax.tree.structure(features)
    longer = []
    for (path, x), entry in zip(
        tree.flatten(features).items(), structure.flatten_up_to(axes), strict=True
    ):
        if tree.is_inexact(x) and x.ndim != len(entry) + 1:
            raise ValueError(
                f"{path!r} is {x.shape}, and {len(entry)} dimensions and one of channels were due"
            )
        longer.append((*entry, None) if tree.is_inexact(x) else entry)
    cut = trace.blocks(features, jax.tree.unflatten(structure, longer))
    folded = {}
    for name, block in cut.items():
        if tree.is_inexact(block.array):
            x = tree.float32(block.array).transpose(_order(block))
            names = _named(block)
            sizes = x.shape[: len(names)]
            folded[name] = names, x.reshape(*sizes, math.prod(x.shape[len(names) :]))
    return cut, folded


def _order(block: trace.Block) -> list[int]:
    """Order the dimensions: those along axes, then the fixed ones and the channels."""
    return sorted(range(len(block.axes)), key=lambda d: block.axes[d] is None)


def _unfold(y: Array, like: trace.Block, channels: int) -> Array:
    order = _order(like)
    shape = [like.array.shape[d] for d in order[:-1]]
    y = y.reshape(*shape, channels).transpose(np.argsort(order))
    return y.astype(like.array.dtype)


def _first_channel(x: Any) -> Any:
    return x[..., 0] if tree.is_inexact(x) else x
