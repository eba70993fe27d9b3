"""A kernel of any layout as a stack of matrices: what the structured initializers share."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Axes = int | Sequence[int]
Field = Callable[[Any, tuple[int, ...], int, int, Any], Float[Array, "*taps fan_in fan_out"]]


def _positive(axes: Axes, ndim: int, shape: Sequence[int]) -> list[int]:
    axes = [axes] if isinstance(axes, int) else list(axes)
    if any(not -ndim <= axis < ndim for axis in axes):
        raise ValueError(f"axes {axes} are not all axes of the shape {tuple(shape)}")
    return [axis % ndim for axis in axes]


def initializer(
    field: Field,
    *,
    in_axis: Axes = -2,
    out_axis: Axes = -1,
    batch_axis: Axes = (),
    groups: int = 1,
):
    """Return ``init(key, shape, dtype, out_sharding)`` that lays `field` out in any kernel.

    ``field(key, taps, fan_in, fan_out, dtype)`` returns an array ``(*taps, fan_in, fan_out)``,
    where `taps` are the sizes of the axes that are neither in, out nor batch. It is called once for
    each batch entry and each group of output channels, under vmap, with float32 or wider.
    """
    if groups < 1:
        raise ValueError(f"groups={groups}: at least one group is due")

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def lay_out(key, shape, dtype, out_sharding):
        named = (in_axis, out_axis, batch_axis)
        ins, outs, batch = (_positive(axes, len(shape), shape) for axes in named)
        if len({*ins, *outs, *batch}) < len(ins) + len(outs) + len(batch):
            raise ValueError(
                f"in_axis={in_axis}, out_axis={out_axis} and batch_axis={batch_axis} overlap in "
                f"the shape {shape}"
            )
        spatial = [axis for axis in range(len(shape)) if axis not in (*ins, *outs, *batch)]
        order = [*batch, *spatial, *ins, *outs]
        taps = tuple(shape[axis] for axis in spatial)
        fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in (ins, outs))
        if fan_out % groups:
            raise ValueError(f"{groups} groups do not divide the {fan_out} outputs of {shape}")

        def draw(key):
            wide = jnp.promote_types(dtype, jnp.float32)
            return field(key, taps, fan_in, fan_out // groups, wide)

        stack = math.prod(shape[axis] for axis in batch) * groups
        if math.prod(shape) == 0:
            kernel = jnp.zeros(0)
        elif stack == 1:
            kernel = draw(key)
        else:
            kernel = jax.vmap(draw)(jax.random.split(key, stack))
            kernel = kernel.reshape(-1, groups, *taps, fan_in, fan_out // groups)
            kernel = jnp.moveaxis(kernel, 1, -2)
        kernel = kernel.reshape([shape[axis] for axis in order])
        kernel = jnp.transpose(kernel, [order.index(axis) for axis in range(len(shape))])
        kernel = kernel.astype(dtype)
        return kernel if out_sharding is None else jax.sharding.reshard(kernel, out_sharding)

    def init(
        key: PRNGKeyArray, shape: Sequence[int], dtype: Any = None, out_sharding: Any = None
    ) -> Array:
        dtype = jnp.zeros(()).dtype if dtype is None else jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"a float dtype is due, and {dtype} came")
        if len(shape) < 2:
            raise ValueError(f"a kernel of two or more dimensions is due, and {tuple(shape)} came")
        return lay_out(key, tuple(shape), dtype, out_sharding)

    return init
