"""Rules of operations that move entries around: reshape, slice, concatenate, pad, gather, scatter.

A rule is `(state, eqn, values) -> values of the outputs`, as in `jaxkit.trace.rules`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkit.trace.terms import concat, cut, divide, factor, find, fix, fixed, is_fixed, prod, runs
from jaxkit.trace.values import Dim, State, Value, align, assign, derive, fresh, give_up, tie

__all__ = ["SHAPES"]

_ONE = Dim(fixed(1), zero=True)


def _size(d: Dim) -> int:
    return find(d.term).size


def _is_zero(v: Value) -> bool:
    return v.array is not None and not np.any(v.array)


def _with(v: Value, dims: Sequence[Dim]) -> Value:
    return v._replace(dims=tuple(dims), array=None)


def _fixed(n: int) -> Dim:
    return Dim(fixed(n), zero=True)


def _combine(dims: Sequence[Dim], sizes: Sequence[int], why: Any) -> list[Dim]:
    """Merge dimensions and divide the result into dimensions of the given sizes."""
    if len(dims) == len(sizes) == 1:
        return list(dims)
    zero = all(d.zero or is_fixed(d.term) for d in dims)
    uniform = all(d.uniform for d in dims)
    origin = frozenset().union(*(d.origin for d in dims))
    terms = divide([d.term for d in dims], sizes, why)
    return [Dim(t, zero or is_fixed(t), uniform, origin) for t in terms]


def reshape(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Dimensions that are split or merged become factors of a product."""
    if eqn.params.get("dimensions") is not None:
        return give_up(state, eqn, values, "a reshape that also transposes")
    return [reshaped(state, eqn, values[0], eqn.outvars[0].aval.shape)]


def reshaped(state: State, eqn: Any, v: Value, sizes: Sequence[int]) -> Value:
    """Reshape a value."""
    if 0 in sizes:
        return _with(v, [_fixed(n) for n in sizes])
    why = (eqn, "a reshape that cuts across axes")
    old = [d for d in v.dims if _size(d) != 1]
    new = [n for n in sizes if n != 1]
    made: list[Dim] = []
    for before, after in runs([_size(d) for d in old], new):
        made += _combine([old[i] for i in before], [new[j] for j in after], why)
    rest = iter(made)
    return _with(v, [_ONE if n == 1 else next(rest) for n in sizes])


def transpose(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Dimensions change places."""
    (v,) = values
    return [_with(v, [v.dims[d] for d in eqn.params["permutation"]])]


def squeeze(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Dimensions of size one go."""
    (v,) = values
    gone = eqn.params["dimensions"]
    return [_with(v, [d for i, d in enumerate(v.dims) if i not in gone])]


def broadcast(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Along a new dimension the value is uniform."""
    v, shape = values[0], eqn.outvars[0].aval.shape
    dims = [fresh(n, _is_zero(v)) if n > 1 else _ONE for n in shape]
    for d, to in zip(v.dims, eqn.params["broadcast_dimensions"], strict=True):
        if _size(d) == shape[to]:
            dims[to] = d
    return [_with(v, dims)]


def tile(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Copies in a row: a product with a factor along which the value is uniform."""
    v = values[0]
    dims = []
    for d, n in zip(v.dims, eqn.params["reps"], strict=True):
        if n == 1:
            dims.append(d)
        else:
            copies = fresh(n * _size(d), d.zero) if d.uniform or _size(d) == 1 else None
            dims.append(copies or d._replace(term=prod((fresh(n).term, d.term))))
    return [_with(v, dims)]


def _block(d: Dim, start: int, size: int) -> Dim:
    """Entries start ... start + size of a dimension."""
    if size == _size(d):
        return d
    if d.uniform:
        return fresh(size, d.zero)
    head = cut(d.term, start)
    middle = head and cut(head[1], size)
    if middle is None:
        fix(d.term)
        return _fixed(size)
    return d._replace(term=middle[0], zero=d.zero or is_fixed(middle[0]))


def block(d: Dim, start: int, size: int, stride: int = 1) -> Dim:
    """Return every stride-th of the entries from `start`.

    With a stride they are one column of the dimension, written as rows of `stride` entries.
    """
    n = _size(d)
    if stride == 1 or size == n:
        return _block(d, start, size)
    if d.uniform:
        return fresh(size, d.zero)
    pair = factor(d.term, n // stride, stride) if n == size * stride and start < stride else None
    if pair is None:
        fix(d.term)
        return _fixed(size)
    fix(pair[1])
    return d._replace(term=pair[0], zero=d.zero or is_fixed(pair[0]))


def slice_(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """A part of a dimension is a block of it."""
    (v,), p = values, eqn.params
    strides = p["strides"] or (1,) * len(v.dims)
    sizes = eqn.outvars[0].aval.shape
    each = zip(v.dims, p["start_indices"], sizes, strides, strict=True)
    return [_with(v, [block(*args) for args in each])]


def split(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Blocks of one dimension."""
    (v,), at = values, eqn.params["axis"]
    out, start = [], 0
    for size in map(int, eqn.params["sizes"]):
        dims = list(v.dims)
        dims[at] = _block(v.dims[at], start, size)
        out.append(_with(v, dims))
        start += size
    return out


def _mixed(state: State, values: Sequence[Value], dims: Sequence[Dim]) -> Value:
    """The value of an operation that lays operands side by side."""
    out = derive(values, dims)
    if out.data:
        for v in values:
            assign(state, v, "other")
    return out


def concatenate(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """A row of blocks; the other dimensions are one."""
    at = eqn.params["dimension"]
    dims = []
    for d, n in enumerate(eqn.outvars[0].aval.shape):
        across = [v.dims[d] for v in values]
        zero = all(c.zero or is_fixed(c.term) for c in across)
        if n == 1:
            dims.append(_ONE)
        elif d == at:
            origin = frozenset().union(*(c.origin for c in across))
            dims.append(Dim(concat([c.term for c in across]), zero, origin=origin))
        else:
            dim = align(state, across)
            dims.append(dim._replace(zero=zero or is_fixed(dim.term)))
    return [_mixed(state, values, dims)]


def stack(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Dimensions laid over each other are one; the new dimension is fixed."""
    n = eqn.params["axis"] % (len(values[0].dims) + 1)
    dims = []
    for across in zip(*(v.dims for v in values), strict=True):
        dim = align(state, across)
        zero = all(c.zero for c in across) or is_fixed(dim.term)
        dims.append(dim._replace(zero=zero))
    return [_mixed(state, values, [*dims[:n], _fixed(len(values)), *dims[n:]])]


def unstack(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Every entry of one dimension by itself: it is fixed."""
    (v,) = values
    at = eqn.params["axis"] % len(v.dims)
    fix(v.dims[at].term)
    return [_with(v, [*v.dims[:at], *v.dims[at + 1 :]]) for _ in eqn.outvars]


def pad(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Padding is a block along which the value is uniform."""
    v, filler = values
    blank = _is_zero(filler)
    dims = []
    for d, (low, high, interior) in zip(v.dims, eqn.params["padding_config"], strict=True):
        n = int(low) + int(high) + _size(d) + max(_size(d) - 1, 0) * int(interior)
        if (low, high, interior) == (0, 0, 0):
            dims.append(d)
        elif interior or low < 0 or high < 0 or n == 0:
            fix(d.term)
            dims.append(_fixed(n))
        else:
            around = fresh(int(low)).term, d.term, fresh(int(high)).term
            zero = (d.zero or is_fixed(d.term)) and blank
            dims.append(Dim(concat(around), zero, origin=d.origin))
    if not blank:  # the padding of one dimension lies over the whole of the others
        dims = [d._replace(zero=is_fixed(d.term)) for d in dims]
    return [_mixed(state, values, dims)]


def rev(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """A reversed dimension is fixed, unless the value is uniform along it."""
    (v,) = values
    for d in eqn.params["dimensions"]:
        if not v.dims[d].uniform:
            fix(v.dims[d].term)
    return [_with(v, v.dims)]


def iota(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Positions are fixed."""
    at = eqn.params["dimension"]
    shape = eqn.outvars[0].aval.shape
    dims = [_fixed(n) if d == at or n == 1 else fresh(n) for d, n in enumerate(shape)]
    return [Value(tuple(dims))]


# ----------------------------------------------------------------- slices at computed positions


def _starts(values: Sequence[Value]) -> list[int] | None:
    if any(v.array is None for v in values):
        return None
    return [int(np.asarray(v.array)) for v in values]


def _at(d: Dim, start: int | None, size: int) -> Dim:
    n = _size(d)
    if size == n:
        return d
    if d.uniform:
        return fresh(size, d.zero)
    if start is None:
        fix(d.term)
        return _fixed(size)
    return _block(d, min(max(start, 0), n - size), size)


def dynamic_slice(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """A block, if the position is a constant; the whole dimension does not care."""
    v, *where = values
    starts = _starts(where[: len(v.dims)]) or [None] * len(v.dims)
    each = zip(v.dims, starts, eqn.params["slice_sizes"], strict=True)
    out = _with(v, [_at(*args) for args in each])
    return [out._replace(data=v.data or any(w.data for w in where))]


def dynamic_update_slice(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The update lies over a block of the operand."""
    v, update, *where = values
    starts = _starts(where[: len(v.dims)]) or [None] * len(v.dims)
    dims = []
    for d, u, start in zip(v.dims, update.dims, starts, strict=True):
        if _size(d) == _size(u):
            dim = align(state, (d, u))
        else:
            if d.uniform:
                d = d._replace(uniform=False)
            if not u.uniform:
                tie(state, _at(d, start, _size(u)).term, u.term)
            elif start is None:
                fix(d.term)
            else:
                _at(d, start, _size(u))
            dim = Dim(d.term, origin=d.origin)
        dims.append(dim._replace(zero=(d.zero and u.zero) or is_fixed(dim.term)))
    return [_mixed(state, values, dims)]


def gather(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """What is looked up is fixed; what is taken whole is carried; index batches pass through."""
    v, index = values
    p = eqn.params
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    *batch, last = index.dims
    lookup = math.prod(_size(d) for d in batch) > 1
    fix(last.term)
    starts: list[int | None] = [None] * len(v.dims)
    if index.array is not None and not lookup:
        for d, start in zip(numbers.start_index_map, np.ravel(index.array), strict=True):
            starts[d] = int(start)
    window = []
    consumed = {}
    for d, dim in enumerate(v.dims):
        if d in numbers.operand_batching_dims:
            continue
        whole = sizes[d] == _size(dim)
        if d not in numbers.start_index_map:
            starts[d] = 0
        if not whole:
            consumed[d] = "consumed"
        taken = _at(dim, starts[d], sizes[d])
        if d not in numbers.collapsed_slice_dims:
            window.append(taken)
    tied = dict(
        zip(numbers.start_indices_batching_dims, numbers.operand_batching_dims, strict=True)
    )
    for i, dim in enumerate(batch):
        if i in tied:
            batch[i] = align(state, (v.dims[tied[i]], dim))._replace(zero=v.dims[tied[i]].zero)
        else:
            batch[i] = dim._replace(zero=is_fixed(dim.term), origin=frozenset())
    out: list[Dim | None] = [None] * len(eqn.outvars[0].aval.shape)
    for at, dim in zip(numbers.offset_dims, window, strict=True):
        out[at] = dim
    rest = iter(batch)
    dims = [d if d is not None else next(rest) for d in out]
    result = derive(values, dims)
    if lookup and v.leaves:
        assign(state, v, "embedding", consumed)
    return [result]


def scatter(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Windows that cover a dimension are tied to it; what is addressed is fixed."""
    v, index, update = values
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims:
        return give_up(state, eqn, values, "a scatter with batch dimensions")
    fix(index.dims[-1].term)
    where = numbers.scatter_dims_to_operand_dims
    starts: list[int | None] = [0] * len(v.dims)
    for d in where:
        starts[d] = None
    if index.array is not None and index.array.size == len(where):
        for d, start in zip(where, np.ravel(index.array), strict=True):
            starts[d] = int(start)
    windows = iter(numbers.update_window_dims)
    dims = []
    for d, dim in enumerate(v.dims):
        one = d in numbers.inserted_window_dims
        u = _ONE if one else update.dims[next(windows)]
        if _size(u) == _size(dim):
            tied = align(state, (dim, u))
        else:
            block = _at(dim._replace(uniform=False), starts[d], _size(u))
            if not u.uniform:
                tie(state, block.term, u.term)
            tied = Dim(dim.term, origin=dim.origin)
        dims.append(tied._replace(zero=(dim.zero and u.zero) or is_fixed(tied.term)))
    loose = [d for d in range(len(update.dims)) if d not in numbers.update_window_dims]
    for d, i in zip(loose, index.dims[:-1], strict=True):
        tied = align(state, (update.dims[d], i))
        if eqn.primitive.name == "scatter" and not tied.uniform:
            fix(tied.term)  # of two updates of one entry the last wins
    return [_mixed(state, values, dims)]


SHAPES = {
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast,
    "tile": tile,
    "slice": slice_,
    "split": split,
    "concatenate": concatenate,
    "stack": stack,
    "unstack": unstack,
    "pad": pad,
    "rev": rev,
    "iota": iota,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    "scatter": scatter,
    "scatter-add": scatter,
    "scatter-sub": scatter,
    "scatter-mul": scatter,
    "scatter-min": scatter,
    "scatter-max": scatter,
}
