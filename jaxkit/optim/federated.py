"""Federated learning rates that adapt by the inner products of successive updates."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxkit import tree

__all__ = ["FedHyperState", "fed_hyper", "fed_hyper_client"]


class FedHyperState(NamedTuple):
    """What the server of `fed_hyper` carries: its rate, and the last mean update of the clients."""

    rate: Float[Array, ""]
    last: PyTree


def _wide(t: PyTree) -> PyTree:
    """Return the float leaves in float32 or wider, and 0 for others."""
    return jax.tree.map(lambda x: tree.float32(x) if tree.is_inexact(x) else jnp.zeros(()), t)


def fed_hyper(
    *,
    rate: float | Array = 1.0,
    bound: float | Array = 3.0,
    hyper_rate: float | Array = 1.0,
    cosine: bool = False,
) -> tuple:
    """FedHyper's global scheduler: the server's learning rate follows the agreement of rounds.

    With D_t = sum_k p_k w_k - W_t, the mean update of the clients of round t:
    alpha_t = clip(alpha_{t-1} + hyper_rate <D_t, D_{t-1}>, 1 / bound, bound) and
    W <- W + alpha_t D_t. With hyper_rate = 0 and rate = 1 it is federated averaging. Leaves that
    are not floats stay the server's.

    Args:
      rate: alpha_0.
      bound: gamma, the largest alpha, 1 / gamma being the least.
      hyper_rate: of the hypergradient step; the paper's 1 is not free of scale.
      cosine: take the cosine of D_t and D_{t-1} in place of their inner product, which is.

    Returns:
      ``init(params) -> state`` and ``update(params, clients, state, weights=None) ->
      (params, state)``: `clients` is a stacked tree of the clients' params, `weights` p_k their
      shares of the data (normalized; default equal).

    Reference: Z. Wang, J. Wang, A. Li, "FedHyper: A Universal and Robust Learning Rate Scheduler
    for Federated Learning with Hypergradient Descent", arXiv:2310.03156. (The released code adds
    1 + a running sum in [-0.8, 4] instead.)

    >>> init, update = fed_hyper()
    >>> params, state = {"w": jnp.zeros(1)}, init({"w": jnp.zeros(1)})
    >>> for _ in range(2):
    ...     clients = {"w": params["w"] + jnp.array([[0.4], [0.6]])}
    ...     params, state = update(params, clients, state)
    >>> state.rate.item(), params["w"].item()  # 1 + 0.5 * 0.5; 0.5 + 1.25 * 0.5
    (1.25, 1.125)
    """

    def init(params: PyTree) -> FedHyperState:
        return FedHyperState(jnp.float32(rate), jax.tree.map(jnp.zeros_like, _wide(params)))

    def update(params, clients, state: FedHyperState, weights=None):
        n = len(jax.tree.leaves(clients)[0])
        p = jnp.full(n, 1 / n) if weights is None else weights / jnp.sum(weights)
        mean = lambda c, w: jnp.tensordot(p, c, 1) - w if c.ndim else w  # no float: 0 and 0
        step = jax.tree.map(mean, _wide(clients), _wide(params))
        agree = optax.tree.vdot(step, state.last)
        if cosine:
            sizes = optax.tree.norm(step) * optax.tree.norm(state.last)
            agree = jnp.where(sizes > 0, agree / jnp.where(sizes > 0, sizes, 1), 0)
        new = jnp.clip(state.rate + hyper_rate * agree, 1 / bound, bound)
        to = lambda w, d: (tree.float32(w) + new * d).astype(w.dtype)
        move = lambda w, d: to(w, d) if tree.is_inexact(w) else w
        return jax.tree.map(move, params, step), FedHyperState(new, step)

    return init, update


def fed_hyper_client(
    rate: float | Array,
    grads: PyTree,
    last_grads: PyTree,
    server_step: PyTree,
    *,
    steps: int,
    start: float | Array,
    bound: float | Array = 10.0,
) -> Array:
    """FedHyper's local scheduler: the next learning rate of a client's step.

    beta + <g_j, g_{j-1}> - <g_j, D> / K, clipped to [start / bound, start * bound]. Gradients point
    up and the server's update D = W_t - W_{t-1} points down, hence the sign: with D written as a
    gradient, as in the paper, it is a plus.

    Args:
      rate: beta.
      grads, last_grads: g_j and g_{j-1} of this client (for j = 0 zeros).
      server_step: D, the last global update.
      steps: K, the client's steps in a round.
      start: the rate at which the round starts.

    Reference: as for `fed_hyper`.

    >>> g, d = {"w": jnp.array([1.0])}, {"w": jnp.array([-0.5])}
    >>> float(fed_hyper_client(0.5, g, g, d, steps=5, start=0.5))  # 0.5 + 1 + 0.1
    1.600000023841858
    """
    own = optax.tree.vdot(_wide(grads), _wide(last_grads))
    whole = optax.tree.vdot(_wide(grads), _wide(server_step))
    return jnp.clip(rate + own - whole / steps, start / bound, start * bound)
