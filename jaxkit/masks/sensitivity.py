"""Scores that ask a loss: what happens if the entry goes.

Each is made of a statistic that adds up over batches (a gradient, the product of a vector with the
Hessian, its diagonal), so that several batches are averaged before the score is taken:
``stacked=True`` reads the leading axis of `batch` as batches and visits them one at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree

__all__ = ["grasp", "obd", "snip", "tempered"]

Loss = Callable[[PyTree, Any], Any]
_EXACT = 10_000  # entries of a diagonal, a product with the Hessian each


# ----------------------------------------------------------------------------------------- shared


def _gradient(
    loss_fn: Loss, params: PyTree, where: PyTree[bool], batch: Any, has_aux: bool
) -> Callable[[dict], dict]:
    """Return the gradient as a function of the chosen leaves alone, by path."""

    def loss(leaves):
        out = loss_fn(tree.map(lambda path, _: leaves[path], params, where=where), batch)
        return out[0] if has_aux else out

    return jax.grad(loss)


def _wide(leaves: dict) -> dict:
    return jax.tree.map(tree.float32, leaves)


def _mean(fn: Callable[[Any], Any], batch: Any, stacked: bool, axis_name: str | None) -> Any:
    """Average ``fn(batch)`` over a stack of batches, and over the devices of a mapped axis."""
    if stacked:
        shapes = [np.shape(x) for x in jax.tree.leaves(batch)]
        n = shapes[0][0] if shapes and shapes[0] else 0
        if not n or any(shape[:1] != (n,) for shape in shapes):
            raise ValueError(
                f"stacked batches have one leading axis in common, not empty; came: {shapes}"
            )
        first = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        add = lambda total, one: (jax.tree.map(jnp.add, total, fn(one)), None)
        out = jax.tree.map(lambda x: x / n, jax.lax.scan(add, zeros, batch)[0])
    else:
        out = fn(batch)
    return out if axis_name is None else jax.lax.pmean(out, axis_name)


# ------------------------------------------------------------------------------------ first order


def snip(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    has_aux: bool = False,
    stacked: bool = False,
    axis_name: str | None = None,
) -> PyTree:
    """Score every entry by its connection sensitivity: s = |w dL/dw|, one backward pass.

    It is the first-order effect on the loss of removing the entry: the derivative with respect to a
    factor of w, at 1. The paper divides by the sum of all scores, which changes no ranking. Where a
    loader brings the batches, add up the gradients as they come:
    ``masks.magnitude(jax.tree.map(jnp.multiply, params, grads))`` is the same score.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``; model state and rngs travel in `batch`.
      params: any tree; leaves that are not inexact arrays pass through.
      batch: one batch; take one that holds several examples of every class. (Of one class alone the
        gradient says nothing about telling it from others, and that cannot be seen here.)
      has_aux: loss_fn returns ``(loss, aux)``.
      stacked: `batch` has a leading axis of batches; the gradient is averaged over them before the
        absolute value.
      axis_name: average the gradient over this axis of pmap or shard_map.

    Returns:
      A tree like params of float32.

    Raises:
      ValueError: stacked batches without a common leading axis.

    Reference: N. Lee, T. Ajanthan, P. Torr, "SNIP: Single-shot Network Pruning based on Connection
    Sensitivity", arXiv:1810.02340.

    >>> loss = lambda params, x: jnp.sum(params["kernel"] * x)
    >>> snip(loss, {"kernel": jnp.array([[3.0, -1.0]])}, jnp.array([1.0, 2.0]))["kernel"].tolist()
    [[3.0, 2.0]]
    """
    where = tree.every(params)
    leaves = tree.chosen(params, where)
    grad = lambda one: _wide(_gradient(loss_fn, params, where, one, has_aux)(leaves))
    grads = _mean(grad, batch, stacked, axis_name)
    return tree.map(lambda path, w: jnp.abs(tree.float32(w) * grads[path]), params, where=where)


# ----------------------------------------------------------------------------------- second order


def tempered(apply_fn: Callable[[PyTree, Any], Array], temperature: float | Array = 200.0) -> Loss:
    """Return the loss of GraSP: the cross-entropy of logits divided by a temperature.

    L(params, (inputs, labels)) = mean over examples of
    -log softmax(apply_fn(params, inputs) / temperature)[label], with integer labels. At 200, the
    authors' choice, the predictions are close to uniform whatever the logits.

    >>> loss = tempered(lambda params, x: x @ params, 2.0)
    >>> round(float(loss(jnp.eye(2), (jnp.array([[4.0, 0.0]]), jnp.array([0])))), 4)
    0.1269
    """

    def loss_fn(params, batch):
        inputs, labels = batch
        logits = tree.float32(apply_fn(params, inputs)) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return loss_fn


def grasp(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    where: tree.Where = None,
    has_aux: bool = False,
    stacked: bool = False,
    axis_name: str | None = None,
) -> PyTree:
    """Score every entry by what it gives to the gradient's norm: s = w * (H g), largest = keep.

    g is the gradient of the loss at the chosen leaves and H the Hessian. To first order ||g||^2 / 2
    falls by s without the entry: s is its derivative with respect to a factor of w, at 1. Entries
    with large s carry the gradient flow, those with negative s hold it back and go first. (The
    paper's S(-w) = -w * Hg has the other sign, and its largest are removed.)

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``; the authors divide the logits by 200 in it:
        ``tempered(apply_fn)`` is that loss.
      params: any tree; leaves that are not inexact arrays pass through.
      batch: one batch; the authors take several examples of every class.
      where: the leaves whose gradient counts in the norm; default: the weights. Every leaf is
        scored.
      has_aux, axis_name: as for `snip`.
      stacked: as for `snip`; g is averaged over the batches, then H g.

    Returns:
      A tree like params of float32, with signs.

    Raises:
      ValueError: stacked batches without a common leading axis.

    Reference: C. Wang, G. Zhang, R. Grosse, "Picking Winning Tickets Before Training by Preserving
    Gradient Flow", arXiv:2002.07376.

    >>> loss = lambda params, x: jnp.sum(x * params["kernel"] ** 2) / 2  # g = x w, H = diag(x)
    >>> grasp(loss, {"kernel": jnp.array([[3.0, 1.0]])}, jnp.array([1.0, -2.0]))["kernel"].tolist()
    [[9.0, 4.0]]
    """
    all_of_them = tree.every(params)
    leaves, counted = tree.chosen(params, all_of_them), tree.chosen(params, where)
    grad = lambda one: _gradient(loss_fn, params, all_of_them, one, has_aux)
    g = _mean(lambda one: _wide(grad(one)(leaves)), batch, stacked, axis_name)
    tangent = {p: (g[p] if p in counted else 0 * g[p]).astype(w.dtype) for p, w in leaves.items()}
    product = lambda one: _wide(jax.jvp(grad(one), (leaves,), (tangent,))[1])
    hg = _mean(product, batch, stacked, axis_name)
    return tree.map(lambda path, w: tree.float32(w) * hg[path], params, where=all_of_them)


def obd(
    loss_fn: Loss,
    params: PyTree,
    batch: Any,
    *,
    key: PRNGKeyArray | None = None,
    samples: int = 100,
    where: tree.Where = None,
    has_aux: bool = False,
    stacked: bool = False,
    axis_name: str | None = None,
) -> PyTree:
    """Score every entry by optimal brain damage: s = H_ii w^2 / 2, with H the Hessian of the loss.

    At a minimum of a loss whose Hessian is diagonal, it is the rise of the loss if the entry goes.

    Without a key the diagonal is exact: a product with the Hessian for every entry. With a key it
    is Hutchinson's estimate, the mean over `samples` draws of z * (H z) with random signs z, which
    is unbiased and has the variance sum over j != i of H_ij^2 / samples.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, twice differentiable.
      params: any tree; leaves that are not inexact arrays pass through.
      batch: one batch.
      key: a typed key for the estimate, None for the exact diagonal.
      samples: the number of draws, static.
      where: the leaves to score, the others get 0; default: the weights.
      has_aux, stacked, axis_name: as for `snip`.

    Returns:
      A tree like params of float32, negative where the loss curves down.

    Raises:
      ValueError: an exact diagonal of more than 10,000 entries, no sample, or stacked batches
        without a common leading axis.
      TypeError: a legacy uint32 key.

    References:
      Y. LeCun, J. Denker, S. Solla, "Optimal Brain Damage" (NeurIPS 1989); M. Hutchinson, "A
      Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines"
      (1989).

    >>> loss = lambda params, h: jnp.sum(h * params["kernel"] ** 2) / 2
    >>> obd(loss, {"kernel": jnp.array([[3.0, 1.0]])}, jnp.array([1.0, 4.0]))["kernel"].tolist()
    [[4.5, 2.0]]
    """
    where = tree.select(params, where)
    leaves = tree.chosen(params, where)
    n = sum(w.size for w in leaves.values())
    if key is None and n > _EXACT:
        raise ValueError(
            f"the exact diagonal of {n} entries is {n} products with the Hessian, and at most "
            f"{_EXACT} are made; give a key for Hutchinson's estimate"
        )
    if key is not None:
        tree.check_key(key)
        if samples < 1:
            raise ValueError(f"samples is {samples}, and at least one draw is due")

    def diagonal(one):
        grad = _gradient(loss_fn, params, where, one, has_aux)
        product = lambda t: jax.jvp(grad, (leaves,), (t,))[1]
        return _exact(product, leaves) if key is None else _estimate(key, product, leaves, samples)

    found = _mean(diagonal, batch, stacked, axis_name) if n else leaves

    def score(path, w):
        w = tree.float32(w)
        return found[path] * w * w / 2 if path in found else jnp.zeros_like(w)

    return tree.map(score, params, where=tree.every(params))


def _exact(product: Callable[[dict], dict], leaves: dict) -> dict:
    """Return the diagonal entry by entry, 64 of them at a time."""
    vector, unravel = tree.ravel(leaves, tree.every(leaves))
    unit = lambda i: unravel((jnp.arange(vector.size) == i).astype(vector.dtype))
    entry = lambda i: tree.ravel(product(unit(i)), tree.every(leaves))[0][i]
    return _wide(unravel(jax.lax.map(entry, jnp.arange(vector.size), batch_size=64)))


def _estimate(key: PRNGKeyArray, product: Callable, leaves: dict, samples: int) -> dict:
    def add(total, key):
        keys = tree.keys(key, leaves, "jaxkit.masks.obd")
        signs = {p: jax.random.rademacher(keys[p], w.shape, w.dtype) for p, w in leaves.items()}
        one = jax.tree.map(lambda z, hz: tree.float32(z) * tree.float32(hz), signs, product(signs))
        return jax.tree.map(jnp.add, total, one), None

    zeros = jax.tree.map(lambda w: jnp.zeros_like(tree.float32(w)), leaves)
    total, _ = jax.lax.scan(add, zeros, jax.random.split(key, samples))
    return jax.tree.map(lambda x: x / samples, total)
