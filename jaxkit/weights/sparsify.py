"""What methods do to the deltas of every model before they combine them.

A `Step` maps (models, *shape) to (models, *shape); `after` puts it in front of a method.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, PRNGKeyArray

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit._known import violates
from jaxkit.weights.merge import Deltas, Method

Scope = str | int

__all__ = ["Drop", "Scope", "Step", "Window", "after", "check_share", "drop", "scoped", "window"]


class Step(NamedTuple):
    """A `Method` but for its result, which is still one delta a model; and what it is, as data."""

    apply: Callable[[str, Array, Any], Array]
    prepare: Callable[[Deltas], dict[str, Any]] | None
    recipe: "Window | Drop"


class Window(NamedTuple):
    """The arguments of `window`."""

    sparsity: Any
    outliers: Any
    scope: Any


class Drop(NamedTuple):
    """The arguments of `drop`."""

    key: PRNGKeyArray
    drop_rate: Any
    rescale: Callable[[str], Any]


def after(step: Step, method: Method) -> Method:
    """Return the method on what the step leaves of the deltas. The base is needed."""

    def prepare(deltas: Deltas) -> dict[str, Any]:
        first = dict.fromkeys(deltas) if step.prepare is None else step.prepare(deltas)
        if method.prepare is None:
            return {path: (aux, None) for path, aux in first.items()}
        left = {path: step.apply(path, d, first[path]) for path, d in deltas.items()}
        second = method.prepare(left)
        return {path: (first[path], second[path]) for path in deltas}

    def combine(path: str, deltas: Array, aux: Any) -> Array:
        first, second = (None, None) if aux is None else aux
        return method.combine(path, step.apply(path, deltas, first), second)

    together = step.prepare is not None or method.prepare is not None
    steps = (step.recipe, *method.steps)
    return Method(combine, prepare if together else None, steps=steps, blend=method.blend)


def scoped(
    scope: Scope,
    measure: Callable[[Deltas], Any],
    use: Callable[[str, Array, Any], Array],
) -> tuple[Callable[[str, Array, Any], Array], Callable[[Deltas], dict[str, Any]] | None]:
    """Return (combine, prepare) of what is measured over the whole tree, or leaf by leaf."""
    if scope == "tree":
        return use, lambda deltas: dict.fromkeys(deltas, measure(deltas)) if deltas else {}
    if scope == "leaf":
        return lambda path, d, aux: use(path, d, measure({path: d})), None
    raise ValueError(f"scope={scope!r}; 'tree' or 'leaf' was due")


def check_share(name: str, value: Any, *, top: bool = False) -> None:
    """Raise unless a known number is in [0, 1), or [0, 1] with `top`."""
    if violates(lambda x: (x >= 0) & ((x < 1) | (top & (x == 1))), value):
        raise ValueError(f"{name} is {value}, and a number in [0, 1{']' if top else ')'} was due")


def window(sparsity: float | Array, outliers: float | Array = 0.0, scope: Scope = "leaf") -> Step:
    """Keep the entries with the largest magnitudes, but not the very largest.

    Of n entries the round-half-even(outliers n) largest go, and so many of the smallest that
    round-half-even(sparsity n) are zero. Equal magnitudes rank in the order of the flat index.

    Args:
      sparsity: the fraction of zeros, in [0, 1).
      outliers: the part of them that is taken from above, at most `sparsity`.
      scope: what is ranked together, in every model by itself: "tree", "leaf", or an integer: each
        line along that axis. A scalar leaf is left alone, but by "tree".
    """
    check_share("sparsity", sparsity)
    check_share("outliers", outliers)
    if violates(lambda o, s: o <= s, outliers, sparsity):
        raise ValueError(
            f"outliers={outliers} is more than sparsity={sparsity}, of which it is part"
        )
    if scope not in ("tree", "leaf") and not isinstance(scope, int):
        raise ValueError(f"scope={scope!r}; 'tree', 'leaf' or an axis (an int) was due")
    above = not (isinstance(outliers, int | float) and outliers == 0)

    def counts(n: Any) -> tuple[Any, Any]:
        """Return how many are removed from above, and how many there are above the rest."""
        pair = rank.as_pair(n)
        start = rank.share(pair, outliers)
        return start, rank.minus(pair, rank.minus(rank.share(pair, sparsity), start))

    def prepare(deltas: Deltas) -> dict[str, Any]:
        n = sum(d[0].size for d in deltas.values())
        return _counted({path: jnp.abs(d) for path, d in deltas.items()}, *counts(n))

    def apply(path: str, deltas: Array, aux: Any) -> Array:
        if not deltas[0].size or (deltas.ndim == 1 and scope != "tree"):
            return deltas
        x = jnp.abs(deltas)
        if scope == "tree":
            kept = _between(x, *aux, above=above, lines=1, own=True)
        elif scope == "leaf":
            kept = _between(x, *counts(deltas[0].size), above=above, lines=1)
        else:
            axis = _axis(path, scope, deltas.ndim - 1)
            x = jnp.moveaxis(x, axis + 1, -1)
            start, stop = counts(x.shape[-1])
            known = isinstance(outliers, int | float)
            if above and known and not round(rank.decimal(outliers) * x.shape[-1]):
                warnings.warn(
                    f"{path!r}: no outlier is removed from lines of {x.shape[-1]} entries",
                    stacklevel=2,
                )
            kept = _between(x, start, stop, above=above, lines=x.ndim - 1)
            kept = jnp.moveaxis(kept, -1, axis + 1)
        return jnp.where(kept, deltas, 0)

    recipe = Window(sparsity, outliers, scope)
    return Step(apply, prepare if scope == "tree" else None, recipe)


def _top(x: Deltas, k: Any) -> dict[str, Bool[Array, "..."]]:
    return tree.topk(x, k, where=dict.fromkeys(x, True))


@jax.jit
def _counted(x: Deltas, start: rank.Pair, stop: rank.Pair) -> dict[str, Any]:
    """Return, for each leaf and model, how many of its entries are among the first of the tree."""

    def of_one_model(x: Deltas) -> dict[str, Any]:
        tops = [_top(x, k) for k in (start, stop)]
        return {path: tuple(rank.count(top[path]) for top in tops) for path in x}

    return lax.map(of_one_model, x) if x else {}


@partial(jax.jit, static_argnames=("above", "lines", "own"))
def _between(
    x: Array, start: rank.Pair, stop: rank.Pair, *, above: bool, lines: int, own: bool = False
) -> Bool[Array, "..."]:
    """Mark the ranks from start to stop of each line: of each index of the first `lines` axes."""

    def line(x: Array, start: Any, stop: Any) -> Array:
        kept = _top({"": x}, stop)[""]
        return kept & ~_top({"": x}, start)[""] if above else kept

    for _ in range(lines - 1):
        line = jax.vmap(line, (0, None, None))
    # one model after another: the search among equals is skipped where there are none
    if own:
        return lax.map(lambda args: line(*args), (x, start, stop))
    return lax.map(lambda x: line(x, start, stop), x)


def _axis(path: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{path!r} has {ndim} dimensions and no axis {axis}; leave it out by `where`"
        )
    return axis % ndim


def drop(key: PRNGKeyArray, drop_rate: float | Array, rescale: Callable[[str], Any]) -> Step:
    """Set every entry to zero with probability `drop_rate`, and divide the others.

    The draws of a leaf depend on the key, its path and the model's place in the list alone.

    Args:
      key: a typed key.
      drop_rate: in [0, 1).
      rescale: ``path -> q``, what the entries that stay are divided by.
    """
    tree.check_key(key)
    check_share("drop_rate", drop_rate)

    def apply(path: str, deltas: Array, aux: Any) -> Array:
        own = tree.flatten(tree.keys(key, {path: 0}, "jaxkit.weights.dare"))[path]
        kept = _drawn(own, 1 - drop_rate, deltas.shape)
        return jnp.where(kept, deltas / rescale(path), 0)

    return Step(apply, None, Drop(key, drop_rate, rescale))


@partial(jax.jit, static_argnames="shape")
def _drawn(key: PRNGKeyArray, rate: Any, shape: tuple[int, ...]) -> Bool[Array, "models ..."]:
    draw = lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), rate, shape[1:])
    return jax.vmap(draw)(jnp.arange(shape[0]))
