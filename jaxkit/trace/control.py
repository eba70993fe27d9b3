"""The interpreter: equations in order, through calls, loops and branches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxkit.trace import stacked
from jaxkit.trace.rules import ARITHMETIC, ELEMENTWISE
from jaxkit.trace.shapes import SHAPES
from jaxkit.trace.terms import fix, fixed, is_fixed
from jaxkit.trace.values import (
    Dim,
    State,
    Value,
    align,
    assign,
    const,
    derive,
    evaluate,
    fresh,
    give_up,
    refresh,
    tie,
)

# calls of a function as it is: the parameter that holds its jaxpr
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "custom_lin": "jaxpr",
    "composite": "jaxpr",
}
_RANDOM = ("random_", "rng_", "threefry", "philox", "iota_2x32")


def interpret(state: State, jaxpr: Any, consts: Sequence[Any], values: Sequence[Value]):
    """Return the values of the outputs of a jaxpr.

    jaxpr, consts: an open jaxpr and the arrays of its constants.
    """
    env: dict[Any, Value] = dict(zip(jaxpr.constvars, map(const, consts), strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))

    def read(atom: Any) -> Value:
        return _literal(atom) if isinstance(atom, core.Literal) else env[atom]

    users: stacked.Uses = {}
    for eqn in jaxpr.eqns:
        inner = [read(a) for a in eqn.invars]
        outs = None
        if eqn.primitive.name == "reshape":
            users = users or stacked.uses(jaxpr)
            stack = stacked.stack(state, eqn, inner[0], users)
            outs = stack and [stack]
        elif inner and inner[0].blocks:
            outs = stacked.index(state, eqn, inner[0])
        outs = outs or _apply(state, eqn, inner)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in jaxpr.outvars]


def _literal(atom: Any) -> Value:
    if isinstance(atom.val, bool | int | float | complex):
        return Value((), np.asarray(atom.val, atom.aval.dtype))
    return const(atom.val)


def _apply(state: State, eqn: Any, values: list[Value]) -> list[Value]:
    name = eqn.primitive.name
    state.eqn = eqn
    if name in _CALLS:
        inner = eqn.params.get(_CALLS[name])
        jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
        if inner is not None and len(jaxpr.invars) == len(values):
            return interpret(state, jaxpr, consts, values)
    if name in _LOOPS:
        return _LOOPS[name](state, eqn, values)
    for v in values:
        state.read |= v.leaves
    values = [refresh(v) for v in values]
    if not eqn.outvars:  # a print: it shows the order, and the outputs do not depend on it
        return []
    rule = ARITHMETIC.get(name) or SHAPES.get(name)
    if rule is None:
        random = name.startswith(_RANDOM)
        why = "a random draw is not uniform" if random else "no rule for this primitive"
        return give_up(state, eqn, values, why)
    outs = rule(state, eqn, values)
    if all(v.array is not None for v in values):
        arrays = evaluate(eqn, values, name in ELEMENTWISE)
        if arrays is not None:
            return [const(a, o.dims) for a, o in zip(arrays, outs, strict=True)]
    return outs


# ---------------------------------------------------------------------------- loops, branches


def _closed(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _iterate(state: State, eqn: Any, carry: list[Value], body: Any) -> tuple[list[Value], Any]:
    """Run the body of a loop until what is known of its carry is true of every iteration.

    body: takes the values of the carry, returns those of the next carry and the rest.
    """
    for v in carry:
        state.read |= v.leaves
        assign(state, v, "other")
    carry = [refresh(v) for v in carry]
    carry = [
        v._replace(
            dims=tuple(d._replace(uniform=False, origin=frozenset()) for d in v.dims),
            array=None,
            data=True,
            leaves=frozenset(),
            params=True,
            scale=1.0,
            sums=(),
        )
        for v in carry
    ]
    while True:
        after, rest = body(carry)
        state.eqn = eqn
        known = []
        for before, now in zip(carry, map(refresh, after), strict=True):
            dims = []
            for a, b in zip(before.dims, now.dims, strict=True):
                if not b.uniform:
                    tie(state, a.term, b.term)
                dims.append(a._replace(zero=(a.zero and b.zero) or is_fixed(a.term)))
            known.append(before._replace(dims=tuple(dims)))
        same = all(
            a.zero == b.zero
            for v, w in zip(carry, known, strict=True)
            for a, b in zip(v.dims, w.dims, strict=True)
        )
        if same:
            return known, rest
        carry = known


def _scan(state: State, eqn: Any, values: list[Value]) -> list[Value]:
    """The order of the steps matters unless nothing is carried: then it is a map."""
    p = eqn.params
    jaxpr, consts = _closed(p["jaxpr"])
    n, m = p["num_consts"], p["num_consts"] + p["num_carry"]
    fixed_values, carry, xs = values[:n], values[n:m], [refresh(v) for v in values[m:]]
    length = p["length"]
    order = fresh(length)
    if p["num_carry"]:
        for v in xs:
            fix(v.dims[0].term)
        order = Dim(fixed(length), zero=True)
    elif xs:
        order = align(state, [v.dims[0] for v in xs])
    steps = [v._replace(dims=v.dims[1:], array=None) for v in xs]

    def body(carry: list[Value]):
        outs = interpret(state, jaxpr, consts, [*fixed_values, *carry, *steps])
        return outs[: len(carry)], outs[len(carry) :]

    carry, ys = _iterate(state, eqn, carry, body)
    ys = [refresh(y) for y in ys]
    zero = is_fixed(order.term)
    first = order._replace(zero=zero, origin=frozenset())
    return [*carry, *(y._replace(dims=(first, *y.dims), array=None) for y in ys)]


def _while(state: State, eqn: Any, values: list[Value]) -> list[Value]:
    """What is carried is the same in every iteration."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, loop = _closed(p["cond_jaxpr"]), _closed(p["body_jaxpr"])

    def body(carry: list[Value]):
        interpret(state, *test, [*values[:n], *carry])
        return interpret(state, *loop, [*values[n:m], *carry]), None

    return _iterate(state, eqn, values[m:], body)[0]


def _cond(state: State, eqn: Any, values: list[Value]) -> list[Value]:
    """The branches agree."""
    index, *operands = values
    branches = [interpret(state, *_closed(b), operands) for b in eqn.params["branches"]]
    state.eqn = eqn
    outs = []
    for across in zip(*branches, strict=True):
        across = [refresh(v) for v in across]
        dims = []
        for each in zip(*(v.dims for v in across), strict=True):
            dim = align(state, each)
            zero = all(d.zero for d in each) or is_fixed(dim.term)
            dims.append(dim._replace(zero=zero))
        out = derive([index, *across], dims)
        outs.append(out)
    return outs


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
