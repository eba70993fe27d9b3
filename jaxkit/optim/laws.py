"""Laws of batch size, horizon and hyperparameters: formulas, and fits on the host in float64."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = [
    "Asymptote",
    "BatchLaw",
    "PowerLaw",
    "critical_batch",
    "decay_from_half_life",
    "fit_asymptote",
    "fit_power_law",
    "half_life",
    "lr_sensitivity",
    "near_best",
    "one_epoch_parameters",
    "rescale_decay",
    "step_law",
    "stochastic_round",
]


# ------------------------------------------------------------------------------ half-lives


def decay_from_half_life(half_life: float | Array, step: float | Array) -> float | Array:
    """Return the decay b = (1/2)^(step / half_life) of an average, in any unit of both (tokens).

    Raises:
      ValueError: a decay that is 1 in float32 (under jit, where it is not known, it is 1).

    Reference: M. Marek, S. Lotfi, A. Somasundaram, A. G. Wilson, M. Goldblum, "Small Batch Size
    Training for Language Models: When Vanilla SGD Works, and Why Gradient Accumulation Is
    Wasteful", arXiv:2507.07101.

    >>> decay_from_half_life(100.0, 100.0)
    0.5
    """
    decay = 0.5 ** (step / half_life)
    if violates(lambda b: b.astype(np.float32) != 1, decay):
        raise ValueError(
            f"the decay would be {decay!r}, which is 1 in float32: nothing would decay"
        )
    return decay


def half_life(decay: float | Array, step: float | Array = 1.0) -> float | Array:
    """Return the half-life -step ln 2 / ln b of an average with decay b, in the unit of `step`.

    >>> round(half_life(0.5, 100.0), 6)
    100.0
    """
    log = jnp.log(decay) if isinstance(decay, jax.Array) else np.log(decay)
    out = -step * np.log(2) / log
    return out if isinstance(out, jax.Array) else float(out)


def rescale_decay(decay: float, old_batch: float, new_batch: float) -> float:
    """Return the decay b^(new / old) that keeps the half-life in examples at another batch size.

    For the second moment of Adam: 0.95 at a batch of 512 becomes 0.9998998 at 1. The first moment's
    and the learning rate stay nearly as they are (the rate falls by 2 to 3 from 512 to 1).

    Raises:
      ValueError: a decay outside (0, 1), or one that becomes 1 in float32.

    Reference: as for `decay_from_half_life`.

    >>> round(rescale_decay(0.95, 512, 1), 7)
    0.9998998
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay}, and a number in (0, 1) was due")
    new = float(decay ** (new_batch / old_batch))
    if np.float32(new) == 1:
        raise ValueError(f"the decay would be {new!r}, which is 1 in float32: nothing would decay")
    return new


def stochastic_round(key: PRNGKeyArray, params: PyTree, dtype=jnp.bfloat16) -> PyTree:
    """Round float32 leaves to bfloat16 up or down at random, so that the mean is what it was.

    16 random bits are added to the bits of the float32 number and the low 16 are cut. Small updates
    then move bfloat16 weights on average, where rounding to nearest would lose them all. Finite
    entries only; leaves that are not float32 pass through.

    Args:
      key: a typed key, another one at each step.
      params: a tree.
      dtype: bfloat16.

    Raises:
      TypeError: a legacy uint32 key, or another dtype.

    Reference: as for `decay_from_half_life`.

    >>> x = {"w": jnp.full(10_000, 1 + 2**-10)}
    >>> rounded = stochastic_round(jax.random.key(0), x)["w"]
    >>> rounded.dtype, abs(float(rounded.astype(jnp.float32).mean()) - (1 + 2**-10)) < 1e-4
    (dtype(bfloat16), True)
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise TypeError(f"dtype is {dtype}, and bfloat16 was due")
    keys = tree.keys(key, params, "jaxkit.optim.stochastic_round")

    def cut(x, k):
        if not tree.is_array(x) or x.dtype != jnp.float32:
            return x
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
        bits = bits + (jax.random.bits(k, x.shape, jnp.uint16).astype(jnp.uint32))
        bits = jnp.where(jnp.isfinite(x), bits, jax.lax.bitcast_convert_type(x, jnp.uint32))
        kept = (bits >> 16).astype(jnp.uint16)
        return jax.lax.bitcast_convert_type(kept, jnp.bfloat16)

    return jax.tree.map(cut, params, keys)


# ------------------------------------------------------------------------------------ fits


class PowerLaw(NamedTuple):
    """y = scale * prod_j x_j^exponents_j."""

    scale: float
    exponents: tuple[float, ...]

    def __call__(self, *x: Any) -> Any:
        """Return the law's value."""
        powers = [np.power(each, k) for each, k in zip(x, self.exponents, strict=True)]
        return self.scale * np.prod(powers, axis=0)


def fit_power_law(
    y: Float[np.ndarray, " n"], *x: Float[np.ndarray, " n"], resamples: int = 0, seed: int = 0
) -> PowerLaw:
    """Fit y = c prod_j x_j^k_j by least squares of the logarithms.

    Args:
      y, x: positive numbers.
      resamples: with it, the means of the coefficients over so many bootstrap resamples of rows.

    Raises:
      ValueError: fewer points than coefficients, or one that is not positive.

    >>> law = fit_power_law(np.array([2.0, 8.0, 32.0]), np.array([1.0, 2.0, 4.0]))
    >>> round(law.scale, 6), [round(k, 6) for k in law.exponents]
    (2.0, [2.0])
    """
    columns = np.stack([np.asarray(v, np.float64) for v in (y, *x)])
    if columns.shape[1] <= len(x) or not np.all(np.isfinite(columns)) or np.any(columns <= 0):
        raise ValueError(
            f"at least {len(x) + 1} points of positive numbers are due, and {columns.shape[1]} came"
        )
    logs = np.log(columns).T

    def solve(rows):
        design = np.concatenate([np.ones((len(rows), 1)), rows[:, 1:]], axis=1)
        return np.linalg.lstsq(design, rows[:, 0], rcond=None)[0]

    found = solve(logs)
    if resamples:
        rng = np.random.default_rng(seed)
        draws = rng.integers(len(logs), size=(resamples, len(logs)))
        found = np.mean([solve(logs[rows]) for rows in draws], axis=0)
    return PowerLaw(float(np.exp(found[0])), tuple(float(k) for k in found[1:]))


class Asymptote(NamedTuple):
    """y = limit + scale / x^exponent."""

    limit: float
    scale: float
    exponent: float

    def __call__(self, x: Any) -> Any:
        """Return the law's value."""
        return self.limit + self.scale / np.power(x, self.exponent)

    def inverse(self, y: Any) -> Any:
        """Return the x at which the law has the value y: what another method's y is worth."""
        return np.power(self.scale / (np.asarray(y) - self.limit), 1 / self.exponent)


def fit_asymptote(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> Asymptote:
    """Fit y = E + A / x^a with E, A, a >= 0 by least squares, from a grid of exponents.

    E is what infinite x would reach: parameters or members of an ensemble at fixed data, say; and
    `Asymptote.inverse` of a loss tells how much x of the plain method it is worth.

    Raises:
      ValueError: fewer than four points, x not positive, or numbers that are not finite.

    Reference: K. Kim, S. Kotha, P. Liang, T. Hashimoto, "Pre-training under infinite compute",
    arXiv:2509.14786.

    >>> x = np.array([1.0, 2.0, 4.0, 8.0])
    >>> law = fit_asymptote(x, 3 + 2 / x)
    >>> [round(v, 3) for v in law]
    [3.0, 2.0, 1.0]
    """
    from scipy.optimize import least_squares

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 4 or np.any(x <= 0) or not np.all(np.isfinite(x * y)):
        raise ValueError(
            f"at least 4 points of finite numbers with x above 0 are due for three; {len(x)} came"
        )
    unit = np.exp(np.mean(np.log(x)))  # so that the scale does not hang on the exponent

    def residual(p):
        return p[0] + p[1] * (x / unit) ** -p[2] - y

    found = []
    for a in (0.1, 0.3, 0.7, 1.0, 1.5, 2.5):
        start = [max(0.9 * y.min(), 1e-12), max(np.ptp(y), 1e-12), a]
        found.append(
            least_squares(residual, start, bounds=(0, np.inf), xtol=1e-15, ftol=1e-15, gtol=1e-15)
        )
    e, scale, a = min(found, key=lambda f: f.cost).x
    return Asymptote(float(e), float(scale * unit**a), float(a))


class BatchLaw(NamedTuple):
    """Steps to the target Y(B) = floor + slope / B, and the critical batch size.

    extrapolated: whether the critical batch size is outside the batch sizes that were tried.
    """

    floor: float
    slope: float
    critical: float
    extrapolated: bool


def critical_batch(
    batch_sizes: Float[np.ndarray, " n"],
    steps: Float[np.ndarray, " n"],
    *,
    optimal: float,
    overhead: float = 0.2,
) -> BatchLaw:
    """Fit steps to a target against the batch size, and solve for the critical batch size.

    log Y(B) = log(a + b / B) by least squares; B* has `overhead` more than linear scaling from the
    batch size `optimal`: Y(B*) B* = (1 + overhead) Y(B_opt) B_opt, so that
    B* = (1 + overhead) B_opt + overhead b / a. Take the fewest steps over all hyperparameters, with
    a constant rate and averaged weights (a schedule would build a horizon in).

    Args:
      batch_sizes, steps: where the target was reached.
      optimal: B_opt, a batch size still in the linear range.
      overhead: the share of more data.

    Raises:
      ValueError: fewer than three points, or a fit without a floor (a <= 0: all in the linear
        range, larger batches are due).

    Warns:
      UserWarning: points whose steps are not finite are left out.

    Reference: H. Zhang et al., "How Does Critical Batch Size Scale in Pre-training?",
    arXiv:2410.21676.

    >>> b = np.array([64.0, 256.0, 1024.0, 4096.0])
    >>> round(critical_batch(b, 100 + 1e5 / b, optimal=256).critical, 3)
    507.2
    """
    from scipy.optimize import least_squares

    b, y = np.asarray(batch_sizes, np.float64), np.asarray(steps, np.float64)
    there = np.isfinite(y)
    if not there.all():
        left = ", ".join(f"{size:g}" for size in b[~there])
        warnings.warn(f"the target was not reached at batch size {left}: left out", stacklevel=2)
    b, y = b[there], y[there]
    if len(b) < 3:
        raise ValueError(f"at least 3 batch sizes that reach the target are due; {len(b)} came")
    start = np.log([y.min() / 2, np.max(y * b) / 2])
    residual = lambda p: np.log(np.exp(p[0]) + np.exp(p[1]) / b) - np.log(y)
    a, slope = np.exp(least_squares(residual, start, xtol=1e-15, ftol=1e-15, gtol=1e-15).x)
    if a < 1e-6 * y.min():
        raise ValueError("steps fall as 1 / batch size over the whole range: try larger batches")
    critical = (1 + overhead) * optimal + overhead * slope / a
    outside = bool(critical > b.max() or critical < b.min())
    return BatchLaw(float(a), float(slope), float(critical), outside)


def step_law(parameters: float, tokens: float) -> tuple[float, float]:
    """Return the learning rate 1.79 N^-0.713 D^0.307 and the batch size 0.58 D^0.571 in tokens.

    For AdamW with warmup and a cosine that ends at a rate of 1e-5. Fitted for N between 6e7 and 1e9
    and D between 2e9 and 1e11.

    Args:
      parameters: N, without embeddings.
      tokens: D, tokens in all (not billions).

    Warns:
      UserWarning: outside the range that it was fitted in.

    Reference: H. Li et al., "Predictable Scale: Part I -- Optimal Hyperparameter Scaling Law in
    Large Language Model Pretraining", arXiv:2503.04715.

    >>> rate, batch = step_law(1e9, 1e11)
    >>> round(rate, 6), round(batch)
    (0.001632, 1107715)
    """
    fits = lambda x, low, high: bool(np.all((np.asarray(x) >= low) & (np.asarray(x) <= high)))
    if not (fits(parameters, 6e7, 1e9) and fits(tokens, 2e9, 1e11)):
        warnings.warn(
            "the law was fitted for 6e7 to 1e9 parameters and 2e9 to 1e11 tokens, and this is "
            "beyond: are these numbers, not millions or billions?",
            stacklevel=2,
        )
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


def one_epoch_parameters(tokens: float, *, ratio: float = 5.0) -> float:
    """Return how many parameters suit a single pass over so many tokens: tokens / ratio.

    For one epoch over data that do not repeat, without dropout or other regularization, since
    nothing is there to overfit. (The heuristic of a time before the laws of scale; they take about
    20 tokens to a parameter where compute is what is short.)

    Args:
      tokens: processed in all, not steps.
      ratio: tokens to a parameter, 5 in the paper.

    Raises:
      ValueError: tokens or a ratio not above 0.

    Reference: A. Komatsuzaki, "One Epoch Is All You Need", arXiv:1906.06669.

    >>> one_epoch_parameters(1e9)
    200000000.0
    """
    if not tokens > 0 or not ratio > 0:
        raise ValueError(f"tokens={tokens}, ratio={ratio}, and numbers above 0 were due")
    return tokens / ratio


def near_best(
    losses: Float[np.ndarray, " n"], cells: Float[np.ndarray, " n"], *, share: float = 0.0025
) -> np.ndarray:
    """Mark the runs whose loss is within a share of the least in their cell (their N and D).

    All of them, not the single best one, go into the fit of a law of hyperparameters:
    ``fit_power_law(lr[m], n[m], d[m], resamples=1000)``. A run that diverged (NaN, inf) is none of
    them.

    Reference: as for `step_law`.

    >>> near_best(np.array([1.0, 1.002, 1.1, 2.0]), np.array([0, 0, 0, 1])).tolist()
    [True, True, False, True]
    """
    losses, cells = np.asarray(losses, np.float64), np.asarray(cells)
    losses = np.where(np.isfinite(losses), losses, np.inf)
    least = {cell: losses[cells == cell].min() for cell in np.unique(cells)}
    near = losses <= (1 + share) * np.array([least[cell] for cell in cells])
    return near & np.isfinite(losses)


def lr_sensitivity(
    losses: Float[np.ndarray, "runs rates"], start: float | Float[np.ndarray, " runs"]
) -> Float[np.ndarray, " runs"]:
    """Return how much the loss suffers from a wrong learning rate.

    The mean over the rates of min(loss, loss at the start) - best loss. Use the same rates for all
    that is compared, evenly spaced in their logarithm (3e-4 to 3e-1 in the paper).

    Args:
      losses: final losses; a run that diverged (NaN, inf) counts as the loss at the start.
      start: the loss before training.

    Reference: M. Wortsman et al., "Small-scale proxies for large-scale Transformer training
    instabilities", arXiv:2309.14322.

    >>> lr_sensitivity(np.array([[2.0, 1.0, np.inf]]), 3.0).tolist()
    [1.0]
    """
    losses = np.asarray(losses, np.float64)
    start = np.reshape(np.asarray(start, np.float64), (-1, 1))
    clipped = np.minimum(np.where(np.isfinite(losses), losses, np.inf), start)
    return np.mean(clipped - clipped.min(axis=1, keepdims=True), axis=1)
