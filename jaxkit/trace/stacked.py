"""Blocks that a reshape stacks: q | k | v reshaped to (3, heads, size) and taken by index.

A reshape that splits a dimension makes a product: every index of its first factor sees the same
axes behind it. Where the factor is only ever indexed, that ties too much, since each of its
indices leads a life of its own. Such a reshape is followed block by block instead. Whether it is
one is found by looking ahead: every use of its result indexes the factor, through transposes.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from jaxkit.trace.shapes import block, reshaped, transpose
from jaxkit.trace.terms import find, is_fixed, runs
from jaxkit.trace.values import State, Value

Uses = dict[Any, list[Any]]


def uses(jaxpr: Any) -> Uses:
    """Return the equations that read each variable; None stands for the outputs."""
    out: Uses = {}
    for eqn in jaxpr.eqns:
        for atom in eqn.invars:
            if not isinstance(atom, core.Literal):
                out.setdefault(atom, []).append(eqn)
    for atom in jaxpr.outvars:
        if not isinstance(atom, core.Literal):
            out.setdefault(atom, []).append(None)
    return out


def _only_indexed(var: Any, d: int, users: Uses) -> bool:
    for eqn in users.get(var, [None]):
        if eqn is None:
            return False
        name = eqn.primitive.name
        if name == "transpose":
            at = list(eqn.params["permutation"]).index(d)
            if not _only_indexed(eqn.outvars[0], at, users):
                return False
        elif name == "slice":
            p = eqn.params
            if p["limit_indices"][d] - p["start_indices"][d] != 1:
                return False
        elif name == "split":
            if eqn.params["axis"] != d or any(n != 1 for n in eqn.params["sizes"]):
                return False
        elif name != "unstack" or eqn.params["axis"] != d:
            return False
    return True


def stack(state: State, eqn: Any, v: Value, users: Uses) -> Value | None:
    """Return the blocks that a reshape stacks, or None if it does not only do that."""
    sizes = eqn.outvars[0].aval.shape
    if not v.params or eqn.params.get("dimensions") is not None or 0 in sizes:
        return None
    old = [i for i, d in enumerate(v.dims) if find(d.term).size != 1]
    new = [j for j, n in enumerate(sizes) if n != 1]
    for before, after in runs([find(v.dims[i].term).size for i in old], [sizes[j] for j in new]):
        d, j = old[before[0]], new[after[0]]
        dim = v.dims[d]
        if len(before) > 1 or len(after) == 1 or dim.uniform or is_fixed(dim.term):
            continue
        if not _only_indexed(eqn.outvars[0], j, users):
            continue
        n = find(dim.term).size // sizes[j]
        inner = tuple(1 if i == j else s for i, s in enumerate(sizes))
        parts = []
        for k in range(sizes[j]):
            dims = [*v.dims[:d], block(dim, k * n, n), *v.dims[d + 1 :]]
            parts.append(reshaped(state, eqn, v._replace(dims=tuple(dims)), inner))
        return v._replace(dims=(), blocks=(j, tuple(parts)))
    return None


def index(state: State, eqn: Any, v: Value) -> Sequence[Value]:
    """Apply one of the equations that `stack` has looked ahead to."""
    assert v.blocks is not None
    at, parts = v.blocks
    name, p = eqn.primitive.name, eqn.params
    if name == "transpose":
        moved = tuple(transpose(state, eqn, [part])[0] for part in parts)
        return [v._replace(blocks=(list(p["permutation"]).index(at), moved))]
    if name == "slice":
        part = parts[p["start_indices"][at]]
        strides = p["strides"] or (1,) * len(part.dims)
        dims = list(part.dims)
        for d, n in enumerate(eqn.outvars[0].aval.shape):
            if d != at:
                dims[d] = block(dims[d], p["start_indices"][d], n, strides[d])
        return [part._replace(dims=tuple(dims))]
    if name == "unstack":
        gone = [part.dims[:at] + part.dims[at + 1 :] for part in parts]
        return [part._replace(dims=dims) for part, dims in zip(parts, gone, strict=True)]
    return parts
