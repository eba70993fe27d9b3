"""Editing a layer as an associative memory: one rule changes, and the others as little as can be.

A kernel W maps keys to values, v = k W. A key is what the layer is given (before it, not after): a
row of a dense layer's input, the channels at one position of a convolution's. The functions act on
one leaf; its input axis is the second to last one, as in flax kernels (in, out) and HWIO.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Inexact

from jaxkit import tree

__all__ = ["SecondMoment", "confine", "edit_directions", "rewrite", "second_moment"]


class SecondMoment(NamedTuple):
    """C = E[k k'], uncentred, of shape (in, in), and the number of keys that it is the mean of."""

    mean: Float[Array, "in in"]
    count: Float[Array, ""]


def second_moment(
    keys: Inexact[Array, "*batch in"],
    moment: SecondMoment | None = None,
    *,
    axis_name: str | None = None,
) -> SecondMoment:
    """Return the second moment of keys, or take more of them into one: C += (K'K - n C) / (N + n).

    Batch after batch, in any train or data loop, under jit and `lax.scan`::

        for x in batches:
            moment = second_moment(inputs_of_the_layer(x), moment)

    Args:
      keys: what the layer is given; all axes but the last count as examples, so that each position
        of an image (n, height, width, channels) is one. For a layer with a bias, append a 1 to the
        keys, and the bias to the kernel as one more row.
      moment: of the batches before.
      axis_name: count the keys of all devices on this axis of pmap or shard_map.

    Returns:
      float32 or wider.

    Raises:
      ValueError: keys of another size than those before.

    >>> second_moment(jnp.array([[1.0, 0.0], [3.0, 2.0]])).mean.tolist()
    [[5.0, 3.0], [3.0, 2.0]]
    """
    keys = tree.float32(jnp.asarray(keys))
    size = keys.shape[-1]
    if moment is not None and moment.mean.shape != (size, size):
        raise ValueError(f"keys of size {len(moment.mean)} were due, and {keys.shape} came")
    flat = keys.reshape(-1, size)
    total, n = _dot(flat.T, flat), jnp.asarray(len(flat), keys.dtype)
    if axis_name is not None:
        total, n = jax.lax.psum((total, n), axis_name)
    if moment is None:
        return SecondMoment(total / n, n)
    count = moment.count + n
    return SecondMoment(moment.mean + (total - n * moment.mean) / count, count)


def rewrite(
    w: Inexact[Array, "*kernel"],
    covariance: Float[Array, "in in"],
    keys: Inexact[Array, "*pairs in"],
    values: Inexact[Array, "..."],
    *,
    ridge: float | Array = 1e-4,
    in_axis: int = -2,
) -> Inexact[Array, "*kernel"]:
    r"""Make the layer answer a key with a value, and disturb its other answers least.

    .. math:: W' = \arg\min_X E|k X - k W|^2 \; \text{s.t.}\; k_* X = v_*
        = W + \frac{d\,(v_* - k_* W)}{\langle d, k_*\rangle}, \quad d = C^{-1} k_*

    A change of rank one; of rank n for n pairs at once, W' = W + D (K D)^-1 (V - K W) with the
    columns D = C^-1 K'.

    Args:
      w: the kernel.
      covariance: C = E[k k'] of the keys that are to keep their answers (`second_moment`).
      keys: one key (in,), or n of them (n, in), linearly independent.
      values: the answers due: the shape of `w` without its input axis, after n for n keys. That is
        (out,) of a dense kernel; of a convolution (height, width, out), what each place of the
        window gives for a key.
      ridge: a share of the mean of the diagonal of C, added to it, so that C may be singular, as
        it is of fewer keys than channels. The answers are exact whatever it is. 0: none.
      in_axis: the axis of `w` that keys are summed over.

    Returns:
      An array like `w`, computed in float32 or wider.

    Raises:
      ValueError: shapes that do not fit; C singular, ridge included, or keys that depend on each
        other (if the values are known; under jit, what comes out is NaN or large).

    Reference: D. Bau, S. Liu, T. Wang, J.-Y. Zhu, A. Torralba, "Rewriting a Deep Generative Model",
    arXiv:2007.15646. (Of several pairs, there is no closed form in it.)

    >>> w = rewrite(jnp.zeros((2, 1)), jnp.eye(2), jnp.array([1.0, 0.0]), jnp.array([5.0]))
    >>> w.tolist()
    [[5.0], [0.0]]
    """
    matrix, fold = _matrix(w, in_axis)
    _check_keys(keys, w, in_axis)
    rest = jnp.shape(jnp.moveaxis(w, in_axis, 0))[1:]
    if jnp.ndim(keys) > 2 or jnp.shape(values) != jnp.shape(keys)[:-1] + rest:
        raise ValueError(
            f"for keys {jnp.shape(keys)}, one or a row each, values "
            f"{(*jnp.shape(keys)[:-1], *rest)} are due, and {jnp.shape(values)} came"
        )
    k = tree.float32(jnp.asarray(keys)).reshape(-1, len(matrix))
    if len(k) > len(matrix):
        raise ValueError(f"{len(k)} keys of size {len(matrix)} depend on each other")
    v = tree.float32(jnp.asarray(values)).reshape(len(k), -1)
    lower = _cholesky(covariance, ridge, len(matrix))
    white = solve_triangular(lower, k.T, lower=True)  # K D = white' white
    basis, small = jnp.linalg.qr(white)
    pivots, lengths = jnp.abs(jnp.diagonal(small)), jnp.linalg.norm(small, axis=0)
    _check_pivots(pivots, lengths, f"the {len(k)} keys depend on each other")
    # D (K D)^-1: all that is solved is (in, n), so that a sharded kernel stays where it is
    steps = solve_triangular(lower.T, solve_triangular(small, basis.T, lower=False).T, lower=False)
    return fold(matrix + _dot(steps, v - _dot(k, matrix))).astype(w.dtype)


def edit_directions(
    covariance: Float[Array, "in in"],
    keys: Inexact[Array, "n in"],
    *,
    rank: int = 1,
    ridge: float | Array = 1e-4,
) -> Float[Array, "in rank"]:
    """Return the directions in which an edit changes the answers to a context, and little else.

    C^-1/2 times the first singular vectors of the whitened keys K C^-1/2, made orthonormal. For one
    key and rank 1 it is C^-1 k, the direction of `rewrite`. (Any root of C gives the same, and this
    is the one of Cholesky.) What has no closed form, many answers or answers that go on through
    further layers, is trained and kept within these directions by `confine`.

    Args:
      covariance: of the keys that are to keep their answers (`second_moment`).
      keys: of the context; times their weights, if they have some.
      rank: how many directions.
      ridge: as in `rewrite`.

    Returns:
      Orthonormal columns, each with the sign that agrees with the mean key; float32 or wider.

    Raises:
      ValueError: shapes that do not fit, a rank above the number of keys or their size, singular C.

    Reference: D. Bau et al., "Rewriting a Deep Generative Model", arXiv:2007.15646. (Its code has a
    floor for eigenvalues in place of the ridge.)

    >>> d = edit_directions(jnp.diag(jnp.array([1.0, 4.0])), jnp.array([[3.0, 16.0]]), ridge=0)
    >>> [round(x, 4) for x in d[:, 0].tolist()]  # (3, 16 / 4) of length 1
    [0.6, 0.8]
    """
    if jnp.ndim(keys) != 2 or not 1 <= rank <= min(jnp.shape(keys)):
        raise ValueError(f"keys (n, in) of rank {rank} or more are due, and {jnp.shape(keys)} came")
    k = tree.float32(jnp.asarray(keys))
    lower = _cholesky(covariance, ridge, k.shape[1])
    white = solve_triangular(lower, k.T, lower=True)
    first = jnp.linalg.svd(white, full_matrices=False)[0][:, :rank]
    basis = jnp.linalg.qr(solve_triangular(lower.T, first, lower=False))[0]
    return basis * jnp.where(_dot(k.mean(0), basis) < 0, -1, 1)


def confine(
    w: Inexact[Array, "*kernel"],
    start: Inexact[Array, "*kernel"],
    directions: Float[Array, "in rank"],
    *,
    in_axis: int = -2,
) -> Inexact[Array, "*kernel"]:
    """Project what training added to a kernel onto the directions: W_0 + D D' (W - W_0).

    After it, keys that are orthogonal to all directions have their old answers. The paper trains
    with Adam (learning rate 0.05, mean absolute error) and does this every ten steps and at the
    end::

        params = optax.apply_updates(params, updates)
        edited = lambda w: jnp.where(step % 10 == 9, confine(w, start, directions), w)
        params = tree.map(lambda path, w: edited(w), params, where="conv5/kernel")

    Args:
      w: the kernel.
      start: the kernel before training.
      directions: orthonormal columns (`edit_directions`).
      in_axis: the axis of `w` that keys are summed over; every place of a window is projected.

    Returns:
      An array like `w`.

    Raises:
      ValueError: shapes that do not fit.

    Reference: D. Bau et al., "Rewriting a Deep Generative Model", arXiv:2007.15646.

    >>> confine(jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.array([[0.0], [1.0]])).tolist()
    [[0.0], [1.0]]
    """
    if jnp.shape(w) != jnp.shape(start):
        raise ValueError(f"the kernel is {jnp.shape(w)}, and its start {jnp.shape(start)}")
    _check_keys(directions.T, w, in_axis)
    (now, fold), (before, _) = _matrix(w, in_axis), _matrix(start, in_axis)
    d = tree.float32(directions)
    return fold(before + _dot(d, _dot(d.T, now - before))).astype(w.dtype)


# ------------------------------------------------------------------------------------ algebra


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _matrix(w: Array, in_axis: int) -> tuple[Array, Callable[[Array], Array]]:
    """Return the kernel as (in, everything else), and the function that puts it back."""
    if not -jnp.ndim(w) <= in_axis < jnp.ndim(w):
        raise ValueError(f"in_axis={in_axis} is no axis of a kernel of shape {jnp.shape(w)}")
    first = jnp.moveaxis(tree.float32(jnp.asarray(w)), in_axis, 0)
    back = lambda m: jnp.moveaxis(m.reshape(first.shape), 0, in_axis)
    return first.reshape(len(first), math.prod(first.shape[1:])), back


def _check_keys(keys: Array, w: Array, in_axis: int) -> None:
    if jnp.shape(keys)[-1:] != (jnp.shape(w)[in_axis],):
        raise ValueError(
            f"keys are what the layer is given, of size {jnp.shape(w)[in_axis]} (axis {in_axis} "
            f"of the kernel {jnp.shape(w)}), and {jnp.shape(keys)} came"
        )


def _cholesky(covariance: Array, ridge: float | Array, size: int) -> Array:
    if jnp.shape(covariance) != (size, size):
        raise ValueError(
            f"a covariance of keys of size {size} is due, and {jnp.shape(covariance)} came"
        )
    c = tree.float32(jnp.asarray(covariance))
    c = c + ridge * jnp.trace(c) / size * jnp.eye(size, dtype=c.dtype)
    lower = jnp.linalg.cholesky(c)
    squares = jnp.diagonal(lower) ** 2
    _check_pivots(squares, jnp.diagonal(c), f"the covariance is singular (with ridge={ridge})")
    return lower


def _check_pivots(pivots: Array, whole: Array, what: str) -> None:
    """Raise if rounding is all that is left of a pivot, relative to the row that it is of."""
    fine = (pivots > 8 * jnp.finfo(pivots.dtype).eps * whole).all()
    if tree.concrete(fine) and not fine:
        raise ValueError(what)
