"""Layer tickets: whole residual blocks that may go, and which of them.

A block is given by its leaves, ``{name: where}``. Removing it is masking all of them: a branch that
adds into a stream, y = x + F(x), is then the identity, and so is the module without the branch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask, keep_where
from jaxkit.probes.similarity import cka
from jaxkit.trace import resolve
from jaxkit.trace.names import members, pairs

__all__ = ["layer_mask", "layer_scores", "layer_tickets", "residual_blocks"]

Blocks = Mapping[str, tree.Where]


def residual_blocks(
    params: PyTree, axes: PyTree, roles: PyTree, blocks: Blocks | None = None
) -> dict[str, tree.Where]:
    """Find the blocks that read and write the same stream, or check that the given ones do.

    A block that may be skipped has output and input on the same axes: the axes that its kernels
    share with the rest of the network are produced by it exactly if it consumes them. (One that
    changes the shape of the stream produces another axis than it consumes.) Without `blocks`, all
    groups of leaves with a common path ``prefix/`` are tried, and the smallest that pass returned.

    What the axes do not tell is whether the branch is added: a multiplied gate passes as well, and
    so does a block that holds a normalization after the sum, which masks the stream too. Both leave
    features without signal, so that `layer_scores` gives them the importance 1.

    Args:
      params: a tree of arrays.
      axes: its axes tree, from `trace.axes`.
      roles: its roles, from `trace.roles`.
      blocks: the leaves of each block, by name.

    Returns:
      The blocks: {prefix: glob}, or those given.

    Raises:
      ValueError: a given block that may not be skipped (the legal ones are listed), or none found.

    >>> from jaxkit import trace
    >>> one = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
    >>> params = {"in": jnp.ones((3, 4)), "block0": one, "block1": one, "out": jnp.ones((4, 2))}
    >>> def net(params, x):
    ...     x = x @ params["in"]
    ...     for name in ("block0", "block1"):
    ...         x = x + jax.nn.relu(x @ params[name]["up"]) @ params[name]["down"]
    ...     return x @ params["out"]
    >>> x = jnp.ones((2, 3))
    >>> residual_blocks(params, trace.axes(net, params, x), trace.roles(net, params, x))
    {'block0': 'block0/**', 'block1': 'block1/**'}
    """
    kinds = jax.tree.structure(params).flatten_up_to(roles)
    read: dict[str, set[str]] = {}
    written: dict[str, set[str]] = {}
    for (path, _, entries), kind in zip(pairs(params, resolve(params, axes)), kinds, strict=True):
        for role, side in (("consumed", read), ("produced", written)):
            dims = zip(entries, kind.dims, strict=True) if kind.kind == "kernel" else ()
            side[path] = {a.name for e, r in dims if r == role for a in members(e)}
    legal = lambda inside: _reads_what_it_writes(inside, read, written)
    if blocks is None:
        found = _smallest(list(read), legal)
        if not found:
            raise ValueError("no group of leaves with a common prefix reads and writes one stream")
        return {prefix: f"{prefix}/**" for prefix in found}
    good = {name: w for name, w in blocks.items() if legal(set(tree.chosen(params, w)))}
    if bad := [name for name in blocks if name not in good]:
        raise ValueError(
            f"{bad} may not be skipped: what a block writes must be the stream that it reads; "
            f"the legal blocks: {list(good)}"
        )
    return dict(good)


def _reads_what_it_writes(inside: set[str], read: dict, written: dict) -> bool:
    union = lambda sides, paths: set().union(*(sides[p] for p in paths))
    others = read.keys() - inside
    elsewhere = union(read, others) | union(written, others)
    consumed, produced = union(read, inside) & elsewhere, union(written, inside) & elsewhere
    return bool(consumed) and consumed == produced


def _smallest(paths: list[str], legal: Callable[[set[str]], bool]) -> list[str]:
    parts = [path.split("/") for path in paths]
    prefixes = dict.fromkeys("/".join(p[:n]) for p in parts for n in range(1, len(p)))
    found = [p for p in prefixes if legal({q for q in paths if q.startswith(f"{p}/")})]
    return [p for p in found if not any(q.startswith(f"{p}/") for q in found)]


def layer_mask(params: PyTree, keep: Mapping[str, bool | Bool[Array, ""]], blocks: Blocks) -> Mask:
    """Turn a mask over blocks into a mask over entries: False at every leaf of a removed block.

    Args:
      params: a tree of arrays.
      keep: True or False by name of block; it may be traced, and vmapped over.
      blocks: the leaves of each block, by name.

    Raises:
      ValueError: a block that is not known, or that matches nothing.

    >>> params = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}
    >>> layer_mask(params, {"b": False}, {"a": "a/**", "b": "b/**"})
    {'a': {'w': Array([ True,  True], dtype=bool)},
     'b': {'w': Array([False, False, False], dtype=bool)}}
    """
    for name in keep:
        if name not in blocks:
            raise ValueError(f"no block is named {name!r}; the blocks: {list(blocks)}")
    mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool) if tree.is_array(w) else w, params)
    for name, bit in keep.items():
        chosen = tree.select(params, blocks[name])
        mask = jax.tree.map(lambda m, c, bit=bit: m & bit if c else m, mask, chosen)
    return mask


def layer_scores(
    features_fn: Callable[..., Float[Array, "n *features"]],
    params: PyTree,
    args: tuple,
    blocks: Blocks,
) -> dict[str, Float[Array, ""]]:
    """Score each block by how much its removal changes the features: 1 - CKA, larger = keep.

    CKA is that of the features of a batch in the network as it is and without the block (its
    branch the identity). A block after which no signal is left has the importance 1.

    Args:
      features_fn: ``features_fn(params, *args)``: the features of n examples before the last layer.
        At initialization a BatchNorm takes the statistics of the batch.
      params: a tree of arrays.
      args: the further arguments, a tuple: ``(x,)``, of 256 examples say.
      blocks: the leaves of each block, by name (`residual_blocks`).

    Raises:
      ValueError: a block that matches nothing.

    Reference: A. Jordao, G. Araujo, H. Maia, H. Pedrini, "When Layers Play the Lottery, all Tickets
    Win at Initialization", arXiv:2301.10835. (No code is public: that the features are the last
    ones, and that blocks go one by one, are choices made here.)

    >>> params = {"a": {"w": jnp.zeros((2, 2))}, "b": {"w": jnp.array([[0.0, 1.0], [0.0, 0.0]])}}
    >>> net = lambda p, x: (h := x + x @ p["a"]["w"]) + h @ p["b"]["w"]
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> scores = layer_scores(net, params, (x,), {"a": "a/*", "b": "b/*"})
    >>> {name: round(s.item(), 2) for name, s in scores.items()}
    {'a': 0.0, 'b': 0.3}
    """
    alive = jnp.ones(len(blocks), bool)
    scores = _importance(features_fn, params, args, blocks, alive)
    return dict(zip(blocks, scores, strict=True))


def _importance(features_fn, params, args, blocks: Blocks, alive: Bool[Array, " blocks"]) -> Array:
    """Return 1 - CKA without each block, in the network of the blocks that are alive."""

    def features(keep):
        mask = layer_mask(params, dict(zip(blocks, keep, strict=True)), blocks)
        return features_fn(keep_where(mask, params), *args)

    whole = features(alive)
    without = alive & ~jnp.eye(len(blocks), dtype=bool)
    return jax.lax.map(lambda keep: 1 - cka(whole, features(keep)), without)


def layer_tickets(
    features_fn: Callable[..., Float[Array, "n *features"]],
    params: PyTree,
    args: tuple,
    blocks: Blocks,
    *,
    remove: int,
) -> dict[str, Bool[Array, ""]]:
    """Remove blocks one by one: score those that are left, take out the least important, repeat.

    The ticket is trained from the values that its weights have now: ``masks.apply(params,
    masks.layer_mask(params, keep, blocks))``, or the module rebuilt without the blocks.

    Args:
      features_fn: as for `layer_scores`.
      params: a tree of arrays, at initialization or trained.
      args: the further arguments, a tuple.
      blocks: the leaves of each block, by name.
      remove: how many blocks go; all of them may.

    Returns:
      True by name for the blocks to keep: the `keep` of `layer_mask`.

    Raises:
      ValueError: more blocks to remove than there are.

    Reference: as `layer_scores`.

    >>> params = {"a": {"w": jnp.zeros((2, 2))}, "b": {"w": jnp.array([[0.0, 1.0], [0.0, 0.0]])}}
    >>> net = lambda p, x: (h := x + x @ p["a"]["w"]) + h @ p["b"]["w"]
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> keep = layer_tickets(net, params, (x,), {"a": "a/*", "b": "b/*"}, remove=1)
    >>> {name: bool(bit) for name, bit in keep.items()}
    {'a': False, 'b': True}
    """
    if not 0 <= remove <= len(blocks):
        raise ValueError(f"remove={remove}, and there are {len(blocks)} blocks")

    def one(alive: Any, _: Any) -> Any:
        scores = _importance(features_fn, params, args, blocks, alive)
        return alive & (
            jnp.arange(len(blocks)) != jnp.argmin(jnp.where(alive, scores, jnp.inf))
        ), ()

    alive, _ = jax.lax.scan(one, jnp.ones(len(blocks), bool), None, remove)
    return dict(zip(blocks, alive, strict=True))
