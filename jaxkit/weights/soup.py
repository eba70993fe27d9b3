"""Soups: which models to average, and how much of each; the running mean of one training."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxkit import tree
from jaxkit.weights.merge import Models, deltas, merge
from jaxkit.weights.methods import average

__all__ = ["GreedySoup", "LearnedSoup", "flips", "greedy_soup", "learned_soup", "running_mean"]


def running_mean(
    mean: PyTree, params: PyTree, count: int | Int[Array, ""], *, where: tree.Where = "**"
) -> PyTree:
    """Take one more model into a mean of `count`: mean + (params - mean) / (count + 1).

    The average of the checkpoints of a training with one extra copy of the params, under jit and
    `lax.scan`. Start it from anything with count 0, and begin after the warm-up::

        mean = jax.tree.map(lambda w: w.astype(jnp.float32), params)      # the accumulator's dtype
        mean = running_mean(mean, params, k)                              # k = 0, 1, 2, ...

    Args:
      mean: a tree like params; each leaf keeps its dtype, so make it float32 for bfloat16 params.
      params: one more model. (No optimizer state.)
      count: how many are in `mean`.
      where: the leaves to average; default: every float leaf. The others, and what is no float, are
        those of the first params that came.

    Raises:
      ValueError: another structure or shape, naming the path.

    Reference: F. D. Schmidt, I. Vulić, G. Glavaš, "Free Lunch: Robust Cross-Lingual Transfer via
    Model Checkpoint Averaging", arXiv:2305.16834.

    >>> mean = {"w": jnp.zeros(1)}
    >>> for k, w in enumerate([1.0, 3.0, 5.0]):
    ...     mean = running_mean(mean, {"w": jnp.array([w])}, k)
    >>> mean["w"].tolist()
    [3.0]
    """
    tree.check_like(mean, params, "params")
    if isinstance(where, str) and where == "**":
        where = tree.every(mean)
    first = jnp.asarray(count) == 0

    def update(bit: bool, m: Any, w: Any) -> Any:
        if not tree.is_array(m):
            return m
        if not bit or not tree.is_inexact(m):
            out = jnp.where(first, w, m)
            return out.astype(m.dtype) if tree.is_inexact(m) else out
        wide = tree.float32(m)
        step = (tree.float32(w) - wide) / (count + 1)
        return jnp.where(first, tree.float32(w), wide + step).astype(m.dtype)

    return jax.tree.map(update, tree.select(mean, where), mean, params)


class GreedySoup(NamedTuple):
    """The soup, the models in it in the order they came in, its value, and that of each model."""

    params: PyTree
    models: tuple[int, ...]
    value: float
    values: tuple[float, ...]


def greedy_soup(
    evaluate: Callable[[PyTree], Any], models: Models, *, accept_ties: bool = False
) -> GreedySoup:
    """Average the models one by one, best first, and keep each that improves the average.

    One pass over the models sorted by their value (equal ones in the order of the list): the soup
    with the next model is kept if its value is above that of the soup. So its value is never below
    that of the best model. `evaluate` is called 2 N - 1 times for N models, and one soup is held in
    memory beside them, in float32. Models of several initializations lose by every average: look
    at `probes.barrier` between two of them, and `align` them first.

    Args:
      evaluate: ``params -> value``, larger is better: accuracy on held-out data, the same at every
        call and not those of the test, on which the soup's value would flatter. Jit it.
      models: a list or a tuple of trees, or a stacked tree.
      accept_ties: keep a model that leaves the value as it is.

    Raises:
      ValueError: no models, a value that is not finite, naming the model, and what `merge` raises
        of the models.

    Reference: M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
    improves accuracy without increasing inference time", arXiv:2203.05482. (The authors' code
    takes the last of equal models first, and keeps no ties.)

    >>> models = [{"w": jnp.array(x)} for x in (0.0, 3.0, 9.0)]
    >>> soup = greedy_soup(lambda params: -abs(params["w"] - 1.0), models)
    >>> soup.params["w"].item(), soup.models
    (1.5, (0, 1))
    """
    if type(models) not in (list, tuple):
        n = len(jax.tree.leaves(models)[0])
        models = [jax.tree.map(lambda x, i=i: x[i], models) for i in range(n)]
    if not models:
        raise ValueError("there is no model to average: the list is empty")
    for model in models:
        deltas(None, [models[0], model])  # raises unless they are alike

    def value(params: PyTree, what: str) -> float:
        out = float(evaluate(params))
        if not math.isfinite(out):
            raise ValueError(f"evaluate gave {out} for {what}")
        return out

    alone = [value(model, f"model {i}") for i, model in enumerate(models)]
    first, *others = sorted(range(len(models)), key=lambda i: -alone[i])
    own = lambda mean: jax.tree.map(lambda m, w: _as(w, m), mean, models[first])
    best, inside = alone[first], [first]
    mean = jax.tree.map(lambda w: tree.float32(w) if tree.is_inexact(w) else w, models[first])
    for i in others:
        wider = running_mean(mean, models[i], len(inside))
        got = value(own(wider), f"the soup with model {i}")
        if got > best or (accept_ties and got == best):
            mean, best, inside = wider, got, [*inside, i]
    return GreedySoup(own(mean), tuple(inside), best, tuple(alone))


def _as(leaf: Any, mean: Any) -> Any:
    return mean.astype(leaf.dtype) if tree.is_inexact(leaf) else leaf


class LearnedSoup(NamedTuple):
    """The soup, the weight of each model in each leaf {path: (models,)}, the loss at each step."""

    params: PyTree
    weights: dict[str, Float[Array, " models"]]
    losses: Float[Array, " steps"]


def learned_soup(
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    models: Models,
    batches: PyTree,
    *,
    tx: optax.GradientTransformation | None = None,
    by: str = "leaf",
) -> LearnedSoup:
    """Learn how much of each model to take, by gradient descent on held-out data.

    theta = sum_i a_i theta_i with a = softmax(beta r): a row r of each leaf (or one for all), which
    starts at 1/N, the uniform soup, and the factor beta, which starts at 1. The models stay as
    they are. It is one `lax.scan` over the batches.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``, on data that no model was trained on.
      models: a list or a tuple of trees, or a stacked tree.
      batches: a tree of arrays whose first axis is that of the steps. (The paper makes 5 passes.)
      tx: default: ``optax.adamw(0.05, weight_decay=0.0)``, as in the paper.
      by: "leaf", weights for each leaf, or "model", the same for all.

    Raises:
      ValueError: a `by` that there is not, and what `merge` raises of the models.

    Reference: M. Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
    improves accuracy without increasing inference time", arXiv:2203.05482.

    >>> models = [{"w": jnp.array(0.0)}, {"w": jnp.array(4.0)}]
    >>> soup = learned_soup(lambda p, y: (p["w"] - y) ** 2, models, jnp.ones(100))
    >>> round(soup.params["w"].item(), 2), jnp.round(soup.weights["w"], 2).tolist()
    (1.0, [0.75, 0.25])
    """
    if by not in ("leaf", "model"):
        raise ValueError(f"by={by!r}; 'leaf' or 'model' was due")
    tx = optax.adamw(0.05, weight_decay=0.0) if tx is None else tx
    stacks = deltas(None, models)
    n = max((len(stack) for stack in stacks.values()), default=1)
    row = jnp.full(n, 1 / n)
    theta = {"beta": jnp.ones(()), "raw": dict.fromkeys(stacks, row) if by == "leaf" else row}

    def shares(theta: dict[str, Any]) -> dict[str, Any]:
        alpha = jax.tree.map(lambda r: jax.nn.softmax(theta["beta"] * r), theta["raw"])
        return alpha if by == "leaf" else dict.fromkeys(stacks, alpha)

    def mixed(theta: dict[str, Any]) -> PyTree:
        return merge(None, models, average(shares(theta)))

    def step(carry: tuple, batch: Any) -> tuple[tuple, Array]:
        theta, state = carry
        loss, grads = jax.value_and_grad(lambda t: loss_fn(mixed(t), batch))(theta)
        updates, state = tx.update(grads, state, theta)
        return (optax.apply_updates(theta, updates), state), loss

    (theta, _), losses = lax.scan(step, (theta, tx.init(theta)), batches)
    return LearnedSoup(mixed(theta), shares(theta), losses)


def flips(y: Int[Array, " n"], *predictions: Int[Array, " n"]) -> Float[Array, "..."]:
    """Count who is right where: ``cells[r_1, ..., r_k]``, r_i = 1 where prediction i is right.

    Fractions of the n examples, which sum to 1. Of two models, old and new, ``cells[1, 0]`` are the
    negative flips and ``cells[0, 1]`` the positive ones, whose difference is the gain in accuracy.
    Of three, the zero-shot model, the fine-tuned one and their average, ``cells[0, 0, 1]`` is
    FalseFalseTrue: both are wrong, and the average is right.

    Args:
      y: the labels.
      predictions: one label an example of each model.

    Raises:
      ValueError: arrays of other shapes.

    Reference: Y. Lin, L. Tan, Y. Hao, H. Wong, H. Dong, W. Zhang, Y. Yang, T. Zhang, "Spurious
    Feature Diversification Improves Out-of-distribution Generalization", arXiv:2309.17230.

    >>> flips(jnp.array([0, 1, 2, 3]), jnp.array([0, 1, 0, 0]), jnp.array([0, 0, 2, 2])).tolist()
    [[0.25, 0.25], [0.25, 0.25]]
    """
    y = jnp.asarray(y)
    for i, p in enumerate(predictions):
        if jnp.shape(p) != y.shape or y.ndim != 1:
            raise ValueError(f"prediction {i} is {jnp.shape(p)}, and the labels are {y.shape}")
    cells = jnp.ones((len(y),))
    for p in predictions:
        right = jnp.stack([p != y, p == y], -1)
        right = right.reshape((len(y),) + (1,) * (cells.ndim - 1) + (2,))
        cells = cells[..., None] * right
    return cells.mean(0)
