"""Which entries of a long vector are in a window of magnitudes: exactly, in a few passes.

A vector is a function from places (a slice, or an array of indexes) to fresh entries there. Ranks
are found as Floyd and Rivest do: a sample says between which magnitudes the k-th largest will be,
one pass counts what lies above and makes a histogram of what lies between, and if the rank is not
there, or if a bin holds more than one magnitude, another pass follows. The sample decides how many
passes it takes, and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxkit._rank import decimal
from jaxkit.weights.sparsify import Window

Places = Any  # a slice or an array of integers
Vector = Callable[[Places], np.ndarray]
Each = Callable[[Callable[[slice], Any], int], Iterator[Any]]  # over the pieces of n entries

_TOP = 0x7FFFFFFF  # no magnitude has a larger image
_BINS = 1 << 20
_SAMPLE = 1 << 20


class Edge(NamedTuple):
    """Where the k largest end: those above a magnitude, and those equal to it up to an index."""

    image: int
    index: int


class Rank(NamedTuple):
    """The image of the k-th largest, its place among its equals, and how many these are."""

    image: int
    place: int
    equals: int


class Counted(NamedTuple):
    """How many entries lie above a bracket, and how many in each part of it."""

    above: int
    bins: np.ndarray


Bracket = tuple[int, int]  # the least and the largest image
NONE = Rank(_TOP + 1, 0, 0)  # the rank of k = 0: everything is below


def image(x: np.ndarray) -> np.ndarray:
    """Map magnitudes of float32 to integers of the same order."""
    return x.view(np.uint32) & np.uint32(_TOP)


def counts(window: Window, n: int) -> tuple[int, int]:
    """Return how many entries go from above, and how many there are above the smallest that go."""
    exact = lambda share: round(decimal(share) * n)
    start = exact(window.outliers)
    return start, n - (exact(window.sparsity) - start)


# ---------------------------------------------------------------------------------- finding ranks


def sampled(n: int, whole: int) -> Places:
    """Return the places of a vector of n entries, of `whole` in all, where a sample looks."""
    size = min(_SAMPLE, 4096 + int(2 * whole ** (2 / 3)))
    if size >= whole or not n:
        return slice(0, n)
    return np.random.default_rng(n).integers(n, size=-(-n * size // whole))


def guess(sample: np.ndarray, n: int, k: int) -> Bracket:
    """Return between which images the k-th largest of n will be, going by images of some."""
    s = len(sample)
    rank = k * s / n
    margin = 0.0 if s == n else 6 + 6 * (rank * max(0.0, 1 - rank / s)) ** 0.5
    first, last = int(rank - 1 - margin), int(np.ceil(rank - 1 + margin))
    ends = [s - 1 - min(max(i, 0), s - 1) for i in (last, first)]
    low, high = np.partition(sample, ends)[ends]
    return (0 if last >= s else int(low), _TOP if first < 0 else int(high))


def count(x: Vector, n: int, brackets: Sequence[Bracket], each: Each) -> list[Counted]:
    """Count the entries of a vector above and in each bracket, in one pass."""
    if not brackets:
        return []
    shifts = [_shift(bracket) for bracket in brackets]
    widths = [high - low for low, high in brackets]
    found = [np.zeros((w >> s) + 1, np.int64) for w, s in zip(widths, shifts, strict=True)]
    above = [0] * len(brackets)

    def look(at: slice) -> list[tuple[int, Any]]:
        bits, out = image(x(at)), []
        for low, high in brackets:
            inside = bits - np.uint32(low) if low else bits  # what is below wraps around
            among = inside <= np.uint32(high - low)
            more = 0 if high == _TOP else np.count_nonzero(bits > np.uint32(high))
            out.append((more, np.count_nonzero(among) if low == high else inside[among]))
        return out

    for pieces in each(look, n):
        for i, (more, inside) in enumerate(pieces):
            above[i] += more
            _add(found[i], inside, shifts[i])
    return [Counted(a, bins) for a, bins in zip(above, found, strict=True)]


def plus(a: Counted | None, b: Counted) -> Counted:
    """Add the counts of two vectors for the same bracket; None counts nothing."""
    return b if a is None else Counted(a.above + b.above, a.bins + b.bins)


def _shift(bracket: Bracket) -> int:
    return max(0, (bracket[1] - bracket[0] + 1).bit_length() - _BINS.bit_length() + 1)


def _add(bins: np.ndarray, inside: Any, shift: int) -> None:
    if bins.size == 1:
        bins += inside if np.ndim(inside) == 0 else len(inside)
    elif 8 * len(inside) < bins.size:
        np.add.at(bins, inside >> np.uint32(shift), 1)
    else:
        bins += np.bincount(inside >> np.uint32(shift), minlength=bins.size)


def step(bracket: Bracket, counted: Counted, k: int) -> Rank | Bracket:
    """Return the k-th largest, or where to look for it."""
    (low, high), (above, bins) = bracket, counted
    if above >= k:
        return high + 1, _TOP
    down = np.cumsum(bins[::-1])
    if above + down[-1] < k:
        return 0, low - 1
    i = int(np.searchsorted(down, k - above))
    place, bin_ = k - above - (int(down[i - 1]) if i else 0), bins.size - 1 - i
    shift = _shift(bracket)
    if shift:
        start = low + (bin_ << shift)
        return start, min(high, start + (1 << shift) - 1)
    return Rank(low + bin_, place, int(bins[bin_]))


def find(
    pass_: Callable[[list[list[Bracket]]], list[list[Counted]]],
    samples: list[np.ndarray],
    n: int,
    ks: Sequence[int],
) -> list[list[Rank]]:
    """Return the k-th largest of each vector for each k.

    Args:
      pass_: counts the entries of every vector for its brackets.
      samples: images of some entries of each.
      n: how many entries each has.
    """
    known: list[list[Any]] = [[guess(s, n, k) if k else NONE for k in ks] for s in samples]
    is_open = lambda found: not isinstance(found, Rank)
    while any(is_open(found) for own in known for found in own):
        counted = [iter(c) for c in pass_([[f for f in own if is_open(f)] for own in known])]
        known = [
            [step(f, next(own), k) if is_open(f) else f for f, k in zip(founds, ks, strict=True)]
            for founds, own in zip(known, counted, strict=True)
        ]
    return known


# -------------------------------------------------------------------------------- applying windows


def edge(rank: Rank, left: int, x: Vector, n: int, each: Each) -> tuple[Edge, int]:
    """Return the edge in one of the vectors that were ranked together, and how many equals it used.

    Of the entries equal to the rank's, the first `left` are above the edge.
    """
    if rank.place == rank.equals:
        return Edge(rank.image, n), 0
    if left <= 0:
        return Edge(rank.image, 0), 0
    value, seen = np.uint32(rank.image), 0
    equal = lambda at: image(x(at)) == value
    for at, here in each(lambda at: (at, np.count_nonzero(equal(at))), n):
        if seen + here >= left:
            last = np.flatnonzero(equal(at))[left - seen - 1]
            return Edge(rank.image, at.start + int(last) + 1), left
        seen += here
    return Edge(rank.image, n), seen


def apply(x: np.ndarray, at: Places, start: Edge, stop: Edge) -> np.ndarray:
    """Set to zero, in place, what is above the first edge or below the second."""
    bits = image(x)
    keep = _above(bits, at, stop)
    if start.image <= _TOP:
        keep &= ~_above(bits, at, start)
    return zero(x, keep)


def _above(bits: np.ndarray, at: Places, edge: Edge) -> np.ndarray:
    value = np.uint32(edge.image)
    above = bits > value
    if not isinstance(at, slice):
        return above | ((bits == value) & (at < edge.index))
    if (own := edge.index - at.start) > 0:
        np.greater_equal(bits[:own], value, out=above[:own])
    return above


def zero(x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Set to zero, in place, what is not kept; return it."""
    bits = x.view(f"i{x.itemsize}")
    bits &= np.negative(keep.view(np.int8))  # all bits of what is kept
    return x
