"""Lottery tickets: train, prune, go back to the first weights, again; controls and stability."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit.masks.score import magnitude, random
from jaxkit.masks.select import Mask, apply, prune

__all__ = ["Stability", "Ticket", "reinit", "shuffle", "stability", "tickets"]


class Ticket(NamedTuple):
    """A round of `tickets`: its number, the mask, the params under it before and after training."""

    round: int
    mask: Mask
    start: PyTree
    trained: PyTree


def tickets(
    train: Callable[[PyTree, Mask, int, int], PyTree],
    params: PyTree,
    *,
    steps: int,
    rounds: int,
    fraction: float | PyTree = 0.2,
    rewind: int = 0,
    where: tree.Where = None,
    within: Mask | None = None,
    rule: Callable[[Mask, PyTree], Mask] | None = None,
) -> Iterator[Ticket]:
    """Find lottery tickets by iterative magnitude pruning, with or without late rewinding.

    With theta_k the params after the first k = `rewind` steps (k = 0: the first params), m = 1, and
    T = `steps`, round r = 0, 1, ... trains m * theta_k from step k to T; then, in the trained
    params, the live weights with the smallest magnitude leave m. The first k steps are made once,
    dense. k = T trains no ticket: it is pruning after training.

    ``ticket.start`` is zero outside the mask, and keeping it so is up to `train`, as with
    ``optax`` and ``masks.sparse(tx, mask)``. Optimizer states start anew in every call of `train`.
    The paper prunes half as much in the output layer: give `fraction` as a tree.

    Args:
      train: ``train(params, mask, start, stop) -> params``, from step `start` up to `stop`: the
        learning-rate schedule and the order of the data are those of these steps,
        ``schedule(start + i)``.
      params: the first params; with model state (BatchNorm), the whole tree of variables, for what
        is rewound is all of it.
      steps: T, the steps of a whole training.
      rounds: how often to prune, so that ``rounds + 1`` tickets come, the dense one first.
      fraction: of the live weights, what leaves in a round; one number ranks all chosen leaves
        together, a tree of numbers each leaf for itself (as `prune`).
      rewind: k.
      where: the leaves to prune, as for `prune`; the others are never masked.
      within: the mask to start from, in place of ones: all tickets lie within it, and the first k
        steps are made under it.
      rule: ``rule(mask, trained) -> mask`` in place of pruning `fraction` by magnitude.

    Returns:
      An iterator over the rounds; each is computed when it is asked for.

    Raises:
      ValueError: rewind outside 0 ... steps; a first mask that does not fit; a round that would
        leave a leaf without weights (its path), that prunes nothing, or that brings a weight back.

    References:
      J. Frankle, M. Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural
      Networks", arXiv:1803.03635; J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, "Stabilizing
      the Lottery Ticket Hypothesis", arXiv:1903.01611 (rewinding; the optimizer state is not
      rewound here, nor in their code).

    >>> train = lambda params, mask, start, stop: jax.tree.map(lambda w: 2 * w, params)
    >>> params = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> for ticket in tickets(train, params, steps=10, rounds=2, fraction=0.5):
    ...     print(ticket.round, ticket.start["kernel"].tolist())
    0 [[4.0, -3.0, 2.0, 1.0]]
    1 [[4.0, -3.0, 0.0, 0.0]]
    2 [[4.0, 0.0, 0.0, 0.0]]
    """
    if not 0 <= rewind <= steps:
        raise ValueError(f"rewind={rewind}, and a step from 0 to steps={steps} was due")
    if within is not None:
        tree.check_like(params, within, "mask")
    if rule is None:
        rule = lambda mask, trained: prune(mask, magnitude(trained), fraction, where=where)

    def iterate() -> Iterator[Ticket]:
        every = jax.tree.map(lambda w: jnp.ones(w.shape, bool) if tree.is_array(w) else w, params)
        mask = every if within is None else within
        rewound = train(apply(params, mask), mask, 0, rewind) if rewind else params
        for number in range(rounds + 1):
            start = apply(rewound, mask)
            trained = train(start, mask, rewind, steps)
            yield Ticket(number, mask, start, trained)
            if number < rounds:
                old, mask = mask, rule(mask, trained)
                _check_round(number + 1, old, mask)

    return iterate()


def _check_round(number: int, old: Mask, new: Mask) -> None:
    total = {"before": 0, "after": 0}
    after = tree.flatten(new)
    for path, mask in tree.flatten(old).items():
        if not tree.is_array(mask):
            continue
        was, now = np.asarray(mask), np.asarray(after[path])
        if was.any() and not now.any():
            raise ValueError(f"round {number} would leave {path!r} without weights")
        if (now & ~was).any():
            raise ValueError(f"round {number} brings back weights of {path!r}: masks are to nest")
        total["before"] += int(was.sum())
        total["after"] += int(now.sum())
    if total["after"] == total["before"]:
        raise ValueError(f"round {number} prunes nothing of {total['before']} weights")


# ---------------------------------------------------------------------------------- controls


def shuffle(
    key: PRNGKeyArray, mask: Mask, *, scope: str = "leaf", where: tree.Where = None
) -> Mask:
    """Draw a mask with the counts of another: the control that tells what its places are worth.

    Every choice of as many live entries is equally likely (up to ties of 23-bit random numbers).

    Args:
      key: a typed key.
      mask: a tree of bools.
      scope: "leaf" keeps the count of every chosen leaf, "global" that of all of them together.
      where: the leaves to shuffle; default: the weights.

    Raises:
      ValueError: another scope.
      TypeError: a legacy uint32 key.

    >>> mask = {"kernel": jnp.arange(6).reshape(2, 3) < 2, "bias": jnp.ones(3, bool)}
    >>> other = shuffle(jax.random.key(0), mask)
    >>> other["kernel"].sum().item(), other["bias"].sum().item()
    (2, 3)
    """
    if scope not in ("leaf", "global"):
        raise ValueError(f"scope={scope!r}, and 'leaf' or 'global' was due")
    floats = jax.tree.map(lambda m: m.astype(jnp.float32) if tree.is_array(m) else m, mask)
    chosen = tree.select(floats, where)
    if scope == "leaf":
        counts = jax.tree.map(lambda bit, m: rank.count(m) if bit else 0, chosen, mask)
    else:
        pairs = zip(jax.tree.leaves(mask), jax.tree.leaves(chosen), strict=True)
        counts = rank.total([m for m, bit in pairs if bit])
    drawn = tree.topk(random(key, floats), counts, where=chosen)
    return jax.tree.map(lambda bit, d, m: d if bit else m, chosen, drawn, mask)


def reinit(
    key: PRNGKeyArray,
    init: Callable[[PRNGKeyArray, PyTree], PyTree],
    params: PyTree,
    mask: Mask,
    *,
    live: bool = False,
) -> PyTree:
    """Draw new weights under a mask: the control that tells what a ticket's first values are worth.

    Args:
      key: a typed key.
      init: a tree initializer, ``(key, params) -> params``.
      params: the tree to draw anew.
      mask: a tree of bools like params.
      live: scale the weights of each output unit (the last dimension; weights are chosen by
        `tree.is_weight`) by sqrt(fan_in / live fan_in), for the variance that a dense unit has.

    Raises:
      ValueError: a mask that does not fit.

    >>> init = lambda key, params: jax.tree.map(jnp.ones_like, params)
    >>> mask = {"kernel": jnp.array([[True, False]] * 4)}
    >>> reinit(jax.random.key(0), init, {"kernel": jnp.zeros((4, 2))}, mask)["kernel"][0].tolist()
    [1.0, 0.0]
    """
    out = apply(init(key, params), mask)
    if not live:
        return out

    def scale(path, w, m):
        inputs = tuple(range(w.ndim - 1))
        left = jnp.maximum(m.sum(inputs), 1)
        return (w * jnp.sqrt(w.size // w.shape[-1] / left)).astype(w.dtype) if w.size else w

    weights = jax.tree.map(tree.is_weight, tree.paths(out), out)
    return tree.map(scale, out, mask, where=weights)


class Stability(NamedTuple):
    """How far apart two networks are: the L2 distance, and the angle in radians."""

    distance: Float[Array, ""]
    angle: Float[Array, ""]


def stability(a: PyTree, b: PyTree, mask: Mask, *, where: tree.Where = None) -> Stability:
    """Measure how far training went apart, over the live entries of the chosen leaves.

    distance = |m a - m b|, and angle = arccos of their cosine, computed as
    2 atan2(|u - v|, |u + v|) of the unit vectors, which is exact for small angles. Between the
    ticket and the dense network, both trained from theta_k on the same data, it is the stability
    to pruning; between two tickets trained on other orders of the data, that to data order.

    Args:
      a: a tree of params.
      b: another, like it.
      mask: a tree of bools like them.
      where: the leaves to compare; default: the weights.

    Raises:
      ValueError: trees that differ.

    Reference: J. Frankle, G. K. Dziugaite, D. M. Roy, M. Carbin, "Stabilizing the Lottery Ticket
    Hypothesis", arXiv:1903.01611.

    >>> a, b = {"kernel": jnp.array([[3.0, 0.0, 9.0]])}, {"kernel": jnp.array([[0.0, 4.0, 7.0]])}
    >>> found = stability(a, b, {"kernel": jnp.array([[True, True, False]])})
    >>> found.distance.item(), round(found.angle.item(), 4)
    (5.0, 1.5708)
    """
    tree.check_like(a, b, "second tree")
    x, y = (list(tree.chosen(apply(t, mask), where).values()) for t in (a, b))
    x, y = ([tree.float32(leaf) for leaf in leaves] for leaves in (x, y))
    unit = lambda leaves, n: [leaf / jnp.where(n > 0, n, 1) for leaf in leaves]
    u, v = unit(x, _norm(x)), unit(y, _norm(y))
    apart = _norm([p - q for p, q in zip(u, v, strict=True)])
    together = _norm([p + q for p, q in zip(u, v, strict=True)])
    distance = _norm([p - q for p, q in zip(x, y, strict=True)])
    return Stability(distance, 2 * jnp.arctan2(apart, together))


def _norm(leaves: list[Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum((jnp.sum(jnp.abs(x) ** 2) for x in leaves), jnp.float32(0)))
