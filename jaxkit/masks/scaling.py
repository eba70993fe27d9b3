"""What sparse pre-training costs, and the loss it leads to: laws for whole runs."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxkit.masks.select import check_sparsity

__all__ = ["Law", "fit_law", "transformer_flops"]

Numbers = Sequence[float] | Float[np.ndarray, " runs"]


class Law(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta: the loss after D tokens at N parameters on average.

    >>> round(Law(1.7, 400.0, 410.0, 0.34, 0.28).loss(1e9, 2e10), 4)
    2.5836
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Return the predicted loss, element by element."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


def fit_law(parameters: Numbers, tokens: Numbers, losses: Numbers, *, delta: float = 1e-3) -> Law:
    """Fit the scaling law that sparse and dense runs share.

    The minimum over (log A, log B, log E, alpha, beta) of the sum over runs of Huber_delta of
    logsumexp(log A - alpha log N, log B - beta log D, log E) - log L, by L-BFGS-B from six starts.

    Args:
      parameters: N of each run, the *average* parameter count over its steps (`average_density`
        times the dense count), all counted alike: with embeddings or without.
      tokens: D of each run.
      losses: L of each run.
      delta: beyond it errors count linearly, so that outliers weigh less.

    Raises:
      ValueError: fewer than 5 runs (there are 5 unknowns), other lengths, or numbers that are not
        positive.

    References:
      T. Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse
      and Dense Scaling Laws", arXiv:2501.12486 (the law with N averaged).
      J. Hoffmann et al., "Training Compute-Optimal Large Language Models", arXiv:2203.15556 (the
      law and its fit).

    >>> sizes, budgets = np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)
    >>> n, d = (x.ravel() for x in np.meshgrid(sizes, budgets))
    >>> law = fit_law(n, d, Law(1.7, 400.0, 410.0, 0.34, 0.28).loss(n, d))
    >>> round(law.E, 2), round(law.alpha, 2), round(law.beta, 2)
    (1.7, 0.34, 0.28)
    """
    from scipy.optimize import minimize

    given = {"parameters": parameters, "tokens": tokens, "losses": losses}
    columns = {name: np.asarray(values, np.float64) for name, values in given.items()}
    shapes = {name: column.shape for name, column in columns.items()}
    if len(set(shapes.values())) > 1 or columns["losses"].ndim != 1:
        raise ValueError(f"three vectors of one length are due, and the shapes are {shapes}")
    if len(columns["losses"]) < 5:
        raise ValueError(f"the law has 5 unknowns, and {len(columns['losses'])} runs came")
    for name, column in columns.items():
        if not (column > 0).all():
            raise ValueError(f"{name} are due to be positive: {column[~(column > 0)]} came")
    log_n, log_d, log_l = (np.log(column) for column in columns.values())
    mean_n, mean_d = log_n.mean(), log_d.mean()  # centred, the five unknowns hardly correlate
    x_n, x_d = log_n - mean_n, log_d - mean_d

    def loss(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * x_n, b - beta * x_d, np.full_like(x_n, e)])
        top = terms.max(0)
        weights = np.exp(terms - top)
        total = weights.sum(0)
        error = top + np.log(total) - log_l
        slope = np.clip(error, -delta, delta)
        g_a, g_b, g_e = weights / total * slope
        grad = np.array([g_a.sum(), g_b.sum(), g_e.sum(), -(g_a @ x_n), -(g_b @ x_d)])
        return (slope @ (error - slope / 2)) / delta**2, grad / delta**2

    least = columns["losses"].min()
    starts = [
        (*np.log([share * least, (1 - share) * least, floor * least]), 0.3, 0.3)
        for floor, share in product((0.3, 0.6, 0.9), (0.1, 0.6))
    ]
    options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-15, "gtol": 1e-10}
    fits = [minimize(loss, s, jac=True, method="L-BFGS-B", options=options) for s in starts]
    a, b, e, alpha, beta = min(fits, key=lambda fit: fit.fun).x
    A, B = np.exp(a + alpha * mean_n), np.exp(b + beta * mean_d)
    return Law(float(np.exp(e)), float(A), float(B), float(alpha), float(beta))


def transformer_flops(
    layers: int, width: int, context: int, vocabulary: int, *, sparsity: float = 0.0
) -> float:
    """Return the forward FLOPs per token of a GPT whose block kernels are sparse.

    24 width^2 layers (1 - sparsity) + 4 context width layers + 2 width vocabulary: the six kernels
    of a block (query, key, value, out, and two of 4 width), attention over the whole context, and
    the readout. Attention and readout stay dense, so the saving is less than 1 / (1 - sparsity).
    Training costs three times as much. `costs` counts any model, leaf by leaf.

    Sparse pre-training and dense fine-tuning needs no more than `sparse` and its absence::

        sparsity = masks.uniform(params, 0.75, where="**/block_*/**/kernel")
        mask = masks.topk(masks.random(key, params), sparsity=sparsity)
        params = masks.apply(params, mask)
        tx = masks.sparse(optax.adamw(1e-3), mask)  # pre-training
        tx = optax.adamw(1e-4)                      # fine-tuning: plain, and its state fresh

    The revived weights start at 0. (With Adam's old moments, zero at the revived entries, the first
    steps would be far too long.)

    Raises:
      ValueError: sparsity outside [0, 1).

    Reference: V. Thangarasa et al., "SPDF: Sparse Pre-training and Dense Fine-tuning for Large
    Language Models", arXiv:2303.10464.

    >>> sizes = dict(layers=24, width=2048, context=2048, vocabulary=50257)
    >>> round(transformer_flops(**sizes) / transformer_flops(**sizes, sparsity=0.75), 3)
    2.494
    """
    check_sparsity(sparsity)
    blocks = 24 * width**2 * layers * (1 - sparsity)
    return blocks + 4 * context * width * layers + 2 * width * vocabulary
