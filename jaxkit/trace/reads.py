"""What is read along an axis: the activations that the consumers of its units get."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxkit.trace.names import Entry, pairs, resolve
from jaxkit.trace.taps import Tap, taps

__all__ = ["Read", "reads"]


class Read(NamedTuple):
    """An input of an operation, one dimension of which runs along axes.

    Attributes:
      path: the leaf that the input meets.
      entry: what the dimension is: an `Axis`, or a `Prod` or `Concat` of some.
      axis: which dimension of ``tap.input`` it is, counted from the end (negative).
      tap: the operation's input and output.
    """

    path: str
    entry: Entry
    axis: int
    tap: Tap


def reads(
    apply_fn: Callable[..., Any], params: PyTree, args: tuple, axes: PyTree, roles: PyTree
) -> list[Read]:
    """Return what kernels read along axes: activations after the nonlinearity, unit by unit.

    Args:
      apply_fn: ``apply_fn(params, *args)``, as it predicts.
      params: a tree of arrays.
      args: the further arguments, a tuple: ``(x,)``.
      axes: the axes tree of params.
      roles: their roles.

    Raises:
      ValueError: no kernel consumes an axis, or an axes tree that does not fit.

    >>> import jax.numpy as jnp
    >>> from jaxkit import trace
    >>> params = {"w": jnp.array([[1.0, -1.0]]), "v": jnp.ones((2, 1))}
    >>> net, x = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"], jnp.array([[3.0]])
    >>> found = reads(net, params, (x,), trace.axes(net, params, x), trace.roles(net, params, x))
    >>> [(r.path, r.entry.name, r.axis, r.tap.input.tolist()) for r in found]
    [('v', 'w:1', -1, [[3.0, 0.0]])]
    """
    axes = resolve(params, axes)
    kinds = jax.tree.structure(params).flatten_up_to(roles)
    consumers = {
        path: [
            (d, e) for d, e in enumerate(entries) if e is not None and kind.dims[d] == "consumed"
        ]
        for (path, _, entries), kind in zip(pairs(params, axes), kinds, strict=True)
        if kind.kind == "kernel"
    }
    consumers = {path: dims for path, dims in consumers.items() if dims}
    if not consumers:
        raise ValueError("no kernel consumes an axis: there are no activations to read")
    _, tapped = taps(apply_fn, lambda path, _: path in consumers)(params, *args)
    return [
        Read(path, entry, use.x_axes[d], use)  # type: ignore[arg-type]
        for path, tap in tapped.items()
        for use in (tap, *tap.later)
        for d, entry in consumers[path]
        if use.x_axes[d] is not None
    ]
