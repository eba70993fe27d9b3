"""Reparametrizations over a mask: some entries train, the others are read from the frozen params.

`compact` trains the entries of a mask as vectors; `grafting` trains the mask itself, between two
models.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask
from jaxkit.reparam.core import Reparam, Theta, install, matched

__all__ = ["compact", "grafting", "hardened"]


def compact(mask: Mask) -> Reparam:
    """Train the entries of a mask as one vector a leaf: w[index] = theta, all others stay.

    Gradients and optimizer states have the size of the vectors, not of the params. At the start
    apply returns the params as they are, to the bit; leaves without an entry in the mask are the
    same objects as before. The same training as ``masks.constrain(tx, mask)``.

    Args:
      mask: a tree of bools like params, known outside jit, for it decides shapes.

    Raises:
      ValueError: a mask that is traced or does not fit.

    Reference: T. Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive
    Sparse Low-Rank Adaptation", arXiv:2409.06633 (its unstructural backpropagation).

    >>> params, mask = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[False, True]])}
    >>> r = compact(mask)
    >>> theta = r.init(jax.random.key(0), params)
    >>> theta["w"].tolist(), r.apply({"w": theta["w"] + 1}, params)["w"].tolist()
    ([1.0], [[3.0, 2.0]])
    """
    if not tree.concrete(mask):
        raise ValueError("the mask decides shapes: make it outside jit")
    marks = {path: np.atleast_1d(m) for path, m in tree.flatten(mask).items() if tree.is_array(m)}
    where = {path: np.nonzero(m) for path, m in marks.items() if m.any()}

    def init(key: PRNGKeyArray, params: PyTree) -> Theta:
        tree.check_like(params, mask, "mask")
        leaves = {path: w for path, w in tree.flatten(params).items() if tree.is_inexact(w)}
        return {
            path: jnp.atleast_1d(leaves[path])[i] for path, i in where.items() if path in leaves
        }

    def apply(theta: Theta, params: PyTree) -> PyTree:
        leaves = matched(params, theta)

        def put(w, index, values):
            new = jnp.atleast_1d(w).at[index].set(values.astype(w.dtype), unique_indices=True)
            return new.reshape(w.shape)

        return install(params, {p: put(w, where[p], theta[p]) for p, w in leaves.items()})

    return Reparam(init, apply)


def grafting(
    tuned: PyTree, base: Mask, *, offset: float = 10.0, where: tree.Where = None
) -> Reparam:
    """Learn which entries of a fine-tuned model carry its skill: a soft mask between two models.

    w(S) = w_pre + gamma (w_ft - w_pre), gamma = b + (1 - 2b) sigmoid(S - offset), with b the base
    patch as 0 and 1, and S trained, from U[0, 1). At first gamma is nearly b; the slope of the
    sigmoid is 4.5e-5 there, so plain gradient descent takes a huge learning rate: 1e7 in the
    authors' example. `hardened` rounds S to a mask, for `masks.graft`.

    Args:
      tuned: the fine-tuned params; `init` and `apply` take the pretrained ones.
      base: a mask like params: ``masks.most_moved(tuned, pretrained, keep=k)``.
      offset: how far the sigmoid starts in its tail.
      where: the leaves with a soft mask; default: the weights. All others are the pretrained ones.

    Raises:
      ValueError: trees that do not fit (or a leaf of another dtype: one model of the two would be
        rounded), a `where` that matches nothing.
      TypeError: a legacy uint32 key.

    Reference: A. Panigrahi, N. Saunshi, H. Zhao, S. Arora, "Task-Specific Skill Localization in
    Fine-tuned Language Models", arXiv:2302.06600.

    >>> pretrained, tuned = {"w": jnp.zeros((1, 2))}, {"w": jnp.ones((1, 2))}
    >>> r = grafting(tuned, {"w": jnp.array([[True, False]])})
    >>> theta = r.init(jax.random.key(0), pretrained)
    >>> r.apply(theta, pretrained)["w"].round(3).tolist()
    [[1.0, 0.0]]
    """
    targets, bases = tree.flatten(tuned), tree.flatten(base)

    def init(key: PRNGKeyArray, params: PyTree) -> Theta:
        tree.check_like(params, tuned, "fine-tuned tree")
        tree.check_like(params, base, "mask")
        for path, w in tree.flatten(params).items():
            if tree.is_array(w) and targets[path].dtype != w.dtype:
                raise ValueError(
                    f"{path!r} is {w.dtype} in params and {targets[path].dtype} in the fine-tuned "
                    "tree, and one dtype is due"
                )
        keys = tree.flatten(tree.keys(key, params, "jaxkit.reparam.grafting"))
        chosen = tree.chosen(params, where)
        return {path: jax.random.uniform(keys[path], w.shape) for path, w in chosen.items()}

    def apply(theta: Theta, params: PyTree) -> PyTree:
        def mixed(path, w):
            b = bases[path].astype(jnp.float32)
            gamma = b + (1 - 2 * b) * jax.nn.sigmoid(theta[path] - offset)
            return tree.float32(w) + gamma * (tree.float32(targets[path]) - tree.float32(w))

        return install(params, {p: mixed(p, w) for p, w in matched(params, theta).items()})

    return Reparam(init, apply)


def hardened(theta: Theta, base: Mask, *, offset: float = 10.0) -> Mask:
    """Round the soft mask of `grafting`: gamma > 1/2, and no entry of leaves without one.

    Args:
      theta: S by path, from ``grafting(...).init`` and trained.
      base, offset: those of `grafting`.

    >>> base = {"w": jnp.array([[True, True, False]]), "bias": jnp.array([True])}
    >>> mask = hardened({"w": jnp.array([[0.5, 11.0, 0.5]])}, base)
    >>> mask["w"].tolist(), mask["bias"].tolist()
    ([[True, False, False]], [False])
    """

    def leaf(path, b):
        if path not in theta:
            return jnp.zeros_like(b) if tree.is_array(b) else b
        return jnp.where(b, theta[path] < offset, theta[path] > offset)

    return jax.tree.map(leaf, tree.paths(base), base)
