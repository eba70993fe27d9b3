"""What makes random dropping of deltas bear high rates: a better factor, smaller deltas."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import trace, tree
from jaxkit.weights.merge import deltas, merge
from jaxkit.weights.methods import dare

__all__ = ["adamr", "analytic_q", "output_change", "search_q"]


def search_q(
    evaluate: Callable[[float], Any], low: float, high: float = 1.0, *, step: float = 0.05
) -> tuple[float, dict[float, float]]:
    """Find the q of `dare` with the best value: a grid, and a finer one around its best.

    From low to high by `step`, then by a tenth of it between the neighbours of the best; each grid
    ends after more than three points in a row without a new best.

    Args:
      evaluate: ``q -> value``, larger is better. With labels: the accuracy on held-out data of the
        model merged with `dare` of one key and that q. Without: ``lambda q: -output_change(...)``.
        As q is one traced number, one compiled program serves all points.
      low: 1 - drop_rate, for the factor of DARE.
      high: at most 1.

    Returns:
      The best q, and the value at all points.

    Raises:
      ValueError: bounds outside (0, 1] or in the wrong order; a value that is not finite.

    Reference: W. Deng et al., "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned
    Models", arXiv:2410.09344.

    >>> best, values = search_q(lambda q: -((q - 0.37) ** 2), 0.1)
    >>> round(best, 3)
    0.37
    """
    if not 0 < low <= high <= 1:
        raise ValueError(f"0 < low <= high <= 1 was due, and low={low}, high={high} came")
    values: dict[float, float] = {}

    def walk(start: float, stop: float, step: float) -> float:
        best, since = -math.inf, 0
        for i in range(int((stop - start) / step + 1e-6) + 1):
            q = round(start + i * step, 10)
            values[q] = float(evaluate(q))
            if not math.isfinite(values[q]):
                raise ValueError(f"evaluate gave {values[q]} for q={q}")
            best, since = max(best, values[q]), 0 if values[q] > best else since + 1
            if since > 3:
                break
        return max(values, key=lambda q: values[q])

    best = walk(low, high, step)
    fine = step / 10
    best = walk(max(low, best - step + fine), min(high, best + step - fine), fine)
    return best, values


def output_change(
    key: PRNGKeyArray,
    apply_fn: Callable[[PyTree, Any], Array],
    base: PyTree,
    model: PyTree,
    batch: Any,
    *,
    drop_rate: float | Array,
    q: float | Array | PyTree,
    draws: int = 4,
    where: tree.Where = "**",
) -> Float[Array, ""]:
    """Return how far dropping moves the outputs: the mean of |f(dropped) - f(model)|.

    It needs no labels. The mean over `draws` masks, without the one farthest from the mean.

    Args:
      key: a typed key.
      apply_fn: ``apply_fn(params, batch) -> array``; the paper takes the last hidden states.
      base, model: before and after fine-tuning.
      batch: unlabelled inputs; the paper takes 50 sequences of 128 tokens.
      drop_rate, q: as for `dare`; they may be traced.
      draws: how many masks, at least 3.
      where: the leaves that are dropped from; the others are the model's.

    Raises:
      ValueError: fewer than three draws, and what `merge` raises.

    Reference: as for `search_q`.

    >>> base, model = {"w": jnp.zeros((2, 1))}, {"w": jnp.ones((2, 1))}
    >>> apply_fn = lambda params, x: x @ params["w"]
    >>> key, x = jax.random.key(0), jnp.ones((1, 2))
    >>> output_change(key, apply_fn, base, model, x, drop_rate=0.0, q=1.0).item()
    0.0
    """
    if draws < 3:
        raise ValueError(f"draws={draws}: at least three are due, as one is left out")
    tree.check_key(key)
    full = apply_fn(model, batch)
    every = tree.every(base)
    chosen = tree.select(base, every if isinstance(where, str) and where == "**" else where)

    def change(key: PRNGKeyArray) -> Array:
        method = dare(key, drop_rate=drop_rate, q=q)
        dropped = merge(base, [model], method, where=chosen)
        dropped = jax.tree.map(lambda bit, d, w: d if bit else w, chosen, dropped, model)
        return jnp.abs(tree.float32(apply_fn(dropped, batch)) - tree.float32(full)).mean()

    found = jax.lax.map(change, jax.random.split(key, draws))
    outlier = jnp.argmax(jnp.abs(found - found.mean()))
    return jnp.where(jnp.arange(draws) == outlier, 0, found).sum() / (draws - 1)


def analytic_q(
    apply_fn: Callable[[PyTree, Any], Any],
    base: PyTree,
    model: PyTree,
    batch: Any,
    *,
    drop_rate: float,
    eta: float | Array = 0.45,
    gamma: float = 0.95,
    stop: float = 0.8,
    where: tree.Where = None,
) -> PyTree[Float[Array, ""]]:
    r"""Return the q of `dare` for each layer, from its deltas and the mean of its inputs.

    For each output i of a kernel, with c_ij = tau_ij E[x_j] (and the delta of the bias as one more
    input), q minimizes a bound, that holds with probability gamma, on how far dropping moves it:

    .. math:: \Big|\eta \Big(1 - \frac{1 - p}{q}\Big) \sum_j c_{ij}
        + \frac{\eta^2 \phi(p)}{4 q^2} \sum_j c_{ij}^2 + \ln\frac{2}{1 - \gamma}\Big|,
        \quad \phi(p) = \frac{1 - 2p}{\ln((1 - p) / p)},

    on a grid from 1 - p by 0.001 to 0.998; the sweep ends where the share `stop` of the outputs has
    stopped to improve, so that a few with large inputs do not decide. The layer's q is the mean
    over its outputs. (The sign of the first sum counts, as in the authors' code: where it is not
    negative, q stays near 1 - p.)

    Args:
      apply_fn: ``apply_fn(params, batch)``.
      base, model: before and after fine-tuning; the inputs are those in `model`.
      batch: unlabelled inputs.
      drop_rate: p in (0, 1), a Python number.
      eta: the paper searches it on held-out data (`search_q` does).
      gamma, stop: see above.
      where: the kernels to look at; default: those weights that feed a contraction.

    Returns:
      A tree like `base` of one number a leaf, for ``dare(q=)``: the bias next to a kernel (named
      "bias" or "b" and of the shape of its outputs) has the kernel's, and every other leaf the mean
      over the kernels. A kernel used several times is seen at its first use; one that a scan stacks
      counts as another leaf.

    Raises:
      ValueError: a drop rate outside (0, 1), no kernel to look at, and what `trace.taps` raises.

    Reference: as for `search_q`; after the authors' code, which sums in float16.

    >>> base, model = {"w": jnp.zeros((8, 1))}, {"w": jnp.full((8, 1), -5.0)}
    >>> q = analytic_q(lambda p, x: x @ p["w"], base, model, jnp.ones((3, 8)), drop_rate=0.9)
    >>> round(q["w"].item(), 3)
    0.574
    """
    if not 0 < drop_rate < 1:
        raise ValueError(f"drop_rate is {drop_rate}, and a number in (0, 1) was due")
    taus = {path: d[0] for path, d in deltas(base, [model]).items()}
    _, taps = trace.taps(apply_fn, where)(model, batch)
    found: dict[str, Array] = {}
    for path, tap in taps.items():
        tau = taus[path]
        produced = [y is not None for y in tap.y_axes]
        if len(produced) != tau.ndim or all(produced):
            continue
        c = tau * _mean_input(tap)
        sums = c.sum([d for d, y in enumerate(produced) if not y]).ravel()
        squares = jnp.square(c).sum([d for d, y in enumerate(produced) if not y]).ravel()
        out = tuple(n for n, y in zip(tau.shape, produced, strict=True) if y)
        head = path.rpartition("/")[0]
        beside = [f"{head}/{name}" if head else name for name in ("bias", "b")]
        own = [name for name in beside if name in taus and taus[name].shape == out]
        for name in own:
            sums, squares = sums + taus[name].ravel(), squares + jnp.square(taus[name].ravel())
        best = _best_q(sums, squares, drop_rate, eta, gamma, stop)
        found |= dict.fromkeys([path, *own], best)
    if not found:
        raise ValueError("no kernel was found to look at; choose some by `where`")
    kernels = [found[path] for path in taps if path in found]
    mean = jnp.stack(kernels).mean()
    out = [found.get(path, mean) for path in tree.flatten(base)]
    return jax.tree.unflatten(jax.tree.structure(base), out)


def _mean_input(tap: trace.Tap) -> Array:
    """Return the mean of what a kernel is contracted with, to broadcast against the kernel."""
    x = tree.float32(tap.input)
    at = [None if a is None else a % x.ndim for a in tap.x_axes]
    used = [a for a in at if a is not None]
    mean = x.mean([a for a in range(x.ndim) if a not in used])
    left = sorted(used)
    mean = mean.transpose([left.index(a) for a in used])
    return jnp.expand_dims(mean, [d for d, a in enumerate(at) if a is None])


def _best_q(sums: Array, squares: Array, p: float, eta: Any, gamma: float, stop: float) -> Array:
    phi = 0.5 if p == 0.5 else (1 - 2 * p) / math.log((1 - p) / p)
    grid = np.arange(max(round((1 - p) * 1000), 1), 999) * 0.001
    qs = jnp.asarray(grid if len(grid) else [1 - p], jnp.float32)
    linear = eta * (1 - (1 - p) / qs) * sums[:, None]
    square = eta**2 * phi * squares[:, None] / (4 * qs**2)
    values = jnp.abs(linear + square + math.log(2 / (1 - gamma)))
    lowest = jax.lax.cummin(values, axis=1)
    stopped = jnp.cumsum(values[:, 1:] >= lowest[:, :-1], axis=1) > 0
    enough = jnp.pad(stopped.mean(0) >= stop, (1, 0))
    last = jnp.where(enough.any(), jnp.argmax(enough), len(qs) - 1)
    seen = jnp.where(jnp.arange(len(qs)) <= last, values, jnp.inf)
    return qs[len(qs) - 1 - jnp.argmin(seen[:, ::-1], axis=1)].mean()


def adamr(
    learning_rate: optax.ScalarOrSchedule,
    start: PyTree,
    *,
    strength: float | Array = 1e-4,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    norm: str = "l2",
) -> optax.GradientTransformation:
    r"""Adam with decay towards the pretrained weights, so that deltas stay small (DAREx-L2).

    .. math:: \theta \leftarrow \theta - \eta \Big[\frac{\hat m}{\sqrt{\hat v} + \epsilon}
        + \frac{\lambda}{\sqrt{\bar v}} (\theta - \theta_0)\Big]

    with v-bar the mean of v-hat over all entries of all leaves (1 if it is 0): the pull is
    decoupled, and in the unit of the gradients.

    Args:
      learning_rate: a number or a schedule.
      start: theta_0, like params; inside `optax.masked`, with `optax.MaskedNode` where it is not
        used (a fresh head).
      strength: lambda.
      b1, b2, eps: those of Adam.
      norm: "l2", or "l1" for sign(theta - theta_0).

    Raises:
      ValueError: a norm that there is not, a start that does not fit the params, an update without
        params.

    Reference: W. Deng et al., "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned
    Models", arXiv:2410.09344; the stable decay is that of Z. Xie, Z. Xu, J. Zhang, I. Sato,
    M. Sugiyama, "On the Overlooked Pitfalls of Weight Decay and How to Mitigate Them: A
    Gradient-Norm Perspective", arXiv:2011.11152.

    >>> tx = adamr(0.1, {"w": jnp.array([1.0])}, strength=0.5)
    >>> params = {"w": jnp.array([3.0])}
    >>> updates, _ = tx.update({"w": jnp.array([2.0])}, tx.init(params), params)
    >>> round(updates["w"].item(), 5)  # -0.1 (1 + 0.5 / 2 * (3 - 1))
    -0.15
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm={norm!r}; 'l1' or 'l2' was due")
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: PyTree) -> Any:
        if jax.tree.leaves(params):  # no placeholder of optax.tree.map_params
            tree.check_like(params, start, "start")
        return adam.init(params)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("adamr pulls params towards their start: update needs params")
        scaled, state = adam.update(updates, state, params)
        moments = jax.tree.leaves(state.nu)
        total = sum((tree.float32(v).sum() for v in moments), jnp.zeros(()))
        mean = total / max(1, sum(v.size for v in moments)) / (1 - b2**state.count)
        pull = strength / jnp.where(mean > 0, jnp.sqrt(mean), 1)

        def add(u: Array, w: Array, w0: Array) -> Array:
            away = tree.float32(w) - tree.float32(w0)
            return (u + pull * (jnp.sign(away) if norm == "l1" else away)).astype(u.dtype)

        return jax.tree.map(add, scaled, params, start), state

    return optax.chain(
        optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate)
    )
