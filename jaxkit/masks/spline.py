"""Redundant units of piecewise affine networks: those whose boundary lies on another's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit.masks.unit_scores import unit_matrices

__all__ = ["fold_norm", "hyperplanes", "spline"]

Planes = Mapping[str, tuple[Float[Array, "units n"], Float[Array, " units"]]]


def hyperplanes(params: PyTree, axes: PyTree, roles: PyTree) -> Planes:
    """Return the boundaries of units: {axis: (weights (units, n), biases (units,))}.

    Only for axes that one kernel produces: a unit of a residual stream has no one boundary.

    Args:
      params: a tree of arrays.
      axes: its axes tree.
      roles: its roles.

    Raises:
      ValueError: such an axis has a gain: fold the normalization into kernel and bias first
        (`fold_norm`).

    >>> from jaxkit import trace
    >>> params = {"w": jnp.ones((3, 2)), "b": jnp.array([0.0, 1.0]), "v": jnp.ones((2, 1))}
    >>> net = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]
    >>> x = jnp.ones((1, 3))
    >>> planes = hyperplanes(params, trace.axes(net, params, x), trace.roles(net, params, x))
    >>> {name: (w.shape, b.tolist()) for name, (w, b) in planes.items()}
    {'w:1': ((2, 3), [0.0, 1.0])}
    """
    kinds = jax.tree.structure(params).flatten_up_to(roles)
    of_kind = lambda kind: {
        path: leaf
        for (path, leaf), role in zip(tree.flatten(params).items(), kinds, strict=True)
        if role.kind == kind
    }
    rows = lambda path: unit_matrices(params, axes, None, where=lambda p, _: p == path)
    produced = {
        path: unit_matrices(params, axes, roles, where=lambda p, _, path=path: p == path)
        for path in of_kind("kernel")
    }
    makers: dict[str, list[str]] = {}
    for path, found in produced.items():
        for name in found:
            makers.setdefault(name, []).append(path)
    single = {name: paths[0] for name, paths in makers.items() if len(paths) == 1}
    for path in of_kind("gain"):
        for name in rows(path).keys() & single.keys():
            raise ValueError(
                f"axis {name!r} has the gain {path!r}: fold the normalization into the kernel and "
                "the bias first (fold_norm)"
            )
    biases = [rows(path) for path in of_kind("bias")]
    planes = {}
    for name, path in single.items():
        w = produced[path][name]
        own = [b[name].sum(1) for b in biases if name in b]
        planes[name] = (w, sum(own, jnp.zeros(len(w), w.dtype)))
    return planes


def fold_norm(
    kernel: Float[Array, "... units"],
    scale: Float[Array, " units"],
    bias: Float[Array, " units"],
    mean: Float[Array, " units"],
    var: Float[Array, " units"],
    *,
    kernel_bias: Float[Array, " units"] | float = 0.0,
    epsilon: float = 1e-5,
) -> tuple[Float[Array, "... units"], Float[Array, " units"]]:
    """Fold a BatchNorm with running statistics into the layer before it: its kernel and bias.

    W' = W gamma / sigma and b' = beta + (b - mu) gamma / sigma, sigma = sqrt(var + epsilon).

    >>> one = jnp.ones(1)
    >>> fold_norm(2 * jnp.ones((1, 1)), 3 * one, one, one, 4 * one, epsilon=0.0)
    (Array([[3.]], dtype=float32), Array([-0.5], dtype=float32))
    """
    gain = scale / jnp.sqrt(var + epsilon)
    return kernel * gain, bias + (kernel_bias - mean) * gain


def spline(
    planes: Planes, *, bias_weight: float | Array = 1.0
) -> dict[str, Float[Array, " units"]]:
    """Score a unit by how far its boundary lies from that of the nearest unit that stays longer.

    Of each layer the closest pair is taken again and again, by

        D(k, k') = 1 - |<w_k, w_k'>| / (|w_k| |w_k'|) + bias_weight |b_k / |w_k| - s b_k' / |w_k'||

    with s the sign of <w_k, w_k'>, and the member with the smaller norm (the later one, if equal)
    leaves with the score D. The least distance of what remains never falls, so that the lowest
    scores left first; the last unit has the score inf. O(units^3) for each layer.

    A unit whose weights are all zero has no boundary: it bends the network nowhere, and leaves with
    the score 0, as a twin does. (If its bias is positive, what it puts out is a constant, which
    belongs in the bias of the next layer.)

    Args:
      planes: `hyperplanes`.
      bias_weight: lambda.

    Reference: H. You, R. Balestriero, Z. Lu, Y. Kou, H. Shi, S. Zhang, S. Wu, Y. Lin, R. Baraniuk,
    "Max-Affine Spline Insights Into Deep Network Pruning", arXiv:2101.02338. (How biases
    are normalized, and which twin goes, are choices made here.)

    >>> w, b = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), jnp.array([1.0, 0.0, 2.0])
    >>> spline({"hidden": (w, b)})["hidden"].tolist()
    [0.0, 2.0, inf]
    """
    return {name: _removal(w, b, bias_weight) for name, (w, b) in planes.items()}


def _removal(w: Array, b: Array, bias_weight: Any) -> Array:
    norm = jnp.sqrt(jnp.sum(w**2, 1))
    none = norm == 0  # no boundary
    safe = jnp.where(none, 1, norm)
    unit, shift = w / safe[:, None], b / safe
    cosine = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    side = jnp.where(cosine < 0, -1, 1)
    far = jnp.maximum(1 - jnp.abs(cosine), 0)
    far = far + bias_weight * jnp.abs(shift[:, None] - side * shift[None])
    far = jnp.where(none[:, None] | none, 0, far)
    n = len(w)
    far = jnp.where(jnp.eye(n, dtype=bool), jnp.inf, far)

    def leave(state, _):
        far, scores = state
        i, j = jnp.divmod(jnp.argmin(far), n)
        gone = jnp.where(norm[i] < norm[j], i, j)  # i < j
        scores = scores.at[gone].set(far[i, j])
        return (far.at[gone].set(jnp.inf).at[:, gone].set(jnp.inf), scores), None

    scores = jnp.full(n, jnp.inf, far.dtype)
    return jax.lax.scan(leave, (far, scores), None, max(n - 1, 0))[0][1]
