"""Several objectives, one direction: solve on the Gram matrix of their gradients."""

from itertools import combinations
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxkit import tree

__all__ = ["Direction", "epo_weights", "gram", "min_norm", "pareto_direction", "weigh"]


class Direction(NamedTuple):
    """A combined gradient and the weights on the simplex that combine it."""

    grads: PyTree
    weights: Float[Array, " objectives"]


def gram(grads: PyTree, other: PyTree | None = None, *, where: tree.Where = "**") -> Array:
    """Return <g_i, h_j> over the chosen leaves, in float32 or wider.

    Args:
      grads: a stacked tree, every leaf with a leading axis of objectives (``jax.jacrev`` of the
        vector of losses, or a vmapped gradient).
      other: another stacked tree, a tree without that axis (then a vector comes), or None for
        `grads` itself.
      where: the shared leaves; default: every float leaf.

    >>> gram({"w": jnp.array([[1.0, 0.0], [1.0, 2.0]])}).tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    """
    own = tree.chosen(grads, where)
    rest = tree.flatten(grads if other is None else other)
    total = jnp.zeros(())
    for path, g in own.items():
        flat = tree.float32(g).reshape(len(g), -1)
        h = tree.float32(jnp.asarray(rest[path]))
        single = h.ndim == g.ndim - 1
        total = total + flat @ (h.ravel() if single else h.reshape(len(h), -1).T)
    return total


def weigh(grads: PyTree, weights: Float[Array, " objectives"]) -> PyTree:
    """Return sum_i a_i g_i of a stacked tree, in the dtypes of its leaves.

    >>> weigh({"w": jnp.array([[1.0], [3.0]])}, jnp.array([0.5, 0.5]))["w"].tolist()
    [2.0]
    """
    mix = lambda g: jnp.tensordot(weights, tree.float32(g), 1).astype(g.dtype)
    return jax.tree.map(lambda g: mix(g) if tree.is_inexact(g) else g, grads)


def min_norm(c: Float[Array, "m m"]) -> Float[Array, " m"]:
    """Return the weights on the simplex with the least a' C a: the shortest combined gradient.

    Exactly, by trying every support (so m is at most 8): on a support S, a is C_SS^-1 1 over its
    sum, and is the answer if it is positive and shortest. Against the direction that they give, no
    objective increases to first order (multiple-gradient descent).

    Args:
      c: a Gram matrix.

    Raises:
      ValueError: more than 8 objectives.

    Reference: J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization", Comptes Rendus Mathématique 350 (2012).

    >>> min_norm(jnp.array([[1.0, 0.0], [0.0, 3.0]])).round(4).tolist()
    [0.75, 0.25]
    """
    m = c.shape[0]
    if m > 8:
        raise ValueError(f"{m} objectives, and at most 8 were due: every support is tried")
    bits = np.array([[(s >> i) & 1 for i in range(m)] for s in range(1, 2**m)], bool)
    cosines, share = _units(c)

    def solve(inside):
        # outside the support: b_i = 0
        square = jnp.where(inside[:, None] & inside[None, :], cosines, 0.0)
        square = square + jnp.diag(jnp.where(inside, 1e-7, 1.0))
        b = jnp.linalg.solve(square, jnp.where(inside, share, 0.0))
        b = b / (b @ share)
        fine = jnp.all(jnp.where(inside, b >= -1e-6 * jnp.max(jnp.abs(b)), True)) & jnp.all(
            jnp.isfinite(b)
        )
        b = jnp.where(inside, jnp.maximum(b, 0), 0)
        b = b / (b @ share)
        return jnp.where(fine, b, jnp.nan), jnp.where(fine, b @ cosines @ b, jnp.inf)

    weights, values = jax.vmap(solve)(jnp.asarray(bits))
    return _simplex(weights[jnp.argmin(values)] * share)


def _units(c: Float[Array, "m m"]) -> tuple[Float[Array, "m m"], Float[Array, " m"]]:
    """Return the cosines of gradients, and the shares a_i of b_i: 1 / length, to the largest.

    In the weights b of the unit gradients nothing hangs on scales: a_i g_i = b_i g_i / |g_i|, up to
    one factor for all.
    """
    square = jnp.diag(c)
    least = jnp.finfo(c.dtype).tiny
    length = jnp.sqrt(jnp.where(square > least, square, jnp.maximum(jnp.max(square), least)))
    return c / length[:, None] / length[None, :], jnp.min(length) / length


def _simplex(a: Float[Array, " m"]) -> Float[Array, " m"]:
    return a / jnp.sum(a)


def _best_vertex(
    objective: Array,
    rows: Float[Array, "k m"],
    least: Float[Array, " k"],
    share: float | Float[Array, " m"] = 1.0,
) -> Float[Array, " m"]:
    """Maximize objective . a / share . a over the simplex with rows a >= least, over all vertices.

    NaN if there is no such a.
    """
    m = objective.shape[0]
    bounds = jnp.concatenate([jnp.eye(m, dtype=rows.dtype), rows])
    floor = jnp.concatenate([jnp.zeros(m, rows.dtype), least])
    # an infinite floor binds nothing
    corners = list(combinations(range(m + rows.shape[0]), m - 1))
    active = np.array(corners, int).reshape(len(corners), m - 1)

    def vertex(index):
        a = jnp.concatenate([jnp.ones((1, m), rows.dtype), bounds[index]])
        right = jnp.concatenate([jnp.ones(1, rows.dtype), floor[index]])
        free = ~jnp.all(jnp.isfinite(right))
        x = jnp.linalg.solve(a, jnp.where(jnp.isfinite(right), right, 0))
        slack = bounds @ x - jnp.where(jnp.isfinite(floor), floor, -jnp.inf)
        fine = jnp.all(jnp.isfinite(x)) & jnp.all(slack >= -1e-5) & ~free
        return jnp.where(fine, x, 0), jnp.where(fine, objective @ x / jnp.sum(share * x), -jnp.inf)

    points, values = jax.vmap(vertex)(jnp.asarray(active))
    best = jnp.argmax(values)
    a = jnp.maximum(points[best], 0)
    return jnp.where(jnp.isfinite(values[best]), a / jnp.sum(a), jnp.nan)


def pareto_direction(
    grads: PyTree, guidance: PyTree, *, normalize: bool = False, where: tree.Where = "**"
) -> Direction:
    """Descend on all objectives at once, as far as may be towards a guidance gradient.

    With rows g_i, C = G G' and v the guidance (the gradient of a loss on held-out data of the
    target domain): a maximizes a' G v over the simplex under C a >= 0, so that to first order no
    objective increases along -G' a. A guidance of 0 gives the shortest direction (`min_norm`). The
    linear program is solved exactly by trying its vertices, for a few objectives, and in terms of
    the unit gradients, so that C a >= 0 holds of weak objectives beside strong ones.

    Args:
      grads: a stacked tree, every leaf with a leading axis of objectives.
      guidance: a tree like the gradient of one objective; of data that nothing is trained on.
      normalize: give all g_i the length 1 in G v, too (for objectives of very different scales,
        of which else the largest draws the weight).
      where: the leaves that all objectives share, which alone count in C and G v; default: every
        float leaf.

    Returns:
      The combined gradient (of all leaves), and a.

    Reference: F. Lv et al., "Pareto Domain Adaptation", arXiv:2112.04137. (The right-hand sides of
    its program are not known to us: never increasing an objective is our choice.)

    >>> grads = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    >>> pareto_direction(grads, {"w": jnp.array([0.2, 1.0])}).weights.tolist()
    [0.0, 1.0]
    """
    c, v = gram(grads, where=where), gram(grads, guidance, where=where)
    cosines, share = _units(c)
    w = v * share
    per = 1.0 if normalize else share
    guided = _best_vertex(w / jnp.maximum(jnp.max(jnp.abs(w)), 1e-30), cosines, 0 * share, per)
    shortest = min_norm(cosines) if normalize else min_norm(c) / share
    b = jnp.where(jnp.any(v != 0) & jnp.all(jnp.isfinite(guided)), guided, shortest)
    a = _simplex(b * share)
    return Direction(weigh(grads, a), a)


def epo_weights(
    c: Float[Array, "m m"], losses: Float[Array, " m"], preference: Float[Array, " m"]
) -> Float[Array, " m"]:
    """Return weights that lead to the Pareto optimum on the ray of a preference.

    With l^ = r l / sum(r l), mu = sum l^ log(m l^) (0 where all r_i l_i are equal) and
    a_i = r_i (log(m l^_i) - mu): while mu > 1e-4, balance: maximize w' C a over the simplex, the
    objectives with (C a)_j > 0 free and the others not worse than they were to be, but the largest
    r_i l_i never worse; then descend: maximize sum C w under C w >= 0.

    Args:
      c: the Gram matrix of the gradients.
      losses: l, positive.
      preference: r, positive: r_i l_i is what should be equal.

    Reference: D. Mahapatra, V. Rajan, "Multi-Task Learning with User Preferences: Gradient Descent
    with Controlled Ascent in Pareto Optimization", ICML 2020.

    >>> epo_weights(jnp.eye(2), jnp.array([3.0, 1.0]), jnp.ones(2)).tolist()
    [1.0, 0.0]
    """
    m = len(losses)
    weighted = preference * losses
    share = weighted / jnp.sum(weighted)
    mu = jnp.sum(share * jnp.log(m * share))
    a = preference * (jnp.log(m * share) - mu)
    ca = c @ a
    # on the ray C a is nothing but rounding, which is to bind nothing
    rounding = 1e-5 * jnp.max(jnp.abs(c)) * jnp.max(preference)
    ca = jnp.where(jnp.abs(ca) > rounding, ca, 0.0)
    up = ca > 0
    largest = weighted == jnp.max(weighted)
    free = jnp.where(up, -jnp.inf, ca)
    floor = jnp.where(jnp.any(up), jnp.where(largest, 0.0, free), 0.0)
    scale = jnp.maximum(jnp.max(jnp.abs(c)), jnp.finfo(c.dtype).tiny)
    tilt = jnp.maximum(jnp.max(jnp.abs(ca)), jnp.finfo(c.dtype).tiny)
    balance = _best_vertex(ca / tilt, c / scale, floor / scale)
    rows = jnp.concatenate([c / scale, (ca / tilt)[None]])
    least = jnp.concatenate([jnp.zeros(m), jnp.minimum(0.0, jnp.max(ca / tilt))[None]])
    descend = _best_vertex(jnp.sum(c / scale, axis=0), rows, least)
    out = jnp.where(mu > 1e-4, balance, descend)
    return jnp.where(jnp.all(jnp.isfinite(out)), out, min_norm(c))
