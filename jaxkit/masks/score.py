"""Scores that need no data: a tree like params, float32, larger = keep.

What an entry is worth by its value, its movement, or a draw. The scores that ask a loss or the
network itself are in `sensitivity`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree

__all__ = ["gumbel", "magnitude", "movement", "random"]


def _scores(fn: Callable[..., Array], params: PyTree, *rest: PyTree) -> PyTree:
    """Map ``fn(path, leaf, *rest)`` over all inexact leaves, whatever their name or shape."""
    return tree.map(fn, params, *rest, where=tree.every(params))


def magnitude(params: PyTree, *, standardize: bool = False) -> PyTree:
    """Score every entry by its magnitude: s = |w|.

    Args:
      params: any tree; leaves that are not inexact arrays pass through.
      standardize: divide by the standard deviation of the leaf's entries, s = |w| / std(leaf), so
        that one threshold over leaves of different scales prunes each by its own distribution
        ("class-distributed"). A leaf whose entries are all equal is not divided.

    Returns:
      A tree like params of float32 (float64 for float64 leaves).

    References:
      S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for Efficient
      Neural Networks", arXiv:1506.02626; A. See, M.-T. Luong, C. D. Manning, "Compression of Neural
      Machine Translation Models via Pruning", arXiv:1606.09274 (the names of the classes).

    >>> magnitude({"kernel": jnp.array([[-2.0, 1.0]])})["kernel"].tolist()
    [[2.0, 1.0]]
    >>> magnitude({"kernel": jnp.array([[-6.0, 2.0]])}, standardize=True)["kernel"].tolist()
    [[1.5, 0.5]]
    """

    def score(path, w):
        size = tree.float32(jnp.abs(w))
        if not standardize or not w.size:
            return size
        std = jnp.std(tree.float32(w))
        return size / jnp.where(std > 0, std, 1)

    return _scores(score, params)


def movement(params: PyTree, reference: PyTree) -> PyTree:
    """Score every entry by how far it is from where it was: s = |w - w_reference|.

    Args:
      params: any tree, after fine-tuning, say; leaves that are not inexact arrays pass through.
      reference: a tree like params, before it.

    Returns:
      A tree like params of float32.

    Raises:
      ValueError: a reference that does not fit, naming the first path that differs.

    Reference: A. Panigrahi, N. Saunshi, H. Zhao, S. Arora, "Task-Specific Skill Localization in
    Fine-tuned Language Models", arXiv:2302.06600 (the first choice of the grafted region). The
    movement pruning of arXiv:2005.07683 is another: it learns its scores.

    >>> tuned, pretrained = {"w": jnp.array([[3.0, 1.0]])}, {"w": jnp.array([[3.5, 0.0]])}
    >>> movement(tuned, pretrained)["w"].tolist()
    [[0.5, 1.0]]
    """
    tree.check_like(params, reference, "reference")
    return _scores(lambda path, w, r: jnp.abs(tree.float32(w) - tree.float32(r)), params, reference)


def random(key: PRNGKeyArray, params: PyTree) -> PyTree:
    """Score every entry by an independent draw: s ~ U[0, 1), so that any top k is a random mask.

    Args:
      key: a typed key; the draw of a leaf depends on it and on the leaf's path alone.
      params: any tree; leaves that are not inexact arrays pass through.

    Returns:
      A tree like params of float32.

    Raises:
      TypeError: a legacy uint32 key.

    >>> scores = random(jax.random.key(0), {"kernel": jnp.ones((2, 3))})
    >>> scores["kernel"].shape
    (2, 3)
    """
    keys = tree.keys(key, params, "jaxkit.masks.random")
    return _scores(lambda path, w, k: jax.random.uniform(k, w.shape), params, keys)


def gumbel(key: PRNGKeyArray, scores: PyTree, temperature: float | Array = 1.0) -> PyTree:
    """Perturb scores so that their top k is a draw: log s + temperature G, G standard Gumbel noise.

    At temperature 1 the k largest are k entries drawn one after the other without replacement, each
    with probability s / sum of s over those that are left. Towards 0 they are those of the largest
    s, at infinity any k. Entries with s = 0 get -inf: they come last. See `sample` for the mask.

    Args:
      key: a typed key; the noise of a leaf depends on it and on the leaf's path alone.
      scores: non-negative floats, of any sum.
      temperature: at least 0; may be traced.

    Returns:
      A tree like `scores` of float32.

    Raises:
      ValueError: a negative score (eagerly, naming the leaf), for then they are no distribution.
        Under jit it becomes NaN, which ranks lowest.
      TypeError: a legacy uint32 key.

    Reference: T. Vieira, "Gumbel-max trick and weighted reservoir sampling" (2014); W. Kool, H. van
    Hoof, M. Welling, "Stochastic Beams and Where to Find Them: The Gumbel-Top-k Trick for Sampling
    Sequences Without Replacement", arXiv:1903.06059.

    >>> scores = gumbel(jax.random.key(0), {"w": jnp.array([[3.0, 1.0, 0.0]])})
    >>> scores["w"].shape, scores["w"][0, 2].item()
    ((1, 3), -inf)
    """
    keys = tree.keys(key, scores, "jaxkit.masks.gumbel")

    def perturb(path, s, k):
        s = tree.float32(s)
        negative = (s < 0).any()
        if tree.concrete(negative) and negative:
            raise ValueError(
                f"{path!r} holds negative scores, which are no probabilities; "
                "take scores that are at least 0 (magnitude, snip, synflow)"
            )
        # the fine mode: the largest of many draws have to differ
        return jnp.log(s) + temperature * jax.random.gumbel(k, s.shape, s.dtype, mode="high")

    return _scores(perturb, scores, keys)
