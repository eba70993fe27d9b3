"""The operation of a leaf: how the leaf's dimensions lie in its operand, and what it can be run on.

A leaf reaches its operation through casts, transposes and reshapes. A `Layout` follows its
dimensions there as a product of factors: a merged heads x size dimension holds two factors, a split
one has its factors in two dimensions of the operand.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxkit.trace import _jaxpr
from jaxkit.trace._uses import ELEMENTWISE

Factor = tuple[tuple[int, ...], int]  # (name, size)
Dims = tuple[tuple[Factor, ...], ...]

# One operand's entries, moved nowhere: in their own right (CASTS), or changed one by one.
CASTS = frozenset(
    ["convert_element_type", "copy", "copy_p", "name", "sharding_constraint", "pvary", "pcast"]
)
POINTWISE = frozenset(
    ["add", "add_any", "sub", "mul", "div", "max", "min", "neg", "sign", "abs", "round", "floor"]
    + ["ceil", "exp", "log", "tanh", "logistic", "sqrt", "rsqrt", "square", "integer_pow", "pow"]
    + ["clamp", "select_n", "erf", "reduce_precision"]
)


class Layout(NamedTuple):
    """Where the factors of the leaf's dimensions (`base`) lie in a value's (`dims`).

    `exact`: nothing but the order and the dtype of the entries has changed.
    """

    base: Dims
    dims: Dims
    exact: bool = True


def layout(shape: Sequence[int]) -> Layout:
    """Return the layout of a leaf itself: every dimension one factor."""
    dims = tuple((((i,), size),) for i, size in enumerate(shape))
    return Layout(dims, dims)


def advance(eqn: core.JaxprEqn, old: Layout | None) -> Layout | None:
    """Return the layout of an equation's output, or None where the dimensions cannot be told."""
    name, params = eqn.primitive.name, eqn.params
    if old is None or len(eqn.outvars) != 1:
        return None
    shape = _jaxpr.aval(eqn.outvars[0]).shape
    if name == "transpose":
        return old._replace(dims=tuple(old.dims[i] for i in params["permutation"]))
    if name == "squeeze":
        drop = params["dimensions"]
        return old._replace(dims=tuple(d for i, d in enumerate(old.dims) if i not in drop))
    if name == "broadcast_in_dim":
        return old._replace(dims=_broadcast(old.dims, shape, params["broadcast_dimensions"]))
    if name == "reshape" and params.get("dimensions") is None:
        return _reshape(old, shape)
    if name in CASTS:
        return old
    sizes = tuple(math.prod(size for _, size in d) for d in old.dims)
    if name in POINTWISE and sizes == tuple(shape):
        return old._replace(exact=False)
    return None


def _broadcast(dims: Dims, shape: Sequence[int], into: Sequence[int]) -> Dims:
    new = lambda j, size: (((-1, j), size),) if size != 1 else ()
    out: list[tuple[Factor, ...]] = [new(j, size) for j, size in enumerate(shape)]
    for d, j in zip(dims, into, strict=True):
        if math.prod(size for _, size in d) == shape[j]:
            out[j] = d
    return tuple(out)


def _reshape(old: Layout, shape: Sequence[int]) -> Layout | None:
    if 0 in shape:
        return None
    left = [f for d in old.dims for f in d]
    base, dims = old.base, []
    for size in shape:
        group: list[Factor] = []
        if size == 1 and left and left[0][1] == 1:
            group.append(left.pop(0))
        while size > 1:
            name, have = left.pop(0)
            if have == 1:
                continue
            if size % have and have % size:
                return None
            if have > size:  # split the factor into two, in the leaf's dimensions too
                head, tail = ((*name, 0), size), ((*name, 1), have // size)
                swap = lambda d, f=(name, have), new=(head, tail): tuple(
                    g for h in d for g in (new if h == f else (h,))
                )
                base, dims = tuple(map(swap, base)), [swap(d) for d in dims]
                left.insert(0, tail)
                name, have = head
            group.append((name, have))
            size //= have
        dims.append(tuple(group))
    return Layout(base, tuple(dims), old.exact)


class View(NamedTuple):
    """A value as a function of one leaf: `build(base)` is the value."""

    base: Any
    make: Callable[[Any, dict], Any]
    layout: Layout | None

    def build(self, leaf: Any) -> Any:
        return self.make(leaf, {})


def view(leaf: Any) -> View:
    """Return the view of a leaf as itself."""
    return View(leaf, lambda w, memo: w, layout(jnp.shape(leaf)))


class Op(NamedTuple):
    """The operation that a leaf feeds: what `trace.replay` hands to a replacement.

    Attributes:
      primitive: its name: dot_general, conv_general_dilated, gather, dynamic_slice, add, ...
      x_axes: for every dimension of the leaf, the axis of the input x that it is contracted or
        aligned with, counted from the end (negative), or None.
      y_axes: the same for the axes of the output y. A dimension with only an x axis is consumed,
        with only a y axis produced, with both a batch dimension (experts, gains).
      step: the index of the current iteration of every `lax.scan` around, outermost first.
      run: `run(x, w) -> y`, the operation itself on another input or another leaf. The produced
        dimensions of w may have other sizes where no reshape on the way to the operation fixes
        them.
      low_rank: `low_rank(x, a, b) -> y`, the operation on the leaf ``w[i, o] = sum_r a[i, r]
        b[r, o]`` without ever forming it: `a` has the shape (*batch, *consumed, r) and `b` the
        shape (*batch, r, *produced), dimensions in the order of the leaf. Computes in the dtype
        of the operation. For dot_general with any dimension numbers, convolutions (a has the
        spatial dimensions, b is the 1x1 convolution) and embeddings (a is looked up).
    """

    primitive: str
    x_axes: tuple[int | None, ...]
    y_axes: tuple[int | None, ...]
    step: tuple[Any, ...]
    run: Callable[[Any, Any], Any]
    low_rank: Callable[[Any, Any, Any], Any]


def make_op(
    path: str, eqn: core.JaxprEqn, values: Sequence[Any], position: int, seen: View, step: tuple
) -> tuple[Op, Any]:
    """Return the operation of an equation as a function of one operand's leaf, and its input."""
    operand, name = values[position], eqn.primitive.name
    x = jnp.stack(values[1:]) if name == "dynamic_slice" else values[1 - position]

    def run_on(x, operand):
        if name == "dynamic_slice":
            return _jaxpr.evaluate(_fit_slices(eqn, operand), [operand, *x])[0]
        pair = [x, operand] if position else [operand, x]
        return _jaxpr.evaluate(_fit_slices(eqn, operand), [*pair, *values[2:]])[0]

    x_dims, y_dims = _axes(eqn, position, values)
    run = lambda x, w: run_on(x, operand if w is seen.base else seen.build(w))

    def low_rank(x, a, b):
        try:
            return _low_rank(eqn, position, operand, seen.layout, run_on, x, a, b)
        except _NoFactors as why:
            raise ValueError(f"{path!r} has no low-rank form: {why}") from None

    x_axes, y_axes = (_leaf_axes(seen, dims) for dims in (x_dims, y_dims))
    return Op(name, x_axes, y_axes, step, run, low_rank), x


def _leaf_axes(seen: View, dims: Sequence[int | None]) -> tuple[int | None, ...]:
    if seen.layout is None:
        return (None,) * jnp.ndim(seen.base)
    at = {factors: dims[j] for j, factors in enumerate(seen.layout.dims) if factors}
    return tuple(at.get(factors) for factors in seen.layout.base)


def _fit_slices(eqn: core.JaxprEqn, operand: Any) -> core.JaxprEqn:
    """A lookup of whole rows takes whole rows of any operand."""
    if "slice_sizes" not in eqn.params:
        return eqn
    sizes = zip(
        eqn.params["slice_sizes"], _jaxpr.aval(eqn.invars[0]).shape, jnp.shape(operand), strict=True
    )
    fit = tuple(new if size == old else size for size, old, new in sizes)
    return eqn.replace(params=eqn.params | {"slice_sizes": fit})


def _axes(eqn: core.JaxprEqn, position: int, values: Sequence[Any]) -> tuple[list, list]:
    """For every dimension of the operand: its axis in x and its axis in y, from the end."""
    name, params = eqn.primitive.name, eqn.params
    rank = jnp.ndim(values[position])
    x_axes: list[int | None] = [None] * rank
    y_axes: list[int | None] = [None] * rank
    y_rank = len(_jaxpr.aval(eqn.outvars[0]).shape)
    x_rank = 1 if name == "dynamic_slice" else jnp.ndim(values[1 - position])
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        for i, j in zip(contract[position], contract[1 - position], strict=True):
            x_axes[i] = j
        for k, (i, j) in enumerate(zip(batch[position], batch[1 - position], strict=True)):
            x_axes[i], y_axes[i] = j, k
        free = [i for i in range(rank) if i not in {*contract[position], *batch[position]}]
        start = y_rank - len(free) if position else len(batch[0])
        for k, i in enumerate(free):
            y_axes[i] = start + k
    elif name == "conv_general_dilated":
        dn = params["dimension_numbers"]
        if position == 1:
            y_axes[dn.rhs_spec[0]] = dn.out_spec[1] if params["batch_group_count"] == 1 else None
            x_axes[dn.rhs_spec[1]] = dn.lhs_spec[1] if params["feature_group_count"] == 1 else None
        else:
            y_axes[dn.lhs_spec[0]] = dn.out_spec[0] if params["batch_group_count"] == 1 else None
            x_axes[dn.lhs_spec[1]] = dn.rhs_spec[1] if params["feature_group_count"] == 1 else None
    elif name == "gather":
        dn = params["dimension_numbers"]
        gone = {*dn.collapsed_slice_dims, *getattr(dn, "operand_batching_dims", ())}
        for i, k in zip([i for i in range(rank) if i not in gone], dn.offset_dims, strict=True):
            if params["slice_sizes"][i] == _jaxpr.aval(eqn.invars[0]).shape[i]:
                y_axes[i] = k
    elif name == "dynamic_slice":
        shape = _jaxpr.aval(eqn.invars[0]).shape
        y_axes = [i if params["slice_sizes"][i] == shape[i] else None for i in range(rank)]
    elif name in ELEMENTWISE:
        y_axes = list(range(rank))
        x_axes = [i if x_rank == rank else None for i in range(rank)]
    negative = lambda axes, n: [None if i is None else i - n for i in axes]
    return negative(x_axes, x_rank), negative(y_axes, y_rank)


class _NoFactors(ValueError):
    pass


def _low_rank(eqn, position, operand, seen, run_on, x, a, b):
    """Run the operation on a, and contract the rank with b."""
    if seen is None or not seen.exact:
        raise _NoFactors("it is more than cast, transposed and reshaped before its operation")
    name, rank = eqn.primitive.name, jnp.ndim(operand)
    batch, produced = _roles(eqn, position, operand)
    groups = [[], [], []]  # dimensions of the leaf: batch, consumed, produced
    role = {
        f: 0 if j in batch else 2 if j in produced else 1 for j in range(rank) for f in seen.dims[j]
    }
    for i, factors in enumerate(seen.base):
        roles = {role[f] for f in factors if f in role} or {1}
        if len(roles) > 1:
            raise _NoFactors(f"its dimension {i} is consumed and produced by `{name}`")
        groups[roles.pop()].append(i)
    sizes = lambda dims: tuple(math.prod(n for _, n in seen.base[i]) for i in dims)
    r = jnp.shape(a)[-1] if jnp.ndim(a) else 0
    due_a = (*sizes(groups[0] + groups[1]), r)
    due_b = (*sizes(groups[0]), r, *sizes(groups[2]))
    if jnp.shape(a) != due_a or jnp.shape(b) != due_b:
        raise _NoFactors(f"factors {jnp.shape(a)} and {jnp.shape(b)} came, {due_a} and {due_b} due")
    into = [j for j in range(rank) if j not in produced]  # the operand's dimensions that a has
    a = _arrange(a, groups[0] + groups[1], seen, into).astype(operand.dtype)
    out = [j for j in range(rank) if j in batch], [j for j in range(rank) if j in produced]
    b = jnp.moveaxis(b, len(groups[0]), -1)
    b = _arrange(b, groups[0] + groups[2], seen, [*out[0], *out[1]]).astype(operand.dtype)
    dtype = _jaxpr.aval(eqn.outvars[0]).dtype
    if name == "dot_general":
        y = _dot_low_rank(eqn, position, x, a, b, into, out)
    elif name == "conv_general_dilated":
        y = _conv_low_rank(eqn, run_on, x, a, b, into)
    else:
        y = _lookup_low_rank(eqn, x, a, b, into)
    return y.astype(dtype)


def _roles(eqn, position, operand) -> tuple[set[int], set[int]]:
    """The dimensions of the operand that are batch dimensions, and those that are produced."""
    name, params, rank = eqn.primitive.name, eqn.params, jnp.ndim(operand)
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        gone = {*contract[position], *batch[position]}
        return {*batch[position]}, {i for i in range(rank) if i not in gone}
    if name == "conv_general_dilated" and position == 1 and params["batch_group_count"] == 1:
        return set(), {params["dimension_numbers"].rhs_spec[0]}
    if name == "gather":
        dn = params["dimension_numbers"]
        whole = [i for i in range(rank) if i not in dn.collapsed_slice_dims]
        fixed = all(params["slice_sizes"][i] == jnp.shape(operand)[i] for i in whole)
        if fixed and {*dn.collapsed_slice_dims} == {*dn.start_index_map}:
            return set(), {*whole}
    if name == "dynamic_slice":
        shape = jnp.shape(operand)
        return set(), {i for i in range(rank) if params["slice_sizes"][i] == shape[i]}
    raise _NoFactors(f"`{name}` is not bilinear, or not in a form that factors")


def _arrange(factor, leaf_dims, seen: Layout, operand_dims):
    """Take a factor from the leaf's dimensions to the operand's, the rank staying last."""
    have = [f for i in leaf_dims for f in seen.base[i]]
    want = [f for j in operand_dims for f in seen.dims[j]]
    if {f for f in have if f[1] > 1} != {f for f in want if f[1] > 1}:
        raise _NoFactors("it is broadcast before its operation")
    r = factor.shape[-1]
    have, want = [f for f in have if f[1] > 1], [f for f in want if f[1] > 1]
    factor = factor.reshape(*(n for _, n in have), r)
    factor = factor.transpose(*(have.index(f) for f in want), len(want))
    return factor.reshape(*(math.prod(n for _, n in seen.dims[j]) for j in operand_dims), r)


def _dot_low_rank(eqn, position, x, a, b, into, out):
    contract, batch = eqn.params["dimension_numbers"]
    letters = iter(string.ascii_letters)
    w = {j: next(letters) for j in sorted([*into, *out[1]])}
    rank = next(letters)
    in_x = dict(zip(contract[1 - position], contract[position], strict=True))
    in_x |= dict(zip(batch[1 - position], batch[position], strict=True))
    xs = [w[in_x[i]] if i in in_x else next(letters) for i in range(jnp.ndim(x))]
    free = [c for i, c in enumerate(xs) if i not in in_x]
    both = [w[j] for j in batch[position]]
    made = [w[j] for j in out[1]]
    y = [*both, *free, *made] if position else [*both, *made, *free]
    spec = lambda *parts: ",".join("".join(p) for p in parts[:-1]) + "->" + "".join(parts[-1])
    options = {k: eqn.params[k] for k in ("precision", "preferred_element_type")}
    z = jnp.einsum(spec(xs, [*(w[j] for j in into), rank], [*both, *free, rank]), x, a, **options)
    b_letters = [*(w[j] for j in out[0]), *made, rank]
    return jnp.einsum(spec([*both, *free, rank], b_letters, y), z, b.astype(z.dtype), **options)


def _conv_low_rank(eqn, run_on, x, a, b, into):
    params = eqn.params
    dn, groups = params["dimension_numbers"], params["feature_group_count"]
    feature, r = dn.rhs_spec[0], a.shape[-1]
    kernel = jnp.moveaxis(jnp.concatenate([a] * groups, axis=-1), -1, feature)
    z = jnp.moveaxis(run_on(x, kernel), dn.out_spec[1], -1)
    z = z.reshape(*z.shape[:-1], groups, r)
    b = b.reshape(groups, -1, r).astype(z.dtype)
    y = jnp.einsum("...gr,gor->...go", z, b, precision=_first(params["precision"]))
    return jnp.moveaxis(y.reshape(*y.shape[:-2], -1), -1, dn.out_spec[1])


def _first(precision):
    return precision[0] if isinstance(precision, tuple) else precision


def _lookup_low_rank(eqn, x, a, b, into):
    params = eqn.params
    if eqn.primitive.name == "dynamic_slice":
        starts = [x[j] for j in into]
        sizes = [params["slice_sizes"][j] for j in into]
        z = lax.dynamic_slice(a, [*starts, jnp.zeros_like(x[0])], [*sizes, a.shape[-1]])
        y = jnp.tensordot(z, b, [[-1], [-1]])
        places = [*into, *(j for j in range(len(params["slice_sizes"])) if j not in into)]
        return jnp.moveaxis(y, range(len(places)), places)
    dn = params["dimension_numbers"]
    rows = lax.GatherDimensionNumbers(
        offset_dims=(jnp.ndim(x) - 1,),
        collapsed_slice_dims=tuple(into.index(i) for i in dn.collapsed_slice_dims),
        start_index_map=tuple(into.index(i) for i in dn.start_index_map),
    )
    z = lax.gather(
        a,
        x,
        rows,
        (*(1 for _ in into), a.shape[-1]),
        **{k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode", "fill_value")},
    )
    y = jnp.tensordot(z, b, [[-1], [-1]])
    return jnp.moveaxis(y, range(jnp.ndim(z) - 1, jnp.ndim(y)), dn.offset_dims)
