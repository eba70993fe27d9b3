"""Scaled weight standardization: kernels with mean 0 and norm `gain`, on every forward pass."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxkit import tree

__all__ = ["signal_moments", "standardize", "standardized", "unit_gains"]


def standardize(
    w: Float[Array, "*shape"],
    gain: Float[Array, "*channels"] | None = None,
    *,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    eps: float = 1e-4,
) -> Float[Array, "*shape"]:
    """Return the kernel with mean 0 and sum of squares ``gain^2`` over each output channel.

    With mean and population variance over all axes but `out_axis` and `batch_axis`, and N the
    number of entries there (in a grouped convolution, those of the group alone)::

        w_hat = gain * (w - mean) / sqrt(max(N * var, eps))

    `eps` is the floor of a maximum and is not added: the sum of squares is exactly ``gain^2`` above
    it, and a constant kernel gives zeros, with finite gradients. Because the mean of a kernel
    meets the positive mean of a relu no more, the variance of the output is that of the
    activation. It is a map of every forward pass, not of the start alone; the scale of `w` does
    not matter, so that weight decay of `w` changes nothing but the effective learning rate. The
    embedding and the classifier are left as they are. (``flax.linen.WeightNorm`` does not remove
    the mean.)

    Args:
      w: a kernel; its statistics are accumulated in float32 or wider.
      gain: one factor per output channel, trained; 1 unless given.
      out_axis: the output axis or axes.
      batch_axis: axes over which kernels are stacked (a scan over layers).
      eps: the floor of ``N * var``.

    Returns:
      A kernel of the shape and dtype of `w`.

    Raises:
      ValueError: no axis is left to standardize over, or a gain of another shape.

    >>> w = standardize(jax.random.normal(jax.random.key(0), (3, 3, 4, 2)))
    >>> bool(jnp.allclose((w**2).sum((0, 1, 2)), 1.0)), bool(jnp.allclose(w.mean((0, 1, 2)), 0.0))
    (True, True)

    Reference: Andrew Brock, Soham De, Samuel L. Smith, "Characterizing signal propagation to close
    the performance gap in unnormalized ResNets", arXiv 2101.08692.
    """
    kept = [*_axes(out_axis, w.ndim), *_axes(batch_axis, w.ndim)]
    over = tuple(axis for axis in range(w.ndim) if axis not in kept)
    if not over:
        raise ValueError(f"no axis of the shape {w.shape} is left to standardize over")
    wide = tree.float32(w)
    centred = wide - wide.mean(over, keepdims=True)
    centred = centred - centred.mean(over, keepdims=True)  # what the rounding of the mean left
    size = math.prod(w.shape[axis] for axis in over)
    scale = jax.lax.rsqrt(jnp.maximum(size * jnp.square(centred).mean(over, keepdims=True), eps))
    if gain is not None:
        due = _gain_shape(w.shape, out_axis, batch_axis)
        if jnp.shape(gain) != due:
            raise ValueError(f"a gain of shape {due} is due, and {jnp.shape(gain)} came")
        scale = scale * jnp.expand_dims(gain, over)
    return (centred * scale).astype(w.dtype)


def _axes(axes: int | Sequence[int], ndim: int) -> list[int]:
    return [axis % ndim for axis in ([axes] if isinstance(axes, int) else axes)]


def _gain_shape(shape, out_axis, batch_axis) -> tuple[int, ...]:
    kept = sorted([*_axes(out_axis, len(shape)), *_axes(batch_axis, len(shape))])
    return tuple(shape[axis] for axis in kept)


def unit_gains(
    params: PyTree,
    *,
    where: tree.Where,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
) -> dict[str, Float[Array, "*channels"]]:
    """Return the gains of `standardized` at their start: ones, by the path of their kernel.

    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
    >>> {path: gain.shape for path, gain in unit_gains(params, where="conv/kernel").items()}
    {'conv/kernel': (4,)}
    """
    chosen = tree.flatten(tree.select(params, where))
    return {
        path: jnp.ones(_gain_shape(leaf.shape, out_axis, batch_axis), leaf.dtype)
        for path, leaf in tree.flatten(params).items()
        if chosen[path]
    }


def standardized(
    gains: dict[str, Float[Array, "*channels"]],
    params: PyTree,
    *,
    where: tree.Where,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    eps: float = 1e-4,
) -> PyTree:
    """Return params with `standardize` applied to the leaves that `where` chooses.

    Call it inside the loss, and train `gains` and `params` together::

        loss = lambda gains, params: f(standardized(gains, params, where="**/Conv_*/kernel"))

    `where` has no default: the classifier must not be among the leaves.

    Args:
      gains: by path, from `unit_gains`.
      params: any tree.
      where: chooses the kernels.
      out_axis: see `standardize`.
      batch_axis: see `standardize`.
      eps: see `standardize`.

    Raises:
      ValueError: gains whose paths are not those that `where` chooses, or of another shape.

    >>> params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 2, 4))}}
    >>> gains = unit_gains(params, where="conv/kernel")
    >>> kernel = standardized(gains, params, where="conv/kernel")["conv"]["kernel"]
    >>> bool(jnp.allclose((kernel**2).sum((0, 1, 2)), 1.0))
    True

    Reference: Andrew Brock, Soham De, Samuel L. Smith, "Characterizing signal propagation to close
    the performance gap in unnormalized ResNets", arXiv 2101.08692.
    """
    chosen = set(tree.chosen(params, where))
    if chosen != set(gains):
        raise ValueError(
            f"the gains are not those of where={where!r}: {sorted(chosen ^ set(gains))} are in one "
            "of the two only"
        )

    def leaf(path, w):
        try:
            return standardize(w, gains[path], out_axis=out_axis, batch_axis=batch_axis, eps=eps)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None

    return tree.map(leaf, params, where=where)


def signal_moments(x: Float[Array, "*batch channels"]) -> dict[str, Float[Array, ""]]:
    """Return the two figures of a signal-propagation plot, of one activation.

    With mean and variance over all axes but the last, and averages over the channels::

        avg_sq_mean = mean_c(mean(x)^2),    avg_var = mean_c(var(x))

    Under `jax.shard_map` or `jax.pmap` they are those of the local batch.

    >>> {name: float(v) for name, v in signal_moments(jnp.array([[1.0, 2.0], [3.0, 2.0]])).items()}
    {'avg_sq_mean': 4.0, 'avg_var': 0.5}

    Reference: Andrew Brock, Soham De, Samuel L. Smith, "Characterizing signal propagation to close
    the performance gap in unnormalized ResNets", arXiv 2101.08692.
    """
    over = tuple(range(x.ndim - 1))
    x = tree.float32(x)
    return {"avg_sq_mean": jnp.square(x.mean(over)).mean(), "avg_var": x.var(over).mean()}
