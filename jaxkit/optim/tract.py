"""TrAct: a gradient that moves the first layer's activations, not its weights."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["tract"]


def tract(
    grad: Inexact[Array, "*kernel out"],
    inputs: Inexact[Array, "batch *in"],
    *,
    damping: float | Array = 0.1,
    strides: Sequence[int] | None = None,
    padding: Any = "SAME",
    axis_name: str | None = None,
) -> Inexact[Array, "*kernel out"]:
    """Replace the gradient of the first layer by one that realizes a step of its activations.

    G' = (X' X / b + damping I)^-1 G, the ridge regression of a gradient step on Z = X W: with X the
    b rows of inputs (all positions of all examples; the patches of a convolution). Other leaves
    keep their gradients, and the optimizer takes G' as if it were the gradient::

        grads["Conv_0"]["kernel"] = optim.tract(grads["Conv_0"]["kernel"], images)

    Args:
      grad: of the kernel, (in, out) of a dense layer or (*window, in, out) of a convolution.
      inputs: what the layer was given, (..., in), with leading axes (examples, positions); of a
        convolution (examples, *space, channels).
      damping: lambda > 0. The larger, the nearer to grad / lambda. Inputs are to be normalized: of
        pixels up to 255, X' X / b swamps it.
      strides, padding: of the convolution (default: 1 and "SAME").
      axis_name: average X' X over this axis of pmap or shard_map, on whose mean the gradient is.

    Returns:
      An array like `grad`, in its dtype.

    Warns:
      UserWarning: inputs with a mean square above 100 (where it is known: not under jit).

    Raises:
      ValueError: damping not above 0, or inputs that do not fit the kernel.

    Reference: F. Petersen, C. Borgelt, S. Ermon, "TrAct: Making First-layer Pre-Activations
    Trainable", arXiv:2410.23970.

    >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> tract(jnp.ones((2, 1)), x, damping=0.5).ravel().tolist()  # 1 / (2 + 0.5), 1 / (0.5 + 0.5)
    [0.4000000059604645, 1.0]
    """
    if violates(lambda d: d > 0, damping):
        raise ValueError(f"damping={damping}, and a number above 0 was due")
    window, size = grad.shape[:-2], grad.shape[-2]
    if inputs.shape[-1] != size or (window and inputs.ndim != len(window) + 2):
        raise ValueError(f"inputs of shape {inputs.shape} do not fit a kernel {grad.shape}")
    x = tree.float32(inputs)
    if window:
        n = len(window)
        numbers = jax.lax.conv_dimension_numbers(
            x.shape, grad.shape, (f"N{'XYZ'[:n]}C", f"{'XYZ'[:n]}IO", f"N{'XYZ'[:n]}C")
        )
        x = jax.lax.conv_general_dilated_patches(
            x, window, strides or (1,) * n, padding, dimension_numbers=numbers
        )
        # channels come before the window there, and after it in the kernel
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], size, -1), -2, -1)
    rows: Float[Array, "rows n"] = x.reshape(-1, grad[..., 0].size)
    second = rows.T @ rows / len(rows)
    if axis_name is not None:
        second = jax.lax.pmean(second, axis_name)
    if violates(lambda c: ~(c > 100), jnp.trace(second) / len(second)):
        warnings.warn(
            "the mean square of the inputs is above 100, against which the damping is nothing: "
            "normalize them",
            stacklevel=2,
        )
    flat = tree.float32(grad).reshape(-1, grad.shape[-1])
    damped = second + damping * jnp.eye(len(second), dtype=second.dtype)
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), flat)
    return solved.reshape(grad.shape).astype(grad.dtype)
