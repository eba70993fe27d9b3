"""What the interpreter of `jaxkit.trace.axes` knows of every array of a program.

A `Value` has a `Dim` per dimension. A group permutes the leaves of params; `Dim.term` says how
it moves the entries of the array along this dimension. Three more facts ride along:

* `Dim.zero`: setting all leaf entries that belong to a unit to zero makes this array zero on the
  entries of that unit; only then may a sum over the dimension lose the unit. (Vacuously true on
  a fixed dimension.)
* `Dim.uniform`: the array is constant along the dimension, so it ties the dimension to nothing:
  every use gets a fresh axis.
* `Dim.origin`: the (leaf, dimension) pairs that a value computed from params alone inherits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit.trace.terms import (
    AXIS,
    FIXED,
    Term,
    axis,
    concat,
    find,
    fix,
    fixed,
    is_fixed,
    prod,
    unify,
)

Pair = tuple[int, int]
_NONE: frozenset = frozenset()
_LARGEST = 1 << 20  # constants with more distinct entries are not evaluated
_EXACT = {  # what numpy computes bit for bit as XLA does, without a compilation
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": np.invert,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


class Dim(NamedTuple):
    """What is known of one dimension of a value."""

    term: Term
    zero: bool = False
    uniform: bool = False
    origin: frozenset[Pair] = _NONE


class Value(NamedTuple):
    """What is known of an array.

    dims: one `Dim` per dimension.
    array: the value itself, if it depends on neither params nor args.
    data: depends on args (or on the carry of a loop).
    leaves: the leaves it is computed from, while it does not depend on args.
    params: depends on params.
    scale: the product of the constants it was just multiplied by.
    sums: the terms it was just summed over.
    blocks: a dimension, and the values at each index of it, of a value that is followed block by
      block (`jaxkit.trace.stacked`); `dims` is then empty.
    """

    dims: tuple[Dim, ...]
    array: np.ndarray | None = None
    data: bool = False
    leaves: frozenset[int] = _NONE
    params: bool = False
    scale: float = 1.0
    sums: tuple[Term, ...] = ()
    blocks: "tuple[int, tuple[Value, ...]] | None" = None


Note = tuple[Any, str]  # an equation, and what about it could not be followed


@dataclass(eq=False, slots=True)
class State:
    """What one trace writes down.

    eqn: the equation at work.
    notes: equations that were not followed.
    kinds, roles: what each leaf does, and each of its dimensions.
    read: the leaves that some operation reads.
    scaled: terms whose size is the likely source of a constant, and the reason.
    """

    eqn: Any = None
    notes: list[Note] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)
    roles: dict[Pair, str] = field(default_factory=dict)
    read: set[int] = field(default_factory=set)
    scaled: list[tuple[Term, str]] = field(default_factory=list)


def source(eqn: Any) -> str:
    """Return the user's line that an equation comes from."""
    try:
        from jax.extend import source_info_util

        return source_info_util.summarize(eqn.source_info)
    except Exception:  # the door is not promised; the line is a courtesy
        return "unknown line"


def reason(state: State, what: str) -> str:
    """Return a reason to keep an axis whole: what, the operation, the user's line."""
    return f"{what}: {state.eqn.primitive.name} at {source(state.eqn)}"


def fresh(size: int, zero: bool = False) -> Dim:
    """Return a dimension along which a value is uniform."""
    return Dim(axis(size), zero=zero, uniform=True)


def refresh(value: Value) -> Value:
    """Return the value for one more use: what it is uniform along, it ties to nothing."""
    if not value.dims:
        return value
    if not value.params:
        names: dict[Term, Term] = {}
        dims = tuple(d._replace(term=_rename(d.term, names)) for d in value.dims)
        return value._replace(dims=dims)
    if not any(d.uniform for d in value.dims):
        return value
    dims = (d._replace(term=axis(find(d.term).size)) if d.uniform else d for d in value.dims)
    return value._replace(dims=tuple(dims))


def _rename(t: Term, names: dict[Term, Term]) -> Term:
    t = find(t)
    if t.kind == FIXED:
        return t
    if t.kind == AXIS:
        return names.setdefault(t, axis(t.size))
    make = prod if t.kind == "prod" else concat
    return make([_rename(p, names) for p in t.parts])


def const(array: Any, dims: Sequence[Dim] | None = None) -> Value:
    """Return the value of a constant: what it is uniform along is found by looking.

    dims: what is known of the dimensions by the way the constant was made.
    """
    try:
        array = np.asarray(array)
    except Exception:  # keys, tracers
        return Value(tuple(Dim(fixed(n), zero=True) for n in np.shape(array)))
    if array.ndim == 0:
        return Value((), array)
    zero = bool(array.size) and not array.any()
    out = []
    for d, n in enumerate(array.shape):
        if n > 1 and _uniform(array, d):
            out.append(fresh(n, zero))
        elif dims is not None:
            out.append(dims[d]._replace(zero=zero or is_fixed(dims[d].term), uniform=False))
        else:
            out.append(Dim(fixed(n), zero=True))
    plain = [d for d in range(array.ndim) if not out[d].uniform and array.shape[d] > 1]
    if len(plain) == 2 and array.shape[plain[0]] == array.shape[plain[1]]:
        matrix = array[tuple(slice(None) if d in plain else 0 for d in range(array.ndim))]
        off = matrix[~np.eye(len(matrix), dtype=bool)]
        if (matrix.diagonal() == matrix[0, 0]).all() and (off == off[0]).all():
            shared = Dim(axis(len(matrix)), zero=zero)  # permuting both at once changes nothing
            for d in plain:
                out[d] = shared
    return Value(tuple(out), array)


def _uniform(array: np.ndarray, d: int) -> bool:
    if array.strides[d] == 0:
        return True
    array = np.moveaxis(array, d, 0)
    squeeze = tuple(slice(0, 1) if s == 0 else slice(None) for s in array.strides)
    array = array[squeeze]
    return bool((array[1] == array[0]).all() and (array == array[:1]).all())


def evaluate(eqn: Any, values: Sequence[Value], same_shape: bool) -> list[np.ndarray] | None:
    """Return what an equation makes of constants, or None if they are too large.

    same_shape: it works entry by entry, so that broadcast operands need not be spread out.
    """
    arrays = [np.asarray(v.array) for v in values]
    name = eqn.primitive.name
    if name in ("device_put", "sharding_constraint", "optimization_barrier", "name", "reshard"):
        return arrays
    if name == "iota":
        shape, at = eqn.params["shape"], eqn.params["dimension"]
        ramp = np.arange(shape[at], dtype=eqn.params["dtype"])
        inner = [-1 if d == at else 1 for d in range(len(shape))]
        return [np.broadcast_to(ramp.reshape(inner), shape)]
    if name == "broadcast_in_dim":
        (array,), shape = arrays, eqn.params["shape"]
        inner = [1] * len(shape)
        for d, n in zip(eqn.params["broadcast_dimensions"], np.shape(array), strict=True):
            inner[d] = n
        return [np.broadcast_to(np.reshape(array, inner), shape)]
    shapes = [a.shape for a in arrays] + [v.aval.shape for v in eqn.outvars]
    squeezed = None
    if same_shape and len(set(shapes)) == 1 and shapes[0]:
        uniform = [all(a.strides[d] == 0 for a in arrays) for d in range(len(shapes[0]))]
        squeezed = tuple(slice(0, 1) if u else slice(None) for u in uniform)
        arrays = [a[squeezed] for a in arrays]
    elif max(int(np.prod(s)) for s in shapes) > _LARGEST:
        return None
    if max((a.size for a in arrays), default=0) > _LARGEST:
        return None
    if name in _EXACT:
        with np.errstate(all="ignore"):
            out = _EXACT[name](*arrays).astype(eqn.outvars[0].aval.dtype)
        return [out if squeezed is None else np.broadcast_to(out, shapes[-1])]
    with jax.ensure_compile_time_eval():
        outs = eqn.primitive.bind(*map(jnp.asarray, arrays), **eqn.params)
    outs = outs if eqn.primitive.multiple_results else [outs]
    outs = [np.asarray(o) for o in outs]
    if squeezed is not None:
        outs = [np.broadcast_to(o, shapes[-1]) for o in outs]
    return outs


def align(state: State, dims: Iterable[Dim]) -> Dim:
    """Tie dimensions that an element-wise operation lays over each other.

    `zero` of the result is left to the caller.
    """
    dims = list(dims)
    tied = [d for d in dims if not d.uniform]
    origin = frozenset().union(*(d.origin for d in dims))
    if not tied:
        return fresh(find(dims[0].term).size)._replace(origin=origin)
    for d in tied[1:]:
        tie(state, tied[0].term, d.term)
    return Dim(tied[0].term, origin=origin)


def tie(state: State, a: Term, b: Term) -> None:
    """Unify two terms for the equation at work."""
    unify(a, b, (state.eqn, "the blocks of its operands do not line up"))


def derive(values: Iterable[Value], dims: Iterable[Dim]) -> Value:
    """Return a value that an operation computes from `values`."""
    data = params = False
    leaves: frozenset[int] = _NONE
    for v in values:
        data, params = data or v.data, params or v.params
        leaves = leaves | v.leaves if v.leaves else leaves
    return Value(tuple(dims), data=data, leaves=_NONE if data else leaves, params=params)


def assign(state: State, value: Value, kind: str, roles: dict[int, str] | None = None) -> None:
    """Write down what the leaves behind a value are for, unless they were met before.

    roles: per dimension, "consumed" or "produced" (the default).
    """
    for leaf in value.leaves:
        state.kinds.setdefault(leaf, kind)
    for d, dim in enumerate(value.dims):
        for pair in dim.origin:
            role = (roles or {}).get(d, "produced")
            if role:
                state.roles.setdefault(pair, role)


def give_up(state: State, eqn: Any, values: Sequence[Value], why: str) -> list[Value]:
    """Fix every dimension of the values, and write down that the equation was not followed."""
    note = (eqn, why)
    if any(v.params for v in values):
        state.notes.append(note)
    for v in values:
        for d in v.dims:
            fix(d.term, note)
    base = derive(values, ())
    if any(v.data for v in values):
        for v in values:
            assign(state, v, "other")
    return [
        base._replace(
            dims=tuple(Dim(fixed(n, note), zero=True) for n in getattr(var.aval, "shape", ()))
        )
        for var in eqn.outvars
    ]
