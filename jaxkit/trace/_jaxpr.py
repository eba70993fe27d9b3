"""Reading jaxprs: trace a function of params, evaluate one equation, see through calls.

Everything here stands on `jax.extend.core`, the public door to jaxprs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jaxtyping import PyTree

from jaxkit import tree

# Primitives that only call a function on their operands. JAX has renamed some of them.
JIT = frozenset({"jit", "pjit", "closed_call", "core_call", "call"})
REMAT = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
INLINED = JIT | REMAT  # the operands and the rule of differentiation stay as they are
CALLS = INLINED | CUSTOM


class Traced(NamedTuple):
    """A function of params as a jaxpr: `jaxpr(*values)`, the first values being the params."""

    jaxpr: core.ClosedJaxpr
    values: list[Any]
    paths: tuple[str, ...]
    out_tree: Any


def trace(apply_fn: Callable, params: PyTree, args: Sequence[PyTree]) -> Traced:
    """Trace `apply_fn(params, *args)`.

    Raises:
      TypeError: a leaf of params, or of an argument, is no array; static arguments, rng names
        and modules have to be closed over.
      ValueError: two leaves of params have the same path.
    """
    leaves = tree.flatten(params)
    for path, leaf in leaves.items():
        if not _is_value(leaf):
            raise TypeError(
                f"params leaf {path!r} is {_describe(leaf)}, not an array; split the static "
                "leaves off first (nnx.split, eqx.partition) and close over them"
            )
    for i, arg in enumerate(args):
        for path, leaf in tree.flatten(arg).items():
            if not _is_value(leaf):
                raise TypeError(
                    f"args[{i}]{f' leaf {path!r}' if path else ''} is {_describe(leaf)}, not an "
                    "array; close over static arguments: "
                    "lambda params, x: apply_fn(params, x, train=False)"
                )
    try:
        jaxpr, shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, *args)
    except jax.errors.ConcretizationTypeError as error:
        error.add_note(
            "jaxkit.trace traces every argument after params: close over those that are static "
            "(lambda params, x: apply_fn(params, x, train=False))"
        )
        raise
    values = [v if isinstance(v, jax.Array) else jnp.asarray(v) for v in jax.tree.leaves(params)]
    values += [v if isinstance(v, jax.Array) else jnp.asarray(v) for v in jax.tree.leaves(args)]
    return Traced(jaxpr, values, tuple(leaves), jax.tree.structure(shape))


def _is_value(leaf: Any) -> bool:
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def _describe(leaf: Any) -> str:
    return f"the {type(leaf).__name__} {leaf!r}" if isinstance(leaf, str) else type(leaf).__name__


def evaluate(eqn: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """Run one equation on the values of all its operands (literals included); return its outputs.

    The operands may have other shapes than the traced ones wherever the equation's parameters
    allow it.
    """
    bound = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # jax < 0.10 has a pair
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    traceback = eqn.source_info.traceback
    with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
        out = eqn.primitive.bind(*subfuns, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_literal(atom: Any) -> bool:
    """Whether a jaxpr atom is a literal value rather than a variable."""
    return isinstance(atom, core.Literal)


def closed(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Return a jaxpr without constants of its own in closed form."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """Return the function that an equation of one of the `CALLS` applies to its operands."""
    return next(
        closed(eqn.params[k]) for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params
    )


def aval(atom: Any) -> Any:
    """Return the shape and dtype of a variable or a literal."""
    return atom.aval


def source(eqn: core.JaxprEqn) -> str:
    """Return the user's line that an equation comes from, as ``file:line (function)``."""
    return source_info_util.summarize(eqn.source_info)
