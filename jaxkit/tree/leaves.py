"""Leaves by path: name them, choose them, give them keys.

A leaf's *path* is its key path joined by ``/``: ``params/Dense_0/kernel``. The same three forms
of `where` choose leaves everywhere in jaxkit:

* a glob over the path: ``*`` stays within one component, ``**`` spans any number of them, and a
  sequence of globs chooses what any of them matches;
* a callable ``(path, leaf) -> bool``;
* a tree of bools with the structure of the tree it chooses from;

and ``None``, the default, stands for `is_weight`: two or more dimensions and no bias, scale, norm
or embedding by name. Only inexact arrays (float and complex) can be chosen; every other leaf
passes through every function untouched.
"""

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Inexact, PRNGKeyArray, PyTree

Where = str | Sequence[str] | Callable[[str, Any], bool] | PyTree | None

__all__ = [
    "Where",
    "check_key",
    "check_like",
    "chosen",
    "concrete",
    "every",
    "flatten",
    "float32",
    "is_array",
    "is_inexact",
    "is_weight",
    "keys",
    "map",
    "paths",
    "ravel",
    "replace",
    "select",
]


# ------------------------------------------------------------------------------------- paths


def _spell(key_path) -> str:
    parts = [jax.tree_util.keystr((k,), simple=True) for k in key_path]
    if len(parts) > 1 and parts[-1] == "value":
        last = key_path[-1]
        if isinstance(last, jax.tree_util.GetAttrKey):  # the array inside an NNX Variable
            parts.pop()
    return "/".join(parts)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Return the leaves by path, in leaf order.

    Raises:
      ValueError: two leaves have the same path (``{"a/b": x}`` beside ``{"a": {"b": y}}``).

    >>> list(flatten({"Dense_0": {"bias": 0.0, "kernel": 1.0}, "blocks": [2.0, 3.0]}))
    ['Dense_0/bias', 'Dense_0/kernel', 'blocks/0', 'blocks/1']
    """
    out: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = _spell(key_path)
        if path in out:
            raise ValueError(f"two leaves have the path {path!r}; rename one of them")
        out[path] = leaf
    return out


def paths(tree: PyTree) -> PyTree[str]:
    """Return the tree with every leaf replaced by its path.

    >>> paths({"a": {"w": 1.0}, "b": [2.0]})
    {'a': {'w': 'a/w'}, 'b': ['b/0']}
    """
    return jax.tree.unflatten(jax.tree.structure(tree), list(flatten(tree)))


def first_difference(a: PyTree, b: PyTree) -> str:
    left, right = flatten(a), flatten(b)
    for path in [*left, *right]:
        if path not in right or path not in left:
            return f"{path!r} is only in the {'first' if path in left else 'second'}"
    return f"the containers differ: {jax.tree.structure(a)} and {jax.tree.structure(b)}"


def check_like(params: PyTree, other: PyTree, what: str = "tree") -> None:
    """Raise unless `other` has the tree structure and the leaf shapes of `params`.

    Raises:
      ValueError: naming `what` and the first path that differs.

    >>> check_like({"w": jnp.ones(2)}, {"w": jnp.ones(3)}, "mask")
    Traceback (most recent call last):
    ...
    ValueError: the mask does not fit params: 'w' has shape (3,), and (2,) was due
    """
    if jax.tree.structure(params) != jax.tree.structure(other):
        raise ValueError(
            f"the {what} does not fit params: {first_difference(params, other)} "
            f"(first: params, second: {what})"
        )
    for (path, leaf), got in zip(flatten(params).items(), jax.tree.leaves(other), strict=True):
        if is_array(leaf) and np.shape(got) != np.shape(leaf):
            raise ValueError(
                f"the {what} does not fit params: {path!r} has shape {np.shape(got)}, "
                f"and {np.shape(leaf)} was due"
            )


# ------------------------------------------------------------------------------------- where

_NORM = re.compile(
    r"(?i)(.*_)?(batch|layer|group|instance|rms)?_?norm(alization)?_?\d*|bn_?\d*|ln(_\w+|\d*)"
)
_SMALL = re.compile(r"(?i)(.*_)?(bias|scale|gain|gamma|beta|offset|embeddings?)|b|g")
_EMBED = re.compile(r"(?i)(.*_)?embed(ding|dings|der)?(_\w+|\d*)|w[tp]e")


def is_array(leaf: Any) -> bool:
    """Tell whether a leaf is an array, or stands for one (a tracer, a ShapeDtypeStruct)."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_inexact(leaf: Any) -> bool:
    """Tell whether a leaf is an array of floats or complex numbers: what jaxkit transforms."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_weight(path: str, leaf: Any) -> bool:
    """Tell whether a leaf is a weight: the default of every `where`.

    A weight is an inexact array of two or more dimensions that is no bias, scale, norm or
    embedding by name. (Dimensions alone do not tell: an attention bias is a (heads, size)
    matrix, and a scan over layers stacks biases and scales.) The name is read off the path: its
    last part (``bias``, ``scale``, ``embedding``, ...), a part that names a normalization layer
    (``LayerNorm_0``, ``bn1``, ``ln_f``), or a part that names an embedding (``Embed_0``, ``wte``)
    unless the leaf is its ``kernel`` or ``w``, as in the convolution of a patch embedding.

    >>> is_weight("params/Dense_0/kernel", jnp.ones((2, 3)))
    True
    >>> is_weight("params/LayerNorm_0/scale", jnp.ones((12, 3)))
    False
    """
    *modules, name = path.split("/")
    return (
        is_inexact(leaf)
        and len(leaf.shape) >= 2
        and not _SMALL.fullmatch(name)
        and not any(_NORM.fullmatch(part) for part in path.split("/"))
        and (name in ("kernel", "w") or not any(_EMBED.fullmatch(part) for part in modules))
    )


def _compile(glob: str) -> re.Pattern[str]:
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif glob.startswith("**", i):
            out, i = out + ".*", i + 2
        elif glob[i] in "*?":
            out, i = out + ("[^/]*" if glob[i] == "*" else "[^/]"), i + 1
        else:
            out, i = out + re.escape(glob[i]), i + 1
    return re.compile(out)


def _match(glob: str, leaves: dict[str, Any]) -> set[str]:
    pattern = _compile(glob)
    hits = {path for path in leaves if pattern.fullmatch(path)}
    chosen = {path for path in hits if is_inexact(leaves[path])}
    if not chosen:
        if hits:
            raise ValueError(f"where={glob!r} matches only leaves that are no float arrays: {hits}")
        parts = [part for part in glob.split("/") if part != "**"]
        likeness = lambda path: difflib.SequenceMatcher(
            None, "/".join(parts), "/".join(path.split("/")[-len(parts) :])
        ).ratio()
        ranked = sorted(leaves, key=likeness, reverse=True)
        near = ", ".join(f"{path!r}" for path in ranked[:3]) or "none: the tree is empty"
        raise ValueError(f"where={glob!r} matches no leaf; the nearest paths: {near}")
    return chosen


def select(tree: PyTree, where: Where = None) -> PyTree[bool]:
    """Return a tree of Python bools: True at the leaves that `where` chooses.

    Leaves that are not inexact arrays are never chosen.

    Raises:
      ValueError: a glob or a callable that chooses no leaf, or a tree of another structure.
      TypeError: a tree whose leaves are not single bools.

    >>> params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "step": jnp.array(3)}
    >>> select(params)
    {'a': {'bias': False, 'kernel': True}, 'step': False}
    >>> select(params, "**/bias")
    {'a': {'bias': True, 'kernel': False}, 'step': False}
    >>> select(params, "**/kernels")
    Traceback (most recent call last):
    ...
    ValueError: where='**/kernels' matches no leaf; the nearest paths: 'a/kernel', 'a/bias', 'step'
    """
    leaves = flatten(tree)
    structure = jax.tree.structure(tree)
    if isinstance(where, str):
        where = [where]
    if where is None:
        chosen = [is_weight(path, leaf) for path, leaf in leaves.items()]
    elif isinstance(where, Sequence) and where and all(isinstance(g, str) for g in where):
        hits = set().union(*(_match(glob, leaves) for glob in where))
        chosen = [path in hits for path in leaves]
    elif jax.tree.structure(where) == structure and not (
        callable(where) and structure.num_leaves == 1
    ):
        for path, bit in zip(leaves, jax.tree.leaves(where), strict=True):
            if not isinstance(bit, bool | np.bool_):
                raise TypeError(f"where takes one bool a leaf; {path!r} has a {type(bit).__name__}")
        bits = zip(leaves.values(), jax.tree.leaves(where), strict=True)
        chosen = [is_inexact(leaf) and bool(bit) for leaf, bit in bits]
    elif callable(where):
        chosen = [is_inexact(leaf) and bool(where(path, leaf)) for path, leaf in leaves.items()]
        if leaves and not any(chosen):
            raise ValueError(f"where={where!r} chooses none of the leaves {list(leaves)[:5]}")
    else:
        raise ValueError(
            f"where does not fit the tree: {first_difference(tree, where)} "
            "(first: the tree, second: where)"
        )
    return jax.tree.unflatten(structure, chosen)


def every(tree: PyTree) -> PyTree[bool]:
    """Return the `where` that chooses all inexact leaves, be there any or none.

    >>> every({"w": 1.0, "b": [2.0]})
    {'b': [True], 'w': True}
    """
    return jax.tree.map(lambda _: True, tree)


def map(fn: Callable[..., Any], tree: PyTree, *rest: PyTree, where: Where = None) -> PyTree:
    """Return the tree with ``fn(path, leaf, *rest_leaves)`` at the leaves that `where` chooses.

    Every other leaf is the same object as before. The trees in `rest` have the structure of `tree`.

    >>> map(lambda path, w: 2 * w, {"kernel": jnp.ones((1, 2)), "bias": 1.0})
    {'bias': 1.0, 'kernel': Array([[2., 2.]], dtype=float32)}
    """
    for other in rest:
        if jax.tree.structure(other) != jax.tree.structure(tree):
            raise ValueError(f"the trees differ: {first_difference(tree, other)}")
    return jax.tree.map(
        lambda bit, path, leaf, *others: fn(path, leaf, *others) if bit else leaf,
        select(tree, where),
        paths(tree),
        tree,
        *rest,
    )


def chosen(tree: PyTree, where: Where = None) -> dict[str, Inexact[Array, "..."]]:
    """Return the leaves that `where` chooses by path, in leaf order.

    >>> list(chosen({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2), "step": 3}))
    ['kernel']
    """
    bits = jax.tree.leaves(select(tree, where))
    return {p: leaf for (p, leaf), bit in zip(flatten(tree).items(), bits, strict=True) if bit}


def replace(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    """Return the tree with other leaves at some paths: what `chosen` took out, put back.

    So a function of the whole tree becomes one of the chosen leaves, to differentiate::

        grads = jax.grad(lambda w: loss_fn(tree.replace(params, w)))(tree.chosen(params, where))

    Raises:
      ValueError: a path that the tree does not have.

    >>> replace({"w": 1.0, "b": [2.0]}, {"b/0": 3.0})
    {'b': [3.0], 'w': 1.0}
    """
    own = flatten(tree)
    if unknown := [path for path in leaves if path not in own]:
        near = ", ".join(repr(p) for p in difflib.get_close_matches(unknown[0], own, 3, 0.0))
        raise ValueError(f"the tree has no leaf {unknown[0]!r}; the nearest: {near}")
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves.get(p, x) for p, x in own.items()])


# ------------------------------------------------------------------------------------- values


def concrete(*values: Any) -> bool:
    """Tell whether all leaves are known, that is no tracer: whether an error can depend on them.

    >>> concrete({"w": jnp.ones(2)}, 3.0), jax.eval_shape(lambda x: print(concrete(x)), 1.0)
    False
    (True, None)
    """
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values))


def float32(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """Return the array in float32, or as it is if its dtype is wider: what statistics sum in.

    >>> float32(jnp.ones(1, jnp.bfloat16)).dtype, float32(jnp.ones(1, jnp.complex64)).dtype
    (dtype('float32'), dtype('complex64'))
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# -------------------------------------------------------------------------------------- keys


def check_key(key: PRNGKeyArray) -> None:
    """Raise unless `key` is one typed key, made by ``jax.random.key``.

    Raises:
      TypeError: for a legacy uint32 key, an array of keys, or anything else.
    """
    if not is_array(key) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        came = f"{key.dtype}{list(key.shape)}" if is_array(key) else type(key).__name__
        raise TypeError(
            f"a typed key is due (jax.random.key(seed)), and {came} came; "
            "wrap a legacy key with jax.random.wrap_key_data(key)"
        )
    if key.shape:
        raise TypeError(f"one key is due, and an array of shape {key.shape} came; use jax.vmap")


def _words(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:8], "big")


def keys(key: PRNGKeyArray, tree: PyTree, tag: str) -> PyTree[PRNGKeyArray]:
    """Return a key for every leaf, that depends on `key`, `tag` and the leaf's path alone.

    ``fold_in(fold_in(fold_in(key, t), p0), p1)`` with t the first word of SHA-256 of `tag`, and p0
    and p1 the first two big-endian words of SHA-256 of the path. So adding, removing or sharding a
    leaf changes no other leaf's draw, and functions with different tags draw independently from
    one key. This is a file format: it does not change between versions.

    Raises:
      TypeError: `key` is not one typed key.

    >>> ks = keys(jax.random.key(0), {"a": 0.0, "b": 1.0}, "example")
    >>> bool(ks["a"] == keys(jax.random.key(0), {"a": 0.0}, "example")["a"])
    True
    """
    check_key(key)
    words = np.array([_words(path) for path in flatten(tree)], np.uint32).reshape(-1, 2)
    base = jax.random.fold_in(key, np.uint32(_words(tag)[0]))
    folded = jax.vmap(lambda w: jax.random.fold_in(jax.random.fold_in(base, w[0]), w[1]))(words)
    return jax.tree.unflatten(jax.tree.structure(tree), [folded[i] for i in range(len(words))])


# ------------------------------------------------------------------------------------- ravel


def ravel(tree: PyTree, where: Where = None) -> tuple[Inexact[Array, " n"], Callable]:
    """Return the chosen leaves as one vector, and the function that puts a vector back.

    The vector has the common dtype of the chosen leaves (float32 where there is none); `unravel`
    gives every leaf its own dtype again, and the leaves that were not chosen as they were.

    >>> vector, unravel = ravel({"kernel": jnp.arange(4.0).reshape(2, 2), "bias": jnp.ones(2)})
    >>> vector.tolist()
    [0.0, 1.0, 2.0, 3.0]
    >>> unravel(vector + 1)["kernel"].tolist()
    [[1.0, 2.0], [3.0, 4.0]]
    """
    chosen = jax.tree.leaves(select(tree, where))
    leaves, structure = jax.tree.flatten(tree)
    picked = [leaf for leaf, bit in zip(leaves, chosen, strict=True) if bit]
    dtype = jnp.result_type(*(leaf.dtype for leaf in picked)) if picked else jnp.float32
    parts = [jnp.ravel(leaf).astype(dtype) for leaf in picked]
    vector = jnp.concatenate(parts) if parts else jnp.zeros(0, dtype)

    def unravel(vector):
        if jnp.shape(vector) != (n := sum(leaf.size for leaf in picked),):
            raise ValueError(f"a vector of shape {(n,)} is due, and {jnp.shape(vector)} came")
        out, start = [], 0
        for leaf, bit in zip(leaves, chosen, strict=True):
            if bit:
                piece = vector[start : start + leaf.size]
                start += leaf.size
                leaf = piece.reshape(leaf.shape).astype(leaf.dtype)
            out.append(leaf)
        return jax.tree.unflatten(structure, out)

    return vector, unravel
