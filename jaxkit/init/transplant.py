"""Warm starts: the weights of one model in another one, with a report that leaves nothing unsaid.

Self-pretraining, perceptual initialization and every change of a head are `transplant` between two
models: the tasks that come before it are in `jaxkit.init.pretrain`.

References: I. Amos, J. Berant, A. Gupta, "Never Train from Scratch: Fair Comparison of
Long-Sequence Models Requires Data-Driven Priors", arXiv:2310.02980; Y. Hu, R. Wang, S. C. Zhao,
X. Zhan, D. H. Kim, M. Wallace, D. A. Tovar, "Beginning with You: Perceptual-Initialization Improves
Vision-Language Representation and Alignment", arXiv:2505.14204.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit import tree

__all__ = ["Transplanted", "crop", "resize", "transplant"]

Adapt = Callable[[str, Array, Array], Array | None]
Rename = Mapping[str, str | None] | Callable[[str], str | None]


class Transplanted(NamedTuple):
    """What `transplant` did; every leaf of both trees is in it. ``str()`` of it is a list.

    Attributes:
      loaded: ``(path, source path)`` of the leaves that are the source's, bit for bit.
      adapted: ``(path, source path, how)`` of those that had to change shape or dtype.
      skipped: ``(path, reason)`` of those that stay as they were in the target.
      unused: the paths of the source that went nowhere.
    """

    loaded: tuple[tuple[str, str], ...]
    adapted: tuple[tuple[str, str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        origin = lambda path, source: "" if path == source else f" from {source}"
        lines = [f"loaded   {path}{origin(path, source)}" for path, source in self.loaded]
        lines += [f"adapted  {p}{origin(p, source)}: {how}" for p, source, how in self.adapted]
        lines += [f"skipped  {path}: {reason}" for path, reason in self.skipped]
        lines += [f"unused   {path} of the source" for path in self.unused]
        return "\n".join(lines)


def crop(path: str, source: Array, target: Array) -> Array | None:
    """Take the leading entries along every axis; None where the source has fewer.

    It drops the last input of a first layer: the encoder that has seen ``[x, mask]`` is, on x, what
    it was on ``[x, 0]``.

    >>> import jax.numpy as jnp
    >>> crop("kernel", jnp.arange(6.0).reshape(3, 2), jnp.zeros((2, 2))).tolist()
    [[0.0, 1.0], [2.0, 3.0]]
    """
    shape = np.shape(target)
    fits = len(shape) == np.ndim(source) and all(
        a >= b for a, b in zip(np.shape(source), shape, strict=True)
    )
    return source[tuple(slice(size) for size in shape)] if fits else None


def resize(path: str, source: Array, target: Array) -> Array | None:
    """Interpolate linearly along every axis whose size differs: tables of positions.

    None where the numbers of dimensions differ. float32 inside.

    >>> import jax.numpy as jnp
    >>> resize("positions", jnp.array([[0.0], [2.0]]), jnp.zeros((4, 1)))[:, 0].tolist()
    [0.0, 0.5, 1.5, 2.0]
    """
    if np.ndim(source) != np.ndim(target):
        return None
    wide = tree.float32(source)
    return jax.image.resize(wide, np.shape(target), "linear", antialias=False).astype(source.dtype)


def transplant(
    source: PyTree,
    target: PyTree,
    *,
    rename: Rename | None = None,
    adapt: Adapt | Mapping[str, Adapt] | None = None,
    where: tree.Where = None,
) -> tuple[PyTree, Transplanted]:
    """Put the leaves of `source` into `target`, by path.

    A leaf of the target is *loaded* if the source has one of its path and shape; *adapted* if
    `adapt` makes one of its shape, or if only the dtype differs (the target's is kept); *skipped*
    if not. Read the report: a warm start that half fails trains as well as one from scratch.

    Loaded leaves are the source's arrays themselves: copy them before donating either tree.

    Args:
      source: any tree of arrays.
      target: the initialized params of the new model, or their shapes.
      rename: source path -> target path, where they differ: a function (None drops the leaf), or
        ``{prefix: new prefix}`` on whole components (``{"encoder": "model", "head": None}``; of
        several that fit the longest counts; "" fits all).
      adapt: ``adapt(path, source leaf, target leaf) -> array or None`` for leaves of different
        shapes, `crop` and `resize` among them, or ``{glob: adapt}``.
      where: leaves of the target that must be filled: an error if one is not. Others are not
        touched. Default: all leaves, none of which must.

    Raises:
      ValueError: no leaf of the target is filled; a leaf that `where` chooses is not, with the
        reason; two leaves of the source with one new path; an adapted leaf of another shape.

    >>> import jax.numpy as jnp
    >>> source = {"encoder": {"kernel": jnp.ones((3, 2))}, "decoder": jnp.ones((2, 3))}
    >>> target = {"encoder": {"kernel": jnp.zeros((2, 2))}, "head": jnp.zeros((2, 5))}
    >>> params, report = transplant(source, target, adapt=crop)
    >>> print(report)
    adapted  encoder/kernel: (3, 2) -> (2, 2)
    skipped  head: the source has no such leaf; its nearest: ...
    unused   decoder of the source
    """
    given: dict[str, tuple[str, Any]] = {}
    unused = []
    for path, leaf in tree.flatten(source).items():
        new = _renamed(path, rename)
        if new is None or not tree.is_array(leaf):
            unused.append(path)
        elif new in given:
            raise ValueError(f"{path!r} and {given[new][0]!r} of the source both become {new!r}")
        else:
            given[new] = path, leaf
    must = dict.fromkeys(tree.flatten(target), False)
    if where is not None:
        must = tree.flatten(tree.select(target, where))
    loaded, adapted, skipped, out = [], [], [], []
    for path, leaf in tree.flatten(target).items():
        new, how = None, ""
        if where is not None and not must[path]:
            how = "not chosen"
        elif not tree.is_array(leaf):
            how = "no array"
        elif path not in given:
            how = f"the source has no such leaf; its nearest: {_nearest(path, given)}"
        else:
            new, how = _fill(path, given[path][1], leaf, adapt)
        if new is None:
            if must[path]:
                raise ValueError(f"{path!r} of the target cannot be filled: {how}")
            skipped.append((path, how))
        else:
            name, _ = given.pop(path)
            (adapted.append((path, name, how)) if how else loaded.append((path, name)))
        out.append(leaf if new is None else new)
    if not loaded and not adapted:
        reasons = "\n".join(f"  {path!r}: {reason}" for path, reason in skipped)
        raise ValueError(f"no leaf of the target could be filled from the source\n{reasons}")
    unused = [*unused, *(name for name, _ in given.values())]
    order = [path for path in tree.flatten(source) if path in unused]
    report = Transplanted(tuple(loaded), tuple(adapted), tuple(skipped), tuple(order))
    return jax.tree.unflatten(jax.tree.structure(target), out), report


def _renamed(path: str, rename: Rename | None) -> str | None:
    if rename is None:
        return path
    if callable(rename):
        return rename(path)
    fits = [p for p in rename if p == "" or path == p or path.startswith(p + "/")]
    if not fits:
        return path
    prefix = max(fits, key=len)
    new, rest = rename[prefix], path[len(prefix) :].strip("/")
    return None if new is None else "/".join(part for part in (new, rest) if part)


def _nearest(path: str, given: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(path, list(given), 2, 0)
    return ", ".join(map(repr, near)) or "none is left"


def _fill(path: str, old: Any, leaf: Any, adapt) -> tuple[Any, str]:
    """Return the new leaf and what had to change, or None and the reason."""
    new, how = old, ""
    if np.shape(old) != np.shape(leaf):
        how = f"{np.shape(old)} -> {np.shape(leaf)}"
        if isinstance(adapt, Mapping):
            fits = [fn for glob, fn in adapt.items() if _meets(path, leaf, glob)]
            adapt = fits[0] if fits else None
        new = adapt(path, old, leaf) if adapt else None
        if new is None:
            return None, f"shape {np.shape(old)} in the source, {np.shape(leaf)} in the target"
        if np.shape(new) != np.shape(leaf):
            raise ValueError(
                f"{path!r} was adapted to {np.shape(new)}, and {np.shape(leaf)} was due"
            )
    if new.dtype != leaf.dtype:
        how = f"{how}, {old.dtype} -> {leaf.dtype}".lstrip(", ")
        new = new.astype(leaf.dtype)
    return new, how


def _meets(path: str, leaf: Any, glob: str) -> bool:
    try:
        return jax.tree.leaves(tree.select(_nest(path, leaf), glob)) == [True]
    except ValueError:
        return False


def _nest(path: str, leaf: Any) -> PyTree:
    for part in reversed(path.split("/")):
        leaf = {part: leaf}
    return leaf
