"""Augmentations of networks that are data: other weights of the same meaning.

Each is ``(key, params, ...) -> params``, of one network; `jax.vmap` it over keys and networks. They
are for whatever learns from weights (`jaxkit.nn.equivariant_apply`, say), above all from those of
implicit representations f(z), images as functions of a position.

* Symmetries, which leave the function what it is: `permuted_units`, `flipped_signs`,
  `shifted_phases` (in `jaxkit.data.weight_symmetry`).
* Of the input of f: `rotated_inputs`, `translated_inputs`, `scaled_inputs`.
* Of the numbers: `noisy_weights`, `dropped_weights`, `trimmed_weights`.
* Of two networks and their labels: `weight_mixup`. (Labels alone: `optax.smooth_labels`.)

Reference: A. Shamsian, D. W. Zhang, A. Navon, Y. Zhang, M. Kofinas, I. Achituve, R. Valperga, G. J.
Burghouts, E. Gavves, C. G. M. Snoek, E. Fetaya, G. Chechik, H. Maron, "Data Augmentations in Deep
Weight Spaces", arXiv:2311.08851.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import trace, tree, weights
from jaxkit._known import violates
from jaxkit.data.weight_symmetry import permuted_units

Number = float | Float[Array, ""]

__all__ = [
    "dropped_weights",
    "noisy_weights",
    "rotated_inputs",
    "scaled_inputs",
    "translated_inputs",
    "trimmed_weights",
    "weight_mixup",
]


def _key(key: PRNGKeyArray, tag: str) -> PRNGKeyArray:
    return tree.keys(key, {"network": 0}, tag)["network"]


# ------------------------------------------------------------------------------- of the input


def rotated_inputs(
    key: PRNGKeyArray,
    params: PyTree,
    where: tree.Where,
    *,
    degrees: Number = 30.0,
    axis: int = 0,
) -> PyTree:
    """Rotate the plane that f is of: R W for all kernels of the input, so that f'(z) = f(z R).

    R = ((cos, -sin), (sin, cos)) of an angle uniform in [-degrees, degrees].

    Args:
      key: a typed key.
      params: a network of a 2-dimensional input.
      where: the kernels that the input meets: most often one, by its path.
      degrees: the largest angle, maybe traced.
      axis: the dimension of the kernels along the input: 0 of (in, out), 1 of (out, in).

    Raises:
      ValueError: an input that is not 2-dimensional, naming the leaf, or a `where` of no leaf.
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> params = {"w": jnp.array([[3.0], [4.0]])}
    >>> float(jnp.linalg.norm(rotated_inputs(jax.random.key(0), params, "w")["w"]))
    5.0
    """
    own = _key(key, "rotated inputs")
    angle = jnp.deg2rad(degrees) * jax.random.uniform(own, minval=-1.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.array([[cos, -sin], [sin, cos]])

    def rotate(path: str, w: Array) -> Array:
        if w.ndim <= axis or w.shape[axis] != 2:
            raise ValueError(
                f"{path!r} is {w.shape}, and 2 inputs were due along dimension {axis}: only a "
                "plane is rotated"
            )
        turned = jnp.tensordot(rotation, tree.float32(w), (1, axis))
        return jnp.moveaxis(turned, 0, axis).astype(w.dtype)

    return tree.map(rotate, params, where=where)


def translated_inputs(
    key: PRNGKeyArray,
    params: PyTree,
    kernel: str,
    bias: str,
    *,
    scale: Number = 0.25,
    axis: int = 0,
) -> PyTree:
    """Translate the space that f is of: b + t W, so that f'(z) = f(z + t).

    t is uniform in [-scale, scale] in every dimension. (The authors' code moves the bias of a
    random layer instead, by t W W' ..., which is a translation for the first layer alone: this.)

    Args:
      key: a typed key.
      params: a network.
      kernel, bias: the paths of W and b, the first layer.
      scale: the largest shift, maybe traced.
      axis: the dimension of the kernel along the input: 0 of (in, out), 1 of (out, in).

    Raises:
      ValueError: a path that is no leaf's, or a bias that does not fit the kernel.
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> params = {"w": jnp.array([[1.0, 2.0]]), "b": jnp.zeros(2)}
    >>> b = translated_inputs(jax.random.key(0), params, "w", "b")["b"]
    >>> bool(b[1] == 2 * b[0]), bool(abs(b[0]) < 0.25)
    (True, True)
    """
    (w,) = tree.chosen(params, kernel).values()
    own = _key(key, "translated inputs")
    t = scale * jax.random.uniform(own, (w.shape[axis],), minval=-1.0)
    shift = jnp.tensordot(t, tree.float32(w), (0, axis))

    def move(path: str, b: Array) -> Array:
        if b.shape != shift.shape:
            raise ValueError(f"{path!r} is {b.shape}, and {shift.shape} was due for {kernel!r}")
        return (b + shift).astype(b.dtype)

    return tree.map(move, params, where=bias)


def scaled_inputs(
    key: PRNGKeyArray, params: PyTree, where: tree.Where, *, scale: Number = 0.2
) -> PyTree:
    """Scale the space that f is of: s W for all kernels of the input, so that f'(z) = f(s z).

    s is uniform in [1 - scale, 1 + scale].

    Args:
      key: a typed key.
      params: a network.
      where: the kernels that the input meets: most often one, by its path.
      scale: the largest change, maybe traced.

    Raises:
      ValueError: a `where` of no leaf.
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> w = scaled_inputs(jax.random.key(0), {"w": jnp.ones((1, 2))}, "w")["w"]
    >>> bool((w > 0.8).all() and (w < 1.2).all() and w[0, 0] == w[0, 1])
    True
    """
    s = 1 + scale * jax.random.uniform(_key(key, "scaled inputs"), minval=-1.0)
    return tree.map(lambda path, w: (s * w).astype(w.dtype), params, where=where)


# ------------------------------------------------------------------------------- of the numbers


def noisy_weights(
    key: PRNGKeyArray, params: PyTree, *, scale: Number = 0.32, where: tree.Where = "**"
) -> PyTree:
    """Add noise: W + scale std(W) n, n normal, std that of the leaf's entries.

    Args:
      key: a typed key.
      params: a network.
      scale: maybe traced.
      where: the leaves; default: every float leaf. (A leaf of equal entries stays as it is.)

    Raises:
      ValueError: a `where` of no leaf.
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> noisy_weights(jax.random.key(0), {"w": jnp.ones(2)})["w"].tolist()
    [1.0, 1.0]
    """

    def add(path: str, w: Array, key: PRNGKeyArray) -> Array:
        x = tree.float32(w)
        std = x.std() if w.size else 0.0
        return (x + scale * std * jax.random.normal(key, w.shape, x.dtype)).astype(w.dtype)

    return tree.map(add, params, tree.keys(key, params, "noisy weights"), where=where)


def dropped_weights(
    key: PRNGKeyArray, params: PyTree, *, rate: Number = 0.1, where: tree.Where = "**"
) -> PyTree:
    """Drop entries with probability `rate`, and divide the others by 1 - rate.

    Args:
      key: a typed key.
      params: a network.
      rate: in [0, 1), maybe traced.
      where: the leaves; default: every float leaf.

    Raises:
      ValueError: a rate outside [0, 1) (if it is known), or a `where` of no leaf.
      TypeError: a legacy uint32 key.

    Reference: the module's.

    >>> dropped = dropped_weights(jax.random.key(0), {"w": jnp.ones(1000)}, rate=0.5)["w"]
    >>> sorted(set(dropped.tolist()))
    [0.0, 2.0]
    """
    if violates(lambda r: (r >= 0) & (r < 1), rate):
        raise ValueError(f"rate={rate}, and a probability in [0, 1) was due")

    def drop(path: str, w: Array, key: PRNGKeyArray) -> Array:
        kept = jax.random.bernoulli(key, 1 - jnp.asarray(rate), w.shape)
        return jnp.where(kept, w / (1 - rate), 0).astype(w.dtype)

    return tree.map(drop, params, tree.keys(key, params, "dropped weights"), where=where)


def trimmed_weights(
    key: PRNGKeyArray, params: PyTree, *, largest: Number = 0.1, where: tree.Where = "**"
) -> PyTree:
    """Set the small entries to zero: those below the u-quantile of all magnitudes.

    u is uniform in [0, largest]. Of n distinct magnitudes, the floor(u (n - 1)) smallest.

    Args:
      key: a typed key.
      params: a network.
      largest: in [0, 1], maybe traced.
      where: the leaves, ranked together; default: every float leaf.

    Raises:
      ValueError: NaN (if the values are known), or a `where` of no leaf.
      TypeError: a legacy uint32 key, or a complex leaf.

    Reference: the module's.

    >>> params = {"w": jnp.array([0.1, -3.0, 2.0])}
    >>> trimmed_weights(jax.random.key(0), params, largest=1.0)["w"].round(1).tolist()
    [0.0, -3.0, 2.0]
    """
    if not tree.chosen(params, where):
        return params
    u = largest * jax.random.uniform(_key(key, "trimmed weights"))
    sizes = tree.map(lambda path, w: jnp.abs(w), params, where=where)
    least = tree.quantile(sizes, u, where=where)
    return tree.map(lambda path, w: jnp.where(jnp.abs(w) < least, 0, w), params, where=where)


# ------------------------------------------------------------------------------ of two networks


def weight_mixup(
    key: PRNGKeyArray,
    params: PyTree,
    other: PyTree,
    labels: Float[Array, "*n classes"],
    other_labels: Float[Array, "*n classes"],
    *,
    order: Literal["same", "random", "matched"] = "same",
    axes: PyTree = None,
    share: Number | None = None,
    hard: bool = False,
    smoothing: Number = 0.0,
) -> tuple[PyTree, Float[Array, "*n classes"]]:
    """Mix two networks and their labels: a x + (1 - a) x', with a uniform in [0, 1].

    In the order in which they come, two networks of one function may have nothing in common.
    "matched" first permutes the units of the other to fit those of the first (`weights.align`),
    which is the paper's method; it runs on the host, so that under jit, align before and use
    "same". "random" permutes them at random.

    Args:
      key: a typed key.
      params, other: two networks alike.
      labels, other_labels: of each, one-hot or other probabilities.
      order: of the units of the other network.
      axes: the axes tree, for "random" and "matched".
      share: a; default: drawn. At 1 the first network comes out, at 0 the other.
      hard: do not mix the labels: take those of the network of the larger share.
      smoothing: of the labels that come out, as `optax.smooth_labels`; the authors use 0.1.

    Returns:
      The mixed network and its labels. Integer leaves must agree.

    Raises:
      ValueError: networks that do not fit, labels of two shapes, another order, an order that needs
        axes without any, "matched" under jit.
      TypeError: labels that are integers, where one-hot vectors were due; a legacy uint32 key.

    Reference: the module's.

    >>> a, b = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[2.0, 1.0]])}
    >>> one, two = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> mix = lambda **how: weight_mixup(jax.random.key(0), a, b, one, two, share=0.75, **how)
    >>> params, labels = mix()
    >>> params["w"].tolist(), labels.tolist()
    ([[1.25, 1.75]], [0.75, 0.25])
    >>> mix(order="matched", axes={"w": (None, "hidden")})[0]["w"].tolist()
    [[1.0, 2.0]]
    """
    labels, other_labels = jnp.asarray(labels), jnp.asarray(other_labels)
    for each in (labels, other_labels):
        if not jnp.issubdtype(each.dtype, jnp.floating):
            raise TypeError(
                f"labels are {each.dtype}, and one-hot floats were due (jax.nn.one_hot)"
            )
    if labels.shape != other_labels.shape:
        raise ValueError(f"labels are {labels.shape} and {other_labels.shape}")
    if order not in ("same", "random", "matched"):
        raise ValueError(f'order={order!r}, and "same", "random" or "matched" was due')
    if order != "same" and axes is None:
        raise ValueError(f"order={order!r} permutes units: give the axes tree")
    if order == "random":
        other = permuted_units(key, other, axes)
    elif order == "matched":
        if not tree.concrete(params, other):
            raise ValueError('order="matched" runs on the host: align before, and mix under jit')
        other = trace.permute(other, axes, weights.align(params, other, axes))
    a = jax.random.uniform(_key(key, "weight mixup")) if share is None else jnp.asarray(share)
    mixed = weights.interpolate(other, params, a)
    a = (a >= 0.5).astype(labels.dtype) if hard else a
    target = a * labels + (1 - a) * other_labels
    return mixed, optax.smooth_labels(target, smoothing).astype(labels.dtype)
