"""What each leaf does in an apply function, and what each of its dimensions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxkit.trace.axes import run

__all__ = ["Role", "roles"]


class Role(NamedTuple):
    """What a leaf does.

    kind: "kernel" (contracted with data), "bias" (added), "gain" (multiplied), "embedding" (looked
      up) or "other".
    dims: per dimension "consumed" (contracted or looked up), "produced" (it becomes a dimension of
      the result) or None (a tap of a convolution, a batch dimension of the contraction).
    """

    kind: str
    dims: tuple[str | None, ...]


def roles(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> PyTree:
    """Find what each leaf does: the first operation in which it meets data decides.

    On the way to it a leaf may be cast, transposed, reshaped, or combined with other leaves (the
    running variance of a BatchNorm is a gain, since its inverse root is multiplied). Between two
    leaves that are multiplied before they meet data, the contracted dimension is produced by the
    first and consumed by the second. A tied embedding is an embedding.

    Args:
      apply_fn: `apply_fn(params, *args)`, as for `axes`.
      params: a tree of arrays, or of their shapes.
      *args: arrays, or their shapes.

    Returns:
      A tree like params of `Role`.

    Raises:
      TypeError: as for `axes`.

    >>> import jax.numpy as jnp
    >>> params = {"b": jnp.ones(5), "w": jnp.ones((3, 5))}
    >>> found = roles(lambda p, x: x @ p["w"] + p["b"], params, jnp.ones((4, 3)))
    >>> found["w"]
    Role(kind='kernel', dims=('consumed', 'produced'))
    >>> found["b"]
    Role(kind='bias', dims=('produced',))
    """
    trace = run(apply_fn, params, args)
    found = []
    for i, leaf in enumerate(trace.leaves.values()):
        dims = tuple(trace.state.roles.get((i, d)) for d in range(np.ndim(leaf)))
        kind = trace.state.kinds.get(i, "other")
        if kind == "kernel" and "consumed" not in dims:
            kind = "other"  # learned queries: contracted with a kernel, as data are
        found.append(Role(kind, dims))
    return jax.tree.unflatten(jax.tree.structure(params), found)
