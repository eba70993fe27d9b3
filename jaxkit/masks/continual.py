"""Continual learning in one network: every task has its mask, and what is in use is frozen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.dynamic import cosine
from jaxkit.masks.exchange import drop_halves, drop_up, grow
from jaxkit.masks.score import magnitude, random
from jaxkit.masks.select import Mask, apply
from jaxkit.masks.train import Memory, constrain, sparse

__all__ = ["Task", "Transfer", "cl_dst", "recall", "remember", "transfer"]


def cl_dst(
    tx: optax.GradientTransformation,
    mask: Mask,
    used: Mask,
    *,
    key: PRNGKeyArray,
    every: int | Array = 400,
    end: int | Array | None = None,
    drop: str = "magnitude",
    growth: str = "random",
    drop_rate: float | Array = 0.5,
    last_drop_rate: float | Array = 0.005,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Train one task of many with dynamic sparse training: ``sparse(constrain(tx, ~used), mask)``.

    The model of the task is what its mask lets through. Entries that earlier tasks use are frozen,
    but the task may read those in its mask. At t = every, 2 every, ... every leaf drops the share
    r_t of its n live entries, ceil(r_t n), along half a cosine from drop_rate to last_drop_rate at
    `end`, and grows as many that no task uses. Then `remember` it. Start every task with a new
    optimizer state, at ``apply(store, mask)``: that of the last task, which fits, holds its masks.

    Args:
      tx: in the paper Adam with learning rate 1e-3.
      mask: the first mask of the task, in the paper random, uniform or ERK, of density 0.2.
      used: a tree of bools, what earlier tasks use; all False at first. See `remember`.
      key: a typed key for the growth.
      every: steps between two changes.
      end: the end of the cosine, all steps of the task; None: r_t stays drop_rate.
      drop: which live entries leave: those of smallest "magnitude", nearest zero, half of them
        positive ("set"; what one side lacks the other loses), or of smallest "taylor", (w dL/dw)^2.
      growth: which free entries come in: "random", "unfired" (at random, those that were never in
        the task's mask first), largest "gradient", or largest "momentum", |m| / (sqrt(v) + 1e-8)
        with Adam's averages of dense gradients, m <- 0.9 m + 0.1 g and v <- 0.999 v + 0.001 g^2.
      drop_rate, last_drop_rate: the shares of the live entries that move, first and last.
      where: the leaves that change; default: the weights.

    Raises:
      ValueError: a name that is none of these; at `init`: masks that do not fit, no entry of the
        mask that is free (outside jit: inside, nothing trains).
      TypeError: a legacy uint32 key.

    Reference: M. O. Yildirim, E. C. Gok Yildirim, G. Sokar, D. C. Mocanu, J. Vanschoren, "Continual
    Learning with Dynamic Sparse Training: Exploring Algorithms for Effective Model Updates",
    arXiv:2308.14831. (The paper's masks are Bernoulli, and growth may enter used entries.)

    >>> params = {"w": jnp.array([[3.0, 2.0, 1.0, 0.0]])}
    >>> used = {"w": jnp.array([[True, False, False, False]])}
    >>> mask = {"w": jnp.array([[True, True, False, False]])}
    >>> tx = cl_dst(optax.adam(0.1), mask, used, key=jax.random.key(0))
    >>> updates, _ = tx.update({"w": jnp.ones((1, 4))}, tx.init(params), params)
    >>> [round(w, 3) for w in optax.apply_updates(params, updates)["w"][0].tolist()]
    [3.0, 1.9, 0.0, 0.0]
    """
    if drop not in (drops := ("magnitude", "set", "taylor")):
        raise ValueError(f"drop={drop!r} is none of {drops}")
    if growth not in (growths := ("random", "unfired", "gradient", "momentum")):
        raise ValueError(f"growth={growth!r} is none of {growths}")
    free = jax.tree.map(jnp.logical_not, used)

    def first(params):
        tree.check_like(params, mask, "mask")
        tree.check_like(params, used, "mask `used`")
        open_ = jax.tree.map(jnp.logical_and, mask, free)
        chosen = zip(
            jax.tree.leaves(tree.select(params, where)), jax.tree.leaves(open_), strict=True
        )
        if tree.concrete(open_) and not any(bit and np.any(m) for bit, m in chosen):
            raise ValueError("no entry of the mask is free: earlier tasks use them all")
        return mask

    def rule(key, mask, params, grads, step, seen=None):
        rate = cosine(step, drop_rate, end, last_drop_rate)
        if drop == "set":
            kept = drop_halves(mask, params, rate, where=where)
        else:
            kept = drop_up(mask, _worth(drop, params, grads), rate, where=where)
        # what was dropped may return; a used entry that is out holds no value of its own
        room = jax.tree.map(jnp.logical_or, free, mask)
        promise = _promise(growth, key, params, grads, seen)
        return grow(kept, promise, mask, where=where, into=room)

    inner = constrain(tx, free)
    memory = {"unfired": _FIRED, "momentum": _MOMENTUM}.get(growth)
    return sparse(
        inner, first, update=rule, every=every, begin=every, end=None, key=key, memory=memory
    )


_FIRED = Memory(
    lambda params, mask: jax.tree.map(jnp.array, mask),
    lambda fired, mask, grads: jax.tree.map(jnp.logical_or, fired, mask),
)


def _no_moments(params, mask):
    zeros = jax.tree.map(
        lambda w: jnp.zeros_like(tree.float32(w)) if tree.is_inexact(w) else w, params
    )
    return zeros, zeros


def _moments(moments, mask, grads):
    """Average dense gradients and their squares, as Adam does."""
    mean = lambda m, g: 0.9 * m + 0.1 * g if tree.is_inexact(m) else m
    square = lambda v, g: (
        0.999 * v + 0.001 * jnp.square(tree.float32(g)) if tree.is_inexact(v) else v
    )
    return tuple(jax.tree.map(f, m, grads) for f, m in zip((mean, square), moments, strict=True))


_MOMENTUM = Memory(_no_moments, _moments)


def _worth(name: str, params: PyTree, grads: PyTree) -> PyTree:
    if name == "magnitude":
        return magnitude(params)
    square = lambda w, g: jnp.abs(tree.float32(w) * tree.float32(g)) ** 2
    return jax.tree.map(lambda w, g: square(w, g) if tree.is_inexact(w) else w, params, grads)


def _promise(name: str, key: Any, params: PyTree, grads: PyTree, seen: PyTree) -> PyTree:
    if name == "gradient":
        return magnitude(grads)
    if name == "momentum":
        ratio = lambda m, v: jnp.abs(m) / (jnp.sqrt(v) + 1e-8) if tree.is_inexact(m) else m
        return jax.tree.map(ratio, *seen)
    drawn = random(key, params)
    if name == "random":
        return drawn
    return jax.tree.map(lambda u, f: u - f if tree.is_inexact(u) else u, drawn, seen)


# -------------------------------------------------------------------------------------- the store


class Task(NamedTuple):
    """What a task needs besides the store: its mask, and the leaves that are its own, by path."""

    mask: Mask
    own: dict[str, Array]


def remember(
    store: PyTree,
    used: Mask,
    params: PyTree,
    mask: Mask,
    *,
    own: tree.Where = lambda path, leaf: False,
) -> tuple[PyTree, Mask, Task]:
    """Put a trained task into the store: where(mask, params, store).

    Args:
      store: the dense params that all tasks share.
      used: what earlier tasks use.
      params: those of the task, after training with `cl_dst`.
      mask: its last mask, ``current(opt_state)``.
      own: leaves that every task has for itself (biases, norm statistics). They stay out of `used`,
        and so every task may train them. Leaves of neither kind, outside `where`, have a mask of
        ones: the first task uses them up, and they are frozen from then on.

    Returns:
      The store, what is in use now, and the `Task` for `recall`.

    Raises:
      ValueError: trees that do not fit.

    >>> store, mask = {"w": jnp.zeros(2)}, {"w": jnp.array([True, False])}
    >>> used = {"w": jnp.zeros(2, bool)}
    >>> store, used, task = remember(store, used, {"w": jnp.ones(2)}, mask)
    >>> store["w"].tolist(), used["w"].tolist(), recall(store, task)["w"].tolist()
    ([1.0, 0.0], [True, False], [1.0, 0.0])
    """
    tree.check_like(store, params, "params of the task")
    tree.check_like(store, mask, "mask")
    bits = _own(store, own)
    kept = {p: w for p, w in tree.flatten(params).items() if bits[p]}
    put = lambda s, w, m: jnp.where(m, w, s) if tree.is_inexact(s) else s
    mark = lambda path, u, m: u if bits[path] else u | m
    used = jax.tree.map(mark, tree.paths(used), used, mask)
    return jax.tree.map(put, store, params, mask), used, Task(mask, kept)


def _own(params: PyTree, own: tree.Where) -> dict[str, bool]:
    if callable(own):
        return {path: bool(own(path, w)) for path, w in tree.flatten(params).items()}
    return tree.flatten(tree.select(params, own))


def recall(store: PyTree, task: Task) -> PyTree:
    """Return the params of a task: the store through its mask, with the leaves that are its own.

    Raises:
      ValueError: a mask that does not fit the store.

    >>> recall({"w": jnp.ones(2)}, Task({"w": jnp.array([True, False])}, {}))["w"].tolist()
    [1.0, 0.0]
    """
    leaf = lambda path, w: task.own.get(path, w)
    return apply(jax.tree.map(leaf, tree.paths(store), store), task.mask)


class Transfer(NamedTuple):
    """What `transfer` reads off an accuracy matrix."""

    accuracy: Float[Array, " tasks"]
    backward: Float[Array, " tasks-1"]
    forward: Float[Array, " tasks-1"]


def transfer(accuracy: Float[Array, "tasks tasks"]) -> Transfer:
    """Summarize continual learning: with A[i, t] the accuracy on task t after training task i,

    accuracy_i = mean over t <= i of A[T-1, t] (its last entry is the usual average),
    backward_i = mean over t < i of A[i, t] - A[t, t], for i = 1 ... T-1 (negative: forgetting),
    forward_i = mean over t > i of A[i, t], for i = 0 ... T-2 (tasks not seen yet).

    Args:
      accuracy: A, a square matrix of two or more tasks.

    Raises:
      ValueError: a matrix that is not square, or of one task.

    Reference: M. O. Yildirim et al., arXiv:2308.14831.

    >>> found = transfer(jnp.array([[1.0, 0.5], [0.75, 1.0]]))
    >>> found.accuracy.tolist(), found.backward.tolist(), found.forward.tolist()
    ([0.75, 0.875], [-0.25], [0.5])
    """
    shape = jnp.shape(accuracy)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 2:
        raise ValueError(f"a square matrix of two or more tasks is due, and shape {shape} came")
    n = jnp.arange(shape[0])
    before = jnp.tril(jnp.ones(shape), -1)
    lost = (before * (accuracy - jnp.diag(accuracy))).sum(1)[1:] / n[1:]
    unseen = (before.T * accuracy).sum(1)[:-1] / n[:0:-1]
    return Transfer(jnp.cumsum(accuracy[-1]) / (n + 1), lost, unseen)
