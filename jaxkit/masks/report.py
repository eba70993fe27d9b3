"""What a mask does to a model, in numbers and as a table."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit.masks.costs import costs, flops
from jaxkit.masks.reach import effective
from jaxkit.masks.select import Mask

__all__ = ["Report", "Row", "hamming", "iou", "report"]


class Row(NamedTuple):
    """One leaf: its path and shape, entries in all and kept, and whether `where` chose it.

    effective: how many of those kept lie on a way from the data to the output, and flops: those of
    a forward pass with what is kept; None where no function was given.
    """

    path: str
    shape: tuple[int, ...]
    total: int
    kept: int
    chosen: bool
    effective: int | None = None
    flops: float | None = None

    @property
    def sparsity(self) -> float:
        """The fraction of entries that are zero."""
        return 1 - self.kept / self.total if self.total else 0.0


class Report(NamedTuple):
    """The rows of `report`, and the sums over the chosen leaves and over all leaves.

    inference: the FLOPs of a forward pass, dense and with the mask; training: those of a training
    step, dense and with the masks in force; None where no function was given. notes: what was not
    followed or not counted.
    """

    rows: tuple[Row, ...]
    chosen: Row
    all: Row
    inference: tuple[float, float] | None = None
    training: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        full = self.inference is not None
        head = ("leaf", "shape", "entries", "kept", "sparsity", "effective", "FLOPs")
        lines = [
            (
                *(r.path, "x".join(map(str, r.shape)), f"{r.total:,}", f"{r.kept:,}", _percent(r)),
                *(_number(r.effective), _number(r.flops)),
            )[: 7 if full else 5]
            for r in (*self.rows, self.chosen, self.all)
        ]
        head = head[: len(lines[0])]
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        text = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *lines)
        ]
        out = [text[0], rule, *text[1:-2], rule, *text[-2:]]
        for name, pair in (("inference", self.inference), ("training step", self.training)):
            if pair is not None:
                share = f" ({100 * pair[1] / pair[0]:.2f} %)" if pair[0] else ""
                out.append(f"{name}: {pair[1]:,.0f} of {pair[0]:,.0f} FLOPs{share}")
        return "\n".join([*out, *(f"note: {note}" for note in self.notes)])


def _percent(row: Row) -> str:
    return f"{100 * row.sparsity:.2f} %" if row.chosen else "exempt"


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:,.0f}"


def report(
    params: PyTree,
    mask: Mask,
    *,
    where: tree.Where = None,
    apply_fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    average: PyTree | None = None,
    dense_gradients: float = 0.0,
) -> Report:
    """Count what a mask keeps: per leaf, over the leaves to sparsify, and over all leaves.

    With `apply_fn` it also counts what of it is `effective`, and the FLOPs of inference and of
    training apart (`costs`, `flops`): the sparsity at the end says nothing about the cost of a
    training that began dense.

    Args:
      params: any tree of arrays.
      mask: a tree of bools like params.
      where: the leaves that count as sparsified, the others are exempt; default: the weights.
      apply_fn: ``apply_fn(params, *args)``, as the model predicts.
      args: its arguments, or their shapes; one example.
      average: the mean over training of the masks in force, a tree of numbers like params;
        default: `mask`, that is static.
      dense_gradients: the share of the training steps that need the dense gradient.

    Returns:
      A `Report`; ``print`` it for a table.

    Raises:
      ValueError: a mask or an average that does not fit params.

    >>> params = {"bias": np.zeros(2), "kernel": np.ones((2, 2))}
    >>> mask = {"bias": np.ones(2, bool), "kernel": np.array([[True, False], [False, False]])}
    >>> print(report(params, mask))
    leaf        shape  entries  kept  sparsity
    ------------------------------------------
    bias        2            2     2    exempt
    kernel      2x2          4     1   75.00 %
    ------------------------------------------
    sparsified               4     1   75.00 %
    all leaves               6     3   50.00 %
    """
    tree.check_like(params, mask, "mask")
    leaves = tree.flatten(params)
    masks = jax.tree.leaves(mask)
    chosen = jax.tree.leaves(tree.select(params, where))
    more: list = [(None, None)] * len(masks)
    sums: dict[str, Any] = {}
    if apply_fn is not None:
        reached = effective(apply_fn, params, mask, *args, where=where)
        found = costs(apply_fn, params, *args)
        counts = [int(np.sum(m)) for m in jax.tree.leaves(reached.mask)]
        uses = zip(counts, jax.tree.leaves(found.entries), masks, strict=True)
        more = [(k, 2.0 * use * int(np.sum(m))) for k, use, m in uses]
        step = lambda m, dense: flops(found, m, training=True, dense_gradients=dense)
        sums = {
            "inference": (flops(found), flops(found, mask)),
            "training": (
                step(None, 0.0),
                step(mask if average is None else average, dense_gradients),
            ),
            "notes": (*(f"not followed: {name}" for name in reached.unfollowed), *found.notes),
        }
    rows = tuple(
        Row(path, tuple(np.shape(leaf)), int(np.size(leaf)), int(np.asarray(m).sum()), bit, *extra)
        for (path, leaf), m, bit, extra in zip(leaves.items(), masks, chosen, more, strict=True)
        if tree.is_array(leaf)
    )
    only = [r for r in rows if r.chosen]
    return Report(rows, _sum("sparsified", only), _sum("all leaves", rows), **sums)


def _sum(name: str, rows: Any) -> Row:
    add = lambda xs: None if None in xs else sum(xs)
    total, kept = sum(r.total for r in rows), sum(r.kept for r in rows)
    if not rows:
        return Row(name, (), 0, 0, True)
    reached, cost = add([r.effective for r in rows]), add([r.flops for r in rows])
    return Row(name, (), total, kept, True, reached, cost)


# ------------------------------------------------------------------------------ two masks compared


def _counts(a: Mask, b: Mask, where: tree.Where) -> tuple[Array, Array, Array]:
    """Return how many chosen entries differ, are in both, and are in either."""
    tree.check_like(a, b, "second mask")
    floats = jax.tree.map(  # `where` chooses floats
        lambda m: jax.ShapeDtypeStruct(m.shape, jnp.float32) if tree.is_array(m) else m, a
    )
    bits = jax.tree.leaves(tree.select(floats, where))
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), bits, strict=True)
    pairs = [(x, y) for x, y, bit in leaves if bit]
    add = lambda fn: sum((jnp.sum(fn(x, y)).astype(jnp.float32) for x, y in pairs), jnp.float32(0))
    return add(jnp.not_equal), add(jnp.logical_and), add(jnp.logical_or)


def hamming(a: Mask, b: Mask, *, where: tree.Where = None) -> Float[Array, ""]:
    """Return the share of the chosen entries at which two masks differ: sum |a - b| / n.

    Args:
      a: a tree of bools.
      b: another, like it.
      where: the leaves to compare; default: what is a weight by its path and dimensions.

    Raises:
      ValueError: masks that do not fit, or a `where` that matches nothing.

    >>> one, two = jnp.array([[True, False, True, True]]), jnp.array([[True, True, False, True]])
    >>> float(hamming({"w": one}, {"w": two}))
    0.5
    """
    bits = jax.tree.map(lambda m: jnp.ones_like(m, bool) if tree.is_array(m) else m, a)
    differ, *_ = _counts(a, b, where)
    return differ / jnp.maximum(_counts(bits, bits, where)[1], 1)


def iou(a: Mask, b: Mask, *, where: tree.Where = None) -> Float[Array, ""]:
    """Return the overlap of two masks, |a and b| / |a or b| over the chosen entries.

    1 if both are empty. Two random masks of density d have d / (2 - d) in expectation.

    Args:
      a: a tree of bools.
      b: another, like it.
      where: the leaves to compare; default: what is a weight by its path and dimensions.

    Raises:
      ValueError: masks that do not fit, or a `where` that matches nothing.

    >>> one, two = jnp.array([[True, False, True, True]]), jnp.array([[True, True, False, True]])
    >>> float(iou({"w": one}, {"w": two}))
    0.5
    """
    _, both, either = _counts(a, b, where)
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0)
