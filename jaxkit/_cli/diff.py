"""``python -m jaxkit diff``: how two checkpoints differ, leaf by leaf."""

import argparse
import json
import math
from typing import Any

from jaxkit._cli import text


def run(args: argparse.Namespace) -> int:
    from jaxkit.weights import diff, files

    a, b = files.leaves(args.a), files.leaves(args.b)
    chosen = text.choose({**a, **b}, args.where)
    apart = {path: _apart(a.get(path), b.get(path)) for path in chosen}
    apart = {path: why for path, why in apart.items() if why}
    both = [path for path in chosen if path not in apart]
    rows = ((path, diff.difference(a[path], b[path])) for path in both)
    if args.json:
        found = {path: _plain(row._asdict()) for path, row in rows}
        report = {"a": args.a, "b": args.b, "leaves": found, "not_compared": apart}
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _table(both, rows, apart)
    return 1 if apart else 0


def _apart(a: Any, b: Any) -> str | None:
    if a is None or b is None:
        return "only in " + ("A" if b is None else "B")
    if a.shape != b.shape:
        return f"shape {list(a.shape)} in A, {list(b.shape)} in B"
    return None


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: x if math.isfinite(x) else None for name, x in row.items()}  # JSON has no NaN


def _table(paths: list[str], rows: Any, apart: dict[str, str]) -> None:
    names = ("changed", "|B - A|", "relative", "cosine", "same sign")
    show = text.table(paths, [(name, 9, ">") for name in names])
    size = changed = 0
    squares = 0.0
    for path, row in rows:
        relative = row.norm / row.norm_a if row.norm_a else math.nan
        share = text.fraction(row.changed, row.size)
        show(path, [share, *(_number(x) for x in (row.norm, relative, row.cosine, row.same_sign))])
        size, changed, squares = size + row.size, changed + row.changed, squares + row.norm**2
    share = text.fraction(changed, size)
    norm = _number(math.sqrt(squares)) if squares >= 0 else "-"
    print(f"{text.count_leaves(len(paths))}, {size:,} parameters, changed {share}, |B - A| {norm}")
    for path, why in apart.items():
        print(f"not compared: {text.printable(path)}: {why}")


def _number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.4g}"
