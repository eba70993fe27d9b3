"""Which dimensions of which leaves are the same axis, read off the jaxpr of an apply function."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxkit import tree
from jaxkit.trace.control import interpret
from jaxkit.trace.names import Axis, Concat, Entry, Prod
from jaxkit.trace.terms import AXIS, FIXED, PROD, Term, atoms, axis, find, fix, fixed
from jaxkit.trace.values import Dim, State, Value, source

__all__ = ["Unfollowed", "axes", "unfollowed"]


class Trace(NamedTuple):
    """One run of the interpreter: a term per leaf dimension, and what was written down."""

    leaves: dict[str, Any]
    terms: list[tuple[Term, ...]]
    state: State


class Unfollowed(NamedTuple):
    """What could not be followed.

    primitive: the operation, or "unread" for a leaf that the function never reads.
    source: the user's line.
    why: what about it.
    leaves: the paths of the leaves that have a dimension fixed by it.
    """

    primitive: str
    source: str
    why: str
    leaves: tuple[str, ...]


_HINT = (
    "jaxkit.trace calls apply_fn(params, *args) with abstract arrays. Close over what is static "
    "(lambda params, x: apply_fn(params, x, train=False)) and over random keys "
    "(lambda params, x: apply_fn(params, x, rngs={'dropout': key})); better, trace the model as "
    "it predicts, without dropout"
)


def make_jaxpr(apply_fn: Callable[..., Any], params: PyTree, args: Sequence[Any]) -> Any:
    """Return the closed jaxpr of `apply_fn(params, *args)`.

    Raises:
      TypeError: a leaf or an argument that is no array, or a function that needs its values.
    """
    for what, leaves in (("params", params), ("args", tuple(args))):
        for path, leaf in tree.flatten(leaves).items():
            if not (tree.is_array(leaf) or isinstance(leaf, int | float | complex)):
                raise TypeError(
                    f"{path!r} of {what} is a {type(leaf).__name__}, and an array was due. {_HINT}"
                )
    try:
        return jax.make_jaxpr(apply_fn)(params, *args)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise TypeError(f"apply_fn needs the value of an argument. {_HINT}") from error
    except Exception as error:
        error.add_note(_HINT)
        raise


def run(apply_fn: Callable[..., Any], params: PyTree, args: Sequence[Any]) -> Trace:
    """Interpret `apply_fn(params, *args)`."""
    jaxpr = make_jaxpr(apply_fn, params, args)
    leaves = tree.flatten(params)
    values = []
    for i, leaf in enumerate(leaves.values()):
        moves = tree.is_inexact(leaf)
        dims = tuple(
            Dim(axis(n) if moves else fixed(n), zero=True, origin=frozenset({(i, d)}))
            for d, n in enumerate(np.shape(leaf))
        )
        values.append(Value(dims, leaves=frozenset({i}), params=True))
    terms = [tuple(d.term for d in v.dims) for v in values]
    for leaf in jax.tree.leaves(tuple(args)):
        dims = tuple(Dim(fixed(n), zero=True) for n in np.shape(leaf))
        values.append(Value(dims, data=True))
    state = State()
    for out in interpret(state, jaxpr.jaxpr, jaxpr.consts, values):
        state.read |= out.leaves
        for d in out.dims:
            if not d.uniform:
                fix(d.term)
    for i, dims in enumerate(terms):
        if i not in state.read:
            for t in dims:
                fix(t)
    return Trace(leaves, terms, state)


def _names(trace: Trace) -> dict[Term, str]:
    """Name every axis by the leaf dimension that produces it: path:dimension(.part)."""
    best: dict[Term, tuple] = {}
    for i, (path, dims) in enumerate(zip(trace.leaves, trace.terms, strict=True)):
        kernel = trace.state.kinds.get(i) in ("kernel", "embedding")
        for d, term in enumerate(dims):
            inside = list(atoms(term))
            produced = trace.state.roles.get((i, d)) == "produced"
            for k, a in enumerate(inside):
                part = f".{k}" if len(inside) > 1 else ""
                rank = (not produced, not kernel, bool(part), i, d, k, f"{path}:{d}{part}")
                best[a] = min(best.get(a, rank), rank)
    return {a: rank[-1] for a, rank in best.items()}


def axes(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> PyTree:
    r"""Find the axes of a function: the dimensions of leaves that may be permuted together.

    An axis is a group of leaf dimensions such that, for every permutation of its units applied
    to all of them at once and for all values of the leaves,

    .. math:: f(\pi \cdot \theta, x) = f(\theta, x).

    The function is interpreted abstractly. Every operation ties the dimensions that have to move
    together for it to commute with the permutation: contracted dimensions, equal dimensions of
    element-wise operations, the carry of a loop. A reshape makes a product of axes out of a
    dimension, a slice or a concatenation a row of blocks. Dimensions of `args` and of the output
    are fixed, and so are looked-up rows, positions along which a constant is not uniform, the
    taps of a convolution, the layers of a scan that carries, and all that an operation without a
    rule touches (`unfollowed` lists those). Only axes that permute whole dimensions, factors or
    blocks are found, one permutation each: not those of the heads one by one, nor symmetries
    other than permutations.

    An axis is *removable* if `pinned` is empty: where all entries that belong to a unit are zero,
    in the leaves that produce it and in those that consume it, dropping them changes nothing. A
    maximum, a mean, a sum over values that the zero does not reach (the exponentials of a
    softmax) pin the axis.

    Trace the model as it predicts: a dropout mask is not uniform and fixes what it is laid on; a
    returned BatchNorm update is an output, and fixes its channels.

    Args:
      apply_fn: `apply_fn(params, *args)`; a flax model with state or random keys is closed over
        them, or takes them in `params` (batch statistics follow the channels) or `args`.
      params: a tree of arrays, or of their shapes (`jax.eval_shape`). Integer leaves are fixed.
      *args: arrays, or their shapes.

    Returns:
      A tree like params of tuples with an entry per dimension: `None` (fixed), an `Axis`, a
      `Prod` or a `Concat`. An axis bears the name ``path:dimension`` of a leaf dimension that
      produces it; `rename` gives it another.

    Raises:
      TypeError: a leaf or an argument is no array, or the function needs a concrete value.

    >>> import jax.numpy as jnp
    >>> params = {"up": {"b": jnp.ones(5), "w": jnp.ones((3, 5))}, "down": jnp.ones((5, 2))}
    >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]["w"] + p["up"]["b"]) @ p["down"]
    >>> found = axes(mlp, params, jnp.ones((4, 3)))
    >>> found["up"]["w"]
    (None, Axis(name='up/w:1', size=5, pinned=(), scaled=()))
    >>> found["down"] == (found["up"]["b"][0], None)
    True

    References:
      Ainsworth, Hayase, Srinivasa: Git Re-Basin (arXiv:2209.04836), whose permutation
      specifications this derives.
    """
    trace = run(apply_fn, params, args)
    names = _names(trace)
    scaled: dict[Term, dict[str, None]] = {}
    for term, reason in trace.state.scaled:
        for a in atoms(term):
            scaled.setdefault(a, {})[reason] = None
    public = {
        a: Axis(name, a.size, tuple(a.pins), tuple(scaled.get(a, ()))) for a, name in names.items()
    }
    entries = []
    for dims in trace.terms:
        made = (_entry(t, public) for t in dims)
        entries.append(tuple(None if isinstance(e, int) else e for e in made))
    return jax.tree.unflatten(jax.tree.structure(params), entries)


def _entry(t: Term, public: dict[Term, Axis]) -> Entry:
    t = find(t)
    if t.kind == FIXED:
        return t.size
    if t.kind == AXIS:
        return public[t]
    cls, join = (Prod, int.__mul__) if t.kind == PROD else (Concat, int.__add__)
    parts: list[Entry] = []
    for part in t.parts:
        e = _entry(part, public)
        for p in e.parts if isinstance(e, cls) else (e,):
            if isinstance(p, int) and parts and isinstance(parts[-1], int):
                parts[-1] = join(parts[-1], p)
            else:
                parts.append(p)
    return parts[0] if len(parts) == 1 else cls(tuple(parts))


def unfollowed(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> tuple[Unfollowed, ...]:
    """List what `axes` could not follow, and the leaves that it fixed for that.

    Operations without a rule that read params, random draws and reshapes across axes that fix
    some axis, and leaves that the function never reads.

    Args:
      apply_fn: as for `axes`.
      params: as for `axes`.
      *args: as for `axes`.

    Raises:
      TypeError: as for `axes`.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.ones((3, 3)), "v": jnp.ones((3, 2)), "u": jnp.ones(5)}
    >>> hidden = lambda p, x: x @ jnp.linalg.inv(p["w"]) @ p["v"]
    >>> [(u.primitive, u.leaves) for u in unfollowed(hidden, params, jnp.ones(3))]
    [('lu', ('w',)), ('custom_linear_solve', ...), ('unread', ('u',))]
    """
    trace = run(apply_fn, params, args)
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for eqn, why in trace.state.notes:
        found.setdefault((eqn.primitive.name, source(eqn), why), {})
    for path, dims in zip(trace.leaves, trace.terms, strict=True):
        for t in dims:
            for eqn, why in _notes(t):
                found.setdefault((eqn.primitive.name, source(eqn), why), {})[path] = None
    listed = [Unfollowed(*what, tuple(paths)) for what, paths in found.items()]
    unread = [p for i, p in enumerate(trace.leaves) if i not in trace.state.read]
    if unread:
        listed.append(Unfollowed("unread", "", "apply_fn never reads the leaf", tuple(unread)))
    return tuple(listed)


def _notes(t: Term) -> list[Any]:
    t = find(t)
    if t.kind == FIXED:
        return [t.why] if t.why else []
    return [n for p in t.parts for n in _notes(p)]
