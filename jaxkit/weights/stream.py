"""Merge checkpoints on disk, leaf by leaf, in the memory of a few leaves.

Per leaf there is one float32 buffer a model, one for the base and two for what is being read and
written. What a method does to each model's delta (`Window`, `Drop`) happens in its buffer, and what
combines them runs as a compiled program on pieces. Ranks over the whole tree take two more passes
over the files: one for the upper half of the bits of every magnitude, one for the lower.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import tree
from jaxkit.weights import files
from jaxkit.weights.files import Leaf
from jaxkit.weights.merge import Method
from jaxkit.weights.sparsify import Drop, Window
from jaxkit.weights.write import writing

__all__ = ["Rule", "Task", "merge_files", "plan"]

_PIECE = 1 << 20  # entries that are combined at a time


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
    deltas = Deltas(None if base is None else opened[0], opened[0 if base is None else 1 :])
    merging = {id(rule): _merger(rule, deltas, tasks) for rule in rules if rule.method}
    specs = {task.path: (task.leaf.shape, task.leaf.dtype) for task in tasks}
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


def _wide(array: np.ndarray) -> np.ndarray:
    """Return the array in float32, or as it is if it is wider."""
    return array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)


class Deltas(NamedTuple):
    """What the models add to the base."""

    base: Opened | None
    models: list[Opened]

    def origin(self, path: str) -> np.ndarray | None:
        """Return the leaf of the base, flat."""
        return None if self.base is None else _load(self.base, path)

    def of(self, path: str, origin: np.ndarray | None) -> Iterator[np.ndarray]:
        """Yield the delta of one model after the other, flat; each may be written to."""
        for model in self.models:
            array = _load(model, path)
            yield array if origin is None else np.subtract(array, origin, out=array)


def _load(opened: Opened, path: str) -> np.ndarray:
    """Return a leaf flat and in float32 (float64 if it is that), as an array of its own."""
    name, leaves = opened
    array = _wide(leaves[path].read()).ravel()
    array = array if array.flags.writeable else array.copy()
    if np.isnan(np.min(array, initial=0.0)):
        raise ValueError(f"leaf {path!r} of {name} holds NaN")
    return array


# ------------------------------------------------------------------------------------- windows


class Cut(NamedTuple):
    """Which magnitudes stay: those between two, by the integer image of their bits.

    counts: how many entries equal to `high` go, and how many equal to `low` stay, in the order in
    which they come; an array, in which `_apply_cut` counts down.
    """

    high: int
    low: int
    counts: np.ndarray


def _image(x: np.ndarray) -> np.ndarray:
    """Map magnitudes of float32 to integers of the same order."""
    return x.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _pieces(x: np.ndarray) -> Iterator[np.ndarray]:
    for i in range(0, x.size, _PIECE):
        yield x[i : i + _PIECE]


def _histogram(x: np.ndarray, prefix: int | None) -> np.ndarray:
    """Count the upper halves of the images, or the lower halves of those with an upper half."""
    total = np.zeros(1 << 16, np.int64)
    for piece in _pieces(x):
        image = _image(piece)
        if prefix is None:
            total += np.bincount(image >> 16, minlength=1 << 16)
        else:
            image = image[(image >> 16) == prefix]
            total += np.bincount(image & np.uint32(0xFFFF), minlength=1 << 16)
    return total


def _rank(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """Return the bin of the k-th largest (k >= 1), and how many lie in the bins above it."""
    above = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(above, k))
    return len(histogram) - 1 - place, int(above[place - 1]) if place else 0


def _find(count: Callable[[int | None], np.ndarray], ks: Sequence[int]) -> list[tuple[int, int]]:
    """Return, for each k, the image of the k-th largest and its place among its equals."""
    upper = count(None)
    found = []
    for k in ks:
        if k < 1:
            found.append((1 << 32, 0))  # above everything
            continue
        prefix, more = _rank(upper, k)
        low, rest = _rank(count(prefix), k - more)
        found.append(((prefix << 16) | low, k - more - rest))
    return found


def _window_counts(window: Window, n: int) -> tuple[int, int]:
    """Return how many entries go from above, and how many there are above the smallest that go."""
    exact = lambda share: round(Fraction(repr(float(share))) * n)
    start = exact(window.outliers)
    return start, n - (exact(window.sparsity) - start)


def _cut(found: list[tuple[int, int]]) -> Cut:
    (high, gone), (low, stay) = found
    return Cut(high, low, np.array([gone, stay], np.int64))


def _leaf_cut(x: np.ndarray, window: Window) -> Cut:
    return _cut(_find(partial(_histogram, x), _window_counts(window, x.size)))


def _apply_cut(x: np.ndarray, cut: Cut) -> None:
    """Set to zero what is outside the window; of equals the first go, and the first stay."""
    for piece in _pieces(x):
        image = _image(piece)
        keep = (image < cut.high) & (image > cut.low)
        high, low = (np.flatnonzero(image == edge) for edge in (cut.high, cut.low))
        gone, stay = cut.counts
        if cut.high == cut.low:
            keep[high[gone:stay]] = True
        else:
            keep[high[gone:]] = cut.high > cut.low
            keep[low[:stay]] = cut.high > cut.low
        cut.counts[:] = max(0, gone - len(high)), max(0, stay - len(low))
        piece[~keep] = 0


def _tree_cuts(window: Window, deltas: Deltas, tasks: list[Task]) -> list[Cut]:
    """Rank the entries of all leaves together: the cut of every model, by two passes."""
    sizes = {task.path: math.prod(task.leaf.shape) for task in tasks}
    ks = _window_counts(window, sum(sizes.values()))

    def count(prefixes: list[Any]) -> list[dict[int | None, np.ndarray]]:
        totals = [{p: np.zeros(1 << 16, np.int64) for p in own} for own in prefixes]
        for path in sizes:
            for total, x in zip(totals, deltas.of(path, deltas.origin(path)), strict=True):
                for p, histogram in total.items():
                    histogram += _histogram(_float32(x, path), p)
        return totals

    upper = count([[None]] * len(deltas.models))
    lower = count([{_rank(u[None], k)[0] for k in ks if k > 0} for u in upper])
    both = [u | v for u, v in zip(upper, lower, strict=True)]
    return [_cut(_find(each.__getitem__, ks)) for each in both]


def _float32(x: np.ndarray, path: str) -> np.ndarray:
    if x.dtype != np.float32:
        raise ValueError(f"leaf {path!r} is {x.dtype}, and magnitudes are ranked in float32")
    return x


# ------------------------------------------------------------------------------------ one leaf


def _streams(method: Method) -> bool:
    ranks = [s for s in method.steps if isinstance(s, Window) and isinstance(s.scope, int)]
    later = [s for s in method.steps[1:] if isinstance(s, Window) and s.scope == "tree"]
    if method.steps:
        return method.blend is not None and not ranks and not later
    return method.blend is not None or method.prepare is None


def _merger(rule: Rule, deltas: Deltas, tasks: list[Task]) -> Callable[[Task], np.ndarray]:
    """Return the function that merges a leaf by a rule."""
    method, own = rule.method, [task for task in tasks if task.rule is rule]
    assert method is not None
    cuts: list[Cut | None] = [None] * len(deltas.models)
    if method.steps and isinstance(method.steps[0], Window) and method.steps[0].scope == "tree":
        cuts = [*_tree_cuts(method.steps[0], deltas, own)]
    blend = method.blend
    combine = method.combine if blend is None else blend
    program = jax.jit(lambda stack, origin, scale: origin + scale * combine("", stack, None))

    def merged(task: Task) -> np.ndarray:
        path, shape, dtype = task.path, task.leaf.shape, task.leaf.dtype
        origin, wide = deltas.origin(path), _wide(np.empty(0, dtype)).dtype
        stack = np.empty((len(deltas.models), math.prod(shape)), wide)
        for i, delta in enumerate(deltas.of(path, origin)):
            for step in method.steps:
                _step(step, path, shape, i, delta, cuts[i])
            stack[i] = delta
        scale = wide.type(rule.scale)
        zero = np.zeros((), wide)
        if blend is None:
            start = zero if origin is None else origin.reshape(shape)
            full = program(stack.reshape(len(stack), *shape), start, scale)
            return np.asarray(full).astype(dtype)
        out = np.empty(math.prod(shape), dtype)
        for i in range(0, out.size, _PIECE):
            at = slice(i, i + _PIECE)
            start = zero if origin is None else origin[at]
            out[at] = np.asarray(program(stack[:, at], start, scale)).astype(dtype)
        return out.reshape(shape)

    return merged


def _step(step: Any, path: str, shape: tuple[int, ...], i: int, x: np.ndarray, cut: Any) -> None:
    """Do one step to the flat delta of model i, in place."""
    if isinstance(step, Window):
        if x.size and (shape or step.scope == "tree"):
            x = _float32(x, path)
            _apply_cut(x, cut if step.scope == "tree" else _leaf_cut(x, step))
    elif isinstance(step, Drop):
        own = tree.flatten(tree.keys(step.key, {path: 0}, "jaxkit.weights.dare"))[path]
        keep = jax.random.bernoulli(jax.random.fold_in(own, i), 1 - step.drop_rate, shape)
        np.divide(x, x.dtype.type(step.rescale(path)), out=x)
        x[~np.asarray(keep).ravel()] = 0
