"""AutoLRS: the learning rate of every stage, by Bayesian optimization of what it will lead to."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float

__all__ = ["Stage", "autolrs", "forecast"]

Train = Callable[[Any, float, int], tuple[Any, Float[np.ndarray, " steps"]]]


class Stage(NamedTuple):
    """One stage of `autolrs`.

    rate: the learning rate that it was trained with.
    state: the training state after it.
    losses: of its steps.
    tried: {rate: forecast of the loss at the stage's end} of the search.
    search_steps: what the search cost.
    """

    rate: float
    state: Any
    losses: Float[np.ndarray, " steps"]
    tried: dict[float, float]
    search_steps: int


def forecast(
    losses: Float[np.ndarray, " n"], at: int, *, validation: bool = False, spacing: int = 1
) -> float:
    """Extrapolate a loss curve: a exp(b x) + c with b < 0, fitted to a smoothed series, at x = at.

    Outliers leave first: of the 3% largest residuals of a quadratic spline, those in the first
    half, ten times over (of a validation loss the single largest, once). (What is left is smoothed
    as far as its noise asks for, and the fit is to these points.)

    Args:
      losses: of steps 0, spacing, 2 spacing, ...
      at: the step to predict.
      validation: a validation loss. One that never got below its start is predicted to stay.
      spacing: steps between two losses.

    Raises:
      ValueError: fewer than four losses. (One that is not finite gives inf.)

    Warns:
      UserWarning: a curve that rises, by more than its noise: a is below 0 then.

    Reference: Y. Jin, T. Zhou, L. Zhao, Y. Zhu, C. Guo, M. Canini, A. Krishnamurthy, "AutoLRS:
    Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", arXiv:2105.10762.

    >>> x = np.arange(100)
    >>> round(forecast(2 * np.exp(-0.01 * x) + 0.5, 1000), 3)
    0.5
    """
    value, rises = _extrapolate(losses, at, validation, spacing)
    if rises:
        warnings.warn(f"the loss rises: it is extrapolated to {value:g}", stacklevel=2)
    return value


def _extrapolate(losses: Any, at: int, validation: bool, spacing: int) -> tuple[float, bool]:
    """Return what `forecast` does, and whether the curve rises."""
    from scipy.interpolate import UnivariateSpline
    from scipy.optimize import minimize

    y = np.asarray(losses, np.float64)
    if len(y) < 4:
        raise ValueError(f"at least 4 losses are due to extrapolate, and {len(y)} came")
    if not np.all(np.isfinite(y)):
        return np.inf, False
    if validation and y.min() >= y[0]:
        return float(y[-1]), False
    x = spacing * np.arange(len(y), dtype=np.float64)

    def smoothed() -> np.ndarray:
        # as smooth as the noise asks for, which fourth differences tell
        noise = 1.4826 * np.median(np.abs(np.diff(y, 4))) / np.sqrt(70)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of losses that have no noise to smooth
            spline = UnivariateSpline(left_x, left, k=2, s=len(left) * noise**2)
            return np.asarray(spline(left_x))

    middle, left_x, left = x[len(x) // 2], x, y
    for _ in range(1 if validation else 10):
        if len(left) < 8:
            break
        residual = np.abs(left - UnivariateSpline(left_x, left, k=2)(left_x))
        most = 1 if validation else max(1, int(0.03 * len(left)))
        worst = np.argsort(-residual, kind="stable")[:most]
        gone = [i for i in worst if residual[i] > 0 and (validation or left_x[i] < middle)]
        left_x, left = np.delete(left_x, gone), np.delete(left, gone)
    smooth = smoothed() if len(left) >= 8 else left

    def solve(b):
        design = np.stack([np.exp(b * left_x), np.ones_like(left_x)], axis=1)
        coefficients = np.linalg.lstsq(design, smooth, rcond=None)[0]
        return coefficients, float(np.sum((design @ coefficients - smooth) ** 2))

    starts = -np.log(x[-1]) + np.array([-2.0, 0.0, 2.0, 4.0])
    options = {"xatol": 1e-10, "fatol": 1e-18, "maxiter": 2000}
    objective = lambda beta: solve(-np.exp(beta[0]))[1]
    fits = [minimize(objective, [s], method="Nelder-Mead", options=options) for s in starts]
    b = -np.exp(min(fits, key=lambda fit: fit.fun).x[0])
    (a, c), _ = solve(b)
    fitted = a * np.exp(b * left_x) + c
    rise = fitted[-1] - fitted[0]
    rises = rise > np.ptp(left - fitted) + 1e-9 * np.abs(left).max()
    return float(a * np.exp(b * at) + c), bool(rises)


def autolrs(
    train: Train,
    state: Any,
    *,
    low: float,
    high: float,
    steps: int = 1000,
    trial_steps: int = 100,
    most: int = 8000,
    candidates: int = 10,
    exploration: float = 1000.0,
    seed: int = 0,
) -> Iterator[Stage]:
    """Train in stages, each with the constant rate whose loss at the stage's end is forecast best.

    In a stage of tau steps every candidate is trained for tau' steps from the state that the stage
    starts with, and its loss at tau forecast; a Gaussian process over log(rate) chooses the next
    candidate by the lower confidence bound mean - kappa std. Then the best is trained for tau
    steps. The next stage is twice as long, and its trials too, up to `most`. A search costs
    ``candidates * trial_steps`` steps for each stage. Do the linear warmup before.

    Args:
      train: ``train(state, rate, n) -> (state, losses of the n steps)``, pure: what comes in stays
        as it was (with a data order that the state fixes, runs can be repeated).
      state: params, optimizer state and position in the data.
      low, high: the range of rates.
      steps, trial_steps: tau and tau' of the first stage.
      most: the largest tau.
      candidates: rates to try in a stage.
      exploration: kappa; at 1000 it explores nearly alone.
      seed: of the first candidate.

    Returns:
      An endless iterator of `Stage`; take as many as there are steps to make.

    Raises:
      ValueError: not 0 < low < high, or a stage of which every candidate diverges (NaN, inf): what
        came before it has been yielded.
      ImportError: without scikit-learn.

    Reference: as for `forecast`. (A candidate that diverges counts as the worst of its stage.)
    """
    if not 0 < low < high:
        raise ValueError(f"low={low} and high={high}: 0 < low < high was due")
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import Matern, WhiteKernel
    except ImportError:
        raise ImportError("autolrs needs scikit-learn: pip install scikit-learn") from None

    def search(state: Any, tau: int, trial: int, rng: np.random.Generator) -> dict[float, float]:
        grid = np.linspace(np.log(low), np.log(high), 257)
        tried: dict[float, float] = {}
        free = np.ones(len(grid), bool)
        for i in range(candidates):
            if i == 0:
                place = int(rng.integers(len(grid)))
            else:
                x = np.log(list(tried))[:, None]
                values = np.array(list(tried.values()))
                known = values[np.isfinite(values)]
                worst = known.max() if len(known) else 1.0
                y = np.where(np.isfinite(values), values, worst)
                y = (y - y.mean()) / (y.std() or 1.0)
                kernel = Matern(length_scale=1.0, nu=2.5) + WhiteKernel(1e-3)
                process: Any = GaussianProcessRegressor(kernel, optimizer=cast(Any, None)).fit(x, y)
                mean, std = process.predict(grid[:, None], return_std=True)
                place = int(np.argmin(np.where(free, mean - exploration * std, np.inf)))
            free[place] = False
            rate = float(np.exp(grid[place]))
            _, losses = train(state, rate, trial)
            tried[rate], _ = _extrapolate(losses, tau, False, 1)
        return tried

    def stages() -> Iterator[Stage]:
        now, tau, trial, rng = state, steps, trial_steps, np.random.default_rng(seed)
        while True:
            tried = search(now, tau, trial, rng)
            rate = min(tried, key=lambda r: tried[r])
            if not np.isfinite(tried[rate]):
                raise ValueError(
                    f"every rate that was tried in [{low}, {high}] diverged in {trial} steps"
                )
            now, losses = train(now, rate, tau)
            yield Stage(rate, now, np.asarray(losses), tried, candidates * trial)
            tau, trial = min(2 * tau, most), min(2 * trial, most // 10)

    return stages()
