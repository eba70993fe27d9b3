"""Sampling in place of optimizing: Langevin dynamics, and what a mixture of models is worth."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["LangevinState", "langevin", "mixture_log_loss", "regret_bound"]


class LangevinState(NamedTuple):
    """The state of `langevin`: updates seen, and the key."""

    count: Int[Array, ""]
    key: PRNGKeyArray


def langevin(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: PRNGKeyArray,
    num_data: int | Array,
    temperature: float | Array = 1.0,
) -> optax.GradientTransformation:
    """Stochastic gradient Langevin dynamics: w <- w - lr g + sqrt(2 lr T / n) xi, xi ~ N(0, I).

    With g the gradient of the mean loss (sum of -log p(y | x, w) over n examples, minus the log
    prior, all over n) it samples the posterior at T = 1, up to O(lr n). The noise comes after the
    learning rate; ``optax.noisy_sgd`` adds it before, which is another temperature. Predict with
    the mean of the probabilities over samples, not of the logits (`mixture_log_loss`).

    Noise is drawn by the leaf's path and in float32. Use one key on all devices.

    Args:
      learning_rate: a number or a schedule, for the mean loss.
      key: a typed key.
      num_data: n, the size of the data set, not of the batch.
      temperature: T.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: num_data not above 0, or a negative temperature.

    Reference: M. Welling, Y. W. Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics",
    ICML 2011; the use of mixtures: M. Feder, R. Urbanke, Y. Fogel, "The Universality Lens: Why Even
    Highly Over-Parametrized Models Learn Well", arXiv:2506.07661.

    >>> tx = langevin(0.1, key=jax.random.key(0), num_data=50)
    >>> params = {"w": jnp.zeros(10_000)}
    >>> updates, _ = tx.update(params, tx.init(params))
    >>> round(float(updates["w"].std()), 2)  # sqrt(2 * 0.1 / 50)
    0.06
    """
    tree.check_key(key)
    if violates(lambda n, t: (n > 0) & (t >= 0), num_data, temperature):
        raise ValueError(
            f"num_data={num_data} and temperature={temperature}: numbers above 0 and of at least 0 "
            "were due"
        )

    def init(params):
        return LangevinState(jnp.zeros((), jnp.int32), key)

    def update(updates, state, params=None):
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        std = jnp.sqrt(2 * rate * temperature / num_data)
        keys = tree.keys(
            jax.random.fold_in(state.key, state.count), updates, "jaxkit.optim.langevin"
        )

        def move(g, k):
            if not tree.is_inexact(g):
                return g
            wide = tree.float32(g)
            return (std * jax.random.normal(k, g.shape, wide.dtype) - rate * wide).astype(g.dtype)

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(move, updates, keys), LangevinState(count, state.key)

    return optax.GradientTransformation(init, update)


def mixture_log_loss(
    log_probs: Float[Array, "models *data"], log_weights: Float[Array, " models"] | None = None
) -> Float[Array, "*data"]:
    """Return -log sum_m w_m p_m, the log loss of a mixture of models.

    Args:
      log_probs: log p_m of what came, of whole sequences for a mixture over models.
      log_weights: log w_m of the prior, normalized here; None: equal.

    Reference: M. Feder et al., arXiv:2506.07661.

    >>> round(float(mixture_log_loss(jnp.log(jnp.array([0.2, 0.6])))), 4)  # -log 0.4
    0.9163
    """
    n = log_probs.shape[0]
    weights = jnp.zeros(n) if log_weights is None else jnp.asarray(log_weights)
    weights = jax.nn.log_softmax(tree.float32(weights))
    weights = weights.reshape((n,) + (1,) * (log_probs.ndim - 1))
    return -jax.nn.logsumexp(tree.float32(log_probs) + weights, axis=0)


def regret_bound(
    kl: Float[Array, " models"], log_weights: Float[Array, " models"], n: int | Array
) -> Float[Array, ""]:
    """Bound the expected regret of a mixture on n data: min over eps of n eps - log W(eps).

    W(eps) is the prior weight of the models within eps of the truth, KL(P_0 || P_m) <= eps. What
    counts is how much weight lies near the truth, not how many models there are. Per datum, divide
    by n.

    Args:
      kl: KL(P_0 || P_m) of every model, for one datum.
      log_weights: log w_m of the prior, normalized here.
      n: the number of data.

    Reference: M. Feder, R. Urbanke, Y. Fogel, arXiv:2506.07661.

    >>> bound = regret_bound(jnp.array([0.0, 9.0]), jnp.zeros(2), 10)
    >>> round(float(bound), 4)  # log 2
    0.6931
    """
    order = jnp.argsort(kl)
    weights = jax.nn.log_softmax(tree.float32(jnp.asarray(log_weights)))[order]
    inside = jax.lax.cumlogsumexp(weights)
    return jnp.min(n * kl[order] - inside)
