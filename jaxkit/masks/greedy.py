"""Remove what the loss does not miss: greedily, from coarse parts to fine ones."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxkit.masks.route import largest

__all__ = ["Greedy", "Visit", "greedy_removal", "hard_attention"]


class Visit(NamedTuple):
    """One evaluation of `greedy_removal`.

    name: of the axis.
    units: what was tried without.
    loss: the mean loss on the decision set without them.
    gain: how much less that is than the loss to beat.
    error: the standard error of the gain over the examples; nan if the loss is a scalar.
    removed: the decision.
    """

    name: str
    units: tuple[int, ...]
    loss: float
    gain: float
    error: float
    removed: bool


class Greedy(NamedTuple):
    """What `greedy_removal` found.

    unit_mask: what is left.
    start: the loss before.
    loss: the loss of what is left.
    visits: the evaluations, in order; their number is the cost beside one evaluation at the start.
    """

    unit_mask: dict[str, Bool[np.ndarray, " units"]]
    start: float
    loss: float
    visits: tuple[Visit, ...]


def greedy_removal(
    losses_fn: Callable[[dict[str, Bool[Array, " units"]], Any], Float[Array, "..."]],
    unit_mask: Mapping[str, Bool[Array, " units"]],
    decision_set: Any,
    *,
    order: Sequence[str],
    parts: Mapping[str, int] | None = None,
    eps: float | None = None,
    errors: float = 0.0,
) -> Greedy:
    """Try every axis without all its units, then without each part of those that stay.

    From the last axis to the first: first whole axes (an attention or a feed-forward block), then,
    in the same order, the parts (a head, a group of neurons) of the axes that are left. What is
    better away goes at once. A part is never tried when its whole axis went, nor the last part
    that is left of an axis, as that is the axis again.

    * To gain accuracy (``eps=None``): remove if the loss falls below the lowest so far, which it
      then becomes. Losses of accepted steps fall strictly.
    * To save time and memory: remove if the loss stays at or below that at the start plus `eps`.

    The unit mask may hold any switch that `losses_fn` understands beside the axes of weights: an
    entry ``"0/soft attention"`` of one unit lets it try `hard_attention` in that layer; put those
    first, so that they are visited last. Fine-tune what is left, and perhaps repeat.

    Args:
      losses_fn: ``losses_fn(unit_mask, decision_set) -> losses`` of the examples, whose mean
        decides (or a scalar). With weights: the loss at ``apply(params, nested.subnet(params,
        unit_mask, axes, branches=branches))``. Jit it: the masks always have the same shapes.
      unit_mask: True for the units to start with, by name.
      decision_set: held-out examples: neither those that trained nor those that will test.
      order: the names to try, from the first layer to the last; the last is visited first. (The
        order of a dict does not survive jax.)
      parts: into how many parts the units of an axis are divided, by name; default: an axis is
        removed whole or not at all. The number of heads of an attention, say.
      eps: the tolerated loss; None: only gains.
      errors: with eps=None, demand a gain of more than this many standard errors. On a small
        decision set some removal gains by chance.

    Raises:
      ValueError: a name in `order` or `parts` that is none, fewer units than parts, or a loss at
        the start that is not finite.
      TypeError: a mask that is not boolean.

    >>> losses_fn = lambda u, harm: (u["a"] * harm["a"]).sum() + (u["b"] * harm["b"]).sum()
    >>> harm = {"a": jnp.array([-2.0, 1.0]), "b": jnp.array([1.0, 1.0])}
    >>> found = greedy_removal(losses_fn, jax.tree.map(lambda h: h > -9, harm), harm,
    ...                        order=["a", "b"], parts={"a": 2, "b": 2})
    >>> {name: mask.tolist() for name, mask in found.unit_mask.items()}
    {'a': [True, False], 'b': [False, False]}
    >>> [(visit.name, visit.units, visit.removed) for visit in found.visits]
    [('b', (0, 1), True), ('a', (0, 1), False), ('a', (0,), False), ('a', (1,), True)]

    Reference: Nagarajan, Sen, Stevens, Raghunathan, "AxFormer: Accuracy-driven Approximation of
    Transformers for Faster, Smaller and more Accurate NLP Models", arXiv:2010.03688. Order and
    thresholds are our reading.
    """
    parts = dict(parts or {})
    for name, mask in unit_mask.items():
        if np.asarray(mask).dtype != bool:
            raise TypeError(f"axis {name!r}: the mask is {np.asarray(mask).dtype}, not bool")
    for what, names in (("order", order), ("parts", parts)):
        for name in names:
            if name not in unit_mask:
                raise ValueError(f"{what}: there is no {name!r} among {list(unit_mask)}")
    for name, n in parts.items():
        if not 1 <= n <= len(unit_mask[name]):
            raise ValueError(f"axis {name!r}: {len(unit_mask[name])} units make no {n} parts")
    masks = {name: np.array(mask) for name, mask in unit_mask.items()}
    evaluate = lambda masks: np.asarray(
        losses_fn({name: jnp.asarray(mask) for name, mask in masks.items()}, decision_set),
        np.float64,
    )
    best = start = evaluate(masks)
    if not np.isfinite(start).all():
        raise ValueError(f"the loss at the start is {start.mean()}")
    visits: list[Visit] = []

    def visit(name: str, units: Int[np.ndarray, " n"]) -> None:
        nonlocal masks, best
        tried = masks | {name: masks[name] & ~np.isin(np.arange(len(masks[name])), units)}
        losses = evaluate(tried)
        gains = best - losses
        gain = float(gains.mean())
        error = float(gains.std(ddof=1) / np.sqrt(gains.size)) if gains.size > 1 else np.nan
        margin = errors * error if errors else 0.0
        removed = gain > margin if eps is None else bool(losses.mean() <= start.mean() + eps)
        if removed:
            masks, best = tried, losses
        visits.append(
            Visit(name, tuple(map(int, units)), float(losses.mean()), gain, error, removed)
        )

    for name in reversed(order):
        if masks[name].any():
            visit(name, np.flatnonzero(masks[name]))
    for name in reversed(order):
        for group in np.array_split(np.arange(len(masks[name])), parts.get(name, 1)):
            units = group[masks[name][group]]
            if 0 < len(units) < masks[name].sum():
                visit(name, units)
    return Greedy(masks, float(start.mean()), float(best.mean()), tuple(visits))


def hard_attention(
    scores: Float[Array, "*heads queries keys"],
    k: int = 8,
    *,
    mask: Bool[Array, "*#heads queries keys"] | None = None,
) -> Float[Array, "*heads queries keys"]:
    """Attend to the k keys with the largest scores alone: softmax over them, zeros elsewhere.

    Args:
      scores: query times key, scaled.
      k: how many keys, static; the queries that may see fewer attend to all they may. Ties keep the
        lower index.
      mask: True for the keys that a query may see (causal, padding); the k are chosen among them.
        A query that may see none gets zeros.

    Returns:
      Weights; k >= keys is soft attention.

    Raises:
      ValueError: k below 1.

    >>> hard_attention(jnp.array([[0.0, 2.0, 1.0]]), 1).tolist()
    [[0.0, 1.0, 0.0]]

    Reference: as for `greedy_removal`.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least one key is due")
    allowed = jnp.ones(scores.shape, bool) if mask is None else jnp.broadcast_to(mask, scores.shape)
    ranked = jnp.where(allowed, scores, -jnp.inf)
    kept = largest(ranked, min(k, scores.shape[-1])) & allowed
    top = jnp.max(scores, -1, keepdims=True, where=kept, initial=-jnp.inf)
    weights = jnp.exp(jnp.where(kept, scores - jax.lax.stop_gradient(top), -jnp.inf))
    return weights / jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
