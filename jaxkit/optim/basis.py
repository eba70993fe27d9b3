"""Adam in another basis: project the gradient, step there, lift the step back.

`in_basis` is the primitive: the moments live in the coordinates that a `Basis` gives each leaf.
SOAP turns the basis slowly and takes the moments along; low-rank methods keep a few directions
only, and what they leave out of the gradient may come back as a residual.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Int, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["Basis", "BasisState", "in_basis"]


class Basis(NamedTuple):
    """The coordinates of one leaf, as functions of its statistics `s` (any tree of arrays).

    init: ``leaf -> s``.
    project: ``(s, g) -> coordinates`` of an array like the leaf.
    lift: ``(s, x) -> array`` like the leaf, from coordinates.
    before: ``(s, g) -> s``, a new basis that the step already uses; None: no such thing.
    after: ``(s, mu, nu) -> (s, mu, nu)``, a new basis once the step is made, and the moments in it;
      None: no such thing.
    learn: ``(s, g) -> s``, every step, after it.
    first: ``s -> s``, the basis that the first gradient gives, after `learn`, where `in_basis`
      skips the first step (and there is an `after`).
    residual: ``(s, g, x, u) -> (update, s)``, what to add to the lifted step: from the gradient,
      its coordinates and the step in coordinates.
    """

    init: Callable[[Any], Any]
    project: Callable[[Any, Array], Array]
    lift: Callable[[Any, Array], Array]
    before: Callable[[Any, Array], Any] | None = None
    after: Callable[[Any, Array, Array], tuple[Any, Array, Array]] | None = None
    learn: Callable[[Any, Array], Any] = lambda s, g: s
    first: Callable[[Any], Any] = lambda s: s
    residual: Callable[[Any, Array, Array, Array], tuple[Any, Any]] = lambda s, g, x, u: (0.0, s)


class BasisState(NamedTuple):
    """The state of `in_basis`: updates seen, Adam's moments in coordinates, the bases.

    `mu` and `nu` are trees like params, of the shapes of the coordinates; `bases` has statistics in
    the place of leaves.
    """

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree
    bases: PyTree


def in_basis(
    bases: Callable[[PyTree], dict[str, Basis]],
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    every: int | Array = 1,
    weight_decay: float | Array = 0.0,
    skip_first: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Run Adam in the coordinates of a basis of each leaf.

    With x = project(g): mu <- b1 mu + (1 - b1) x, nu <- b2 nu + (1 - b2) x^2, both bias corrected,
    and u = sqrt(1 - b2^t) / (1 - b1^t) (lift(n) + residual) with n = mu / (sqrt(nu) + eps), so that
    eps is added before the correction. Statistics and moments are float32 or wider; updates have
    the dtype of the gradient. Multiply by -lr after it (``optax.scale_by_learning_rate``).

    Args:
      bases: ``params -> {path: Basis}`` of every leaf; only shapes and dtypes may be read.
      b1, b2, eps: Adam's.
      every: `before` runs at the updates 0, every, 2 every, ..., `after` at every, 2 every, ...
      weight_decay: adds weight_decay w to u (decoupled: not in the moments).
      skip_first: the first update is zero, and only the bases learn from its gradient (`learn`,
        then `first`).

    Raises:
      ValueError: b1 or b2 outside [0, 1), every below 1, or, in update, a weight decay (of other
        than 0) without params.

    >>> own = Basis(lambda w: (), lambda s, g: g, lambda s, x: x)
    >>> tx = in_basis(lambda params: {"w": own}, eps=0.0)
    >>> params = {"w": jnp.array([1.0, 2.0])}
    >>> tx.update({"w": jnp.array([3.0, -4.0])}, tx.init(params))[0]["w"].round(3).tolist()
    [1.0, -1.0]
    """

    def of_leaves(params: PyTree) -> list[Basis]:
        paths = tree.flatten(params)  # none in the placeholder of optax.tree.map_params
        found = bases(params) if paths else {}
        return [found[path] for path in paths]

    for name, b in (("b1", b1), ("b2", b2)):
        if violates(lambda b: (b >= 0) & (b < 1), b):
            raise ValueError(f"{name}={b}, and a number in [0, 1) was due")
    if violates(lambda k: k >= 1, every):
        raise ValueError(f"every={every}, and 1 or more was due")
    no_decay = violates(lambda d: d != 0, weight_decay)  # then params are not read

    def init(params: PyTree) -> BasisState:
        leaves, structure = jax.tree.flatten(params)
        own = of_leaves(params)
        stats = [b.init(tree.float32(w)) for b, w in zip(own, leaves, strict=True)]
        shape = lambda b, s, w: jax.eval_shape(b.project, s, tree.float32(w))
        shapes = [shape(*args) for args in zip(own, stats, leaves, strict=True)]
        zeros = lambda: jax.tree.unflatten(structure, [jnp.zeros(x.shape, x.dtype) for x in shapes])
        start = jnp.zeros((), jnp.int32)
        # one leaf where there are no params, so that bases are none to optax.tree.map_params
        bases_of = jax.tree.unflatten(structure, stats) if leaves else start
        return BasisState(start, zeros(), zeros(), bases_of)

    def update(updates: PyTree, state: BasisState, params: PyTree = None, **_: Any):
        leaves, structure = jax.tree.flatten(updates)
        if not leaves:
            return updates, state
        if params is None and not no_decay:
            raise ValueError("weight decay needs the params: tx.update(grads, state, params)")
        own = of_leaves(updates)
        w = leaves if params is None else jax.tree.leaves(params)
        # where the first step is skipped, it is computed and not taken: a branch around all of it
        # would copy the whole state out at every update
        seen = state.count >= (1 if skip_first else 0)
        taken = lambda new, old: jnp.where(seen, new, old) if skip_first else new
        t = jnp.maximum(1, state.count + (0 if skip_first else 1))
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        due = jnp.where(seen, t % every == 0, 2)

        def step(b: Basis, s: Any, mu: Array, nu: Array, g: Array, w: Array):
            if b.before is not None:
                s = jax.lax.cond(state.count % every == 0, b.before, lambda s, g: s, s, g)
            x = b.project(s, g)
            mu, nu = taken(b1 * mu + (1 - b1) * x, mu), taken(b2 * nu + (1 - b2) * x * x, nu)
            n = mu / (jnp.sqrt(nu) + eps)
            more, s = b.residual(s, g, x, n)
            u = correction * (b.lift(s, n) + more)
            if not no_decay:
                u = u + weight_decay * tree.float32(w)
            s = b.learn(s, g)
            if b.after is not None:
                turns = [lambda *old: old, b.after, lambda s, mu, nu: (b.first(s), mu, nu)]
                s, mu, nu = jax.lax.switch(due, turns, s, mu, nu)
            return taken(u, jnp.zeros_like(u)), s, mu, nu

        stats = structure.flatten_up_to(state.bases)
        moments = jax.tree.leaves(state.mu), jax.tree.leaves(state.nu)
        columns = (stats, *moments, [tree.float32(g) for g in leaves], w)
        rows = [step(b, *args) for b, *args in zip(own, *columns, strict=True)]
        out = [u.astype(g.dtype) for (u, *_), g in zip(rows, leaves, strict=True)]
        rest = [jax.tree.unflatten(structure, [row[i] for row in rows]) for i in (2, 3, 1)]
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(structure, out), BasisState(count, *rest)

    return optax.GradientTransformationExtraArgs(init, cast(Any, update))


def row_major(x: Array) -> Array:
    """Keep the layout that LAPACK wants, by columns, from spreading to the whole state.

    The branches of a `cond` share one layout: without it, every update would transpose the moments
    and the bases for the few that turn them.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))
