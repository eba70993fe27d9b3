"""How alike two representations of the same examples are."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxkit import tree

__all__ = ["cka"]


def cka(
    x: Float[Array | np.ndarray, "n *features"], y: Float[Array | np.ndarray, "n *others"]
) -> Float[Array, ""]:
    """Return the linear centered kernel alignment of two representations of the same n examples.

    CKA = |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F), of features with their mean over the examples taken
    off. It is 1 if one is a rotation and a scaling of the other, 0 if no feature of one correlates
    with any of the other, and 0 by convention if a representation is constant. The sums are made
    over pairs of features or pairs of examples, whichever are fewer.

    Args:
      x: features of n examples; further dimensions count as features.
      y: features of the same examples, of any number.

    Returns:
      A number in [0, 1], float32 unless the features are wider.

    Raises:
      ValueError: different numbers of examples, or fewer than two.

    Reference: S. Kornblith, M. Norouzi, H. Lee, G. Hinton, "Similarity of Neural Network
    Representations Revisited", arXiv:1905.00414.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]])
    >>> round(cka(x, -2 * x[:, ::-1]).item(), 6)
    1.0
    """
    if np.ndim(x) < 1 or np.ndim(y) < 1 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"features of the same two or more examples were due, and {np.shape(x)} and "
            f"{np.shape(y)} came"
        )
    n = len(x)
    x, y = (tree.float32(jnp.asarray(a)).reshape(n, -1) for a in (x, y))
    # unit scale, so that fourth powers neither overflow nor vanish
    x, y = (_unit(a - a.mean(0)) for a in (x, y))
    if max(x.shape[1], y.shape[1]) > n:
        inner = lambda a, b: jnp.sum((a @ a.T) * (b @ b.T))
    else:
        inner = lambda a, b: jnp.sum((a.T @ b) ** 2)
    return inner(x, y) / (jnp.sqrt(inner(x, x)) * jnp.sqrt(inner(y, y)) + 1e-12)


def _unit(a: Array) -> Array:
    largest = jnp.max(jnp.abs(a), initial=0.0)
    return a / jnp.where(largest > 0, largest, 1)
