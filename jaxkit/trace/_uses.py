"""Which equations of a jaxpr use which leaves: a static pass over tags, before anything runs.

A value is *active* once it depends on the arguments after params, or is the output of an operation
on a leaf. A value that is not active is still a weight: a function of leaves and constants (a cast,
a transpose, a product with a mask). An equation *uses* a leaf where a value that stands for the
leaf goes into a contraction (dot_general, conv_general_dilated, ragged_dot_general) or a lookup
(gather, dynamic_slice), or meets an active value in add, sub, mul or div.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jax.extend import core

from jaxkit.trace import _jaxpr

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
ELEMENTWISE = frozenset({"add", "add_any", "sub", "mul", "div"})
OPAQUE = frozenset({"shard_map", "xla_pmap", "pallas_call", "pure_callback", "io_callback"})


class Tag(NamedTuple):
    """What a value is: active, or else a function of these leaves."""

    active: bool = False
    leaves: frozenset[str] = frozenset()


class Use(NamedTuple):
    """An equation that uses a leaf, and the equations around it (scan, cond, while...)."""

    path: str
    eqn: core.JaxprEqn
    within: tuple[str, ...] = ()


class Followed(NamedTuple):
    """The tags of outputs; the uses in order of execution; leaves lost, and why; leaves read."""

    tags: list[Tag]
    uses: list[Use]
    losses: list[tuple[str, str]]
    read: frozenset[str]


def follow(jaxpr: core.ClosedJaxpr, tags: Sequence[Tag]) -> Followed:
    """Follow the leaves through a jaxpr whose inputs have these tags."""
    env = dict.fromkeys(jaxpr.jaxpr.constvars, Tag()) | dict(
        zip(jaxpr.jaxpr.invars, tags, strict=True)
    )
    read = lambda v: Tag() if _jaxpr.is_literal(v) else env[v]
    uses, losses, seen = [], [], frozenset()
    for eqn in jaxpr.jaxpr.eqns:
        out = step(eqn, [read(v) for v in eqn.invars])
        env |= zip(eqn.outvars, out.tags, strict=True)
        uses += out.uses
        losses += out.losses
        seen |= out.read
    return Followed([read(v) for v in jaxpr.jaxpr.outvars], uses, losses, seen)


def step(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> Followed:
    """Follow the leaves through one equation."""
    name, n_out = eqn.primitive.name, len(eqn.outvars)
    leaves = _leaves(tags)
    if not leaves:
        return Followed([Tag(any(t.active for t in tags))] * n_out, [], [], leaves)
    if name in _jaxpr.CALLS:
        inner = follow(_jaxpr.called(eqn), tags)
        return inner if name in _jaxpr.JIT else _enclosed(eqn, tags, inner)
    if name == "scan":
        return _scan(eqn, tags)
    if name == "while":
        return _while(eqn, tags)
    if name == "cond":
        return _enclosed(eqn, tags, _cond(eqn, tags))
    entered = entries(eqn, tags)
    if not (entered or any(t.active for t in tags) or name in OPAQUE):
        return Followed([Tag(False, leaves)] * n_out, [], [], leaves)
    where = f"`{name}` at {_jaxpr.source(eqn)}"
    lost = [(path, f"goes into {where}") for path in sorted(leaves - entered.keys())]
    return Followed([Tag(True)] * n_out, [Use(path, eqn) for path in entered], lost, leaves)


def entries(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> dict[str, int]:
    """Return the leaves that a primitive uses, with the operand by which each one enters."""
    name = eqn.primitive.name
    if name in CONTRACTIONS:
        return {p: i for i in (0, 1) for p in sorted(tags[i].leaves - tags[1 - i].leaves)}
    if name == "gather" or (name == "dynamic_slice" and any(t.active for t in tags[1:])):
        return dict.fromkeys(sorted(tags[0].leaves.difference(*(t.leaves for t in tags[1:]))), 0)
    if name in ELEMENTWISE and tags[0].active != tags[1].active:
        i = int(tags[0].active)
        return dict.fromkeys(sorted(tags[i].leaves), i)
    return {}


def _enclosed(eqn: core.JaxprEqn, tags: Sequence[Tag], inner: Followed) -> Followed:
    """An equation around a function: its output is a weight only if all of it is, without a use."""
    if not inner.uses and not any(t.active for t in tags):
        return Followed([Tag(False, _leaves(tags))] * len(eqn.outvars), [], [], inner.read)
    name = eqn.primitive.name
    why = f"comes out of `{name}` at {_jaxpr.source(eqn)}"
    lost = [(path, why) for path in sorted(_leaves(inner.tags))]
    uses = [use._replace(within=(name, *use.within)) for use in inner.uses]
    out = [Tag(t.active or bool(t.leaves)) for t in inner.tags]
    return Followed(out, uses, inner.losses + lost, inner.read)


def _leaves(tags: Sequence[Tag]) -> frozenset[str]:
    return frozenset().union(*(t.leaves for t in tags))


def loop(
    body: core.ClosedJaxpr, consts: Sequence[Tag], init: Sequence[Tag], xs: Sequence[Tag]
) -> tuple[list[Tag], Followed]:
    """Return the tags of a loop's carry at every iteration, and the body followed under them.

    What changes from one iteration to the next is no leaf, and is active if it ever becomes so.
    (JAX takes what does not change out of the carry.)
    """
    carry = [Tag(t.active or bool(t.leaves)) for t in init]
    while True:
        inner = follow(body, [*consts, *carry, *xs])
        after = [
            Tag(c.active or t.active or bool(t.leaves))
            for c, t in zip(carry, inner.tags[: len(carry)], strict=True)
        ]
        if after == carry:
            return carry, inner
        carry = after


def _loop(eqn: core.JaxprEqn, tags: Sequence[Tag], body, consts, init, xs) -> Followed:
    carry, inner = loop(body, consts, init, xs)
    n = len(carry)
    changed = _leaves([*init, *inner.tags[:n]])
    why = f"changes in the carry of `{eqn.primitive.name}` at {_jaxpr.source(eqn)}"
    lost = [(path, why) for path in sorted(changed)]
    read = inner.read | changed
    out = Followed(carry + inner.tags[n:], inner.uses, inner.losses + lost, read)
    return _enclosed(eqn, tags, out)


def _scan(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> Followed:
    a = eqn.params["num_consts"]
    b = a + eqn.params["num_carry"]
    return _loop(eqn, tags, eqn.params["jaxpr"], tags[:a], tags[a:b], tags[b:])


def _while(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> Followed:
    a = eqn.params["cond_nconsts"]
    b = a + eqn.params["body_nconsts"]
    out = _loop(eqn, tags, eqn.params["body_jaxpr"], tags[a:b], tags[b:], [])
    test = follow(eqn.params["cond_jaxpr"], [*tags[:a], *out.tags])
    why = f"is used by the condition of `while` at {_jaxpr.source(eqn)}"
    lost = [(use.path, why) for use in test.uses]
    return out._replace(losses=out.losses + test.losses + lost, read=out.read | test.read)


def _cond(eqn: core.JaxprEqn, tags: Sequence[Tag]) -> Followed:
    branches = [follow(branch, tags[1:]) for branch in eqn.params["branches"]]
    out = [
        Tag(tags[0].active or any(t.active for t in ts), _leaves(ts))
        for ts in zip(*(branch.tags for branch in branches), strict=True)
    ]
    return Followed(
        out,
        [use for branch in branches for use in branch.uses],
        [loss for branch in branches for loss in branch.losses],
        frozenset().union(*(branch.read for branch in branches)),
    )
