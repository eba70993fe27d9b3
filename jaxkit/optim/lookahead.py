"""Slow weights that follow fast ones: Lookahead; AdaMax as in its paper."""

from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["LookaheadState", "adamax", "lookahead"]


class LookaheadState(NamedTuple):
    """The state of `lookahead`: updates seen, slow weights, the fast optimizer's state.

    anchor: the fast state at the last synchronization, for "pullback", else ().
    """

    count: Int[Array, ""]
    slow: PyTree
    inner: Any
    anchor: Any


def lookahead(
    tx: optax.GradientTransformation,
    *,
    every: int | Array = 5,
    slow_step: float | Array = 0.5,
    moments: Literal["keep", "reset", "pullback"] = "keep",
) -> optax.GradientTransformationExtraArgs:
    """Lookahead: k steps forward, one step back. phi <- phi + alpha (theta - phi), theta <- phi.

    The slow weights phi are in the state, and params are the fast ones, so that a train loop stays
    as it is (``optax.lookahead`` changes the type of params). After every k-th update both are
    the same, bit by bit: evaluate there, or read the slow weights from the state.

    Nothing may follow it in a chain: what changes the update would part fast from slow weights.
    After a number of updates that is no multiple of k, the slow weights lack the last few.

    Args:
      tx: the fast optimizer.
      every: k.
      slow_step: alpha, in (0, 1].
      moments: what becomes of the fast optimizer's state after a synchronization: "keep" it,
        "reset" it (to ``tx.init`` of the synchronized weights), or "pullback": interpolate it like
        the weights (float leaves).

    Raises:
      ValueError: k below 1, alpha outside (0, 1], other moments, or update without params.

    Reference: M. R. Zhang, J. Lucas, G. Hinton, J. Ba, "Lookahead Optimizer: k steps forward, 1
    step back", arXiv:1907.08610.

    >>> tx = lookahead(optax.sgd(1.0), every=2)
    >>> params, grads = {"w": jnp.zeros(1)}, {"w": -jnp.ones(1)}
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["w"].item()
    1.0
    """
    if violates(lambda k: k >= 1, every):
        raise ValueError(f"every={every}, and 1 or more was due")
    if violates(lambda a: (a > 0) & (a <= 1), slow_step):
        raise ValueError(f"slow_step={slow_step}, and a number in (0, 1] was due")
    if moments not in ("keep", "reset", "pullback"):
        raise ValueError(f"moments={moments!r}, and 'keep', 'reset' or 'pullback' was due")
    fast_tx = optax.with_extra_args_support(tx)
    copy = lambda t: jax.tree.map(lambda x: jnp.array(x) if tree.is_array(x) else x, t)

    def init(params: PyTree) -> LookaheadState:
        inner = tx.init(params)
        anchor = copy(inner) if moments == "pullback" else ()
        return LookaheadState(jnp.zeros((), jnp.int32), copy(params), inner, anchor)

    def blend(slow: Any, fast: Any) -> Any:
        if not tree.is_inexact(fast):
            return fast
        wide = tree.float32(slow)
        return (wide + slow_step * (tree.float32(fast) - wide)).astype(fast.dtype)

    def update(updates: PyTree, state: LookaheadState, params: PyTree = None, **extra: Any):
        if params is None:
            raise ValueError("lookahead needs the params: tx.update(grads, state, params)")
        updates, inner = fast_tx.update(updates, state.inner, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))

        def sync(updates, inner, slow, anchor):
            target = jax.tree.map(blend, slow, optax.apply_updates(params, updates))
            back = lambda t, w, u: (t - w).astype(u.dtype) if tree.is_inexact(w) else u
            updates = jax.tree.map(back, target, params, updates)
            after = optax.apply_updates(params, updates)  # what params will be, with rounding
            if moments == "reset":
                inner = jax.tree.map(lambda new, old: new, tx.init(after), inner)
            if moments == "pullback":
                inner = anchor = jax.tree.map(blend, anchor, inner)
            return updates, inner, after, anchor

        due = count % every == 0
        args = (updates, inner, state.slow, state.anchor)
        updates, inner, slow, anchor = jax.lax.cond(due, sync, lambda *same: same, *args)
        return updates, LookaheadState(count, slow, inner, anchor)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def adamax(
    learning_rate: optax.ScalarOrSchedule = 2e-3,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
) -> optax.GradientTransformation:
    """AdaMax as in its paper: u <- max(b2 u, |g|), w <- w - lr / (1 - b1^t) m / u; 0 / 0 is 0.

    (``optax.adamax`` takes max(b2 u, |g| + eps), another rule. ``optax.adam`` is the paper's Adam.)
    The state is in float32 or wider: in bfloat16 0.999 is 1, and u would never fall.

    Args:
      learning_rate: a number or a schedule.
      b1, b2: in [0, 1).

    Raises:
      ValueError: b1 or b2 outside [0, 1).
      TypeError: a leaf of integers, which such steps would not move.

    Reference: D. P. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980.

    >>> tx = adamax(0.1)
    >>> params = {"w": jnp.zeros(2)}
    >>> grads = {"w": jnp.array([5.0, 0.0])}
    >>> [round(float(u), 4) for u in tx.update(grads, tx.init(params))[0]["w"]]
    [-0.1, -0.0]
    """
    for name, b in (("b1", b1), ("b2", b2)):
        if violates(lambda b: (b >= 0) & (b < 1), b):
            raise ValueError(f"{name}={b}, and a number in [0, 1) was due")

    def init(params):
        for path, w in tree.flatten(params).items():
            if not tree.is_inexact(w):
                raise TypeError(f"{path!r} has dtype {jnp.result_type(w)}, and floats were due")
        zeros = lambda: jax.tree.map(lambda w: jnp.zeros_like(tree.float32(w)), params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates, state, params=None):
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * tree.float32(g), state.mu, updates)
        nu = jax.tree.map(lambda u, g: jnp.maximum(b2 * u, jnp.abs(g)), state.nu, updates)
        ratio = lambda m, u: jnp.where(u > 0, m / jnp.where(u > 0, u, 1) / (1 - b1**count), 0)
        same = lambda x, g: x.astype(g.dtype)
        mu, nu = jax.tree.map(same, mu, state.mu), jax.tree.map(same, nu, state.nu)
        out = jax.tree.map(lambda m, u, g: same(ratio(m, u), g), mu, nu, updates)
        return out, optax.ScaleByAdamState(count, mu, nu)

    tx = optax.GradientTransformation(init, update)
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))
