"""The command line: ``python -m jaxkit --help``."""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

_EXAMPLES = """\
examples:
  python -m jaxkit papers                    the papers that jaxkit implements
  python -m jaxkit papers --grep lottery     those that mention a word
  python -m jaxkit inspect model.safetensors
  python -m jaxkit inspect checkpoints/7 --where "**/kernel"
  python -m jaxkit inspect model.safetensors --json | jq .total.sparsity
"""

_INSPECT = (
    "Print the shape, dtype, L2 norm and sparsity (the fraction of entries that are exactly zero) "
    "of every leaf of a checkpoint, and the totals. The leaves are read one after another: it "
    "takes memory for the largest leaf, not for the checkpoint. Pickle (.pt, .bin) is never read."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 1: `papers --grep` found nothing; 2: a bad argument or an unreadable file, with one
    line on stderr that says which.

    >>> main(["papers", "--grep", "1803.03635", "--json"])  # doctest: +ELLIPSIS
    [
      {
        "title": "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
    ...
    0
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program ended by SIGPIPE
    except KeyboardInterrupt:
        return 128 + 2
    except (OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        print(f"python -m jaxkit: error: {_printable(reason)}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxkit",
        description="Research on neural-network weights in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxkit {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    papers = commands.add_parser(
        "papers",
        help="list the papers that jaxkit implements",
        description="List the papers that jaxkit implements, with the functions that do.",
        epilog="exit status: 1 if --grep finds no paper",
    )
    papers.add_argument("--grep", metavar="WORD", help="only papers with WORD in any field")
    papers.add_argument("--json", action="store_true", help="print JSON")
    papers.set_defaults(run=_papers)

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds, leaf by leaf",
        description=_INSPECT,
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        help="a .safetensors file, a model.safetensors.index.json, or the folder of an orbax "
        "checkpoint (one step of a CheckpointManager)",
    )
    inspect.add_argument(
        "--where",
        metavar="GLOB",
        action="append",
        help="only leaves whose path matches: * stays within one component of the path, ** spans "
        "any number; may be given more than once",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    return parser


def _version() -> str:
    try:
        return metadata.version("jaxkit")
    except metadata.PackageNotFoundError:
        return "(not installed)"


# ------------------------------------------------------------------------------------ papers


def _papers(args: argparse.Namespace) -> int:
    from jaxkit import papers

    found = papers.load()
    if args.grep is not None:
        found = papers.grep(found, args.grep)
    if args.json:
        print(json.dumps([paper._asdict() for paper in found], indent=2, ensure_ascii=False))
    elif not found:
        print(f"no paper mentions {args.grep!r}", file=sys.stderr)
    else:
        print("\n\n".join(_describe(paper) for paper in found))
    return 0 if found else 1


def _describe(paper: Any) -> str:
    lines = {
        "": f"{', '.join(paper.authors)}, {paper.year}, arXiv:{paper.arxiv}",
        "functions: ": ", ".join(paper.implements),
        "experiment: ": paper.experiment and f"python -m experiments run {paper.experiment}",
    }
    fill = lambda text, first, rest: textwrap.fill(
        text,
        _width() or 100,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    body = [fill(text, f"  {label}", "    ") for label, text in lines.items() if text]
    return "\n".join([fill(paper.title, "", "  "), *body])


# ----------------------------------------------------------------------------------- inspect


def _inspect(args: argparse.Namespace) -> int:
    from jaxkit.weights import files

    leaves = files.leaves(args.file)
    total = len(leaves)
    if args.where:
        import numpy as np

        from jaxkit import tree

        # `where` chooses floats only; here every leaf may be looked at, so floats stand for all.
        chosen = tree.select({path: np.zeros((), np.float32) for path in leaves}, args.where)
        leaves = {path: leaf for path, leaf in leaves.items() if chosen[path]}
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
    rest = [
        max([5, *map(len, shapes.values())]),
        max([5, *(len(leaf.dtype.name) for leaf in leaves.values())]),
        10,
        8,
    ]
    columns = _width() or sys.maxsize
    shown = _shorten([*leaves], max(16, columns - sum(rest) - 2 * len(rest)))
    width = max([4, *(len(name) for name, fits in shown.values() if fits)])

    def show(path: str, fits: bool, *cells: str) -> None:
        if not fits:
            print(path)
        texts = [(path if fits else "").ljust(width), cells[0].rjust(rest[0])]
        texts.append(cells[1].ljust(rest[1]))
        texts += [cell.rjust(columns) for cell, columns in zip(cells[2:], rest[2:], strict=True)]
        print("  ".join(texts), flush=sys.stdout.isatty())

    show("path", True, "shape", "dtype", "norm", "sparsity")
    found = []
    for path, leaf, stats in rows:
        found.append(_row(path, leaf, stats))
        sparsity = _fraction(stats.zeros, stats.size)
        show(*shown[path], shapes[path], leaf.dtype.name, f"{stats.norm:.4g}", sparsity)
    all_of = _totals(found)
    count = f"{len(leaves)} of {total} leaves" if len(leaves) < total else _leaves(total)
    size = f"{all_of['parameters']:,} parameters, {_bytes(all_of['bytes'])}"
    print(f"{count}, {size}, sparsity {_fraction(all_of['zeros'], all_of['parameters'])}")
    if bad := [row for row in found if row["nan"] or row["inf"]]:
        print(
            f"not finite: {all_of['nan']:,} NaN, {all_of['inf']:,} infinite in {_leaves(len(bad))}"
        )


def _shorten(paths: list[str], width: int) -> dict[str, tuple[str, bool]]:
    """Map each path to what to print for it, and to whether that fits into `width`.

    A long path has its longest parts cut to a ``*``, so that it still is a glob for --where. It
    stays whole where that would make it one with another or leave nothing to read.
    """
    short = {}
    for path in paths:
        parts = re.split("([/.])", _printable(path))
        for most in range(max(width, 4), 3, -1):
            text = "".join(p if len(p) <= most else f"{p[: most - 1]}*" for p in parts)
            if len(text) <= width:
                short[path] = text
                break
    times = Counter(short.values())
    fits = {path: times.get(short.get(path, ""), 0) == 1 for path in paths}
    return {path: (short[path] if fits[path] else _printable(path), fits[path]) for path in paths}


def _leaves(number: int) -> str:
    return f"{number:,} {'leaf' if number == 1 else 'leaves'}"


def _fraction(part: int, whole: int) -> str:
    """Four decimals; 0 and 1 only where that is exact."""
    if part in (0, whole):
        return "-" if whole == 0 else str(part // whole)
    text = f"{part / whole:.4f}"
    return {"0.0000": "<0.0001", "1.0000": ">0.9999"}.get(text, text)


def _bytes(number: int) -> str:
    unit = min(int(math.log2(number) // 10), 4) if number else 0
    if unit == 0:
        return f"{number} bytes"
    return f"{number / 1024**unit:.1f} {['', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}"


def _printable(text: str) -> str:
    """A name from a file may hold anything, such as the escape codes of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _width() -> int | None:
    """The columns of the terminal, or None where the output goes to a file or a pipe."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None


if __name__ == "__main__":
    sys.exit(main())
