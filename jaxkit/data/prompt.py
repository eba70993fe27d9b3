"""Visual prompts: a frozen classifier is given a frame of trained pixels and other labels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxkit import tree

__all__ = ["count_predictions", "frequency_mapping", "random_mapping", "visual_prompt"]


def visual_prompt(
    images: Float[Array, "n h w c"], delta: Float[Array, "height width c"], size: int
) -> Float[Array, "n height width c"]:
    """Put resized images in the middle of a trained frame: pad(resize(x)) + (1 - box) delta.

    The box is the inner square of `size` pixels; delta has the shape of the source model's input,
    is trained, and gets no gradient inside the box: from zeros, it stays exactly zero there. The
    model's params are not trained. Nothing is clipped: what comes out may leave the range of
    images.

    A model with BatchNorm has to run as it predicts; in training mode its statistics would adapt as
    well. Linear probing, the other way to use a frozen model, is
    ``optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)`` with "train" for the
    head alone.

    Args:
      images: of any size; bilinear, without a change if they have the size already.
      delta: the prompt.
      size: the side of the inner square.

    Raises:
      ValueError: a square that does not fit in the frame, or other channels.

    Reference: D. Misra, A. Goyal, B. Runwal, P.-Y. Chen, "Reprogramming under constraints:
    Revisiting efficient and reliable transferability of lottery tickets", arXiv:2308.14969, after
    G. Elsayed, I. Goodfellow, J. Sohl-Dickstein, "Adversarial Reprogramming of Neural Networks",
    arXiv:1806.11146.

    >>> visual_prompt(jnp.full((1, 1, 1, 1), 5.0), jnp.ones((3, 3, 1)), 1)[0, :, :, 0].tolist()
    [[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]
    """
    height, width, channels = delta.shape
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size={size}, and a square within {height} x {width} was due")
    if images.shape[-1] != channels:
        raise ValueError(f"the images have {images.shape[-1]} channels, and the prompt {channels}")
    if images.shape[1:3] != (size, size):
        images = jax.image.resize(images, (len(images), size, size, channels), "bilinear")
    top, left = (height - size) // 2, (width - size) // 2
    pad = lambda x: jnp.pad(
        x, ((0, 0), (top, height - size - top), (left, width - size - left), (0, 0))
    )
    box = pad(jnp.ones((1, size, size, 1), bool))
    return jnp.where(box, pad(images), delta)


def random_mapping(key: PRNGKeyArray, sources: int, targets: int) -> Int[Array, " targets"]:
    """Give each target class a source class of its own, at random: m, for ``logits[..., m]``.

    Raises:
      ValueError: more target classes than source classes.
      TypeError: a legacy uint32 key.

    >>> random_mapping(jax.random.key(0), 10, 3).shape
    (3,)
    """
    tree.check_key(key)
    _check(sources, targets)
    return jax.random.permutation(key, sources)[:targets].astype(jnp.int32)


def _check(sources: int, targets: int) -> None:
    if targets > sources:
        raise ValueError(
            f"{targets} target classes cannot have one of {sources} source classes each"
        )


def count_predictions(
    logits: Float[Array, "n sources"], labels: Int[Array, " n"], targets: int
) -> Int[Array, "sources targets"]:
    """Count how often the source class s is predicted for examples of the target class t.

    >>> count_predictions(jnp.eye(3), jnp.array([0, 1, 1]), 2).tolist()
    [[1, 0], [0, 1], [0, 1]]
    """
    counts = jnp.zeros((logits.shape[-1], targets), jnp.int32)
    return counts.at[logits.argmax(-1), labels].add(1)


def frequency_mapping(counts: Int[Array, "sources targets"]) -> Int[Array, " targets"]:
    """Give each target class the source class that is predicted for it most often, one to one.

    The largest count first; its source and its target are then taken. Ties take the lower source,
    then the lower target. The iterative mapping is this one on new `count_predictions` every epoch.

    Raises:
      ValueError: more target classes than source classes.

    Reference: A. Chen, Y. Yao, P.-Y. Chen, Y. Zhang, S. Liu, "Understanding and Improving Visual
    Prompting: A Label-Mapping Perspective", arXiv:2211.11635. (The order of ties is our choice.)

    >>> frequency_mapping(jnp.array([[5, 9], [1, 8], [0, 0]])).tolist()
    [1, 0]
    """
    sources, targets = counts.shape
    _check(sources, targets)

    def take(_, state):
        left, mapping = state
        s, t = jnp.unravel_index(left.argmax(), left.shape)
        return left.at[s].set(-1).at[:, t].set(-1), mapping.at[t].set(s.astype(jnp.int32))

    first = (jnp.asarray(counts, jnp.int32), jnp.zeros(targets, jnp.int32))
    return jax.lax.fori_loop(0, targets, take, first)[1]
