"""The operation of every leaf of a model, in order of execution: for calibration and probes."""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxkit import tree
from jaxkit.trace import _jaxpr, _uses, _walk
from jaxkit.trace.taps import replay


class Operation(NamedTuple):
    """The operation of a leaf, as it is found while tracing.

    `stack` leading dimensions of the leaf are sliced by scans around it; `scans` are the step
    counters of all scans around. `x_axes` and `y_axes` are those of `trace.taps`, for the slice;
    `uses` counts the operations that the leaf feeds, of which this is the first.
    """

    primitive: str
    stack: tuple[int, ...]
    scans: tuple[Any, ...]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    x_axes: tuple[int | None, ...]
    y_axes: tuple[int | None, ...]
    uses: int = 1


def operations(
    apply_fn: Callable,
    params: PyTree,
    args: Sequence[PyTree],
    where: tree.Where = None,
    outside: frozenset[str] = _walk.BRANCHES,
) -> tuple["OrderedDict[str, Operation]", dict[str, str]]:
    """Return the operations of the chosen leaves in order of execution, and why others have none.

    Only operations that `trace.replay` can replace are there, and none inside the primitives
    `outside`.
    """
    traced = _jaxpr.trace(apply_fn, params, args)
    followed = _uses.follow(traced.jaxpr, _walk.leaf_tags(traced))
    bits = jax.tree.leaves(tree.select(params, where))
    chosen = {path for path, bit in zip(traced.paths, bits, strict=True) if bit}
    counts = Counter(use.path for use in followed.uses)
    skipped = dict.fromkeys(chosen - counts.keys(), "feeds no operation")
    skipped |= {path: why for path, why in followed.losses if path in chosen}
    uses = [use for use in followed.uses if use.path in chosen - skipped.keys()]
    for use in uses:
        if around := outside & {*use.within}:
            skipped[use.path] = f"is used inside `{min(around)}` at {_jaxpr.source(use.eqn)}"
    for a, b in itertools.pairwise(uses):
        if a.eqn is b.eqn and a.path != b.path and _share(apply_fn, params, args, a.path, b.path):
            skipped[a.path] = f"shares its operation with {b.path!r}"
            skipped[b.path] = f"shares its operation with {a.path!r}"
    shapes = {path: jnp.shape(leaf) for path, leaf in tree.flatten(params).items()}
    found: OrderedDict[str, Operation] = OrderedDict()

    def record(path, op, x, w):
        y = op.run(x, w)
        stack = shapes[path][: len(shapes[path]) - jnp.ndim(w)]
        seen = (jnp.shape(x), jnp.shape(y), op.x_axes, op.y_axes, counts[path])
        found.setdefault(path, Operation(op.primitive, stack, op.step, *seen))
        return y

    ops = {path: partial(record, path) for path in sorted(chosen - skipped.keys())}
    jax.eval_shape(replay(apply_fn, ops), params, *args)
    return found, {path: skipped[path] for path in traced.paths if path in skipped}


def _share(apply_fn: Callable, params: PyTree, args: Sequence[PyTree], *paths: str) -> bool:
    """Whether leaves share one operation, or have one each in a function that is called twice."""
    try:
        keep = {path: lambda op, x, w: op.run(x, w) for path in paths}
        jax.eval_shape(replay(apply_fn, keep), params, *args)
    except ValueError:
        return True
    return False
