"""What a mask does to a model, in numbers and as a table."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask

__all__ = ["Report", "Row", "report"]


class Row(NamedTuple):
    """One leaf: its path and shape, entries in all and kept, and whether `where` chose it."""

    path: str
    shape: tuple[int, ...]
    total: int
    kept: int
    chosen: bool

    @property
    def sparsity(self) -> float:
        """The fraction of entries that are zero."""
        return 1 - self.kept / self.total if self.total else 0.0


class Report(NamedTuple):
    """The rows of `report`, and the sums over the chosen leaves and over all leaves."""

    rows: tuple[Row, ...]
    chosen: Row
    all: Row

    def __str__(self) -> str:
        head = ("leaf", "shape", "entries", "kept", "sparsity")
        lines = [
            (r.path, "x".join(map(str, r.shape)), f"{r.total:,}", f"{r.kept:,}", _percent(r))
            for r in (*self.rows, self.chosen, self.all)
        ]
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        text = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in (head, *lines)
        ]
        return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])


def _percent(row: Row) -> str:
    return f"{100 * row.sparsity:.2f} %" if row.chosen else "exempt"


def report(params: PyTree, mask: Mask, *, where: tree.Where = None) -> Report:
    """Count what a mask keeps: per leaf, over the leaves to sparsify, and over all leaves.

    Args:
      params: any tree of arrays.
      mask: a tree of bools like params.
      where: the leaves that count as sparsified, the others are exempt; default: the weights.

    Returns:
      A `Report`; ``print`` it for a table.

    Raises:
      ValueError: a mask that does not fit params.

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
    rows = tuple(
        Row(path, tuple(np.shape(leaf)), int(np.size(leaf)), int(np.asarray(m).sum()), bit)
        for (path, leaf), m, bit in zip(leaves.items(), masks, chosen, strict=True)
        if tree.is_array(leaf)
    )
    return Report(rows, _sum("sparsified", [r for r in rows if r.chosen]), _sum("all leaves", rows))


def _sum(name: str, rows: Any) -> Row:
    return Row(name, (), sum(r.total for r in rows), sum(r.kept for r in rows), True)
