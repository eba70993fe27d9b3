"""Sparse differences of models: cut them out, keep them small, add them to the base."""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8

from jaxkit import tree

__all__ = ["Entries", "Patch", "compose", "difference", "fingerprint", "revert"]


class Entries(NamedTuple):
    """What changes in a leaf: the index of each entry (k, ndim), and by how much (k,)."""

    index: Int[Array, "k ndim"]
    value: Float[Array, " k"]


class Patch(NamedTuple):
    """A sparse difference: the fingerprint of its base, changes by path, leaves kept as a whole."""

    base: UInt8[np.ndarray, "32"]
    entries: dict[str, Entries]
    whole: dict[str, Array]


def fingerprint(params: PyTree) -> UInt8[np.ndarray, "32"]:
    """Return SHA-256 over the paths, dtypes, shapes and bytes of all arrays.

    >>> a, b = fingerprint({"w": jnp.zeros(2)}), fingerprint({"w": jnp.array([0.0, -0.0])})
    >>> a.shape, bool((a == b).all())
    ((32,), False)
    """
    digest = hashlib.sha256()
    for path, leaf in tree.flatten(params).items():
        if tree.is_array(leaf):
            value = np.asarray(leaf)
            digest.update(f"{path}:{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def difference(
    after: PyTree,
    before: PyTree,
    *,
    base: PyTree | None = None,
    whole: tree.Where = lambda path, leaf: False,
    tolerance: float = 1e-7,
) -> Patch:
    """Cut out what fine-tuning changed: phi = w_after - w_before, entry by entry.

    Runs on the host: how many entries there are depends on the values. The patch is a tree of
    arrays, which orbax keeps.

    Args:
      after: the params after it, trained inside ``constrain(tx, mask)``.
      before: those at its beginning.
      base: the params that the patch is meant for, if `before` is already base + another patch;
        `compose` checks it. Default: before.
      whole: leaves that are stored by value (a head), and replaced on composing.
      tolerance: changes up to this are dropped.

    Raises:
      ValueError: trees that do not fit (an embedding tied in one of them, say).

    Reference: A. Ansell, E. M. Ponti, A. Korhonen, I. Vulić, "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer", arXiv:2110.07560.

    >>> phi = difference({"w": jnp.array([1.0, 5.0])}, {"w": jnp.array([1.0, 2.0])})
    >>> phi.entries["w"].index.tolist(), phi.entries["w"].value.tolist()
    ([[1]], [3.0])
    """
    tree.check_like(before, after, "fine-tuned tree")
    kept, entries = {}, {}
    for (path, w), new in zip(tree.flatten(before).items(), jax.tree.leaves(after), strict=True):
        if not tree.is_inexact(w):
            continue
        if _is_whole(whole, before, path, w):
            kept[path] = jnp.array(new)
            continue
        delta = np.asarray(tree.float32(new)) - np.asarray(tree.float32(w))
        delta = np.atleast_1d(delta)
        index = np.argwhere(np.abs(delta) > tolerance)
        if len(index):
            value = delta[tuple(index.T)]
            entries[path] = Entries(jnp.asarray(index, jnp.int32), jnp.asarray(value))
    return Patch(fingerprint(before if base is None else base), entries, kept)


def _is_whole(whole: tree.Where, params: PyTree, path: str, leaf: Any) -> bool:
    if callable(whole):
        return bool(whole(path, leaf))
    return path in tree.chosen(params, whole)


def compose(params: PyTree, *patches: Patch) -> PyTree:
    """Add sparse differences to their base: w = w_0 + phi_1 + phi_2 + ...; whole leaves replace.

    The order does not matter but for rounding, and not at all where they touch different entries.
    To leave out the head of one of them: ``patch._replace(whole={})``.

    Args:
      params: the base.
      patches: from `difference`.

    Raises:
      ValueError: a patch made for other params (known ones; a traced tree is not looked at), a path
        or an index that the params do not have, two patches that replace the same leaf.

    >>> base = {"w": jnp.array([1.0, 2.0])}
    >>> a = difference({"w": jnp.array([1.0, 5.0])}, base)
    >>> b = difference({"w": jnp.array([0.0, 2.0])}, base)
    >>> compose(base, a, b)["w"].tolist()
    [0.0, 5.0]
    """
    if tree.concrete(params, patches):
        own = fingerprint(params)
        for i, patch in enumerate(patches):
            if not np.array_equal(own, patch.base):
                raise ValueError(f"patch {i} was made for other params: the fingerprints differ")
    replaced: dict[str, Array] = {}
    for patch in patches:
        if both := replaced.keys() & patch.whole.keys():
            raise ValueError(f"two patches replace {sorted(both)}: drop one (whole={{}})")
        replaced |= patch.whole
    return _add(params, patches, 1.0, replaced)


def revert(params: PyTree, *patches: Patch) -> PyTree:
    """Subtract sparse differences again: w - phi_1 - phi_2 - ..., up to rounding.

    Leaves that were replaced as a whole stay replaced: a patch does not hold what was there.

    Raises:
      ValueError: a path or an index that the params do not have.

    >>> base = {"w": jnp.array([1.0, 2.0])}
    >>> phi = difference({"w": jnp.array([1.0, 5.0])}, base)
    >>> revert(compose(base, phi), phi)["w"].tolist()
    [1.0, 2.0]
    """
    return _add(params, patches, -1.0, {})


def _add(params: PyTree, patches: tuple[Patch, ...], sign: float, whole: dict) -> PyTree:
    leaves = tree.flatten(params)
    for path in [*(p for patch in patches for p in patch.entries), *whole]:
        if path not in leaves:
            raise ValueError(f"the patch has {path!r}, which is no leaf of params")
    for path, new in whole.items():
        if jnp.shape(new) != jnp.shape(leaves[path]):
            shapes = f"{jnp.shape(new)}, and {jnp.shape(leaves[path])} is due"
            raise ValueError(f"the patch has {path!r} of shape {shapes}")

    def leaf(path, w):
        if path in whole:
            return whole[path].astype(w.dtype)
        found = [patch.entries[path] for patch in patches if path in patch.entries]
        total = jnp.atleast_1d(tree.float32(w)) if found else w
        for index, value in found:
            if index.shape[1] != total.ndim:
                raise ValueError(f"the patch has {index.shape[1]}-d indices at {path!r}")
            total = total.at[tuple(index.T)].add(sign * value, unique_indices=True)
        return total.reshape(w.shape).astype(w.dtype) if found else w

    return jax.tree.map(leaf, tree.paths(params), params)
