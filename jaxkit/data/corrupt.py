"""Corruptions of a labelled set: ``(key, x, y) -> (x, y)``, drawn once and then fixed.

The five of "Understanding deep learning requires rethinking generalization" are the set as it is
and the four below. Each keeps shapes and dtypes, and each is a function of its key alone: apply it
once before training. (Labels drawn anew every epoch are label smoothing, which is another thing.)

Images are ``(n, ..., channels)`` with four or more dimensions: the pixels are the dimensions in
between, and the channels of a pixel move together. Arrays with fewer dimensions, ``(n, d)`` or
``(n, height, width)``, have no channels: every entry is a pixel.

Reference: Chiyuan Zhang, Samy Bengio, Moritz Hardt, Benjamin Recht, Oriol Vinyals, "Understanding
deep learning requires rethinking generalization", arXiv 1611.03530.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from jaxkit import tree
from jaxkit._known import violates

__all__ = ["gaussian", "random_labels", "random_pixels", "shuffled_pixels"]


def _key(key: PRNGKeyArray, tag: str) -> PRNGKeyArray:
    return tree.keys(key, {"examples": 0}, tag)["examples"]


def _check_pair(x, y) -> None:
    if x.ndim < 2 or y.ndim != 1 or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"examples x of shape (n, ...) and labels y of shape (n,) are due, "
            f"and x{tuple(x.shape)} and y{tuple(y.shape)} came"
        )


def _pixels(x) -> Shaped[Array, "n pixels channels"]:
    last = 1 if x.ndim < 4 else x.shape[-1]
    return x.reshape(x.shape[0], math.prod(x.shape[1:]) // max(last, 1), last)


def random_labels(
    key: PRNGKeyArray,
    x: Shaped[Array, "n ..."],
    y: Int[Array, " n"],
    *,
    classes: int,
    p: float | Float[Array, ""] = 1.0,
) -> tuple[Shaped[Array, "n ..."], Int[Array, " n"]]:
    """Replace each label with probability `p` by a class drawn uniformly from all of them.

    ``y'_i = u_i if v_i < p else y_i`` with ``u_i`` uniform over the classes, the true one
    included, and ``v_i`` uniform over [0, 1): the expected fraction of labels that change is
    ``p (classes - 1) / classes``. ``p=1`` is the paper's *random labels*, ``0 < p < 1`` its
    *partially corrupted labels*. Neither draw depends on `p`: with the same key, a label that is
    corrupted stays corrupted, with the same class, at every larger `p`.

    Args:
      key: a typed key.
      x: examples, returned as they are.
      y: integer labels in [0, classes).
      classes: the number of classes (static).
      p: the probability; may be traced. A traced `p` outside [0, 1] acts as the nearest bound.

    Raises:
      ValueError: `p` outside [0, 1], no class, a label outside [0, classes), shapes that differ
        (values are checked where they are concrete).
      TypeError: labels that are not integers, or a key that is not one typed key.

    >>> x, y = jnp.zeros((6, 4)), jnp.array([0, 1, 2, 0, 1, 2])
    >>> _, noisy = random_labels(jax.random.key(0), x, y, classes=3, p=0.5)
    >>> noisy.shape, bool((noisy < 3).all())
    ((6,), True)
    >>> random_labels(jax.random.key(0), x, y, classes=3, p=0.0)[1].tolist()
    [0, 1, 2, 0, 1, 2]

    Reference: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires
    rethinking generalization", arXiv 1611.03530.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check_pair(x, y)
    if not jnp.issubdtype(y.dtype, jnp.integer):
        raise TypeError(f"integer labels are due, and {y.dtype} came")
    if classes < 1:
        raise ValueError(f"classes={classes}: at least one class is due")
    if violates(lambda p: (p >= 0) & (p <= 1), p):
        raise ValueError(f"p={p}: a probability in [0, 1] is due")
    if tree.concrete(y) and y.size:
        low, high = np.asarray(y).min(), np.asarray(y).max()
        if not 0 <= low <= high < classes:
            raise ValueError(
                f"labels in [0, {classes}) are due, and they range from {low} to {high}"
            )
    which, what = jax.random.split(_key(key, "random_labels"))
    drawn = jax.random.randint(what, y.shape, 0, classes, jnp.int32).astype(y.dtype)
    return x, jnp.where(jax.random.uniform(which, y.shape) < p, drawn, y)


def shuffled_pixels(
    key: PRNGKeyArray, x: Shaped[Array, "n ..."], y: Shaped[Array, " n"]
) -> tuple[Shaped[Array, "n ..."], Shaped[Array, " n"]]:
    """Apply one random permutation of the pixels to all images.

    ``x'[i, j] = x[i, s(j)]`` for one uniform permutation s of the pixels, which depends on the key
    and the number of pixels alone: called with the same key for the training and for the test
    images, it is the paper's *shuffled pixels*.

    Args:
      key: a typed key.
      x: images ``(n, ..., channels)``, or an array of fewer than four dimensions.
      y: labels, returned as they are.

    Raises:
      ValueError: shapes that differ.
      TypeError: a key that is not one typed key.

    >>> x = jnp.array([[1, 2, 3], [4, 5, 6]])
    >>> shuffled, _ = shuffled_pixels(jax.random.key(0), x, jnp.arange(2))
    >>> (shuffled[1] - shuffled[0]).tolist()
    [3, 3, 3]

    Reference: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires
    rethinking generalization", arXiv 1611.03530. That the channels of a pixel move together is
    our reading.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check_pair(x, y)
    flat = _pixels(x)
    order = jax.random.permutation(_key(key, "shuffled_pixels"), flat.shape[1])
    return flat[:, order].reshape(x.shape), y


def random_pixels(
    key: PRNGKeyArray, x: Shaped[Array, "n ..."], y: Shaped[Array, " n"]
) -> tuple[Shaped[Array, "n ..."], Shaped[Array, " n"]]:
    """Apply to every image a random permutation of its own.

    ``x'[i, j] = x[i, s_i(j)]`` with independent uniform permutations s_i; s_i depends on the key,
    the position i and the number of pixels alone. It is the paper's *random pixels*. Give the
    training and the test images different keys.

    Args:
      key: a typed key.
      x: images ``(n, ..., channels)``, or an array of fewer than four dimensions.
      y: labels, returned as they are.

    Raises:
      ValueError: shapes that differ.
      TypeError: a key that is not one typed key.

    >>> x = jnp.broadcast_to(jnp.arange(9), (4, 9))
    >>> scrambled, _ = random_pixels(jax.random.key(0), x, jnp.arange(4))
    >>> scrambled.sum(1).tolist(), bool((scrambled[0] == scrambled[1]).all())
    ([36, 36, 36, 36], False)

    Reference: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires
    rethinking generalization", arXiv 1611.03530. That the channels of a pixel move together is
    our reading.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check_pair(x, y)
    flat = _pixels(x)
    base = _key(key, "random_pixels")

    def scramble(i, image):
        return image[jax.random.permutation(jax.random.fold_in(base, i), image.shape[0])]

    return jax.vmap(scramble)(jnp.arange(flat.shape[0]), flat).reshape(x.shape), y


def gaussian(
    key: PRNGKeyArray,
    x: Float[Array, "n ..."],
    y: Shaped[Array, " n"],
    *,
    mean: float | Float[Array, "*channels"] | None = None,
    std: float | Float[Array, "*channels"] | None = None,
) -> tuple[Float[Array, "n ..."], Shaped[Array, " n"]]:
    """Replace the images by Gaussian noise of the same mean and standard deviation.

    ``x' ~ N(mean, std**2)``, independently for every entry; the moments are those of `x`, one pair
    for each channel, unless they are given. It is the paper's *Gaussian*. Give the test images
    another key and the moments of the training images.

    Args:
      key: a typed key.
      x: float images ``(n, ..., channels)``, or an array of fewer than four dimensions.
      y: labels, returned as they are.
      mean: the mean, a scalar or one for each channel.
      std: the standard deviation, a scalar or one for each channel.

    Raises:
      ValueError: shapes that differ.
      TypeError: images that are not floats, or a key that is not one typed key.

    >>> noise, _ = gaussian(jax.random.key(0), 3 * jnp.ones((2, 4)), jnp.arange(2))
    >>> noise.tolist()
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]

    Reference: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires
    rethinking generalization", arXiv 1611.03530. That the moments are taken for each channel is
    our reading.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    _check_pair(x, y)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"float images are due, and {x.dtype} came; scale them first")
    flat = tree.float32(_pixels(x))
    mean = flat.mean((0, 1)) if mean is None else mean
    std = flat.std((0, 1)) if std is None else std
    noise = jax.random.normal(_key(key, "gaussian"), flat.shape, flat.dtype)
    return (mean + std * noise).astype(x.dtype).reshape(x.shape), y
