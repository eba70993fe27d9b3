"""``python -m jaxkit inspect``: what a checkpoint holds, leaf by leaf."""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

from jaxkit._cli import text


def run(args: argparse.Namespace) -> int:
    from jaxkit.weights import files

    leaves = files.leaves(args.file)
    total = len(leaves)
    leaves = text.choose(leaves, args.where)
    rows = ((path, leaf, files.stats(leaf.read())) for path, leaf in leaves.items())
    if args.json:
        found = [_row(*row) for row in rows]
        report = {"file": args.file, "leaves": found, "total": _totals(found)}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _table(leaves, rows, total)
    return 0


def _row(path: str, leaf: Any, stats: Any) -> dict[str, Any]:
    return {
        "path": path,
        "shape": list(leaf.shape),
        "dtype": leaf.dtype.name,
        "parameters": stats.size,
        "bytes": stats.size * leaf.dtype.itemsize,
        "norm": stats.norm if math.isfinite(stats.norm) else None,  # JSON has no NaN
        "zeros": stats.zeros,
        "sparsity": stats.zeros / stats.size if stats.size else None,
        "nan": stats.nan,
        "inf": stats.inf,
    }


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total = {"leaves": len(rows)}
    for name in ("parameters", "bytes", "zeros", "nan", "inf"):
        total[name] = sum(row[name] for row in rows)
    size = total["parameters"]
    return {**total, "sparsity": total["zeros"] / size if size else None}


def _table(leaves: dict[str, Any], rows: Iterator[tuple[str, Any, Any]], total: int) -> None:
    """Print a row as soon as its leaf has been read; only norms and zeros need the data."""
    shapes = {path: "x".join(map(str, leaf.shape)) or "scalar" for path, leaf in leaves.items()}
    dtypes = max([5, *(len(leaf.dtype.name) for leaf in leaves.values())])
    columns = [("shape", max([5, *map(len, shapes.values())]), ">"), ("dtype", dtypes, "<")]
    show = text.table([*leaves], [*columns, ("norm", 10, ">"), ("sparsity", 8, ">")])
    found = []
    for path, leaf, stats in rows:
        found.append(_row(path, leaf, stats))
        sparsity = text.fraction(stats.zeros, stats.size)
        show(path, [shapes[path], leaf.dtype.name, f"{stats.norm:.4g}", sparsity])
    all_of = _totals(found)
    count = f"{len(leaves)} of {total} leaves" if len(leaves) < total else text.count_leaves(total)
    size = f"{all_of['parameters']:,} parameters, {text.size(all_of['bytes'])}"
    print(f"{count}, {size}, sparsity {text.fraction(all_of['zeros'], all_of['parameters'])}")
    if bad := [row for row in found if row["nan"] or row["inf"]]:
        counts = f"{all_of['nan']:,} NaN, {all_of['inf']:,} infinite"
        print(f"not finite: {counts} in {text.count_leaves(len(bad))}")
