"""Why a deep net does not train: the leaf where its signal dies, in sentences.

`jaxkit.init.signals` measures, `advise` reads the measurements.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit import tree
from jaxkit.init._operations import Operation
from jaxkit.init.signals import Layer, Signals, find, measure

__all__ = ["Advice", "Row", "Verdict", "advise"]


class Row(NamedTuple):
    """One layer: the numbers of `jaxkit.init.signals.Layer`, and where they come from.

    `backward` is the norm of the gradient with respect to the output of the operation, over that
    with respect to the output of the model: unlike the gradient's entries, it does not depend on
    how wide the layers are. `path` of a layer in a stack is ``path[i]``.
    """

    path: str
    primitive: str
    input: float
    output: float
    gradient: float
    backward: float
    apart: float
    dead: float
    zeros: float
    leaf: float
    reached: bool


class Verdict(NamedTuple):
    """A finding: what (see `advise`), the leaf it is about, and a sentence."""

    kind: str
    path: str
    text: str


class Advice(NamedTuple):
    """What `advise` found; ``str()`` of it is a table and the verdicts.

    Attributes:
      rows: the layers in order of execution.
      result: the output of the model.
      classes: the fraction of the examples that each class wins, or None.
      verdicts: what stands out, the causes before their consequences; none if all is well.
      skipped: ``(path, reason)`` of the weights whose operation cannot be reached.
    """

    rows: tuple[Row, ...]
    result: Row
    classes: np.ndarray | None
    verdicts: tuple[Verdict, ...]
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        named = {verdict.path for verdict in self.verdicts}
        rows = [*self.rows, self.result]
        near = {j for i, row in enumerate(rows) if row.path in named for j in range(i - 3, i + 4)}
        shown = [i in near or min(i, len(rows) - 1 - i) < 12 for i in range(len(rows))]
        head = ("leaf", "input", "output", "backward", "correlation", "dead")
        lines = [head, *(_cells(row) for row, show in zip(rows, shown, strict=True) if show)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = []
        for line in lines:
            cells = [line[0].ljust(widths[0])]
            cells += [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)]
            text.append("  ".join(cells) + ("  <" if line[0] in named else ""))
        table = [text[0], "-" * len(text[0])]
        left = iter(text[1:])
        for i, show in enumerate(shown):
            if show:
                table.append(next(left))
            elif shown[i - 1]:
                hidden = next((j for j in range(i, len(rows)) if shown[j]), len(rows)) - i
                table.append(f"... {hidden} more")
        out = [line.rstrip() for line in table]
        if self.classes is not None:
            wins = np.sort(self.classes)[::-1]
            share = "undefined (ties)" if np.isnan(wins).any() else f"{wins[0]:.0%} of the examples"
            out += ["", f"largest class: {share}, of {len(wins)} classes"]
        out += ["", *(f"{verdict.text}." for verdict in self.verdicts)]
        if not self.verdicts:
            out.append("No leaf stands out: the signal gets through, forward and backward.")
        out += [f"Not watched: {path}, which {reason}." for path, reason in self.skipped]
        return "\n".join(out)


def _cells(row: Row) -> tuple[str, ...]:
    number = lambda x: "-" if math.isnan(x) else f"{x:.3g}"
    percent = "-" if math.isnan(row.dead) else f"{row.dead:.0%}"
    c = "-" if math.isnan(row.apart) else f"{1 - row.apart:.3f}"
    c = f"1 - {row.apart:.0e}" if row.apart < 5e-4 else c
    return row.path, number(row.input), number(row.output), number(row.backward), c, percent


def advise(
    apply_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batch: PyTree,
    *,
    loss: Callable[[PyTree], Array] | None = None,
    where: tree.Where = None,
    threshold: float = 1e-4,
) -> Advice:
    """Follow the signal through a model and name the leaf where it dies.

    One compiled forward and backward pass over the batch (`jaxkit.init.signals`). ``print`` the
    result. The kinds of verdicts, and when they are passed:

    * ``not-finite``: the first leaf whose output holds NaN or infinity;
    * ``forward-dies``, ``forward-explodes``: from this leaf on, all that is read is smaller than
      `threshold` times what the first layer reads (or larger than its inverse). A branch that
      starts at zero beside a skip connection is no death;
    * ``alike``: from this leaf on, the correlation between examples is 1 to six digits;
    * ``backward-dies``, ``backward-explodes``: before this leaf, all gradients are smaller than
      `threshold` times that of the output, in norm (or larger than its inverse);
    * ``zero-leaf``: a leaf of zeros stops the backward signal: it alone learns at first;
    * ``no-gradient``: a leaf that gets none, though leaves before it do;
    * ``dead-units``: three in ten of the units that a leaf reads, but not all, are zero for every
      example (of eight or more);
    * ``class-bias``: the untrained model guesses one class for nearly all examples (of eight or
      more).

    Args:
      apply_fn: ``apply_fn(params, batch)``, any front end. Close over rngs and state, and return
        the predictions alone (not BatchNorm's new statistics).
      batch: arrays, or a tree of them, whose first axis is the examples. A unit is dead by chance
        in a small batch: take 32 or more, as different as the data are.
      loss: what the backward signal is the gradient of, a function of what `apply_fn` returns.
        Default: a fixed random direction for each example.
      where: the leaves to watch; default: the weights whose operations can be reached.
      threshold: of death, and the inverse of that of explosion.

    Raises:
      ValueError: as `signals`.
      TypeError: under jit, where there are no numbers to judge: use `signals` there.

    >>> import jax.numpy as jnp
    >>> def apply_fn(params, x):
    ...     for kernel in params:
    ...         x = jax.nn.relu(x @ kernel)
    ...     return x
    >>> draw = jax.nn.initializers.normal(0.0006)  # he_normal has 0.088
    >>> params = [draw(key, (256, 256)) for key in jax.random.split(jax.random.key(0), 3)]
    >>> advice = advise(apply_fn, params, jax.random.normal(jax.random.key(1), (32, 256)))
    >>> [(verdict.kind, verdict.path) for verdict in advice.verdicts]
    [('forward-dies', '1'), ('backward-dies', '0')]
    """
    if not tree.concrete(params, batch):
        raise TypeError("advise reads numbers, which jit does not have; use signals there")
    found, skipped = find(apply_fn, params, batch, where)
    seen = jax.jit(partial(measure, apply_fn, found, loss, None))(params, batch)
    rows, result = _rows(jax.device_get(seen), found)
    classes = None if seen.classes is None else np.asarray(seen.classes)
    n = len(next(x for x in jax.tree.leaves(batch) if np.ndim(x)))
    verdicts = _judge(rows, result, classes, n, threshold)
    return Advice(tuple(rows), result, classes, tuple(verdicts), tuple(skipped.items()))


def _rows(seen: Signals, found: dict[str, Operation]) -> tuple[list[Row], Row]:
    """Lay the layers out in order of execution, those of a scan iteration by iteration."""
    groups: list[list[str]] = []
    for path, op in found.items():
        last = found[groups[-1][0]] if groups else op._replace(stack=())
        together = op.stack and last.stack == op.stack and len(op.scans) == len(last.scans)
        if together and all(a is b for a, b in zip(op.scans, last.scans, strict=True)):
            groups[-1].append(path)
        else:
            groups.append([path])
    rows = []
    for group in groups:
        for index in np.ndindex(*found[group[0]].stack):
            for path in group:
                name = path + "".join(f"[{i}]" for i in index)
                rows.append(_row(name, found[path].primitive, seen, seen.layers[path], index))
    return rows, _row("(output)", "", seen, seen.result, ())


def _row(name: str, primitive: str, seen: Signals, layer: Layer, index: tuple[int, ...]) -> Row:
    at = Layer(*(np.asarray(field)[index] for field in layer))
    end = float(seen.result.norm)
    backward = float(at.norm) / end if end > 0 else math.nan
    return Row(
        name,
        primitive,
        input=float(at.input),
        output=float(at.output),
        gradient=float(at.gradient),
        backward=backward,
        apart=float(at.apart),
        dead=float(at.dead),
        zeros=float(at.zeros),
        leaf=float(at.leaf),
        reached=bool(at.reached),
    )


# ---------------------------------------------------------------------------------- verdicts


def _judge(rows, result, classes, n: int, threshold: float) -> list[Verdict]:
    """Read the rows: the causes first."""
    if broken := _not_finite(rows, result):
        return [broken]
    remedy = _remedy(rows)
    out = [*_forward(rows, result, threshold, remedy), *_alike(rows, result)]
    out += _backward(rows, result, threshold, remedy, bool(out))
    kinds = {verdict.kind for verdict in out}
    if n >= 8 and not kinds & {"forward-dies", "alike"}:
        out += _dead_units(rows, n)
    if n >= 8 and classes is not None and not kinds & {"forward-dies"}:
        out += _class_bias(classes, result)
    return out


def _not_finite(rows, result) -> Verdict | None:
    for row in [*rows, result]:
        if not row.reached or math.isfinite(row.output):
            continue
        if row.path == result.path:
            why = "the output of the model is not finite, though that of every leaf is"
        elif not math.isfinite(row.leaf):
            why = f"{row.path} itself holds NaN or infinity"
        elif math.isfinite(row.input):
            why = f"the output of {row.path} overflows: it reads values of size {row.input:.2g}"
        else:
            why = f"{row.path} is the first to read values that are not finite"
        return Verdict("not-finite", row.path, why)
    return None


def _remedy(rows: Sequence[Row]) -> str:
    """What keeps a signal, by what the layers read."""
    zeros = [row.zeros for row in rows[1:] if not math.isnan(row.zeros)]
    if zeros and 0.2 < np.median(zeros) < 0.95:
        keep = "relu layers keep it with gain sqrt(2) (jax.nn.initializers.he_normal)"
    else:
        keep = "jaxkit.init.gain(activation) is the gain that keeps it"
    return f"{keep}, and jaxkit.init.lsuv finds one on this batch"


def _per_layer(levels: Sequence[float]) -> str:
    """The usual factor from one layer to the next, where there are enough to tell."""
    ratios = [b / a for a, b in itertools.pairwise(levels) if a > 0 and b > 0]
    if len(ratios) < 4:
        return ""
    factor = float(np.median(ratios))
    return f", by a factor of {factor:.3g} a layer"


def _forward(rows, result, threshold, remedy) -> list[Verdict]:
    """Where the size of what is read leaves the range for good."""
    read = [row for row in rows if not math.isnan(row.input)]
    if not read or math.isnan(result.output):
        return []
    levels = [*(row.input for row in read), result.output]
    first = levels[0]
    if first == 0:
        text = f"the signal is zero before any weight: {read[0].path} reads zeros alone"
        return [Verdict("forward-dies", read[0].path, text)]
    small = _first_of_last([level < threshold * first for level in levels])
    large = _first_of_last([level > first / threshold for level in levels])
    if small:
        row = read[small - 1]
        if row.leaf == 0:
            return []  # said by _backward: a head or a branch that starts at zero
        size = "is zero" if levels[small] == 0 else f"falls below {threshold:.0e} of its size"
        text = f"the forward signal {size} at {row.path}{_per_layer(levels[1 : small + 1])}"
        text += f" ({first:.2g} at {read[0].path}, {levels[small]:.2g} after it); {remedy}"
        return [Verdict("forward-dies", row.path, text)]
    if large:
        row = read[large - 1]
        text = f"the forward signal grows beyond {1 / threshold:.0e} times its size at {row.path}"
        text += f"{_per_layer(levels[1 : large + 1])} ({first:.2g} at {read[0].path}, "
        text += f"{levels[large]:.2g} after it); {remedy}"
        return [Verdict("forward-explodes", row.path, text)]
    return []


def _first_of_last(flags: Sequence[bool]) -> int:
    """The start of the run of True that lasts to the end; 0 if there is none (or nothing else)."""
    healthy = [i for i, flag in enumerate(flags) if not flag]
    return healthy[-1] + 1 if healthy and healthy[-1] + 1 < len(flags) else 0


def _alike(rows, result) -> list[Verdict]:
    told = [row for row in [*rows, result] if not math.isnan(row.apart)]
    start = next((i for i in range(len(told)) if all(r.apart < 1e-6 for r in told[i:])), None)
    if start is None or told[start].path == result.path:
        return []
    row = told[start]
    if start == 0:
        text = f"the examples are alike where {row.path}, the first, reads them: is the batch one?"
    else:
        text = (
            f"the examples cannot be told apart from {row.path} on: their correlation is "
            f"1 - {row.apart:.0e}, and was {1 - told[0].apart:.2g} at {told[0].path}; biases drown "
            "the signal, or the activation forgets it: jaxkit.init.edge_of_chaos has the variances "
            "that do not"
        )
    return [Verdict("alike", row.path, text)]


def _backward(rows, result, threshold, remedy, told) -> list[Verdict]:
    """Where the size of the gradient leaves the range for good, on the way back."""
    if not result.gradient > 0:
        text = "the gradient at the output is zero: the loss does not depend on it"
        return [Verdict("backward-dies", result.path, text)]
    out = []
    passed = [row for row in rows if row.reached]
    cut = [row.path for row in rows if not row.reached]
    levels = [1.0, *(row.backward for row in reversed(passed))]
    if not all(map(math.isfinite, levels)):
        bad = next(row for row in reversed(passed) if not math.isfinite(row.backward))
        text = f"the backward signal is not finite from {bad.path} back"
        return [Verdict("not-finite", bad.path, text)]
    small = _first_of_last([level < threshold for level in levels])
    large = _first_of_last([level > 1 / threshold for level in levels])
    if small or large:
        start = small or large
        row = passed[-start]
        last = passed[1 - start] if start > 1 else None
        count = f"({len(passed) - start + 1} of the {len(passed)} leaves are beyond)"
        rate = _per_layer(levels[: start + 1])
        advice = "" if told else f"; {remedy}"
        if last is not None and last.leaf == 0 and row.backward == 0:
            text = f"{last.path} is all zeros, so that no leaf before it has a gradient: it alone "
            text += "learns at the first step, and they follow"
            out.append(Verdict("zero-leaf", last.path, text))
        elif small:
            size = "is zero" if row.backward == 0 else f"falls below {threshold:.0e} of its size"
            text = f"the backward signal {size} at {row.path}{rate} {count}{advice}"
            out.append(Verdict("backward-dies", row.path, text))
        else:
            text = f"the backward signal grows beyond {1 / threshold:.0e} times its size at "
            text += f"{row.path}{rate} {count}{advice}"
            out.append(Verdict("backward-explodes", row.path, text))
        passed = passed[len(passed) - start + 1 :]
    without = cut + [row.path for row in passed if row.backward == 0]
    if without:
        names = ", ".join(without[:4]) + (f" and {len(without) - 4} more" if without[4:] else "")
        text = f"no gradient reaches {names}: a factor of zero (a branch that starts at zero), a "
        text += "dead activation or stop_gradient is behind"
        out.append(Verdict("no-gradient", without[0], text))
    return out


def _dead_units(rows, n) -> list[Verdict]:
    dead = [row for row in rows[1:] if 0.3 <= row.dead < 1]  # all: see no-gradient
    if not dead:
        return []
    text = f"{dead[0].dead:.0%} of the units that {dead[0].path} reads are zero for every one of "
    text += f"the {n} examples"
    if len(dead) > 1:
        worst = max(dead, key=lambda row: row.dead)
        text += f", and many in {len(dead) - 1} more layers ({worst.dead:.0%} in {worst.path})"
    text += "; smaller negative biases, or centred inputs, keep them alive"
    return [Verdict("dead-units", dead[0].path, text)]


def _class_bias(classes: np.ndarray, result: Row) -> list[Verdict]:
    k, largest = len(classes), float(classes.max())
    if not largest >= 1 / k + 0.75 * (1 - 1 / k):  # three quarters of the way from 1/k to 1
        return []
    text = f"the untrained model guesses class {classes.argmax()} for {largest:.0%} of the "
    text += "examples (relu, depth and means of the data do this; training has to undo it first)"
    return [Verdict("class-bias", result.path, text)]
