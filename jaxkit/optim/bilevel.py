"""Bilevel optimization: hyperparameters descend on what training with them leads to."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxkit import tree

__all__ = ["BilevelState", "bo_rep", "hypergradient"]

Loss = Callable[[PyTree, PyTree, Any], Array]


class BilevelState(NamedTuple):
    """What `bo_rep` carries.

    count: steps made.
    upper, lower: x and y; the others are in float32 or wider.
    solution: z, which follows (d_yy g)^-1 d_y f.
    momentum: m, of the upper gradient.
    """

    count: Int[Array, ""]
    upper: PyTree
    lower: PyTree
    solution: PyTree
    momentum: PyTree


def hypergradient(
    outer: Loss, inner: Loss, upper: PyTree, lower: PyTree, solution: PyTree, batch: Any
) -> PyTree:
    """Return d_x f - (d_xy g) z, the gradient of f(x, y*(x)) if z = (d_yy g)^-1 d_y f at y*.

    Args:
      outer: f, ``f(upper, lower, batch) -> scalar``.
      inner: g, likewise, strongly convex in the lower variables.
      upper, lower, solution: x, y, z.
      batch: ``(outer batch, inner batch)``.

    >>> f = lambda x, y, _: 0.5 * (y - 3) ** 2
    >>> g = lambda x, y, _: 0.5 * (y - 2 * x) ** 2  # y* = 2 x
    >>> x, y = jnp.array(1.0), jnp.array(2.0)
    >>> float(hypergradient(f, g, x, y, y - 3, (None, None)))  # 2 (2 x - 3)
    -2.0
    """
    solution = jax.tree.map(lambda z, y: z.astype(y.dtype), solution, lower)
    direct = jax.grad(outer)(upper, lower, batch[0])
    along = lambda x: jax.jvp(lambda y: inner(x, y, batch[1]), (lower,), (solution,))[1]
    return optax.tree.sub(direct, jax.grad(along)(upper))


def bo_rep(
    outer: Loss,
    inner: Loss,
    *,
    step: float | Array,
    inner_step: float | Array,
    solution_step: float | Array = 0.01,
    momentum: float | Array = 0.9,
    every: int | Array = 2,
    inner_updates: int = 3,
    radius: float | Array | None = None,
) -> tuple[Callable[[PyTree, PyTree], BilevelState], Callable[[BilevelState, Any], BilevelState]]:
    """BO-REP: bilevel optimization where the smoothness of the outer loss may grow without bound.

    Each step: at every `every`-th, and first of all, N steps of gradient descent on g from the y in
    force (in a ball around it, if `radius` is given); z <- z - nu (d_yy g z - d_y f); then with
    h = `hypergradient`: m <- beta m + (1 - beta) h and x <- x - eta m / |m|. So x moves by eta in
    every step: let eta fall for it to settle. Warm the lower variables up before the first step.

    Args:
      outer: f, ``f(upper, lower, batch) -> scalar``.
      inner: g, likewise, strongly convex in the lower variables (a ridge makes it so; without, z
        diverges).
      step: eta, a number or a traced one.
      inner_step: of gradient descent on g.
      solution_step: nu, below 2 / the largest curvature of g. Above it z grows in every step, and
        x ends as NaN without an error: watch ``optax.tree.norm(state.solution)``.
      momentum: beta.
      every: I, upper steps to one refresh of y.
      inner_updates: N, per refresh.
      radius: of the ball around y that a refresh stays in; None: no ball.

    Returns:
      ``init(upper, lower) -> state`` and ``update(state, (outer batch, inner batch)) -> state``,
      to be jitted.

    Reference: J. Hao, X. Gong, M. Liu, "Bilevel Optimization under Unbounded Smoothness: A New
    Algorithm and Convergence Analysis", arXiv:2401.09587.

    >>> f = lambda x, y, _: 0.5 * (y - 3) ** 2
    >>> g = lambda x, y, _: 0.5 * (y - 2 * x) ** 2
    >>> init, update = bo_rep(f, g, step=0.01, inner_step=0.5, solution_step=0.5)
    >>> state = init(jnp.array(0.0), jnp.array(0.0))
    >>> for _ in range(200):
    ...     state = jax.jit(update)(state, (None, None))
    >>> bool(abs(state.upper - 1.5) < 0.05)
    True
    """

    def init(upper: PyTree, lower: PyTree) -> BilevelState:
        zeros = lambda t: jax.tree.map(lambda x: jnp.zeros_like(tree.float32(x)), t)
        return BilevelState(jnp.zeros((), jnp.int32), upper, lower, zeros(lower), zeros(upper))

    def update(state: BilevelState, batch: Any) -> BilevelState:
        x, outer_batch, inner_batch = state.upper, *batch

        def refresh(y: PyTree) -> PyTree:
            def one(_, z):
                g = jax.grad(inner, argnums=1)(x, z, inner_batch)
                z = jax.tree.map(lambda a, b: (a - inner_step * b).astype(a.dtype), z, g)
                if radius is None:
                    return z
                away = optax.tree.sub(z, y)
                share = jnp.minimum(1.0, radius / jnp.maximum(optax.tree.norm(away), 1e-30))
                return jax.tree.map(lambda a, b: (a + share * b).astype(a.dtype), y, away)

            return jax.lax.fori_loop(0, inner_updates, one, y)

        y = jax.lax.cond(state.count % every == 0, refresh, lambda y: y, state.lower)
        slope = lambda y: jax.grad(inner, argnums=1)(x, y, inner_batch)
        along = jax.tree.map(lambda z, y: z.astype(y.dtype), state.solution, y)
        curved = jax.jvp(slope, (y,), (along,))[1]
        pull = jax.grad(outer, argnums=1)(x, y, outer_batch)
        follow = lambda z, c, p: z - solution_step * (tree.float32(c) - tree.float32(p))
        z = jax.tree.map(follow, state.solution, curved, pull)
        h = hypergradient(outer, inner, x, y, z, batch)
        mix = lambda a, b: momentum * a + (1 - momentum) * tree.float32(b)
        m = jax.tree.map(mix, state.momentum, h)
        length = optax.tree.norm(m) + 1e-10
        x = jax.tree.map(lambda a, b: (a - step * b / length).astype(a.dtype), x, m)
        return BilevelState(state.count + 1, x, y, z, m)

    return init, update
