"""How two checkpoints differ, leaf by leaf."""

import math
from typing import NamedTuple

import numpy as np

from jaxkit.weights.files import Leaf

__all__ = ["Difference", "difference"]


class Difference(NamedTuple):
    """What became of a leaf, `a` before and `b` after. Sums in float64, over all entries.

    Attributes:
      size: the number of entries.
      changed: how many differ (NaN equals NaN).
      norm_a, norm_b, norm: the L2 norms of a, of b, and of b - a.
      cosine: <a, b> / (|a| |b|), nan where a norm is 0.
      same_sign: the fraction of entries whose sign is the same (0 has its own), nan if there are
        none.
    """

    size: int
    changed: int
    norm_a: float
    norm_b: float
    norm: float
    cosine: float
    same_sign: float


def difference(a: Leaf, b: Leaf, *, piece: int = 1 << 18) -> Difference:
    """Compare two leaves of equal shape, piece by piece: no copy of them in a wider type is made.

    Raises:
      ValueError: the shapes differ.

    >>> leaf = lambda *x: Leaf((2,), np.dtype("f4"), lambda: np.array(x, np.float32))
    >>> difference(leaf(3, 4), leaf(3, -4))
    Difference(size=2, changed=1, norm_a=5.0, norm_b=5.0, norm=8.0, cosine=-0.28, same_sign=0.5)
    """
    if a.shape != b.shape:
        raise ValueError(f"the shapes differ: {a.shape} and {b.shape}")
    before, after = np.ravel(a.read()), np.ravel(b.read())
    wide = np.complex128 if "c" in (before.dtype.kind, after.dtype.kind) else np.float64
    sums = np.zeros(4)  # of a², b², (b - a)² and a b
    changed = same = 0
    for start in range(0, before.size, piece):
        x = before[start : start + piece].astype(wide)
        y = after[start : start + piece].astype(wide)
        changed += int(np.sum((x != y) & ~(np.isnan(x) & np.isnan(y))))
        same += int(np.sum(np.sign(x) == np.sign(y)))
        with np.errstate(over="ignore", invalid="ignore"):
            d = y - x
            sums += [np.vdot(p, q).real for p, q in ((x, x), (y, y), (d, d), (x, y))]
    norm_a, norm_b, norm = (math.sqrt(s) for s in sums[:3])
    both = norm_a * norm_b
    cosine = sums[3] / both if both else math.nan
    share = same / before.size if before.size else math.nan
    return Difference(before.size, changed, norm_a, norm_b, norm, float(cosine), share)
