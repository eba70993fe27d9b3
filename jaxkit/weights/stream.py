"""Merge checkpoints on disk, leaf by leaf, in the memory of a few leaves.

Of a leaf there is the array of each model and of the base, as the files have it, and the result.
All else is done on pieces that fit a processor's cache, by several threads: the deltas, what a
method does to each model's (`Window`, `Drop`), and the compiled program that combines them. Ranks
over the whole tree take two more passes over the files: a sample, and the counts (`_windows`).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import tree
from jaxkit.weights import _windows, files
from jaxkit.weights.files import Leaf
from jaxkit.weights.merge import Method
from jaxkit.weights.sparsify import Drop, Window
from jaxkit.weights.write import writing

__all__ = ["Rule", "Task", "merge_files", "plan"]

_PIECE = 1 << 17  # entries that are combined at a time


class Rule(NamedTuple):
    """What is done to the leaves that `where` chooses: a method and its scale; None: copy."""

    where: tree.Where
    method: Method | None
    scale: float = 1.0
    name: str = ""


class Task(NamedTuple):
    """What `plan` makes of one leaf: its rule, or None where it is copied, and why."""

    path: str
    leaf: Leaf
    rule: Rule | None
    note: str


Checkpoint = str | os.PathLike[str]
Opened = tuple[Checkpoint, dict[str, Leaf]]  # its name, its leaves by path


def plan(
    base: Checkpoint | None, models: Sequence[Checkpoint], rules: Sequence[Rule]
) -> list[Task]:
    """Say what `merge_files` would do to every leaf, without reading any data.

    Args:
      base, models: checkpoints (see `files.leaves`).
      rules: the first one whose `where` matches a leaf applies; leaves that none matches, and those
        that are no floats, are copied from the base, or from the first model without one.

    Raises:
      ValueError: no models; a leaf that is not in all of them, or has another shape or dtype there
        (the first one); no base for a method that needs one; a method that cannot stream.
    """
    return _plan(_open(base, models), base is not None, rules)


def _plan(opened: list[Opened], based: bool, rules: Sequence[Rule]) -> list[Task]:
    for rule in rules:
        if rule.method is not None and not based and rule.method.needs_base:
            raise ValueError(f"method {rule.name!r} is about deltas to a base, and none was given")
        if rule.method is not None and not based and rule.scale != 1:
            raise ValueError("scale multiplies deltas to a base, and there is no base")
        if rule.method is not None and not _streams(rule.method):
            raise ValueError(
                f"method {rule.name!r} looks at all leaves together and cannot stream: load the "
                "checkpoints and use weights.merge"
            )
    first, *others = opened
    for other in others:
        _check_alike(first, other)
    shaped = lambda leaf: np.broadcast_to(np.float32(0), leaf.shape)  # no memory
    floats = {path: shaped(x) for path, x in first[1].items() if is_float(x.dtype)}
    chosen = [set(tree.chosen(floats, rule.where)) if floats else set() for rule in rules]
    tasks = []
    for path, leaf in first[1].items():
        if path not in floats:
            tasks.append(Task(path, leaf, None, "no float: has to be the same everywhere"))
            continue
        rule = next((r for r, c in zip(rules, chosen, strict=True) if path in c), None)
        if rule is None or rule.method is None:
            tasks.append(Task(path, leaf, None, "copied"))
        else:
            tasks.append(Task(path, leaf, rule, rule.name))
    return tasks


def merge_files(
    out: Checkpoint,
    base: Checkpoint | None,
    models: Sequence[Checkpoint],
    rules: Sequence[Rule],
    *,
    overwrite: bool = False,
    shard_bytes: int = 5 * 10**9,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda entries: None,
) -> list[Task]:
    """Merge checkpoints into a new one: what `merge` does in memory, leaf by leaf on disk.

    The result has the leaves, shapes and dtypes of the base (of the first model without one).
    `merge` and this one give the same numbers up to rounding, the same random draws included.

    Args:
      out: a ``.safetensors`` file, or a ``.safetensors.index.json`` for shards of `shard_bytes`. It
        appears when it is complete; after an error there is nothing new.
      base, models: checkpoints of any kind that `files.leaves` reads.
      rules: see `plan`.
      overwrite: replace what is at `out`.
      metadata: of the output; default: that of the base (of the first model).
      progress: called with the number of entries done, again and again.

    Returns:
      The plan that was carried out.

    Raises:
      ValueError: what `plan` raises; integers that differ between checkpoints, NaN in a leaf that
        is merged (with its path and file), a damaged file.
      FileExistsError, FileNotFoundError.

    >>> import tempfile
    >>> from safetensors.numpy import load_file, save_file
    >>> from jaxkit import weights
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     names = [f"{folder}/{name}.safetensors" for name in ("base", "a", "b", "out")]
    ...     for i, name in enumerate(names[:3]):
    ...         save_file({"w": np.full(2, i, np.float32)}, name)
    ...     rule = Rule("**", weights.task_arithmetic(), scale=0.5)
    ...     tasks = merge_files(names[3], names[0], names[1:3], [rule])
    ...     load_file(names[3])["w"].tolist()
    [1.5, 1.5]
    """
    opened = _open(base, models)
    tasks = _plan(opened, base is not None, rules)
    if metadata is None:
        metadata = files.metadata(opened[0][0])
    based = base is not None
    specs = {task.path: (task.leaf.shape, task.leaf.dtype) for task in tasks}
    with ThreadPoolExecutor(_processors()) as pool:
        deltas = Deltas(opened, based, pool)
        program = cache(partial(_program, deltas.models))  # rules may share a method
        merging = {id(r): _merger(r, deltas, tasks, program) for r in rules if r.method}
        with writing(
            out, specs, metadata=metadata, overwrite=overwrite, shard_bytes=shard_bytes
        ) as put:
            for task in tasks:
                if task.rule is None or task.rule.method is None:
                    array = task.leaf.read()
                    if task.note != "copied":
                        _check_equal(task.path, array, opened)
                else:
                    array = merging[id(task.rule)](task)
                put(task.path, array)
                del array  # not to be there while the next one is computed
                progress(math.prod(task.leaf.shape))
    return tasks


# --------------------------------------------------------------------------------- checkpoints


def _open(base: Checkpoint | None, models: Sequence[Checkpoint]) -> list[Opened]:
    """Open all checkpoints, the base first."""
    if not models:
        raise ValueError("there is no model to merge")
    return [(name, files.leaves(name)) for name in [*([] if base is None else [base]), *models]]


def is_float(dtype: np.dtype) -> bool:
    """Tell whether a dtype is one of real floats."""
    return jnp.issubdtype(dtype, jnp.floating)


def _check_alike(first: Opened, other: Opened) -> None:
    (a, left), (b, right) = first, other
    for path in [*left, *right]:
        if path not in right or path not in left:
            here, there = (a, b) if path in left else (b, a)
            raise ValueError(f"leaf {path!r} of {here} is not in {there}")
    for path, x in left.items():
        y = right[path]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"leaf {path!r} is {x.dtype}{list(x.shape)} in {a} and "
                f"{y.dtype}{list(y.shape)} in {b}"
            )


def _check_equal(path: str, array: np.ndarray, opened: list[Opened]) -> None:
    for name, leaves in opened[1:]:
        if not np.array_equal(array, leaves[path].read()):
            raise ValueError(
                f"leaf {path!r} holds no floats and is never averaged, and it is another one in "
                f"{name}"
            )


def _wide(dtype: np.dtype) -> np.dtype:
    """Return float32, or the dtype itself if that is wider."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def _processors() -> int:
    own = getattr(os, "sched_getaffinity", None)
    return min(16, len(own(0)) if own else os.cpu_count() or 1)


class Deltas(NamedTuple):
    """What the models add to the base: the first that was opened, if there is one."""

    opened: list[Opened]
    based: bool
    pool: ThreadPoolExecutor

    @property
    def models(self) -> int:
        """The number of models."""
        return len(self.opened) - self.based

    def each(self, fn: Callable[[slice], Any], n: int) -> Iterator[Any]:
        """Yield what a function returns for each piece of n entries; threads compute it."""
        return self.pool.map(fn, (slice(i, min(i + _PIECE, n)) for i in range(0, n, _PIECE)))

    def arrays(self, path: str) -> list[np.ndarray]:
        """Return a leaf of every checkpoint, flat, in its own dtype."""
        return [*self.pool.map(lambda one: _load(one, path), self.opened)]

    def vectors(self, arrays: list[np.ndarray]) -> list[_windows.Vector]:
        """Return the delta of every model as a function of places, in float32 or wider."""
        wide = _wide(arrays[0].dtype)

        def delta(array: np.ndarray, at: Any) -> np.ndarray:
            x = array[at].astype(wide)
            return np.subtract(x, arrays[0][at].astype(wide), out=x) if self.based else x

        return [partial(delta, array) for array in arrays[self.based :]]


def _load(opened: Opened, path: str) -> np.ndarray:
    name, leaves = opened
    array = leaves[path].read().ravel()
    for i in range(0, array.size, _PIECE):
        piece = array[i : i + _PIECE]
        if np.isnan(np.min(piece.astype(_wide(array.dtype), copy=False))):
            raise ValueError(f"leaf {path!r} of {name} holds NaN")
    return array


def _tree_ranks(
    window: Window, deltas: Deltas, tasks: list[Task]
) -> list[list[tuple[_windows.Rank, list[int]]]]:
    """Rank the entries of all leaves together; with each rank, how many of its equals are left."""
    sizes = {task.path: math.prod(task.leaf.shape) for task in tasks}
    whole = sum(sizes.values())
    for task in tasks:
        _check_float32(task)
    samples: list[list[np.ndarray]] = [[] for _ in range(deltas.models)]
    for path, n in sizes.items():
        places = _windows.sampled(n, whole)
        vectors = deltas.vectors(deltas.arrays(path))
        for own, x in zip(samples, vectors, strict=True):
            own.append(_windows.image(x(places)))
        del vectors, x  # or they would stay while the next leaf is read

    def count(brackets: list[list[_windows.Bracket]]) -> list[list[_windows.Counted]]:
        totals: list[list[Any]] = [[None] * len(own) for own in brackets]
        for path, n in sizes.items():
            vectors = deltas.vectors(deltas.arrays(path))
            for i, x in enumerate(vectors):
                here = _windows.count(x, n, brackets[i], deltas.each)
                totals[i] = [*map(_windows.plus, totals[i], here)]
            del vectors, x
        return totals

    ks = _windows.counts(window, whole)
    ranks = _windows.find(count, [np.concatenate(own) for own in samples], whole, ks)
    return [[(rank, [rank.place]) for rank in own] for own in ranks]


def _check_float32(task: Task) -> None:
    if _wide(task.leaf.dtype) != np.float32:
        raise ValueError(
            f"leaf {task.path!r} is {task.leaf.dtype}, and magnitudes are ranked in float32"
        )


# ------------------------------------------------------------------------------------ one leaf


def _streams(method: Method) -> bool:
    ranks = [s for s in method.steps if isinstance(s, Window) and isinstance(s.scope, int)]
    later = [s for s in method.steps[1:] if isinstance(s, Window) and s.scope == "tree"]
    if method.steps:
        return method.blend is not None and not ranks and not later
    return method.blend is not None or method.prepare is None


def _program(models: int, blend: Callable[..., Any], wide: np.dtype) -> Callable[..., Any]:
    """Return the compiled program that combines a piece: (models, piece), the base, the scale."""
    program = jax.jit(lambda stack, origin, scale: origin + scale * blend(stack))
    # at once, lest two threads should compile it
    program(np.zeros((models, _PIECE), wide), np.zeros(_PIECE, wide), wide.type(0))
    return program


def _merger(
    rule: Rule, deltas: Deltas, tasks: list[Task], program: Callable[..., Any]
) -> Callable[[Task], np.ndarray]:
    """Return the function that merges a leaf by a rule."""
    method, own = rule.method, [task for task in tasks if task.rule is rule]
    assert method is not None
    ranks: list[Any] = [None] * deltas.models
    if method.steps and isinstance(method.steps[0], Window) and method.steps[0].scope == "tree":
        ranks = _tree_ranks(method.steps[0], deltas, own)
    whole = jax.jit(
        lambda path, stack, origin, scale: origin + scale * method.combine(path, stack, None),
        static_argnums=0,
    )

    def merged(task: Task) -> np.ndarray:
        shape, dtype, n = task.leaf.shape, task.leaf.dtype, math.prod(task.leaf.shape)
        arrays, wide = deltas.arrays(task.path), _wide(dtype)
        vectors, scale = deltas.vectors(arrays), wide.type(rule.scale)
        if method.blend is None:
            stack = np.stack([x(slice(0, n)).reshape(shape) for x in vectors])
            origin = arrays[0].reshape(shape).astype(wide) if deltas.based else wide.type(0)
            return np.asarray(whole(task.path, stack, origin, scale)).astype(dtype)
        blend = program(method.blend, wide)
        for step in method.steps:
            vectors = [_step(step, task, i, x, deltas, ranks[i]) for i, x in enumerate(vectors)]
        out = np.empty(n, dtype)

        def blended(at: slice) -> None:
            size = at.stop - at.start
            stack = np.zeros((deltas.models, _PIECE), wide)  # one shape: one compilation
            origin = np.zeros(_PIECE, wide)
            for row, x in zip(stack, vectors, strict=True):
                row[:size] = x(at)
            if deltas.based:
                origin[:size] = arrays[0][at]
            out[at] = np.asarray(blend(stack, origin, scale))[:size].astype(dtype)

        for _ in deltas.each(blended, n):
            pass
        return out.reshape(shape)

    return merged


def _step(
    step: Any, task: Task, i: int, x: _windows.Vector, deltas: Deltas, ranks: Any
) -> _windows.Vector:
    """Return the delta of model i after a step."""
    path, shape, n = task.path, task.leaf.shape, math.prod(task.leaf.shape)
    if isinstance(step, Drop):
        own = tree.flatten(tree.keys(step.key, {path: 0}, "jaxkit.weights.dare"))[path]
        draw = jax.random.bernoulli(jax.random.fold_in(own, i), 1 - step.drop_rate, shape)
        keep, q = np.asarray(draw).ravel(), _wide(task.leaf.dtype).type(step.rescale(path))
        return lambda at: _windows.zero(x(at) / q, keep[at])
    if not n or (not shape and step.scope != "tree"):
        return x
    _check_float32(task)
    if step.scope != "tree":
        sample = _windows.image(x(_windows.sampled(n, n)))
        count = lambda brackets: [_windows.count(x, n, brackets[0], deltas.each)]
        found = _windows.find(count, [sample], n, _windows.counts(step, n))[0]
        ranks = [(rank, [rank.place]) for rank in found]
    edges = []
    for rank, left in ranks:
        edge, used = _windows.edge(rank, left[0], x, n, deltas.each)
        left[0] -= used
        edges.append(edge)
    return lambda at: _windows.apply(x(at), at, *edges)
