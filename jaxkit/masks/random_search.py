"""Random search over subnetworks: the best of K random unit masks, by the loss as it is now."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.score import random
from jaxkit.masks.select import check_sparsity, keep_where, kept_count, topk
from jaxkit.masks.structured import units
from jaxkit.trace import named, resolve

__all__ = ["Searched", "random_search", "random_units"]


class Searched(NamedTuple):
    """The best unit mask of a search, the losses of all, and the number of the best."""

    keep: dict[str, Bool[Array, " units"]]
    losses: Float[Array, " draws"]
    best: Array


def random_units(
    key: PRNGKeyArray, params: PyTree, axes: PyTree, sparsity: float | Array
) -> dict[str, Bool[Array, " units"]]:
    """Draw a unit mask: of every axis exactly round-half-even((1 - sparsity) units), at random.

    Args:
      key: a typed key.
      params: a tree of arrays (only shapes are read).
      axes: its axes tree; pinned axes keep all their units, and are not in the mask.
      sparsity: the fraction of units that go, in [0, 1).

    Returns:
      A boolean vector by name of axis, for `masks.units` and `masks.shrink`.

    Raises:
      ValueError: a sparsity outside [0, 1), one that would leave an axis without units (and the
        largest that does not), or no axis that may be cut.
      TypeError: a legacy uint32 key.

    >>> params, axes = {"w": jnp.ones((2, 8))}, {"w": (None, "hidden")}
    >>> random_units(jax.random.key(0), params, axes, 0.75)["hidden"].sum().item()
    2
    """
    check_sparsity(sparsity)
    free = {name: a.size for name, a in named(resolve(params, axes)).items() if not a.pinned}
    if not free:
        raise ValueError("no axis may be cut: there are no units to search")
    scores = random(key, {name: jnp.zeros(size) for name, size in free.items()})
    if isinstance(sparsity, int | float | np.number):
        for name, size in free.items():
            if kept_count(sparsity, size) < 1:
                raise ValueError(
                    f"axis {name!r} of {size} units would be left without any: a sparsity below "
                    f"{1 - 0.5 / min(free.values()):g} was due"
                )
    return topk(scores, sparsity=dict.fromkeys(free, sparsity), where="**")


def random_search(
    key: PRNGKeyArray,
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    params: PyTree,
    batch: Any,
    axes: PyTree,
    *,
    sparsity: float | Array,
    draws: int = 100,
    together: int = 10,
) -> Searched:
    """Draw random subsets of units, and return the one with the lowest loss before any training.

    The subnetwork is then trained from the values that its weights have now. The finding is
    negative: it trains no better than one random subset, the first draw of the same key,
    ``random_units(fold_in(key, 0), ...)``, which a search of one draw returns. A loss that is NaN
    counts as infinite.

    Args:
      key: a typed key; draw i comes from ``fold_in(key, i)``, so that more draws find no worse.
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      params: a tree of arrays, as initialized.
      batch: the batch that ranks the draws: of training data. (With test data, it leaks.)
      axes: the axes tree of params.
      sparsity: the fraction of the units of every axis that go, in [0, 1).
      draws: K.
      together: how many subnetworks are evaluated at once.

    Raises:
      ValueError: as `random_units`; fewer than one draw; losses that are all NaN (if they are
        known: under jit the first draw comes out).
      TypeError: a legacy uint32 key.

    Reference: R. Farahani, "Random Search as a Baseline for Sparse Neural Network Architecture
    Search", arXiv:2403.08265. (K and the ranking by the loss at initialization are choices.)

    >>> params, axes = {"w": jnp.arange(4.0)[None]}, {"w": (None, "hidden")}
    >>> loss_fn = lambda params, x: jnp.sum(params["w"] * x)
    >>> key = jax.random.key(0)
    >>> found = random_search(key, loss_fn, params, 1.0, axes, sparsity=0.5, draws=50)
    >>> found.keep["hidden"].tolist(), found.losses[found.best].item()
    ([True, True, False, False], 1.0)
    """
    if draws < 1:
        raise ValueError(f"draws={draws}, and at least one was due")
    tree.check_key(key)

    def one(i):
        keep = random_units(jax.random.fold_in(key, i), params, axes, sparsity)
        return keep, loss_fn(keep_where(units(params, keep, axes), params), batch)

    keeps, losses = jax.lax.map(one, jnp.arange(draws), batch_size=min(together, draws))
    if violates(lambda losses: not np.isnan(losses).all(), losses):
        raise ValueError(f"the loss of all {draws} draws is NaN: none is the best")
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return Searched(jax.tree.map(lambda k: k[best], keeps), losses, best)
