"""Rules of arithmetic: element-wise operations, contractions, reductions.

A rule is `(state, eqn, values) -> values of the outputs`. It ties the dimensions that have to move
together for the operation to commute with the permutations, fixes what must not move, and pins
what must not be removed.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxkit.trace.terms import Term, factor, find, fix, fixed, is_fixed, pin
from jaxkit.trace.values import (
    Dim,
    State,
    Value,
    align,
    assign,
    derive,
    give_up,
    reason,
    tie,
)


def _names(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


_KEEPS_ZERO = _names(  # f(0) = 0
    "abs asin asinh atan atanh cbrt ceil conj convert_element_type copy copy_p device_put erf",
    "erf_inv expm1 floor imag layout_constraint log1p name neg optimization_barrier pvary real",
    "reduce_precision reshard round sharding_constraint sign sin sinh sqrt square stop_gradient",
    "tan tanh",
)
_ALL_ZERO = _names("add add_any sub max min or xor complex")  # f(0, 0) = 0
_ANY_ZERO = _names("mul and")  # f(0, x) = f(x, 0) = 0
_OTHER = _names(
    "acos acosh atan2 bessel_i0e bessel_i1e clamp clz cos cosh digamma div eq eq_to erfc exp exp2",
    "ge gt igamma igamma_grad_a igammac integer_pow is_finite le le_to lgamma log logistic lt",
    "lt_to mulhi ne nextafter not polygamma population_count pow regularized_incomplete_beta rem",
    "rsqrt select_n shift_left shift_right_arithmetic shift_right_logical zeta",
)
ELEMENTWISE = _KEEPS_ZERO | _ALL_ZERO | _ANY_ZERO | _OTHER
_LINEAR = _names("convert_element_type copy copy_p neg reduce_precision stop_gradient")


def _is_zero(v: Value) -> bool:
    return v.array is not None and not np.any(v.array)


def _bound(v: Value, sign: int) -> bool:
    return v.array is not None and bool(np.all(sign * np.asarray(v.array, np.float64) >= 0))


def _zero(eqn: Any, flags: Sequence[bool], values: Sequence[Value]) -> bool:
    """Whether the result is zero where the flagged operands are."""
    name = eqn.primitive.name
    if name in _ALL_ZERO:
        return all(flags)
    if name in _ANY_ZERO:
        return any(flags)
    if name in ("div", "rem") or name in _KEEPS_ZERO:
        return flags[0]
    if name == "select_n":
        return all(flags[1:])
    if name == "clamp":
        return flags[1] and _bound(values[0], -1) and _bound(values[2], 1)
    if name == "integer_pow":
        return flags[0] and eqn.params["y"] > 0
    if name == "pow":
        return flags[0] and _bound(values[1], 1) and not _is_zero(values[1])
    return False


def _poles(eqn: Any, flags: Sequence[bool]) -> bool:
    """Whether the operation is infinite where the flagged operands are zero."""
    name = eqn.primitive.name
    if name in ("div", "rem"):
        return flags[1]
    return flags[0] and (
        name in ("log", "rsqrt", "digamma", "lgamma")
        or (name == "integer_pow" and eqn.params["y"] < 0)
    )


def elementwise(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Dimensions laid over each other are one; size-one dimensions and scalars are broadcast."""
    if len(eqn.outvars) > 1:  # optimization_barrier, device_put: a tuple of identities
        return [v._replace(array=None) for v in values]
    dims = []
    for d, n in enumerate(eqn.outvars[0].aval.shape):
        if n == 1:
            dims.append(Dim(fixed(1), zero=True))
            continue
        present = [v.dims[d] if v.dims and find(v.dims[d].term).size == n else None for v in values]
        dim = align(state, [p for p in present if p is not None])
        flags = [p.zero if p else _is_zero(v) for p, v in zip(present, values, strict=True)]
        if not dim.uniform and _poles(eqn, flags) and not is_fixed(dim.term):
            pin(dim.term, reason(state, "infinite where a removed unit is zero"))
        dims.append(dim._replace(zero=_zero(eqn, flags, values) or is_fixed(dim.term)))
    out = derive(values, dims)
    name = eqn.primitive.name
    if out.data:
        kind = {"add": "bias", "sub": "bias", "mul": "gain", "div": "gain"}.get(name, "other")
        for v in values:
            assign(state, v, kind)
    if name in _LINEAR:
        return [out._replace(scale=values[0].scale, sums=values[0].sums)]
    if name in ("sqrt", "rsqrt"):
        return [out._replace(sums=values[0].sums)]
    if name in ("add", "sub") and values[1].array is not None:  # an epsilon
        return [out._replace(sums=values[0].sums)]
    if name in ("mul", "div"):
        return [_scale(state, name, values, out)]
    return [out]


def bitcast(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Entry by entry if the widths agree."""
    (v,) = values
    if len(eqn.outvars[0].aval.shape) != len(v.dims):
        return give_up(state, eqn, values, "a bitcast to another width")
    return [v._replace(array=None, scale=1.0, sums=())]


def _scale(state: State, name: str, values: Sequence[Value], out: Value) -> Value:
    """Remember multiplication by one number."""
    for v, number in (values, values[::-1])[: 2 if name == "mul" else 1]:
        if number.array is None or v.array is not None or not number.array.size:
            continue
        first = number.array.flat[0]
        if all(d.uniform for d in number.dims) and np.isrealobj(first) and first != 0:
            c = float(first) if name == "mul" else 1 / float(first)
            by_size(state, c * v.scale, v.sums)
            return out._replace(scale=v.scale * c, sums=v.sums)
    return out


def _close(c: float, power: float) -> bool:
    return abs(c - power) <= 4e-3 * abs(power)


def by_size(state: State, c: float, terms: Sequence[Term]) -> None:
    """Recognize a constant next to a sum over `terms` that is computed from their size.

    With the inverse of the number of entries the sum is a mean, and pins the axes. Another power
    of the size of an axis is written down.
    """
    if c == 1.0 or not terms:
        return
    if _close(c, 1 / math.prod(find(t).size for t in terms)):
        for t in terms:
            if not is_fixed(t):
                pin(t, reason(state, "mean"))
        return
    for t in terms:
        n = find(t).size
        if n > 1 and not is_fixed(t) and any(_close(c, n**p) for p in (-1.0, -0.5, 0.5, 1.0)):
            state.scaled.append((t, reason(state, f"scaled by {c:.4g}, a power of its size {n}")))


# ------------------------------------------------------------------------------ contractions


def _contract(state: State, a: Dim, b: Dim) -> None:
    """Sum over products along two dimensions."""
    if a.uniform and b.uniform:
        return
    term = b.term if a.uniform else a.term
    if not a.uniform and not b.uniform:
        tie(state, a.term, b.term)
    if not (a.zero or b.zero or is_fixed(term)):
        pin(term, reason(state, "sum over values that are not zero for a removed unit"))


def dot_general(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Contracted dimensions are tied, and batch dimensions; the rest is carried over."""
    lhs, rhs = values[:2]
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    batch = []
    for i, j in zip(lb, rb, strict=True):
        a, b = lhs.dims[i], rhs.dims[j]
        dim = align(state, (a, b))
        batch.append(dim._replace(zero=a.zero or b.zero or is_fixed(dim.term)))
    for i, j in zip(lc, rc, strict=True):
        _contract(state, lhs.dims[i], rhs.dims[j])
    free = [d for i, d in enumerate(lhs.dims) if i not in (*lc, *lb)]
    free += [d for j, d in enumerate(rhs.dims) if j not in (*rc, *rb)]
    sums = tuple(lhs.dims[i].term for i in lc) + tuple(rhs.dims[j].term for j in rc)
    by_size(state, lhs.scale * rhs.scale, sums[: len(lc)])
    out = derive(values, [*batch, *free])
    both = not lhs.data and not rhs.data and lhs.leaves and rhs.leaves
    if out.data or both:
        for v, contracted, batched, first in ((lhs, lc, lb, True), (rhs, rc, rb, False)):
            if not v.leaves:
                continue
            role = "produced" if both and first else "consumed"
            roles = dict.fromkeys(contracted, role) | dict.fromkeys(batched, "")
            if both:  # the product goes on: what its free dimensions do is not known yet
                roles |= {d: "" for d in range(len(v.dims)) if d not in contracted}
            _kernel(state, v, contracted, roles)
    return [out._replace(sums=sums[: len(lc)])]


def _kernel(state: State, v: Value, contracted: Sequence[int], roles: dict[int, str]) -> None:
    """Write down the leaves behind an operand; those that only scale its results are gains."""
    leaves = frozenset(leaf for d in contracted for leaf, _ in v.dims[d].origin)
    assign(state, v._replace(leaves=leaves), "kernel", roles)
    assign(state, v, "gain", roles)


def conv(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Channels are contracted, by groups; taps and positions are fixed."""
    p = eqn.params
    if p["batch_group_count"] != 1:
        return give_up(state, eqn, values, "a convolution with batch groups")
    lhs, rhs = values
    spec, groups = p["dimension_numbers"], p["feature_group_count"]
    lhs_in, rhs_in = lhs.dims[spec.lhs_spec[1]], rhs.dims[spec.rhs_spec[1]]
    rhs_out = rhs.dims[spec.rhs_spec[0]]
    why = (eqn, "the groups of a convolution do not line up")
    if groups == 1:
        _contract(state, lhs_in, rhs_in)
    else:
        pairs = []
        for dim in (lhs_in, rhs_out):
            n = find(dim.term).size
            pair = factor(dim.term, groups, n // groups, why)
            if pair is None:
                fix(dim.term, why)
                pair = fixed(groups, why), fixed(n // groups, why)
            pairs.append(pair)
        (g, i), (h, _) = pairs
        if not lhs_in.uniform:
            tie(state, g, h)
        _contract(state, Dim(i, lhs_in.zero, lhs_in.uniform), rhs_in)
    out: list[Dim | None] = [None] * len(lhs.dims)
    out[spec.out_spec[0]] = lhs.dims[spec.lhs_spec[0]]
    out[spec.out_spec[1]] = rhs_out._replace(
        zero=rhs_out.zero or (lhs_in.zero and groups == find(rhs_out.term).size > 1),
        uniform=groups == 1 and rhs_out.uniform,
    )
    spatial = zip(spec.lhs_spec[2:], spec.rhs_spec[2:], spec.out_spec[2:], strict=True)
    for k, (i, j, o) in enumerate(spatial):
        size = eqn.outvars[0].aval.shape[o]
        plain = (p["window_strides"][k], p["lhs_dilation"][k], p["padding"][k]) == (1, 1, (0, 0))
        if find(rhs.dims[j].term).size == 1 and plain:
            out[o] = lhs.dims[i]
        else:
            fix(lhs.dims[i].term)
            fix(rhs.dims[j].term)
            out[o] = Dim(fixed(size), zero=True)
    result = derive(values, [d for d in out if d is not None])
    if result.data:
        assign(state, lhs, "other")
        taps = dict.fromkeys(spec.rhs_spec[2:], "")
        _kernel(state, rhs, spec.rhs_spec[1:2], {**taps, spec.rhs_spec[1]: "consumed"})
    return [result]


# -------------------------------------------------------------------------------- reductions


def reduce_sum(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """A sum over an axis loses nothing with a unit that is zero."""
    (v,), axes = values, eqn.params["axes"]
    for d in axes:
        dim = v.dims[d]
        if not (dim.zero or dim.uniform or is_fixed(dim.term)):
            pin(dim.term, reason(state, "sum over values that are not zero for a removed unit"))
    terms = tuple(v.dims[d].term for d in axes)
    by_size(state, v.scale, terms)
    return [_dropped(v, axes)._replace(scale=1.0, sums=terms)]


def _dropped(v: Value, axes: Sequence[int]) -> Value:
    dims = tuple(d for i, d in enumerate(v.dims) if i not in axes)
    return v._replace(dims=dims, array=None, scale=1.0, sums=())


def _reducer(what: str):
    def rule(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
        (v,), axes = values, eqn.params["axes"]
        for d in axes:
            if not is_fixed(v.dims[d].term):
                pin(v.dims[d].term, reason(state, what))
        return [_dropped(v, axes)]

    return rule


def arg_reduce(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The answer is a position: the axis is fixed."""
    (v,), axes = values, eqn.params["axes"]
    for d in axes:
        fix(v.dims[d].term)
    out = _dropped(v, axes)  # zero entries still have a position, which is not zero
    return [out._replace(dims=tuple(d._replace(zero=is_fixed(d.term)) for d in out.dims))]


def _along(state: State, eqn: Any, values: Sequence[Value], axis: int, zero: bool) -> list[Value]:
    """Fix one dimension; the others are tied among the operands."""
    for v in values:
        fix(v.dims[axis].term)
    out = []
    shape = eqn.invars[0].aval.shape
    tied = [align(state, [v.dims[d] for v in values]) for d in range(len(shape))]
    flags = [all(v.dims[d].zero for v in values) and zero for d in range(len(shape))]
    for var in eqn.outvars:
        dims = [t._replace(zero=f or is_fixed(t.term)) for t, f in zip(tied, flags, strict=True)]
        dims[axis] = Dim(fixed(var.aval.shape[axis]), zero=True)
        out.append(derive(values, dims))
    return out


def cumulative(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Running sums, products and maxima depend on the order."""
    zero = eqn.primitive.name != "cumlogsumexp"
    return _along(state, eqn, values, eqn.params["axis"], zero)


def sort(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The result is ranked: its dimension is fixed. One operand alone may come in any order."""
    at = eqn.params["dimension"]
    if len(values) > 1:
        return _along(state, eqn, values, at, zero=False)
    (v,) = values
    if not is_fixed(v.dims[at].term):
        pin(v.dims[at].term, reason(state, "ranks"))
    dims = list(v.dims)
    dims[at] = Dim(fixed(find(v.dims[at].term).size), zero=True)
    return [derive(values, dims)]


def top_k(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The order is the answer."""
    axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1))
    return _along(state, eqn, values, axis % len(values[0].dims), zero=False)


def window(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """Pooling: windows of one entry leave a dimension alone, others fix it."""
    p = eqn.params
    v = values[0]
    rank = len(v.dims)
    ones = (1,) * rank
    base, dilation = p.get("base_dilation") or ones, p.get("window_dilation") or ones
    dims = []
    for d, n in enumerate(eqn.outvars[0].aval.shape):
        each = (p["window_dimensions"][d], p["window_strides"][d], base[d], dilation[d])
        if each == (1, 1, 1, 1) and tuple(p["padding"][d]) == (0, 0):
            dims.append(v.dims[d])
        else:
            fix(v.dims[d].term)
            dims.append(Dim(fixed(n), zero=True))
    return [derive(values, dims)]


def fft(state: State, eqn: Any, values: Sequence[Value]) -> list[Value]:
    """The transformed dimensions are fixed."""
    (v,) = values
    last = len(eqn.params["fft_lengths"])
    dims = list(v.dims)
    for d in range(len(dims) - last, len(dims)):
        fix(dims[d].term)
        dims[d] = Dim(fixed(eqn.outvars[0].aval.shape[d]), zero=True)
    return [derive(values, dims)]


ARITHMETIC = dict.fromkeys(ELEMENTWISE, elementwise) | {
    "bitcast_convert_type": bitcast,
    "dot_general": dot_general,
    "conv_general_dilated": conv,
    "reduce_sum": reduce_sum,
    "reduce_max": _reducer("maximum"),
    "reduce_min": _reducer("minimum"),
    "reduce_prod": _reducer("product"),
    "reduce_and": _reducer("all"),
    "reduce_or": _reducer("any"),
    "reduce_xor": _reducer("parity"),
    "argmax": arg_reduce,
    "argmin": arg_reduce,
    "cumsum": cumulative,
    "cumprod": cumulative,
    "cummax": cumulative,
    "cummin": cumulative,
    "cumlogsumexp": cumulative,
    "sort": sort,
    "top_k": top_k,
    "reduce_window_sum": window,
    "reduce_window_max": window,
    "reduce_window_min": window,
    "fft": fft,
}
