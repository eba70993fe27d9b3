"""Terms: what is known of the axis that runs along one array dimension, and their unification.

A group acts on the arrays of a program by permuting some of their dimensions. The term of a
dimension says how:

* ``axis``: all `size` entries may be permuted freely;
* ``fixed``: nothing moves;
* ``prod``: the dimension is a row-major merge of factors, each with a term of its own;
* ``concat``: the dimension is a row of blocks, each with a term of its own.

Two dimensions that an operation requires to move together have their terms *unified*. An axis
that meets a product or a concatenation is refined to one. What cannot be reconciled becomes
fixed: the trivial action satisfies every operation, so giving up is always sound.

Terms are the mutable cells of a union-find, private to one trace. Every function takes `why`,
an opaque note of the operation at work, which is kept on a term that becomes fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

AXIS, FIXED, PROD, CONCAT = "axis", "fixed", "prod", "concat"


@dataclass(eq=False, slots=True)
class Term:
    """One cell: `link` points to the term it was unified with; `pins` say why not to cut it."""

    size: int
    kind: str
    parts: "tuple[Term, ...]" = ()
    link: "Term | None" = None
    pins: dict[str, None] = field(default_factory=dict)
    why: Any = None


def find(t: Term) -> Term:
    """Return the representative of a term."""
    root = t
    while root.link is not None:
        root = root.link
    while t.link is not None and t.link is not root:
        t.link, t = root, t.link
    return root


def axis(size: int) -> Term:
    """Return a new free axis (an axis of one entry has nothing to permute)."""
    return Term(size, AXIS if size > 1 else FIXED)


def fixed(size: int, why: Any = None) -> Term:
    """Return a term on which nothing moves."""
    return Term(size, FIXED, why=why)


def prod(parts: Sequence[Term]) -> Term:
    """Return the row-major product; factors of size one vanish."""
    flat: list[Term] = []
    for p in map(find, parts):
        flat.extend(p.parts if p.kind == PROD else (p,) if p.size != 1 else ())
    if not flat:
        return fixed(1)
    if len(flat) == 1:
        return flat[0]
    size = 1
    for p in flat:
        size *= p.size
    return Term(size, PROD, tuple(flat))


def concat(parts: Sequence[Term]) -> Term:
    """Return the concatenation; empty blocks vanish."""
    flat: list[Term] = []
    for p in map(find, parts):
        flat.extend(p.parts if p.kind == CONCAT else (p,) if p.size != 0 else ())
    if not flat:
        return fixed(0)
    if len(flat) == 1:
        return flat[0]
    return Term(sum(p.size for p in flat), CONCAT, tuple(flat))


def atoms(t: Term) -> dict[Term, None]:
    """Return the free axes that a term is made of, in order."""
    t = find(t)
    if t.kind == AXIS:
        return {t: None}
    out: dict[Term, None] = {}
    for p in t.parts:
        out.update(atoms(p))
    return out


def is_fixed(t: Term) -> bool:
    """Return whether no part of the term can move."""
    t = find(t)
    return t.kind == FIXED or (t.kind != AXIS and all(is_fixed(p) for p in t.parts))


def fix(t: Term, why: Any = None) -> None:
    """Fix every axis in the term."""
    for a in atoms(t):
        a.kind, a.why = FIXED, why


def pin(t: Term, reason: str) -> None:
    """Note on every axis in the term why its units cannot be removed."""
    for a in atoms(t):
        a.pins[reason] = None


def _refine(t: Term, kind: str, parts: tuple[Term, ...]) -> None:
    for p in parts:
        if p.kind == AXIS:
            p.pins.update(t.pins)
    t.kind, t.parts = kind, parts


def cut(t: Term, k: int) -> tuple[Term, Term] | None:
    """Split a term into its first `k` entries and the rest, or return None."""
    t = find(t)
    if k in (0, t.size):
        empty = fixed(0)
        return (empty, t) if k == 0 else (t, empty)
    if t.kind == FIXED:
        return fixed(k, t.why), fixed(t.size - k, t.why)
    if t.kind == AXIS:
        parts = (axis(k), axis(t.size - k))
        _refine(t, CONCAT, parts)
        return parts
    if t.kind == PROD:
        rest = prod(t.parts[1:])
        if k % rest.size:
            return None
        halves = cut(t.parts[0], k // rest.size)
        return halves and (prod((halves[0], rest)), prod((halves[1], rest)))
    left: list[Term] = []
    for i, p in enumerate(t.parts):
        if k >= p.size:
            left.append(p)
            k -= p.size
        elif k == 0:
            return concat(left), concat(t.parts[i:])
        else:
            halves = cut(p, k)
            return halves and (concat([*left, halves[0]]), concat([halves[1], *t.parts[i + 1 :]]))
    return concat(left), fixed(0)


def factor(t: Term, a: int, b: int, why: Any = None) -> tuple[Term, Term] | None:
    """Write a term of size a * b as a row-major product of sizes `a` and `b`, or return None."""
    t = find(t)
    if a == 1 or b == 1:
        return (fixed(1), t) if a == 1 else (t, fixed(1))
    if t.kind == FIXED:
        return fixed(a, t.why), fixed(b, t.why)
    if t.kind == AXIS:
        parts = (axis(a), axis(b))
        _refine(t, PROD, parts)
        return parts
    if t.kind == PROD:
        first, rest = t.parts[0], prod(t.parts[1:])
        if a % first.size == 0:
            inner = factor(rest, a // first.size, b, why)
            return inner and (prod((first, inner[0])), inner[1])
        if first.size % a == 0:
            inner = factor(first, a, first.size // a, why)
            return inner and (inner[0], prod((inner[1], rest)))
        return None
    if any(p.size % b for p in t.parts):
        return None
    rows: list[Term] = []
    column = axis(b)
    for p in t.parts:
        pair = factor(p, p.size // b, b, why)
        if pair is None:
            return None
        rows.append(pair[0])
        unify(column, pair[1], why)
    t.kind, t.parts = PROD, (concat(rows), column)
    return t.parts


def unify(a: Term, b: Term, why: Any = None) -> None:
    """Make two terms of one size move together, refining or fixing them as needed."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise AssertionError(f"dimensions of sizes {a.size} and {b.size} cannot be tied")
    if b.kind == FIXED or (b.kind == AXIS and a.kind != FIXED):
        a, b = b, a
    if a.kind == FIXED:
        fix(b, a.why)
    elif a.kind == AXIS:
        for reason in a.pins:
            pin(b, reason)
        a.link = b
    elif not _unify_parts(a, b, why):
        fix(a, why)
        fix(b, why)
    elif find(a) is not find(b):
        find(a).link = find(b)


def _unify_parts(a: Term, b: Term, why: Any) -> bool:
    if a.kind == PROD and b.kind == PROD:
        return _unify_factors(a, b, why)
    if a.kind == PROD:
        a, b = b, a
    rest = b  # a is a concatenation: cut b at its blocks
    for p in a.parts:
        halves = cut(rest, p.size)
        if halves is None:
            return False
        unify(p, halves[0], why)
        rest = find(halves[1])
    return True


def _unify_factors(a: Term, b: Term, why: Any) -> bool:
    while True:
        a, b = find(a), find(b)
        if a.kind != PROD or b.kind != PROD:
            unify(a, b, why)
            return True
        x, y = find(a.parts[0]), find(b.parts[0])
        if x.size == y.size:
            unify(x, y, why)
            a, b = prod(a.parts[1:]), prod(b.parts[1:])
            continue
        if x.size > y.size:
            a, b, x, y = b, a, y, x
        if y.size % x.size:
            return False
        pair = factor(y, x.size, y.size // x.size, why)
        if pair is None:
            return False
        unify(x, pair[0], why)
        a, b = prod(a.parts[1:]), prod((pair[1], *b.parts[1:]))


def runs(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the shortest runs of dimensions with as many entries before a reshape as after it.

    No size is 0 or 1.
    """
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old):
        before, after = [i], [j]
        m, n, i, j = old[i], new[j], i + 1, j + 1
        while m != n:
            if m < n:
                before.append(i)
                m, i = m * old[i], i + 1
            else:
                after.append(j)
                n, j = n * new[j], j + 1
        out.append((before, after))
    return out


def divide(parts: Sequence[Term], sizes: Sequence[int], why: Any = None) -> list[Term]:
    """Return the terms of dimensions `sizes` that a reshape makes of dimensions `parts`.

    If the new dimensions cut across the parts, all are fixed.
    """
    if len(parts) == len(sizes) == 1:
        return [find(parts[0])]
    rest = prod(parts)
    out: list[Term] = []
    for size in sizes:
        pair = factor(rest, size, find(rest).size // size, why)
        if pair is None:
            for p in parts:
                fix(p, why)
            return [fixed(s, why) for s in sizes]
        out.append(pair[0])
        rest = pair[1]
    return out
