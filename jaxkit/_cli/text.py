"""Text for a terminal."""

import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def table(
    paths: list[str], columns: list[tuple[str, int, str]]
) -> Callable[[str, Sequence[str]], None]:
    """Print the head of a table with one row a path, and return what prints a row.

    columns: the name of each column after the path, its least width, and ``<`` or ``>``. A row can
    be printed as soon as it is known.
    """
    sizes = [max(len(name), least) for name, least, _ in columns]
    room = (width() or sys.maxsize) - sum(sizes) - 2 * len(sizes)
    shown = shorten(paths, max(16, room)) | {"path": ("path", True)}
    first = max(len(name) for name, fits in shown.values() if fits)

    def show(path: str, cells: Sequence[str]) -> None:
        name, fits = shown[path]
        if not fits:
            print(name)
        texts = [(name if fits else "").ljust(first)]
        each = zip(cells, columns, sizes, strict=True)
        texts += [format(cell, f"{side}{size}") for cell, (_, _, side), size in each]
        print("  ".join(texts).rstrip(), flush=sys.stdout.isatty())

    show("path", [name for name, _, _ in columns])
    return show


def choose(leaves: dict[str, Any], where: Sequence[str] | None) -> dict[str, Any]:
    """Return the leaves of any dtype whose path matches a glob; all if there is none."""
    if not where:
        return leaves
    import numpy as np

    from jaxkit import tree

    # `where` chooses floats only; here every leaf may be looked at, so floats stand for all
    chosen = tree.chosen({path: np.zeros((), np.float32) for path in leaves}, where)
    return {path: leaves[path] for path in chosen}


def shorten(paths: list[str], width: int) -> dict[str, tuple[str, bool]]:
    """Map each path to what to print for it, and to whether that fits into `width`.

    A long path has its longest parts cut to a ``*``, so that it still is a glob for --where. It
    stays whole where that would make it one with another or leave nothing to read.
    """
    short = {}
    for path in paths:
        parts = re.split("([/.])", printable(path))
        for most in range(max(width, 4), 3, -1):
            text = "".join(p if len(p) <= most else f"{p[: most - 1]}*" for p in parts)
            if len(text) <= width:
                short[path] = text
                break
    times = Counter(short.values())
    fits = {path: times.get(short.get(path, ""), 0) == 1 for path in paths}
    return {path: (short[path] if fits[path] else printable(path), fits[path]) for path in paths}


def count_leaves(number: int) -> str:
    return f"{number:,} {'leaf' if number == 1 else 'leaves'}"


def fraction(part: int, whole: int) -> str:
    """Four decimals; 0 and 1 only where that is exact."""
    if part in (0, whole):
        return "-" if whole == 0 else str(part // whole)
    text = f"{part / whole:.4f}"
    return {"0.0000": "<0.0001", "1.0000": ">0.9999"}.get(text, text)


def size(number: int) -> str:
    unit = min(int(math.log2(number) // 10), 4) if number else 0
    if unit == 0:
        return f"{number} bytes"
    return f"{number / 1024**unit:.1f} {['', 'KiB', 'MiB', 'GiB', 'TiB'][unit]}"


def printable(text: str) -> str:
    """A name from a file may hold anything, such as the escape codes of a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def width() -> int | None:
    """The columns of the terminal, or None where the output goes to a file or a pipe."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS"):
        return shutil.get_terminal_size().columns
    return None
