"""Alignment: the order of one model's units in which they fit those of another.

The units of a hidden axis can be permuted, and the function stays what it was; so two trained
networks may differ by little but the order of their units. Each function here returns
permutations, {name of an axis: (units,)}, for the second model::

    axes = trace.axes(apply_fn, a, x)
    b = trace.permute(b, axes, weights.align(a, b, axes))
    middle = weights.interpolate(a, b, 0.5)

The assignment problems are solved on the host, so nothing here runs under jit.

Reference: S. K. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo
Permutation Symmetries", arXiv:2209.04836.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.optimize import linear_sum_assignment

from jaxkit import trace, tree
from jaxkit.trace.blocks import unit_rows
from jaxkit.weights.merge import interpolate

Permutations = dict[str, Int[np.ndarray, " units"]]

__all__ = ["Learned", "align", "align_activations", "align_by_gradient"]


def align(
    a: PyTree,
    b: PyTree,
    axes: PyTree,
    *,
    where: tree.Where = "**",
    key: PRNGKeyArray | None = None,
    start: Mapping[str, Int[Array | np.ndarray, " units"]] | None = None,
    rounds: int = 100,
) -> Permutations:
    """Match the weights: permute b so that the sum of a * b over all entries is large.

    Axis by axis, with all other permutations held, that is a linear assignment problem of the
    matrix C_ij = sum of a * b over the entries of unit i of a and unit j of b; its solution is
    taken, and the axes are gone through until none can be bettered. An axis is solved again only
    if one that shares a leaf with it has moved. With one hidden axis this is the optimum; in
    general a local one, which depends on the order of the axes.

    Args:
      a: a tree of params.
      b: another, like it.
      axes: their axes tree, from `jaxkit.trace.axes` or written by hand.
      where: the leaves to compare; default: every float leaf. Leave out by it what is no weight,
        as running statistics.
      key: draws the order of the axes anew in every round; default: that of the axes tree.
      start: permutations to start from; default: none.
      rounds: how often to go through the axes at most. (Where an axis runs along two dimensions of
        one leaf, a solution need not better the sum, and the rounds may not end by themselves.)

    Returns:
      A permutation for every axis, for `jaxkit.trace.permute`.

    Raises:
      ValueError: trees that differ, NaN, an axes tree that does not fit, rounds below 1, no axis.

    >>> a = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.array([[1.0], [2.0], [3.0]])}
    >>> axes = {"w": (None, "hidden"), "v": ("hidden", None)}
    >>> b = trace.permute(a, axes, {"hidden": jnp.array([2, 0, 1])})
    >>> align(a, b, axes)["hidden"].tolist()
    [1, 2, 0]
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}, and 1 or more were due")
    tree.check_like(a, b, "second model")
    axes = trace.resolve(a, axes)
    perms = _identity(axes)
    b = trace.permute(b, axes, start or {})
    perms |= {name: np.asarray(p) for name, p in (start or {}).items()}
    own, other = _floats(a, axes, where, "first"), _floats(b, axes, where, "second")
    shared = {
        name: [(k, d) for k, block in own.items() for d, n in enumerate(block.axes) if n == name]
        for name in perms
    }
    similar: dict[tuple[str, int], np.ndarray] = {}  # those that are still true
    names, open_axes = list(perms), set(perms)
    for i in range(rounds):
        order = range(len(names))
        if key is not None:
            order = jax.random.permutation(jax.random.fold_in(key, i), len(names)).tolist()
        for name in (names[j] for j in order):
            if name not in open_axes:
                continue
            open_axes.remove(name)
            for k, d in shared[name]:
                if (k, d) not in similar:
                    similar[k, d] = np.asarray(_similarity(own[k].array, other[k].array, d))
            better = _assign([similar[at] for at in shared[name]])
            if better is None:
                continue
            perms[name] = perms[name][better]
            for k in dict(shared[name]):
                own_axes = own[k].axes
                dims = [d for d, n in enumerate(own_axes) if n == name]
                moved = {(k, d): similar[k, d][:, better] for d in dims if len(dims) == 1}
                for d in range(len(own_axes)):
                    similar.pop((k, d), None)
                similar |= moved
                for d in dims:
                    other[k] = other[k]._replace(array=jnp.take(other[k].array, better, d))
                open_axes |= {n for n in own_axes if n not in (None, name)}
                open_axes |= {name} if len(dims) > 1 else set()
        if not open_axes:
            break
    return perms


def align_activations(
    apply_fn: Callable[..., Any],
    a: PyTree,
    b: PyTree,
    args: tuple,
    axes: PyTree,
    roles: PyTree,
) -> Permutations:
    """Match the activations: permute b so that its units are active where those of a are.

    Of each axis by itself, the permutation that maximizes the sum over examples, positions and
    units of A_i B_P(i), with A and B what the kernels read along the axis (`jaxkit.trace.reads`):
    the least squares between the activations.

    Args:
      apply_fn: ``apply_fn(params, *args)``, as it predicts.
      a: a tree of params.
      b: another, like it.
      args: the further arguments, a tuple: ``(x,)``.
      axes: their axes tree, from `jaxkit.trace.axes`.
      roles: their roles, from `jaxkit.trace.roles`.

    Returns:
      A permutation for every axis; axes that no kernel reads stay as they are.

    Raises:
      ValueError: trees that differ, an axes tree that does not fit, no kernel that reads an axis.

    >>> a = {"w": jnp.array([[1.0, -2.0, 3.0]]), "v": jnp.ones((3, 1))}
    >>> net = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
    >>> x = jnp.array([[-1.0], [2.0], [3.0]])
    >>> axes, roles = trace.axes(net, a, x), trace.roles(net, a, x)
    >>> b = trace.permute(a, axes, {"w:1": jnp.array([2, 0, 1])})
    >>> align_activations(net, a, b, (x,), axes, roles)["w:1"].tolist()
    [1, 2, 0]
    """
    tree.check_like(a, b, "second model")
    own, other = (trace.reads(apply_fn, model, args, axes, roles) for model in (a, b))
    sums: dict[str, list[Array]] = {}
    for x, y in zip(own, other, strict=True):
        rows = (unit_rows(tree.float32(r.tap.input), r.axis, r.entry) for r in (x, y))
        for (name, u), (_, v) in zip(*rows, strict=True):
            sums.setdefault(name, []).append(_similarity(u, v, 0))
    perms = _identity(trace.resolve(a, axes))
    for name, parts in sums.items():
        better = _assign(parts)
        perms[name] = perms[name] if better is None else better
    return perms


class Learned(NamedTuple):
    """What `align_by_gradient` found.

    Attributes:
      permutations: those with the lowest loss, for `jaxkit.trace.permute`.
      loss: the loss of the interpolation in every step.
    """

    permutations: Permutations
    loss: Float[np.ndarray, " steps"]


def align_by_gradient(
    loss_fn: Callable[[PyTree, Any], Float[Array, ""]],
    a: PyTree,
    b: PyTree,
    axes: PyTree,
    batches: Iterable[Any],
    tx: optax.GradientTransformation,
    *,
    where: tree.Where = "**",
    t: float = 0.5,
) -> Learned:
    """Learn permutations by which the model between a and b has a low loss (straight through).

    Free weights v start as those of a. In every step b is matched to v (`align`), giving P(b); the
    gradient of ``loss((1 - t) a + t P(b))`` with respect to P(b) is applied to v, as if matching
    were the identity.

    Args:
      loss_fn: ``loss_fn(params, batch) -> scalar``.
      a: a tree of params, all floats.
      b: another, like it.
      axes: their axes tree.
      batches: a batch for each step.
      tx: the optimizer of v.
      where: the leaves to compare in matching.
      t: the place between a and b.

    Raises:
      ValueError: as for `align`, and no batch.

    >>> a = {"w": jnp.array([[1.0, 2.0]]), "v": jnp.array([[1.0], [-2.0]])}
    >>> axes = {"w": (None, "hidden"), "v": ("hidden", None)}
    >>> b = trace.permute(a, axes, {"hidden": jnp.array([1, 0])})
    >>> loss = lambda p, x: jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) @ p["v"] + 1))
    >>> found = align_by_gradient(loss, a, b, axes, [jnp.ones((3, 1))], optax.sgd(0.1))
    >>> found.permutations["hidden"].tolist(), found.loss.shape
    ([1, 0], (1,))
    """
    free, state = a, tx.init(a)
    perms: Permutations = {}
    best, losses = ({}, np.inf), []
    between = lambda moved, batch: loss_fn(interpolate(a, moved, t), batch)
    gradient = jax.jit(jax.value_and_grad(between))

    @jax.jit
    def step(grads, state, free):
        updates, state = tx.update(grads, state, free)
        return optax.apply_updates(free, updates), state

    for batch in batches:
        perms = align(free, b, axes, where=where, start=perms)
        loss, grads = gradient(trace.permute(b, axes, perms), batch)
        losses.append(float(loss))
        if losses[-1] < best[1]:
            best = dict(perms), losses[-1]
        free, state = step(grads, state, free)
    if not losses:
        raise ValueError("there is no batch to learn from")
    if not best[0]:
        raise ValueError("the loss between the models is not finite in any step")
    return Learned(best[0], np.array(losses))


def _identity(axes: PyTree) -> Permutations:
    sizes = {name: axis.size for name, axis in trace.named(axes).items()}
    if not sizes:
        raise ValueError("the axes tree has no axis: there is nothing to permute")
    return {name: np.arange(n) for name, n in sizes.items()}


def _floats(params: PyTree, axes: PyTree, where: tree.Where, which: str) -> dict[str, trace.Block]:
    """Return the blocks of the chosen leaves in float32."""
    leaves = tree.chosen(params, where)
    for path, leaf in leaves.items():
        if jnp.isnan(leaf).any():
            raise ValueError(f"{path!r} of the {which} model holds NaN")
    return {
        name: block._replace(array=tree.float32(jnp.asarray(block.array)))
        for name, block in trace.blocks(params, axes).items()
        if block.path in leaves
    }


@partial(jax.jit, static_argnums=2)
def _similarity(x: Array, y: Array, d: int) -> Float[Array, "units units"]:
    """The sum of x * y over the entries of unit i of x and of unit j of y, along dimension d."""
    rest = tuple(i for i in range(x.ndim) if i != d)
    return jax.lax.dot_general(x, y, ((rest, rest), ((), ())), precision=jax.lax.Precision.HIGHEST)


def _assign(similarities: Sequence[Array | np.ndarray]) -> Int[np.ndarray, " units"] | None:
    """Return the best assignment, None if it is no better than that of i to i."""
    if not similarities:
        return None
    total = np.sum([np.asarray(s, np.float64) for s in similarities], axis=0)
    units, better = linear_sum_assignment(total, maximize=True)
    old, new = np.trace(total), total[units, better].sum()
    return better if new - old > 1e-6 * max(abs(old), abs(new)) else None
