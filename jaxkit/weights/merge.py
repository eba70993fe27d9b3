"""Merging: many sets of weights become one, leaf by leaf, as base + scale * combined deltas.

A `Method` says how the deltas of one leaf are combined; `merge` reads the models, checks them, and
does the same to every leaf. The methods are in `jaxkit.weights.methods`.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Inexact, PyTree

from jaxkit import tree

Deltas = dict[str, Inexact[Array, "models ..."]]
Models = Sequence[PyTree] | PyTree

__all__ = ["Method", "Models", "combine", "deltas", "interpolate", "merge"]


class Method(NamedTuple):
    """How the deltas of many models become one, leaf by leaf.

    A delta is what a model adds to the base, or the model itself where there is no base: float32
    (or wider), of shape (models, *shape).

    Attributes:
      combine: ``combine(path, deltas, aux) -> merged``, from (models, *shape) to (*shape). It sees
        one leaf, may be jitted, and depends on the path only for its random draws and for
        coefficients given by path.
      prepare: None if every leaf is merged for itself (aux is None then), so that `combine` can
        stream over leaves. Else ``prepare({path: deltas}) -> {path: aux}`` looks at all leaves
        together (one threshold for the whole tree); what it returns for a leaf is a few numbers.
      needs_base: the method is about deltas to a base, and means nothing without one.
      steps: what `combine` does first, to the deltas of each model for itself: `Window`, `Drop`.
      blend: ``blend(deltas) -> merged``, what `combine` does after the steps, if it looks at one
        entry at a time and does the same at every leaf; else None. With these two a merge can
        stream, model by model and piece by piece (`merge_files`).
    """

    combine: Callable[[str, Array, Any], Array]
    prepare: Callable[[Deltas], dict[str, Any]] | None = None
    needs_base: bool = True
    steps: tuple[Any, ...] = ()
    blend: Callable[[Array], Array] | None = None


def combine(
    stack: Inexact[Array, "models *shape"],
    coefficients: Float[Array, " models"] | Float[Array, "models *shape"],
    *,
    normalize: bool = True,
) -> Inexact[Array, "*shape"]:
    """Return sum_i c_i x_i, of c_i / sum_j c_j in place of c_i if `normalize`.

    Uniform and learned soups, task arithmetic, sign election, Fisher-weighted averaging and
    competition balancing differ in c alone.

    Args:
      stack: one leaf of all models.
      coefficients: a number a model, or an array a model that broadcasts to the leaf.
      normalize: divide by the sum of the coefficients. Entries where it is 0 become 0.

    >>> combine(jnp.array([[1.0, 2.0], [3.0, 6.0]]), jnp.array([3.0, 1.0])).tolist()
    [1.5, 3.0]
    >>> combine(jnp.array([[1.0, 2.0], [3.0, 6.0]]), jnp.array([[1.0, 0.0], [0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    c = jnp.asarray(coefficients, jnp.finfo(stack.dtype).dtype)
    c = c.reshape(c.shape + (1,) * (stack.ndim - c.ndim))
    if normalize:
        whole = total(c)
        share = jnp.where(c == whole, 1, c / jnp.where(whole == 0, 1, whole))  # one alone: exactly
        c = jnp.where(whole == 0, 0, share)
    return total(c * stack)


def total(stack: Inexact[Array, "models *shape"]) -> Inexact[Array, "*shape"]:
    """Return the sum over the models, written out as additions.

    On a CPU, XLA compiles a reduction over the first axis to a loop that is some thirty times
    slower.
    """
    return reduce(operator.add, stack) if 0 < len(stack) <= 64 else stack.sum(0)


def merge(
    base: PyTree | None,
    models: Models,
    method: Method,
    *,
    scale: float | Array | PyTree = 1.0,
    where: tree.Where = "**",
) -> PyTree:
    """Merge models: base + scale * combine(deltas), with deltas_i = model_i - base.

    Without a base the deltas are the models themselves. Everything is computed in float32 (or
    wider), and every leaf keeps its dtype. Under jit it is one program, which may be vmapped over
    the scale and over the numbers of the method: fifty scales are one call::

        sweep = jax.vmap(lambda s: weights.merge(base, models, weights.ties(), scale=s))
        candidates = jax.jit(sweep)(jnp.linspace(0.1, 1.5, 50))

    Args:
      base: what the models were fine-tuned from, or None.
      models: a list or a tuple of trees like the base, or one tree with a leading model axis on
        every leaf (what a vmapped training returns).
      method: `average`, `task_arithmetic`, `ties`, `dare`, `breadcrumbs`, `pcb`, `model_stock`,
        `fisher_average`, or your own `Method`.
      scale: what the merged delta is multiplied by: a number, or a tree like params of numbers or
        of arrays that broadcast to the leaves. It may be traced.
      where: the leaves to merge; default: every float leaf, heads, biases and norms included. The
        others are those of the base, or of the first model if there is no base; so the heads of
        different label spaces are left out by ``where`` (they may differ in shape, too), and what
        the base has there is what comes out.

    Returns:
      A tree like the base (like each model, without one). Integer leaves (and whatever else is no
      float) are never averaged: all models and the base must have the same.

    Raises:
      ValueError: no models; trees, shapes or dtypes that differ, naming the first path; an integer
        leaf that differs, or NaN in a leaf that is merged (both are looked at if the values are
        known: under jit the first model's integers and NaN come out); no base for a method that
        needs one; a scale without a base; and what the method raises.

    After merging a model with BatchNorm, run it over some data to renew its statistics.

    >>> from jaxkit import weights
    >>> base = {"kernel": jnp.zeros((1, 2)), "bias": jnp.ones(2)}
    >>> a = {"kernel": jnp.array([[1.0, 4.0]]), "bias": jnp.ones(2)}
    >>> b = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.ones(2)}
    >>> merge(base, [a, b], weights.task_arithmetic(), scale=0.5)["kernel"].tolist()
    [[2.0, 2.0]]
    >>> merge(None, [a, {"kernel": jnp.ones((1, 2))}], weights.average())
    Traceback (most recent call last):
    ...
    ValueError: the model 1 does not fit params: 'bias' is only in the first ...
    """
    if base is None and method.needs_base:
        raise ValueError("this method is about deltas: give the base that the models started from")
    scales = _scales(scale, base)
    template, stacks = _read(base, models, where)
    taus = _minus(stacks, template if base is not None else None)
    aux = dict.fromkeys(taus) if method.prepare is None else method.prepare(taus)
    out = tree.flatten(template)
    for path, tau in taus.items():
        merged = method.combine(path, tau, aux[path])
        if base is not None:
            if path not in scales:
                raise ValueError(f"scale has no number for {path!r}")
            merged = tree.float32(jnp.asarray(out[path])) + scales[path] * merged
        if merged.shape != out[path].shape:
            raise ValueError(f"{path!r} became {merged.shape}, due is {out[path].shape}")
        out[path] = merged.astype(out[path].dtype)
    return tree.replace(template, out)


def deltas(base: PyTree | None, models: Models, *, where: tree.Where = "**") -> Deltas:
    """Return what each model adds to the base: {path: (models, *shape)} of the chosen leaves.

    In float32 or wider; without a base, the models themselves. These are the task vectors: what a
    `Method` combines. Arguments and errors as for `merge`.

    >>> deltas({"w": jnp.ones(2)}, [{"w": jnp.array([1.0, 3.0])}])["w"].tolist()
    [[0.0, 2.0]]
    """
    template, stacks = _read(base, models, where)
    return _minus(stacks, template if base is not None else None)


def interpolate(
    a: PyTree, b: PyTree, t: float | Array | PyTree, *, where: tree.Where = "**"
) -> PyTree:
    """Return (1 - t) a + t b: at t = 0 the values of a, at t = 1 those of b, exactly.

    With a the zero-shot and b the fine-tuned model this is WiSE-FT (whose authors suggest t = 0.5
    where there is nothing to choose it by); with a = b's training start, and more than 1, it is
    the line through both. vmap it over t for a path.

    Args:
      a, b: two trees alike.
      t: a number, or a tree like params of them; any real number, maybe traced.
      where: the leaves to interpolate; default: every float leaf. The others are those of `a`.

    Raises:
      ValueError: what `merge` raises.

    Reference: M. Wortsman, G. Ilharco, J. W. Kim, M. Li, S. Kornblith, R. Roelofs, R. Gontijo-
    Lopes, H. Hajishirzi, A. Farhadi, H. Namkoong, L. Schmidt, "Robust fine-tuning of zero-shot
    models", arXiv:2109.01903.

    >>> interpolate({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)["w"].tolist()
    [0.25, 0.25]
    """
    ts = _scales(t, a)

    def line(path: str, stack: Array, aux: Any) -> Array:
        if path not in ts:
            raise ValueError(f"t has no number for {path!r}")
        coefficients = jnp.stack([1 - jnp.asarray(ts[path]), jnp.asarray(ts[path])])
        return combine(stack, coefficients, normalize=False)

    return merge(None, [a, b], Method(line, needs_base=False), where=where)


# ---------------------------------------------------------------------------------- reading


def _scales(scale: Any, base: PyTree | None) -> dict[str, Any]:
    if base is None:
        if not (tree.concrete(scale) and isinstance(scale, int | float) and scale == 1):
            raise ValueError("scale multiplies deltas to a base, and there is no base")
        return {}
    if jax.tree.structure(scale) == jax.tree.structure(0):
        return dict.fromkeys(tree.flatten(base), scale)
    return tree.flatten(scale)


def _minus(stacks: Deltas, base: PyTree | None) -> Deltas:
    if base is None:
        return {path: tree.float32(stack) for path, stack in stacks.items()}
    start = tree.flatten(base)
    pairs = {path: (stack, jnp.asarray(start[path])) for path, stack in stacks.items()}
    return {path: tree.float32(stack) - tree.float32(b) for path, (stack, b) in pairs.items()}


def _read(base: PyTree | None, models: Models, where: tree.Where) -> tuple[PyTree, Deltas]:
    """Return the tree that the result is like, and the chosen leaves of all models, checked."""
    several = type(models) in (list, tuple)
    if several and not models:
        raise ValueError("there is no model to merge: the list is empty")
    template = base
    if base is None:
        template = models[0] if several else jax.tree.map(lambda x: x[0], models)
    for i, model in enumerate(models if several else [models]):
        _check_structure(template, model, f"model {i}" if several else "stack of models")
    if isinstance(where, str) and where == "**":
        where = tree.every(template)
    chosen = tree.chosen(template, where)
    if several:
        flats = [tree.flatten(model) for model in models]
        columns: dict[str, Any] = {path: [flat[path] for flat in flats] for path in flats[0]}
    else:
        columns = tree.flatten(models)
    stacks = {}
    for path, leaf in tree.flatten(template).items():
        column = columns[path]
        if path in chosen:
            stacks[path] = _stack(path, leaf, column)
        elif not tree.is_inexact(leaf):
            _check_equal(path, leaf, column)
    counts = {path: len(stack) for path, stack in stacks.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the leaves are stacks of different numbers of models: {counts}")
    return template, stacks


def _check_structure(template: PyTree, model: PyTree, name: str) -> None:
    outline = lambda t: jax.tree.map(lambda _: 0.0, t)
    tree.check_like(outline(template), outline(model), name)


def _stack(path: str, leaf: Any, column: Any) -> Array:
    if isinstance(column, list):
        for i, x in enumerate(column):
            _check_kind(f"{path!r} of model {i}", x, leaf.shape, leaf.dtype)
        column = jnp.stack(column)
    else:
        n = np.shape(column)[:1]
        if not n:
            raise ValueError(f"{path!r} is a scalar, and a leading axis of models was due")
        _check_kind(f"{path!r} of the stack", column, (*n, *leaf.shape), leaf.dtype)
        column = jnp.asarray(column)
    bad = jnp.isnan(column).any(tuple(range(1, column.ndim)))
    if tree.concrete(bad) and bad.any():
        raise ValueError(f"{path!r} of model {int(bad.argmax())} holds NaN")
    bad = jnp.isnan(leaf).any()
    if tree.concrete(bad) and bad:
        raise ValueError(f"{path!r} of the base holds NaN")
    return column


def _check_kind(what: str, x: Any, shape: tuple[int, ...], dtype: Any) -> None:
    if not tree.is_array(x) or x.shape != shape or x.dtype != dtype:
        came = f"{x.dtype}{list(x.shape)}" if tree.is_array(x) else type(x).__name__
        raise ValueError(f"{what} is {came}, and {dtype}{list(shape)} was due")


def _check_equal(path: str, leaf: Any, column: Any) -> None:
    for i, x in enumerate(column):
        same = leaf is x or np.shape(leaf) == np.shape(x)
        if same and leaf is not x:
            same = leaf == x
            same = same.all() if tree.is_array(same) else same
        if tree.concrete(same) and not same:
            raise ValueError(
                f"{path!r} is no float leaf and is never averaged, and model {i} has another one"
            )
