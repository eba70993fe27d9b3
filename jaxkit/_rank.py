"""Ranks without a sort: the k largest entries of many arrays, by bisection on their bits.

The floats are ranked by the unsigned integer image of their bits, whose order is theirs. The k-th
largest is found bit by bit: keep a bit if at least k entries reach it. Each round is one reduction
over the leaves where they lie: nothing is sorted, concatenated or gathered, and over a mesh one
count per group moves. Counts are pairs (high, low) of uint32 words, for no tree is too large.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float


class Pair(NamedTuple):
    hi: Any
    lo: Any


_WORD = 2**32


def is_pair(x: Any) -> bool:
    return isinstance(x, Pair)


def decimal(x: Any) -> Fraction:
    """Return the number that a Python number is written as: 0.1 is 1/10, and exactly so."""
    return Fraction(repr(float(x)))


def share(n: Pair, fraction: Any) -> Pair:
    """Return round-half-even(fraction n): exactly for a Python number of few digits.

    That is one that is a ratio of integers below 2**16 (0.2, 0.1234); float32 has the others.
    """
    if isinstance(fraction, int | float | np.number):
        exact = decimal(fraction)
        if 0 <= exact <= 1 and exact.denominator < 2**16:
            return _ratio(n, exact)
    return as_pair(jnp.round(fraction * (n.hi * jnp.float32(_WORD) + n.lo)))


def _ratio(n: Pair, fraction: Fraction) -> Pair:
    """Divide and multiply by hand, in digits of 16 bits."""
    a, b = (jnp.uint32(x) for x in fraction.as_integer_ratio())
    rest, carry, quotient, product = jnp.uint32(0), jnp.uint32(0), [], []
    for digit in (n.hi >> 16, n.hi & 0xFFFF, n.lo >> 16, n.lo & 0xFFFF):
        rest = rest << 16 | digit
        quotient.append(rest // b)
        rest = rest % b
    for digit in reversed(quotient):
        carry = digit * a + carry
        product.append(carry & 0xFFFF)
        carry = carry >> 16
    hi, lo = product[3] << 16 | product[2], product[1] << 16 | product[0]
    more, rest = rest * a // b, rest * a % b
    low = lo + more
    up = (2 * rest > b) | ((2 * rest == b) & (low & 1 == 1))
    hi += low < lo
    last = low + up
    return Pair(hi + (up & (last == 0)), last)


def _at_least(a: Pair, b: Pair):
    return (a.hi > b.hi) | ((a.hi == b.hi) & (a.lo >= b.lo))


def minus(a: Pair, b: Pair) -> Pair:
    return Pair(a.hi - b.hi - (a.lo < b.lo), a.lo - b.lo)


def _minimum(a: Pair, b: Pair) -> Pair:
    return Pair(*(jnp.where(_at_least(a, b), y, x) for x, y in zip(a, b, strict=True)))


def _add_up(pair: Pair) -> Pair:
    """Add the pairs along the only axis (at most 2**24 of them)."""
    pieces = [jnp.sum((pair.lo >> s) & 0xFF, dtype=jnp.uint32) for s in (0, 8, 16, 24)]
    hi, lo = jnp.sum(pair.hi, dtype=jnp.uint32), jnp.uint32(0)
    for shift, piece in zip((0, 8, 16, 24), pieces, strict=True):
        low = lo + (piece << shift)
        hi = hi + ((piece >> (32 - shift)) if shift else 0) + (low < lo)
        lo = low
    return Pair(hi, lo)


def count(bits: Bool[Array, "..."]) -> Pair:
    """Count the True entries of an array of any size."""
    if bits.size < _WORD:
        return Pair(jnp.uint32(0), jnp.sum(bits, dtype=jnp.uint32))
    longest = int(np.argmax(bits.shape))
    partial = jnp.sum(bits, axis=longest, dtype=jnp.uint32).ravel()
    return _add_up(Pair(jnp.zeros_like(partial), partial))


def total(leaves: Sequence[Bool[Array, "..."]]) -> Pair:
    """Count the True entries of all leaves together."""
    return _add_up(_counts(leaves)) if leaves else as_pair(0)


def _counts(leaves: Sequence[Bool[Array, "..."]]) -> Pair:
    pairs = [count(leaf) for leaf in leaves]
    return Pair(*(jnp.stack(column) for column in zip(*pairs, strict=True)))


def as_pair(k: Any) -> Pair:
    """Write a whole number (int, integer array, or float array) as two words."""
    if isinstance(k, Pair):
        return k
    if isinstance(k, int | np.integer):
        return Pair(jnp.uint32(int(k) // _WORD), jnp.uint32(int(k) % _WORD))
    k = jnp.asarray(k)
    if jnp.issubdtype(k.dtype, jnp.floating):
        hi = jnp.floor(k / np.float32(_WORD))
        return Pair(hi.astype(jnp.uint32), (k - hi * np.float32(_WORD)).astype(jnp.uint32))
    k = jnp.maximum(k, 0)
    hi = k >> 32 if k.dtype.itemsize == 8 else jnp.zeros_like(k)
    return Pair(hi.astype(jnp.uint32), k.astype(jnp.uint32))


def _image(x: Float[Array, "..."], within: Bool[Array, "..."] | None, bits: int) -> Array:
    """Map floats to unsigned integers of the same order: 0 outside `within`, 1 for NaN, -0 as 0."""
    x = x.astype(jnp.float64 if bits == 64 else jnp.float32)
    word = lax.bitcast_convert_type(x, jnp.uint64 if bits == 64 else jnp.uint32)
    top = np.array(1 << (bits - 1), word.dtype)
    word = jnp.where(word == top, 0, word)
    image = jnp.where(word >= top, ~word, word | top)
    image = jnp.where(jnp.isnan(x), 1, image)
    return image if within is None else jnp.where(within, image, 0)


def _value(image: Array) -> Float[Array, "..."]:
    """Invert `_image`."""
    top = np.array(1 << (image.dtype.itemsize * 8 - 1), image.dtype)
    word = jnp.where(image >= top, image ^ top, ~image)
    floats = jnp.float64 if image.dtype.itemsize == 8 else jnp.float32
    return jnp.where(image <= 1, jnp.nan, lax.bitcast_convert_type(word, floats))


def _threshold(images: Callable[[], list], k: Pair, together: bool, bits: int) -> Array:
    """Return per group the largest image that at least k entries reach (0 if fewer there are)."""
    dtype = jnp.uint64 if bits == 64 else jnp.uint32

    def refine(i, least):
        candidate = least | (jnp.ones((), dtype) << (bits - 1 - i).astype(dtype))
        reached = _reached(images(), candidate, together)
        return jnp.where(_at_least(reached, k), candidate, least)

    return lax.fori_loop(0, bits, refine, jnp.zeros_like(k.lo, dtype))


def _own(per_group: Array, i: int, together: bool) -> Array:
    return per_group[0 if together else i]


def _grouped(counts: Pair, together: bool) -> Pair:
    return Pair(*(x[None] for x in _add_up(counts))) if together else counts


def _reached(images: list, least: Array, together: bool) -> Pair:
    hits = [image >= _own(least, i, together) for i, image in enumerate(images)]
    return _grouped(_counts(hits), together)


def _positions(shape: tuple[int, ...]) -> tuple[Array, Array, tuple[int, int]]:
    """Return the flat index as (row, column), each below 2**32, and how many bits each has.

    Never a flat iota: reshaping one to the leaf's shape would gather a sharded leaf.
    """
    split = len(shape)
    while split and math.prod(shape[split - 1 :]) < _WORD:
        split -= 1
    words, sizes = [], []
    for dims in (range(split), range(split, len(shape))):
        index = jnp.zeros(shape, jnp.uint32)
        for d in dims:
            stride = math.prod(shape[d + 1 : dims.stop])
            index += lax.broadcasted_iota(jnp.uint32, shape, d) * np.uint32(stride)
        words.append(index)
        sizes.append(math.prod(shape[d] for d in dims).bit_length() if len(dims) else 0)
    return words[0], words[1], (sizes[0], sizes[1])


def _first(leaves: list[Bool[Array, "..."]], quota: Pair) -> list[Bool[Array, "..."]]:
    """Keep of every leaf the first `quota` True entries in the order of the flat index."""
    sizes = [_positions(leaf.shape)[2] for leaf in leaves]
    rows, columns = max(s[0] for s in sizes), max(s[1] for s in sizes)

    def before(end: Pair):
        for i, leaf in enumerate(leaves):
            row, column, _ = _positions(leaf.shape)
            e = Pair(end.hi[i], end.lo[i])
            yield leaf & ((row < e.hi) | ((row == e.hi) & (column < e.lo)))

    def refine(step, end):
        bit = (rows + columns - 1 - step).astype(jnp.uint32)
        high, low = bit >= columns, bit < columns
        candidate = Pair(
            end.hi | jnp.where(high, jnp.uint32(1) << (bit - columns), 0),
            end.lo | jnp.where(low, jnp.uint32(1) << bit, 0),
        )
        few = _at_least(quota, _counts(list(before(candidate))))
        return Pair(*(jnp.where(few, c, e) for c, e in zip(candidate, end, strict=True)))

    start = Pair(jnp.zeros_like(quota.hi), jnp.zeros_like(quota.lo))
    return list(before(lax.fori_loop(0, rows + columns, refine, start)))


def _in_turn(ties: Pair, room: Pair) -> Pair:
    """Share out `room` among the leaves in order: each gets its ties until there is no more."""

    def take(room, tie):
        got = _minimum(tie, room)
        return minus(room, got), got

    return lax.scan(take, Pair(room.hi[0], room.lo[0]), ties)[1]


@partial(jax.jit, static_argnames=("together", "bits"))
def largest(leaves: list, within: list, k: Pair, together: bool, bits: int) -> list:
    def images():
        return [_image(x, inside, bits) for x, inside in zip(leaves, within, strict=True)]

    least = _threshold(images, k, together, bits)
    reached = [im >= _own(least, i, together) for i, im in enumerate(images())]
    above = [im > _own(least, i, together) for i, im in enumerate(images())]
    ties = [x & ~y for x, y in zip(reached, above, strict=True)]
    per_leaf = _counts(ties)
    room = minus(k, _grouped(_counts(above), together))
    # k may exceed what there is (least is 0), or be none
    room = _minimum(room, _grouped(per_leaf, together))
    quota = _in_turn(per_leaf, room) if together else room

    def cut(_):
        return [x | y for x, y in zip(above, _first(ties, quota), strict=True)]

    whole = jnp.all((quota.hi == per_leaf.hi) & (quota.lo == per_leaf.lo))
    chosen = lax.cond(whole, lambda _: reached, cut, None)
    return [x if m is None else x & m for x, m in zip(chosen, within, strict=True)]


@partial(jax.jit, static_argnames=("bits",))
def kth(leaves: list, k: Pair, bits: int) -> Array:
    images = lambda: [_image(x, None, bits) for x in leaves]
    return _value(_threshold(images, k, True, bits)[0])
