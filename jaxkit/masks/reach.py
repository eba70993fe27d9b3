"""Which entries of a mask lie on a way from the data to the output, in any model.

The function is run on what may be zero instead of on numbers. Every value becomes two arrays of 0
and 1: `alive`, 1 where it can be other than zero, and `data`, 1 where it can depend on the data. A
sum of products is alive where one of its products is, and carries data where one factor does and
the other is alive: in the algebra of "or" and "and", which float32 sums and products of 0 and 1
compute, cut back to 0 and 1 after every operation. In this algebra the derivative of the output
with respect to an entry of the mask tells whether a way leads through the entry; so reverse-mode
differentiation finds them all in one sweep.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask
from jaxkit.trace import _jaxpr
from jaxkit.trace.axes import make_jaxpr

__all__ = ["Effective", "effective"]


class Effective(NamedTuple):
    """What `effective` found.

    Attributes:
      mask: the entries that lie on a way; a part of the mask that came.
      unfollowed: the operations that were taken to mix all their inputs into all their outputs,
        since they have no rule, with the user's lines. What they touch may be overcounted.
    """

    mask: Mask
    unfollowed: tuple[str, ...]


def effective(
    apply_fn: Callable[..., Any],
    params: PyTree,
    mask: Mask,
    *args: Any,
    where: tree.Where = None,
    constants: bool = False,
) -> Effective:
    r"""Find the entries of a mask on a way from the data to the output; the others do nothing.

    An entry that feeds a unit without live outputs, or that is fed by one without live inputs, is
    alive in vain. With m the mask and a way any chain of operations from the data to the output

    .. math:: e = \{i : m_i = 1 \text{ and a way leads through the entry } i\}.

    Ways are counted, not values: two of them may cancel, and a relu may be off for all data. Dense
    layers and convolutions are exact, position by position (a tap that meets only padding is on no
    way). What looks at values is taken for the widest it can be: all rows of an embedding may be
    looked up, all pixels of a pool may be its maximum, a softmax may attend everywhere, one side of
    a cond may run. Normalizations subtract a mean and so carry data from every unit to every one.
    An entry that multiplies (a gate, a gain) counts where data flow past what it multiplies.

    Args:
      apply_fn: ``apply_fn(params, *args)``. Trace the model as it predicts; batch statistics and
        other state belong into params or a closure, for `args` are data.
      params: a tree of arrays, or of their shapes; their values are not looked at.
      mask: a tree of bools like params.
      *args: data, or their shapes; one example is enough.
      where: the leaves to look at; at others the mask comes back as it is. Default: the weights.
      constants: biases (and what else is not zero by itself) start ways too. Then every entry
        that is not found could be removed without any change of the output; without it, a
        kernel's entries behind a unit that only its bias keeps alive are not found, nor are
        biases themselves.

    Returns:
      An `Effective`. ``print(report(params, effective(...).mask))`` counts what it keeps.

    Raises:
      ValueError: a mask that does not fit params, or a `where` that matches nothing.
      TypeError: a leaf or an argument that is no array.

    Reference: A. Vysogorets, J. Kempe, "Connectivity Matters: Neural Network Pruning Through the
    Lens of Effective Sparsity", arXiv:2107.02306.

    >>> params = {"up": jnp.ones((2, 2)), "down": jnp.ones((2, 1))}
    >>> mask = {"up": jnp.ones((2, 2), bool), "down": jnp.array([[True], [False]])}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> effective(apply_fn, params, mask, jnp.ones((1, 2))).mask["up"].tolist()
    [[True, False], [True, False]]
    """
    tree.check_like(params, mask, "mask")
    jaxpr = make_jaxpr(apply_fn, params, args)
    leaves, bits = jax.tree.leaves(params), jax.tree.leaves(tree.select(params, where))
    masks = jax.tree.leaves(mask)
    chosen = [jnp.asarray(m, jnp.float32) for m, bit in zip(masks, bits, strict=True) if bit]
    notes: dict[str, None] = {}

    def ways(chosen):
        cells, given = [], iter(chosen)
        for leaf, m, bit in zip(leaves, masks, bits, strict=True):
            alive = next(given) if bit else jnp.asarray(m, jnp.float32)
            if tree.is_inexact(leaf):
                cells.append(Flow(alive, jnp.zeros_like(alive)))
            elif isinstance(leaf, jax.ShapeDtypeStruct):
                cells.append(Flow(jnp.ones(leaf.shape), jnp.zeros(leaf.shape)))
            else:
                cells.append(jnp.asarray(leaf))
        ones = (jnp.ones(np.shape(x), jnp.float32) for x in jax.tree.leaves(args))
        cells += [Flow(one, one) for one in ones]
        out = [_flow(cell) for cell in _run(jaxpr, cells, notes)]
        return sum((jnp.sum(o.alive if constants else o.data) for o in out), jnp.float32(0))

    found = iter(jax.jit(jax.grad(ways))(chosen))
    marked = [m & (next(found) > 0) if bit else m for m, bit in zip(masks, bits, strict=True)]
    return Effective(jax.tree.unflatten(jax.tree.structure(mask), marked), tuple(notes))


# ------------------------------------------------------------------------------------ the algebra


class Flow(NamedTuple):
    """Where a value can be other than zero, and where it can depend on the data: 0 or 1."""

    alive: Array
    data: Array


Cell = Any  # a Flow, or a value that depends neither on params nor on data


@jax.custom_vjp
def _cut(x):
    """Return 1 where x > 0, else 0; its derivative cuts the cotangent likewise."""
    return (x > 0).astype(jnp.float32)


_cut.defvjp(lambda x: (_cut(x), None), lambda _, g: (_cut(g),))


def _flow(cell: Cell) -> Flow:
    if isinstance(cell, Flow):
        return cell
    cell = jnp.asarray(cell)
    if jnp.issubdtype(cell.dtype, jax.dtypes.extended):
        return Flow(jnp.ones(cell.shape), jnp.zeros(cell.shape))
    return Flow((cell != 0).astype(jnp.float32), jnp.zeros(cell.shape))


def _run(jaxpr: Any, cells: Sequence[Cell], notes: dict[str, None]) -> list[Cell]:
    """Run a closed jaxpr in the algebra."""
    env = dict(zip(jaxpr.jaxpr.constvars, jaxpr.consts, strict=True))
    env |= zip(jaxpr.jaxpr.invars, cells, strict=True)
    read = lambda v: v.val if _jaxpr.is_literal(v) else env[v]
    for eqn in jaxpr.jaxpr.eqns:
        out = _step(eqn, [read(v) for v in eqn.invars], notes)
        env |= zip(eqn.outvars, out, strict=True)
    return [read(v) for v in jaxpr.jaxpr.outvars]


def _step(eqn: Any, cells: list[Cell], notes: dict[str, None]) -> list[Cell]:
    name = eqn.primitive.name
    if name in _jaxpr.CALLS:
        return _run(_jaxpr.called(eqn), cells, notes)
    if not any(isinstance(c, Flow) for c in cells):
        return _jaxpr.evaluate(eqn, cells)
    if name == "scan":
        return _scan(eqn, cells, notes)
    if name == "cond":
        return _cond(eqn, cells, notes)
    out = _rule(eqn, name, cells)
    if out is None:
        notes[f"`{name}` at {_jaxpr.source(eqn)}"] = None
        out = _mix(eqn, cells)
    return [Flow(_cut(o.alive), _cut(o.data)) for o in out]


# fmt: off
# Moving entries about, and sums: the same operation on both arrays.
MOVES = frozenset({
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "cumsum", "expand_dims", "pad", "pcast",
    "pvary", "reduce_sum", "reduce_window_sum", "reshape", "rev", "slice", "split", "squeeze",
    "tile", "transpose", "unstack",
})
# The same, where what comes after the first operands is an index that is known.
INDEXED = {"gather": 1, "dynamic_slice": 1, "dynamic_update_slice": 2}
SCATTERS = {"scatter": lax.scatter, "scatter-add": lax.scatter_add}
REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_or", "reduce_and", "reduce_xor"})
# Element by element, alive where an operand is, or where f(0) is not 0.
SUMS = frozenset({
    "add", "add_any", "sub", "max", "min", "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge",
})
UNARY = frozenset({
    "abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil",
    "convert_element_type", "cos", "cosh", "digamma", "erf", "erf_inv", "erfc", "exp", "exp2",
    "expm1", "floor", "integer_pow", "is_finite", "lgamma", "log", "log1p", "logistic", "neg",
    "not", "reduce_precision", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "tan", "tanh",
})
OTHERS = frozenset({"pow", "atan2", "rem", "nextafter", "clamp"})
# fmt: on


def _rule(eqn: Any, name: str, cells: list[Cell]) -> list[Flow] | None:
    """Return the outputs of one equation, or None where there is no rule."""
    params, shapes = eqn.params, [v.aval.shape for v in eqn.outvars]
    if name in MOVES:
        return _both(lambda *xs: _jaxpr.evaluate(eqn, xs), list(map(_flow, cells)))
    if name in REDUCTIONS:
        return _both(lambda x: [x.sum(params["axes"])], cells)
    if name in INDEXED:
        return _look_up(eqn, name, cells)
    if name in SCATTERS and not isinstance(cells[1], Flow):
        names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        put, own = SCATTERS[name], {n: params[n] for n in names}
        ends = [_flow(cells[0]), _flow(cells[2])]
        return _both(lambda x, new: [put(x, cells[1], new, **own)], ends)
    if name in ("cummax", "cummin"):
        return _both(lambda x: [lax.cumsum(x, params["axis"], params["reverse"])], cells)
    if name in ("reduce_window_max", "reduce_window_min"):
        return _both(lambda x: [_window_sum(x, params)], cells)
    if name in ("argmax", "argmin"):
        x, ones = cells[0], jnp.ones(shapes[0])
        return [Flow(ones + x.alive.sum(params["axes"]), x.data.sum(params["axes"]))]
    if name == "optimization_barrier":
        return list(map(_flow, cells))
    if name in ("mul", "dot_general", "conv_general_dilated"):
        (a, x), (b, y) = map(_flow, cells)
        product = lambda u, v: _product(name, params, u, v)
        return [Flow(product(a, b), product(x, b) + product(a, y))]
    if name == "div":
        (a, x), (b, y) = map(_flow, cells)
        return [Flow(a * (1 + b), x * (1 + b) + a * y)]
    if name == "select_n":
        which, *cases = cells
        if not isinstance(which, Flow):
            return _both(lambda *xs: [lax.select_n(which, *xs)], list(map(_flow, cases)))
        alive, data = (sum(parts) for parts in zip(*map(_flow, cases), strict=True))
        return [Flow(alive * (1 + which.alive), data * (1 + which.alive) + which.data * alive)]
    if name in UNARY | SUMS | OTHERS:
        flows = [c for c in cells if isinstance(c, Flow)]
        zeros = [
            jnp.zeros(v.aval.shape, v.aval.dtype) if isinstance(c, Flow) else c
            for v, c in zip(eqn.invars, cells, strict=True)
        ]
        at_zero = (_jaxpr.evaluate(eqn, zeros)[0] != 0).astype(jnp.float32)
        alive, data = (sum(parts) for parts in zip(*flows, strict=True))
        if name in OTHERS:
            data = data * (1 + alive)
        return [Flow(at_zero + alive, data + jnp.zeros(shapes[0]))]
    return None


def _both(fn: Callable[..., Sequence[Array]], cells: Sequence[Flow]) -> list[Flow]:
    alive, data = (fn(*parts) for parts in zip(*cells, strict=True))
    return [Flow(a, d) for a, d in zip(alive, data, strict=True)]


def _product(name: str, params: dict[str, Any], u: Array, v: Array) -> Array:
    if name == "mul":
        return u * v
    if name == "dot_general":
        return lax.dot_general(u, v, params["dimension_numbers"])
    names = (
        "window_strides padding lhs_dilation rhs_dilation dimension_numbers feature_group_count "
        "batch_group_count"
    )
    return lax.conv_general_dilated(u, v, **{n: params[n] for n in names.split()})


def _window_sum(x: Array, params: dict[str, Any]) -> Array:
    names = ["window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"]
    return lax.reduce_window(x, np.float32(0), lax.add, *(params[n] for n in names))


def _look_up(eqn: Any, name: str, cells: list[Cell]) -> list[Flow] | None:
    """Look up at known indices exactly; at others find whatever any index would."""
    n = INDEXED[name]
    flows, index = list(map(_flow, cells[:n])), cells[n:]
    if not any(isinstance(c, Flow) for c in index):
        return _both(lambda *xs: _jaxpr.evaluate(eqn, [*xs, *index]), flows)
    if name == "dynamic_update_slice":
        return None
    shape = flows[0].alive.shape
    pairs = enumerate(zip(eqn.params["slice_sizes"], shape, strict=True))
    some = tuple(d for d, (size, whole) in pairs if size != whole)
    start = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.invars[1:]]

    def any_of(x):
        pooled = jnp.broadcast_to(x.sum(some, keepdims=True), shape)
        return _jaxpr.evaluate(eqn, [pooled, *start])[0]

    alive, data = any_of(flows[0].alive), any_of(flows[0].data)
    moved = sum(jnp.sum(c.data) for c in map(_flow, index))
    turned = sum(jnp.sum(c.alive) for c in map(_flow, index))
    return [Flow(alive * (1 + turned), data * (1 + turned) + moved * alive)]


def _mix(eqn: Any, cells: list[Cell]) -> list[Flow]:
    """Take every output entry to depend on every input entry."""
    flows = [c for c in cells if isinstance(c, Flow)]
    alive, data = (_cut(sum(map(jnp.sum, parts))) for parts in zip(*flows, strict=True))
    out = [jnp.ones(v.aval.shape) for v in eqn.outvars]
    return [Flow(one + alive, one * data * (1 + alive)) for one in out]


# ------------------------------------------------------------------------- functions in equations


def _cond(eqn: Any, cells: list[Cell], notes: dict[str, None]) -> list[Cell]:
    """Any branch may run."""
    which, *rest = cells
    branches = [map(_flow, _run(b, rest, notes)) for b in eqn.params["branches"]]
    chosen = _flow(which)
    turned, moved = (jnp.sum(x) for x in chosen) if isinstance(which, Flow) else (0.0, 0.0)
    out = []
    for each in zip(*branches, strict=True):
        alive, data = (sum(parts) for parts in zip(*each, strict=True))
        out.append(Flow(_cut(alive * (1 + turned)), _cut(data * (1 + turned) + moved * alive)))
    return out


def _scan(eqn: Any, cells: list[Cell], notes: dict[str, None]) -> list[Cell]:
    """Scan in the algebra; a carry stays a known value as long as every iteration leaves it one."""
    params, body = eqn.params, eqn.params["jaxpr"]
    a = params["num_consts"]
    b = a + params["num_carry"]
    consts, carry, xs = cells[:a], cells[a:b], cells[b:]
    options = {k: params[k] for k in ("length", "reverse")}

    def step(carry, xs):
        out = _run(body, [*consts, *carry, *xs], notes)
        return out[: b - a], out[b - a :]

    while True:
        first = jax.tree.map(lambda x: jax.eval_shape(lambda x: x[0], x), xs)
        after = jax.eval_shape(step, carry, first)[0]
        lost = [
            isinstance(now, Flow) and not isinstance(then, Flow)
            for now, then in zip(after, carry, strict=True)
        ]
        # what began as a Flow stays one
        carry = [_flow(c) if gone else c for c, gone in zip(carry, lost, strict=True)]
        if not any(lost):
            break
    same = [isinstance(c, Flow) for c in carry]

    def kept(carry, xs):
        carry, ys = step(carry, xs)
        pairs = zip(carry, same, strict=True)
        return [_flow(c) if was else c for c, was in pairs], ys

    carry, ys = lax.scan(kept, carry, xs, **options)
    return [*carry, *ys]
