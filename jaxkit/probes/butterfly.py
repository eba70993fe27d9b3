"""Spawn and perturb: does one small push early in training lead to another solution?"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["Perturbed", "perturb"]


class Perturbed(NamedTuple):
    """Weights after a push.

    Attributes:
      params: the weights.
      changed: the fraction of the chosen entries that are really others: what is too small for an
        entry's precision is lost.
    """

    params: PyTree
    changed: Float[Array, ""]


def perturb(
    key: PRNGKeyArray,
    params: PyTree,
    sigma: float | Array,
    *,
    std: PyTree,
    direction: PyTree | None = None,
    fraction: float | Array = 1.0,
    where: tree.Where = None,
) -> Perturbed:
    """Push weights by ``sigma`` times the size of an initialization.

    eps = sigma E d / |d| with E = sqrt(sum of std_l^2 size_l) over the leaves and d ~ N(0, std_l^2)
    in leaf l; so that sigma = 1 is a push as large as the weights at initialization. Of its entries
    a random `fraction` is kept, which makes it shorter, by about the root of the fraction.

    To see whether a push at step t matters, train the copy on with the same batches, the same
    schedule and the same optimizer state; with sigma = 0 both runs must give the same bits. Then
    look at the barrier between both (`line`, `barrier`), as they are and after
    `jaxkit.weights.align`.

    Args:
      key: for the direction and for the entries that are kept.
      params: a tree of weights.
      sigma: 0 or more; may be traced.
      std: the standard deviation of the entries of each leaf at initialization: a tree like params
        of numbers, as ``jax.tree.map(jnp.std, initial)``.
      direction: a tree like params for d, as the gradient of one batch; default: Gaussian noise.
      fraction: of the entries of all chosen leaves; ``1 / n`` is a single weight. May be traced.
      where: the leaves to push; default: the weights, not biases and norms.

    Raises:
      ValueError: trees that differ; (if the values are known) a negative sigma, a fraction outside
        [0, 1], a std or a direction of zeros, or a push by sigma > 0 that is lost in rounding.
      TypeError: an untyped key.

    Reference: G. S. Altintas, D. Kwok, C. Raffel, D. Rolnick, "The Butterfly Effect: Neural Network
    Training Trajectories Are Highly Sensitive to Initial Conditions", arXiv:2506.13234.

    >>> params = {"w": jnp.ones((10, 10))}
    >>> pushed = perturb(jax.random.key(0), params, 0.1, std={"w": 2.0})
    >>> push = pushed.params["w"] - params["w"]
    >>> jnp.linalg.norm(push).round(3).item()  # 0.1 * sqrt(2^2 * 100)
    2.0
    """
    tree.check_key(key)
    if violates(lambda s: s >= 0, sigma):
        raise ValueError(f"sigma={sigma}, and 0 or more was due")
    if violates(lambda f: (f >= 0) & (f <= 1), fraction):
        raise ValueError(f"fraction={fraction} is outside [0, 1]")
    chosen = tree.chosen(params, where)
    if jax.tree.structure(std) != jax.tree.structure(params):
        raise ValueError("std has not the structure of params: a number a leaf was due")
    given = tree.flatten(std)
    stds = {path: jnp.float32(given[path]) for path in chosen}
    noise = lambda k, w: jax.random.normal(k, w.shape)
    if direction is None:
        keys = tree.flatten(tree.keys(key, params, "perturb"))
        push = {path: stds[path] * noise(keys[path], w) for path, w in chosen.items()}
    else:
        tree.check_like(params, direction, "direction")
        given = tree.flatten(direction)
        push = {path: tree.float32(given[path]) for path in chosen}
    size = jnp.sqrt(sum((stds[path] ** 2 * w.size for path, w in chosen.items()), jnp.float32(0)))
    norm = optax.tree.norm(push)
    if chosen and violates(lambda s, n: (s * n > 0) & (s * n < jnp.inf), size, norm):
        raise ValueError("the std or the direction is zero everywhere, infinite or NaN: no push")
    kept: Any = dict.fromkeys(chosen, True)
    total = sum(w.size for w in chosen.values())
    if chosen and (not tree.concrete(fraction) or violates(lambda f: f == 1, fraction)):
        ranks = tree.flatten(tree.keys(key, params, "perturb fraction"))
        order = {path: jax.random.uniform(ranks[path], w.shape) for path, w in chosen.items()}
        keep = jnp.round(jnp.float32(fraction) * total).astype(jnp.int32)
        kept = tree.topk(order, keep, where="**")
    scale = sigma * size / jnp.where(norm > 0, norm, 1)
    moved = {
        path: (tree.float32(w) + jnp.where(kept[path], scale * push[path], 0)).astype(w.dtype)
        for path, w in chosen.items()
    }
    count = sum((jnp.sum(moved[path] != w) for path, w in chosen.items()), jnp.int32(0))
    changed = count / max(total, 1)
    if chosen and violates(lambda s, c, _: (s == 0) | (c > 0), sigma, changed, fraction):
        raise ValueError(f"a push of sigma={sigma} is lost in rounding: no entry has changed")
    return Perturbed(tree.replace(params, moved), changed)
