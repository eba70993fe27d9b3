"""Certificates: how wrong at most is the best of many models that were drawn before the data?"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.special import betainccinv, rel_entr

from jaxkit import tree

__all__ = ["Best", "Certificate", "best_of", "certificate"]


class Best(NamedTuple):
    """The best of many models, which one it is, and the loss of each."""

    params: PyTree
    index: Int[Array, ""]
    losses: Float[Array, " count"]


def best_of(
    key: PRNGKeyArray,
    sample: Callable[[PRNGKeyArray], PyTree],
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    support: Any,
    *,
    count: int,
    chunk: int | None = None,
) -> Best:
    """Draw many models from a generator that has not seen the data; keep the best on them.

    No gradient, and a class of `count` models, which is what `certificate` is about. The i-th model
    is that of ``fold_in(key, i)``, so that more of them never do worse. The models are not kept:
    the best one is drawn again.

    Args:
      key: a typed key.
      sample: ``sample(key) -> params``, one model (or adapter) of a generator that is fixed before
        the data are looked at: a diffusion model or a normal distribution fitted to other tasks. It
        is not given the support, and must not know it otherwise, or no certificate holds.
      loss_fn: ``loss_fn(params, support) -> scalar``.
      support: the few examples of the task.
      count: M, how many models.
      chunk: how many at a time, in memory too; default: one.

    Returns:
      `Best`; of equal models the first one. A loss that is not finite loses.

    Raises:
      TypeError: a legacy uint32 key.
      ValueError: a count or a chunk below 1, or no finite loss (if they are known).

    Reference: F. Rezk, R. Lee, H. Gouk, T. Hospedales, M. Kim, "Model Diffusion for Certifiable
    Few-shot Transfer Learning", arXiv:2502.06970.

    >>> found = best_of(jax.random.key(0), lambda key: jax.random.normal(key),
    ...                 lambda w, target: abs(w - target), 0.5, count=1000, chunk=100)
    >>> bool(abs(found.params - 0.5) < 0.01), found.losses.shape
    (True, (1000,))
    """
    tree.check_key(key)
    if count < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"count={count} and chunk={chunk}, and 1 or more were due")
    draw = lambda i: sample(jax.random.fold_in(key, i))
    losses = jax.lax.map(lambda i: loss_fn(draw(i), support), jnp.arange(count), batch_size=chunk)
    finite = jnp.isfinite(losses)
    if tree.concrete(finite) and not finite.any():
        raise ValueError(f"none of the {count} losses is finite")
    index = jnp.argmin(jnp.where(finite, losses, jnp.inf))
    return Best(draw(index), index, losses)


class Certificate(NamedTuple):
    """Upper bounds of the risk, each of which holds with probability 1 - delta.

    Attributes:
      risk: the mean loss on the support.
      hoeffding: risk + sqrt(r / 2), with r = ln(count / delta) / n; it may be above 1.
      kl: the largest p with kl(risk || p) <= r (Chernoff); never above `hoeffding`.
      binomial: the exact quantile of the beta distribution, for losses 0 and 1; never above `kl`,
        and the one to report. NaN where a loss is a fraction: take `kl` then.
    """

    risk: Float[np.ndarray, "*batch"]
    hoeffding: Float[np.ndarray, "*batch"]
    kl: Float[np.ndarray, "*batch"]
    binomial: Float[np.ndarray, "*batch"]


def certificate(
    losses: Float[Array | np.ndarray, "*batch n"],
    count: int | Int[np.ndarray, "*batch"],
    *,
    delta: float = 0.05,
) -> Certificate:
    r"""Bound the risk of a model that was chosen among `count` by its losses on n examples.

    .. math:: R \le \hat R + \sqrt{r / 2}, \quad R \le \max\{p : kl(\hat R \| p) \le r\}, \quad
        R \le \mathrm{Beta}^{-1}(1 - \delta / M;\; k + 1, n - k), \quad r = \tfrac1n \ln(M / \delta)

    With probability 1 - delta over the examples, for all M = `count` models at once, so for the
    one that was chosen, however it was chosen. On the host, in float64.

    Args:
      losses: of the chosen model on the examples that it was chosen on, in [0, 1]: k errors of n.
      count: all models that were in the running. They are fixed before the examples are looked at:
        draw them in one go. Of several rounds all count; if the examples say when to stop, count as
        many as there might have been; if they steer what is drawn, no certificate holds. Nor does
        one with count=1 on further examples once these have been used to choose.
      delta: in (0, 1).

    Raises:
      ValueError: losses outside [0, 1] or none, a count below 1, a delta outside (0, 1).

    Reference: F. Rezk, R. Lee, H. Gouk, T. Hospedales, M. Kim, "Model Diffusion for Certifiable
    Few-shot Transfer Learning", arXiv:2502.06970.

    >>> found = certificate(np.arange(80) < 4, 1000)  # 4 errors of 80, the best of 1000 models
    >>> [round(float(x), 4) for x in found]
    [0.05, 0.2988, 0.2305, 0.2128]
    """
    x = np.asarray(losses, np.float64)
    m = np.asarray(count, np.float64)
    if x.ndim < 1 or x.size == 0:
        raise ValueError(f"losses of one or more examples are due, and {x.shape} came")
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(f"losses in [0, 1] are due, and they are from {x.min()} to {x.max()}")
    if not (m >= 1).all():
        raise ValueError(f"count={count}, and at least the chosen model was in the running")
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} is not strictly between 0 and 1")
    n, risk = x.shape[-1], x.mean(-1)
    r = (np.log(m) - math.log(delta)) / n
    errors = np.where(((x == 0) | (x == 1)).all(-1), x.sum(-1), np.nan)
    all_wrong = errors == n
    exact = betainccinv(errors + 1, np.where(all_wrong, 1, n - errors), delta / m)
    return Certificate(
        risk=risk,
        hoeffding=risk + np.sqrt(r / 2),
        kl=_kl_inverse(*np.broadcast_arrays(risk, r)),
        binomial=np.where(all_wrong, 1.0, exact),
    )


def _kl_inverse(risk: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Return the largest p with kl(risk || p) <= r, from above, by bisection."""
    low, high = risk, np.ones_like(risk)
    for _ in range(60):
        middle = (low + high) / 2
        fits = rel_entr(risk, middle) + rel_entr(1 - risk, 1 - middle) <= r
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return high
