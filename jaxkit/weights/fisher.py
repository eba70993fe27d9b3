"""The diagonal of the Fisher information, and the average of models that it weighs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.weights.merge import Deltas, Method, Models, combine

__all__ = ["fisher", "fisher_average"]


def fisher(
    apply_fn: Callable[[PyTree, Any], Float[Array, "examples classes"]],
    params: PyTree,
    batch: Any,
    *,
    labels: str = "exact",
    key: PRNGKeyArray | None = None,
    axis_name: str | None = None,
) -> PyTree:
    r"""Estimate the diagonal of the Fisher information of a classifier.

    .. math:: F = \frac1M \sum_x \sum_y p(y|x) \left(\frac{\partial \log p(y|x)}{\partial\theta}
        \right)^2

    The square is of the gradient of each example and each class. (The square of the gradient of a
    batch is another quantity, and not even close.) One example after another, so that the memory is
    that of one example's gradients, times the classes for "exact".

    Args:
      apply_fn: ``apply_fn(params, inputs) -> logits`` of one row an example; without dropout, and
        with running statistics in place of those of the batch.
      params: any tree.
      batch: the inputs, arrays with a leading axis of examples; for "empirical" ``(inputs, y)``.
      labels: "exact" sums over the classes; "sample" draws one label from p for each example
        (unbiased, for many classes); "empirical" takes the true labels, which is not the Fisher
        information but is often called so.
      key: a typed key for "sample".
      axis_name: average over this axis of pmap or shard_map (the draws of "sample" fold it in).

    Returns:
      A tree like params of float32 (or wider), at least 0; what is no float leaf passes through.

    Raises:
      ValueError: `labels` of another name, no key for "sample", an empty batch, logits of another
        shape.
      TypeError: a legacy uint32 key.

    References: M. S. Matena, C. Raffel, "Merging Models with Fisher-Weighted Averaging",
    arXiv:2111.09832. On "empirical": F. Kunstner, L. Balles, P. Hennig, "Limitations of the
    Empirical Fisher Approximation for Natural Gradient Descent", arXiv:1905.12558.

    >>> apply_fn = lambda params, x: x @ params["kernel"]
    >>> F = fisher(apply_fn, {"kernel": jnp.zeros((1, 2))}, jnp.array([[1.0], [3.0]]))
    >>> F["kernel"].tolist()  # mean of x^2 times p (1 - p)
    [[1.25, 1.25]]
    """
    if labels not in ("exact", "sample", "empirical"):
        raise ValueError(f"labels={labels!r}; 'exact', 'sample' or 'empirical' was due")
    inputs, y = batch if labels == "empirical" else (batch, None)
    n = len(jax.tree.leaves(inputs)[0])
    if not n:
        raise ValueError("the batch is empty")
    keys = None
    if labels == "sample":
        if key is None:
            raise ValueError("labels='sample' draws labels: give a key")
        tree.check_key(key)
        own = key if axis_name is None else jax.random.fold_in(key, lax.axis_index(axis_name))
        keys = jax.random.split(own, n)
    leaves, structure = jax.tree.flatten(params)
    floats = [leaf if tree.is_inexact(leaf) else None for leaf in leaves]

    def log_p(floats: list, x: Any) -> Float[Array, " classes"]:
        full = [w if f is None else f for f, w in zip(floats, leaves, strict=True)]
        logits = apply_fn(jax.tree.unflatten(structure, full), jax.tree.map(lambda a: a[None], x))
        if logits.ndim != 2 or len(logits) != 1:
            raise ValueError(f"one row of logits an example was due, and {logits.shape} came for 1")
        return jax.nn.log_softmax(tree.float32(logits[0]))

    def add(total: list, example: Any) -> tuple[list, None]:
        x, y, key = example
        out, pull = jax.vjp(lambda f: log_p(f, x), floats)
        square = lambda g: jnp.square(tree.float32(g))
        if labels == "exact":
            rows = jax.vmap(pull)(jnp.eye(len(out), dtype=out.dtype))[0]
            new = jax.tree.map(lambda g: jnp.tensordot(jnp.exp(out), square(g), 1), rows)
        else:
            label = jax.random.categorical(key, out) if labels == "sample" else y
            new = jax.tree.map(square, pull(jax.nn.one_hot(label, len(out), dtype=out.dtype))[0])
        return jax.tree.map(lambda t, f: t + f.astype(t.dtype), total, new), None

    zeros = jax.tree.map(lambda w: jnp.zeros_like(tree.float32(w)), floats)
    total, _ = lax.scan(add, zeros, (inputs, y, keys))
    mean = jax.tree.map(lambda f: f / n, total)
    if axis_name is not None:
        mean = lax.pmean(mean, axis_name)
    out = [w if f is None else f for f, w in zip(mean, leaves, strict=True)]
    return jax.tree.unflatten(structure, out)


def fisher_average(
    fishers: Models,
    weights: Any = None,
    *,
    normalize: bool = True,
    floor: float = 1e-6,
    favor_first: bool = True,
) -> Method:
    r"""Average models entry by entry, each by its precision: the mode of a product of Gaussians.

    .. math:: \theta = \sum_i \frac{l_i}{n_i} F_i \theta_i \Big/ \sum_i \frac{l_i}{n_i} F_i

    With and without a base. Merge the bodies by ``where``, with the target's model first: without a
    base the head is the first model's. Heads may have other shapes, and their Fishers do not count.

    Args:
      fishers: what `fisher` gives for each model, in their order: a list, or a stacked tree.
      weights: l_i, one number a model; equal by default. The paper tries 51 of them on the line
        between two models, and takes the best on validation data.
      normalize: n_i is the norm of F_i over all leaves that are merged; else 1.
      floor: F is at least this, before l_i / n_i; for the first model only if `favor_first`, so
        that where no model has information, the first one's value stays, exactly (and so it does
        where l_1 is 0 and the others know nothing). 0 is no floor.

    Raises:
      ValueError: (when merging) Fishers that do not fit a leaf, that are negative, infinite, NaN
        or all zero (if they are known); entries at which the coefficients of all models are 0
        (0 / 0, if known; under jit they become 0).

    Reference: M. S. Matena, C. Raffel, "Merging Models with Fisher-Weighted Averaging",
    arXiv:2111.09832.

    >>> from jaxkit import weights
    >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([5.0, 6.0])}]
    >>> fishers = [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 0.0])}]
    >>> method = fisher_average(fishers, normalize=False)
    >>> weights.merge(None, models, method)["w"].tolist()
    [2.0, 2.0]
    """
    stacked = type(fishers) not in (list, tuple)
    flats = [tree.flatten(f) for f in ([fishers] if stacked else fishers)]

    def at(path: str, deltas: Array) -> Array:
        """Return the Fishers of all models at a leaf."""
        shape = deltas.shape if stacked else deltas.shape[1:]
        for i, flat in enumerate(flats):
            if path not in flat or jnp.shape(flat[path]) != shape:
                came = f"one of {jnp.shape(flat[path])}" if path in flat else "none"
                whose = "all models" if stacked else f"model {i}"
                raise ValueError(
                    f"a Fisher of {path!r} of shape {shape} is due for {whose}, and {came} came"
                )
        if not stacked and len(flats) != len(deltas):
            raise ValueError(f"there are {len(flats)} Fishers for {len(deltas)} models")
        found = flats[0][path] if stacked else jnp.stack([flat[path] for flat in flats])
        return tree.float32(jnp.asarray(found))

    def shares(deltas: Deltas) -> dict[str, Array]:
        """Return l_i / n_i, with the norms of what is merged."""
        squares = []
        for path, d in deltas.items():
            f = at(path, d)
            fine = (jnp.isfinite(f) & (f >= 0)).all()
            if tree.concrete(fine) and not fine:
                raise ValueError(
                    f"the Fisher of {path!r} has entries that are negative, infinite or NaN"
                )
            squares.append(jnp.square(f).sum(tuple(range(1, f.ndim))))
        norms = jnp.sqrt(sum(squares)) if normalize and squares else jnp.ones(())
        none = norms == 0
        if tree.concrete(none) and none.any():
            raise ValueError(f"the Fisher of model {int(none.argmax())} is all zero")
        share = (1 if weights is None else jnp.asarray(weights)) / jnp.where(norms > 0, norms, 1)
        return dict.fromkeys(deltas, share)

    def weigh(path: str, deltas: Array, share: Array) -> Array:
        f = at(path, deltas)
        over = lambda c: jnp.broadcast_to(c, len(f)).reshape(-1, *(1,) * (f.ndim - 1))
        first = over(jnp.arange(len(f)) == 0)
        c = over(share) * jnp.maximum(f, jnp.where(first | (not favor_first), floor, 0.0))
        empty = c.sum(0) == 0
        if favor_first and floor:
            c = jnp.where(empty, first, c)
        elif tree.concrete(empty) and empty.any():
            raise ValueError(f"no model has information on some entries of {path!r}: give a floor")
        return combine(deltas, c)

    return Method(weigh, shares, needs_base=False)
