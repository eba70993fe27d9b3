"""Run a jaxpr again, equation by equation, and tap or replace the operations of some leaves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, PyTree

from jaxkit.trace import _jaxpr, _uses
from jaxkit.trace._op import View, advance, make_op, view
from jaxkit.trace._uses import Tag

BRANCHES = frozenset({"cond", "while"})  # what is inside may not run, or run any number of times


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input", "output", "later"],
    meta_fields=["primitive", "x_axes", "y_axes"],
)
@dataclass(frozen=True)
class Tap:
    """What goes into the operation of a leaf, and what comes out.

    A pytree with the arrays as leaves: it goes through jit, vmap, scan and grad. Inside `lax.scan`
    the arrays are stacked over the iterations (layers, time steps) along a new first axis.

    Attributes:
      input: the other operand, as the primitive takes it: the activation of a kernel, the indices
        of an embedding (with the last axis that gather wants), the value a bias is added to.
      output: the output of the operation.
      later: the taps of the further operations that the leaf feeds (tied embeddings, a cell called
        in a Python loop), in order of execution.
      primitive: dot_general, conv_general_dilated, gather, dynamic_slice, add, sub, mul or div.
      x_axes: for every dimension of the leaf, the axis of `input` (negative: counted from the end)
        that it is contracted or aligned with, or None.
      y_axes: the same for the axes of `output`. A dimension with only an x axis is consumed, one
        with only a y axis is produced.
    """

    input: Array
    output: Array
    later: tuple["Tap", ...] = ()
    primitive: str = ""
    x_axes: tuple[int | None, ...] = ()
    y_axes: tuple[int | None, ...] = ()


class Plan(NamedTuple):
    """The leaves to follow; the replacements, or none to tap; where in the scans we are."""

    targets: frozenset[str]
    fns: Mapping[str, Callable]
    extra: Mapping[str, PyTree]
    step: tuple[Any, ...]


class _Cell(NamedTuple):
    """A value, its tag, and the value as a function of each followed leaf."""

    value: Any
    tag: Tag = Tag()
    views: Mapping[str, View] = {}


Found = list[dict[str, Tap]]


def leaf_tags(traced: _jaxpr.Traced) -> list[Tag]:
    """The tags of a traced function's inputs: the leaves of params, and active arguments."""
    tags = [Tag(False, frozenset({path})) for path in traced.paths]
    return tags + [Tag(True)] * (len(traced.values) - len(tags))


def run(traced: _jaxpr.Traced, plan: Plan) -> tuple[PyTree, Found]:
    """Evaluate a traced function; return its output and the taps found, in order of execution."""
    tags = leaf_tags(traced)
    cells = [_start(v, t, plan) for v, t in zip(traced.values, tags, strict=True)]
    out, found = _walk(traced.jaxpr, cells, plan)
    return jax.tree.unflatten(traced.out_tree, [c.value for c in out]), found


def _start(value: Any, tag: Tag, plan: Plan) -> _Cell:
    return _Cell(value, tag, {path: view(value) for path in tag.leaves & plan.targets})


def _walk(jaxpr: core.ClosedJaxpr, cells: Sequence[_Cell], plan: Plan) -> tuple[list, Found]:
    """Evaluate a jaxpr on cells; return the cells of its outputs and the taps found."""
    consts = map(_Cell, jaxpr.consts)
    env = dict(zip(jaxpr.jaxpr.constvars, consts, strict=True))
    env |= zip(jaxpr.jaxpr.invars, cells, strict=True)
    read = lambda v: _Cell(v.val) if _jaxpr.is_literal(v) else env[v]
    found: Found = []
    for eqn in jaxpr.jaxpr.eqns:
        out, more = _walk_eqn(eqn, [read(v) for v in eqn.invars], plan)
        env |= zip(eqn.outvars, out, strict=True)
        found += more
    return [read(v) for v in jaxpr.jaxpr.outvars], found


def _walk_eqn(eqn: core.JaxprEqn, cells: list[_Cell], plan: Plan) -> tuple[list, Found]:
    name = eqn.primitive.name
    followed = _uses.step(eqn, [c.tag for c in cells])
    inside = any(
        use.path in plan.targets and (plan.fns or not BRANCHES & {*use.within})
        for use in followed.uses
    )
    if name in _jaxpr.JIT and (inside or any(c.views for c in cells)):
        return _walk(_jaxpr.called(eqn), cells, plan)
    if not inside:
        return _plain(eqn, cells, followed.tags), []
    if name in _jaxpr.CUSTOM:
        out, found = _walk(_jaxpr.called(eqn), cells, plan)
    elif name in _jaxpr.REMAT:
        out, found = _remat(eqn, cells, plan)
    elif name == "scan":
        out, found = _scan(eqn, cells, plan)
    elif name == "while":
        out, found = _while(eqn, cells, plan), []
    elif name == "cond":
        out, found = _cond(eqn, cells, plan), []
    else:
        return _operate(eqn, cells, followed.tags, plan)
    return [_Cell(c.value, t) for c, t in zip(out, followed.tags, strict=True)], found


def _plain(eqn: core.JaxprEqn, cells: list[_Cell], tags: list[Tag]) -> list[_Cell]:
    """Evaluate an equation as it is, and carry the views of followed leaves through it."""
    values = _jaxpr.evaluate(eqn, [c.value for c in cells])
    seen = [{} for _ in values]
    for path in {path for c in cells for path in c.views}:
        remake = _remake(eqn, cells, path)
        at = [c.views[path] for c in cells if path in c.views]
        shape = advance(eqn, at[0].layout) if len(at) == 1 else None
        for i, tag in enumerate(tags):
            if path in tag.leaves:
                make = lambda w, memo, i=i, remake=remake: remake(w, memo)[i]
                seen[i][path] = View(at[0].base, make, shape)
    return [_Cell(v, t, s) for v, t, s in zip(values, tags, seen, strict=True)]


def _remake(eqn: core.JaxprEqn, cells: list[_Cell], path: str) -> Callable[[Any, dict], list]:
    """The outputs of an equation for another leaf at path, each equation evaluated once."""

    def remake(w, memo):
        if remake not in memo:
            inputs = [c.views[path].make(w, memo) if path in c.views else c.value for c in cells]
            memo[remake] = _jaxpr.evaluate(eqn, inputs)
        return memo[remake]

    return remake


def _operate(eqn: core.JaxprEqn, cells: list[_Cell], tags: list[Tag], plan: Plan):
    """Evaluate or replace the operation of one leaf or several."""
    values = [c.value for c in cells]
    entered = _uses.entries(eqn, [c.tag for c in cells])
    paths = [path for path in entered if path in plan.targets]
    made = {
        path: make_op(path, eqn, values, entered[path], cells[entered[path]].views[path], plan.step)
        for path in paths
    }
    if not plan.fns:
        outputs = _jaxpr.evaluate(eqn, values)
        tapped = {
            path: Tap(x, outputs[0], (), op.primitive, op.x_axes, op.y_axes)
            for path, (op, x) in made.items()
        }
        return [_Cell(v, t) for v, t in zip(outputs, tags, strict=True)], [tapped]
    if len(paths) > 1:
        raise ValueError(
            f"the leaves {paths} share one operation, `{eqn.primitive.name}` at "
            f"{_jaxpr.source(eqn)}: only one of them can have it replaced"
        )
    (path,) = paths
    op, x = made[path]
    w = cells[entered[path]].views[path].base
    extra = (plan.extra[path],) if path in plan.extra else ()
    y = plan.fns[path](op, x, w, *extra)
    due = _jaxpr.aval(eqn.outvars[0])
    if jnp.shape(y) != due.shape:
        raise ValueError(f"ops[{path!r}] returned shape {jnp.shape(y)}, and {due.shape} was due")
    if jnp.result_type(y) != due.dtype:
        raise TypeError(
            f"ops[{path!r}] returned dtype {jnp.result_type(y)}, and {due.dtype} was due; "
            "cast it (.astype)"
        )
    return [_Cell(jnp.asarray(y), tags[0])], []


# ------------------------------------------------------- equations that hold a function of theirs


def _inside(cells: Sequence[_Cell], values: Sequence[Any]) -> list[_Cell]:
    """The cells as their values are called within a function; a leaf itself is what it is there."""
    return [
        _Cell(v, c.tag, {p: view(v) if s.base is c.value else s for p, s in c.views.items()})
        for c, v in zip(cells, values, strict=True)
    ]


def _values(cells: Sequence[_Cell]) -> list[Any]:
    return [c.value for c in cells]


def _remat(eqn: core.JaxprEqn, cells: list[_Cell], plan: Plan) -> tuple[list[_Cell], Found]:
    def body(*values):
        out, found = _walk(_jaxpr.called(eqn), _inside(cells, values), plan)
        return _values(out), found

    options = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
    out, found = jax.checkpoint(body, **options)(*_values(cells))
    return list(map(_Cell, out)), found


def _cond(eqn: core.JaxprEqn, cells: list[_Cell], plan: Plan) -> list[_Cell]:
    def branch(jaxpr):
        return lambda *values: _values(_walk(jaxpr, _inside(cells[1:], values), plan)[0])

    branches = [branch(jaxpr) for jaxpr in eqn.params["branches"]]
    return list(map(_Cell, lax.switch(cells[0].value, branches, *_values(cells[1:]))))


def _while(eqn: core.JaxprEqn, cells: list[_Cell], plan: Plan) -> list[_Cell]:
    a = eqn.params["cond_nconsts"]
    b = a + eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    tags, _ = _uses.loop(body, *([c.tag for c in part] for part in (cells[a:b], cells[b:], [])))
    carry = lambda values: list(map(_Cell, values, tags))
    out = lax.while_loop(
        lambda values: _walk(test, [*cells[:a], *carry(values)], plan)[0][0].value,
        lambda values: _values(_walk(body, [*cells[a:b], *carry(values)], plan)[0]),
        _values(cells[b:]),
    )
    return carry(out)


def _scan(eqn: core.JaxprEqn, cells: list[_Cell], plan: Plan) -> tuple[list[_Cell], Found]:
    params, body = eqn.params, eqn.params["jaxpr"]
    a = params["num_consts"]
    b = a + params["num_carry"]
    consts, init, xs = cells[:a], cells[a:b], cells[b:]
    tags, _ = _uses.loop(body, *([c.tag for c in part] for part in (consts, init, xs)))
    sliced = {path for c in xs for path in c.views}
    extra = {path: plan.extra[path] for path in sliced if path in plan.extra}
    for path, part in extra.items():
        for leaf in jax.tree.leaves(part):
            if jnp.shape(leaf)[:1] != (params["length"],):
                raise ValueError(
                    f"{path!r} is stacked over the {params['length']} iterations of the scan at "
                    f"{_jaxpr.source(eqn)}; an extra of shape {jnp.shape(leaf)} is not"
                )

    def step(carry, slices):
        i, values, parts = slices
        layer = plan._replace(extra={**plan.extra, **parts}, step=(*plan.step, i))
        inner = [_start(v, c.tag, plan) for v, c in zip(values, xs, strict=True)]
        out, found = _walk(body, [*consts, *map(_Cell, carry, tags), *inner], layer)
        return _values(out[: b - a]), (_values(out[b - a :]), found)

    steps = jnp.arange(params["length"]) if plan.fns else None
    options = {k: params[k] for k in ("length", "reverse", "unroll")}
    if params.get("_split_transpose"):
        options["_split_transpose"] = True
    carry, (ys, found) = lax.scan(step, _values(init), (steps, _values(xs), extra), **options)
    return [_Cell(v) for v in [*carry, *ys]], found
