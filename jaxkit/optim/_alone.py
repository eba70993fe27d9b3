"""Norms over a batch that see one example: an activation less its own mean, which is nothing."""

from typing import Any, NamedTuple

from jax.extend import core

from jaxkit.trace import _jaxpr

SAME = frozenset({"reshape", "squeeze", "broadcast_in_dim", "convert_element_type", "copy"})


class Value(NamedTuple):
    """What depends on the example: the variable that it equals, and whether it is its mean."""

    of: core.Var
    mean: bool = False


def centred_alone(closed: core.ClosedJaxpr, n_params: int) -> str | None:
    """Return the line of a loss that subtracts the mean of one entry from that entry, or None.

    The mean is over no axes, or over axes of size 1, and the entry depends on the example.
    """
    jaxpr = closed.jaxpr
    found = _walk(jaxpr, {v: Value(v) for v in jaxpr.invars[n_params:]})[1]
    return _jaxpr.source(found[0]) if found else None


def _walk(jaxpr: core.Jaxpr, values: dict) -> tuple[list, list[core.JaxprEqn]]:
    """Return the values of the outputs, and the equations that leave nothing."""
    value = lambda v: None if _jaxpr.is_literal(v) else values.get(v)
    found: list[core.JaxprEqn] = []
    for eqn in jaxpr.eqns:
        old = [value(v) for v in eqn.invars]
        if not any(old):
            continue
        new: list[Value | None] = [Value(v) for v in eqn.outvars]
        if eqn.primitive.name in _jaxpr.INLINED:
            inner = _jaxpr.called(eqn).jaxpr
            new, more = _walk(inner, dict(zip(inner.invars, old, strict=True)))
            found += more
        elif _keeps(eqn) and (one := old[0]):
            new = [one._replace(mean=one.mean or eqn.primitive.name == "reduce_sum")]
        elif eqn.primitive.name == "sub" and (one := old[0]) and (two := old[1]):
            found += [eqn] if one.of is two.of and one.mean != two.mean else []
        values.update(zip(eqn.outvars, new, strict=True))
    return [value(v) for v in jaxpr.outvars], found


def _keeps(eqn: core.JaxprEqn) -> bool:
    """Whether the output holds the entries of the first input in the same order: a mean of one."""
    name = eqn.primitive.name
    if name == "div":
        return _is_one(eqn.invars[1])
    sizes = [_jaxpr.aval(v).size for v in (*eqn.invars, *eqn.outvars)]
    return name in SAME | {"reduce_sum"} and len(sizes) == 2 and sizes[0] == sizes[1]


def _is_one(atom: Any) -> bool:
    return _jaxpr.is_literal(atom) and atom.val == 1
