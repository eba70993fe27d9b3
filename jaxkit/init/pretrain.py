"""The tasks that warm starts train on before `jaxkit.init.transplant`.

Self-pretraining fills in what is masked of the inputs of the very task that follows; perceptual
initialization learns which of two images people find closer to a third.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal

__all__ = ["contrastive_loss", "hide", "masked_loss", "span_mask", "triplet_loss"]


def span_mask(
    key: PRNGKeyArray, shape: tuple[int, ...], *, ratio: float = 0.5, span: int | None = None
) -> Bool[Array, "*shape"]:
    """Draw which positions of sequences to hide: True is hidden.

    Without `span`, every position for itself with probability `ratio`. With it, exactly
    ``n = int(length * ratio / span)`` spans of that length that do not overlap, every arrangement
    of them as likely as any other.

    Args:
      shape: (..., length).
      ratio: in [0, 1]; a number (traced only without `span`).

    Raises:
      TypeError: a legacy key.
      ValueError: a ratio outside [0, 1], a span that is not in 1 to length, or a ratio above 0 that
        has room for no span (``length * ratio < span``).

    Reference: I. Amos, J. Berant, A. Gupta, arXiv:2310.02980.

    >>> mask = span_mask(jax.random.key(0), (4, 12), ratio=0.5, span=3)
    >>> mask.sum(-1).tolist()
    [6, 6, 6, 6]
    """
    tree.check_key(key)
    if violates(lambda r: (r >= 0) & (r <= 1), ratio):
        raise ValueError(f"ratio={ratio} is not in [0, 1]")
    if span is None:
        return jax.random.bernoulli(key, ratio, shape)
    *batch, length = shape
    if not 1 <= span <= length:
        raise ValueError(f"span={span}: a length in 1 to {length} is due")
    n = int(length * decimal(ratio) / span)
    if ratio > 0 and n == 0:
        raise ValueError(
            f"ratio={ratio} of {length} positions is less than a span of {span}: it would hide none"
        )
    slots = length - n * (span - 1)  # a span takes one slot, and so does every other position

    def draw(key):
        starts = jnp.sort(jax.random.permutation(key, slots)[:n]) + (span - 1) * jnp.arange(n)
        hidden = (starts[:, None] + jnp.arange(span)).reshape(-1)
        return jnp.zeros(length, bool).at[hidden].set(True)

    keys = jax.random.split(key, int(np.prod(batch)))
    return jax.vmap(draw)(keys).reshape(shape)


def hide(
    x: Float[Array, "*batch length channels"], mask: Bool[Array, "*batch length"]
) -> Float[Array, "*batch length channels_1"]:
    """Return ``[x * (1 - mask), mask]``: hidden positions are zero, and a last channel says so.

    >>> hide(jnp.array([[3.0], [4.0]]), jnp.array([True, False])).tolist()
    [[0.0, 1.0], [4.0, 0.0]]
    """
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"a mask of shape {x.shape[:-1]} is due, and {mask.shape} came")
    mask = mask[..., None]
    return jnp.concatenate([jnp.where(mask, 0, x), mask.astype(x.dtype)], axis=-1)


def masked_loss(
    predictions: Float[Array, "*batch length channels"],
    targets: Num[Array, "..."],
    mask: Bool[Array, "*batch length"],
) -> Float[Array, ""]:
    """The mean loss over the hidden positions; what is predicted elsewhere does not matter.

    |prediction - target| for float targets (..., length, channels); cross entropy for integer
    targets (..., length), tokens. 0 if nothing is hidden. float32.

    Raises:
      ValueError: shapes that do not belong together.

    >>> masked_loss(jnp.ones((2, 1)), jnp.zeros((2, 1)), jnp.array([True, False])).item()
    1.0
    """
    tokens = jnp.issubdtype(targets.dtype, jnp.integer)
    due = predictions.shape[:-1] if tokens else predictions.shape
    if targets.shape != due or mask.shape != predictions.shape[:-1]:
        raise ValueError(
            f"predictions {predictions.shape} want targets {due} and a mask "
            f"{predictions.shape[:-1]}; {targets.shape} and {mask.shape} came"
        )
    predictions = tree.float32(predictions)
    if tokens:
        predictions = jnp.where(mask[..., None], predictions, 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(predictions, targets)
    else:
        losses = jnp.abs(jnp.where(mask[..., None], predictions - targets, 0)).mean(-1)
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)


def _unit(x: Array) -> Array:
    x = tree.float32(x)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def triplet_loss(
    reference: Float[Array, "n d"],
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    choice: Num[Array, " n"],
    *,
    margin: float | Array = 0.05,
) -> Float[Array, ""]:
    """The hinge of two-alternative choices: mean of max(0, m - t (d(ref, b) - d(ref, a))).

    d = 1 - cosine (embeddings need not be normalized), t = 1 where people chose a and -1 where they
    chose b: the loss is zero where the chosen one is closer by the margin.

    Raises:
      ValueError: (eagerly) choices other than 1 and -1; shapes that differ.

    References: S. Fu, N. Tamir, S. Sundaram et al., "DreamSim: Learning New Dimensions of Human
    Visual Similarity using Synthetic Data", arXiv:2306.09344 (its margin); arXiv:2505.14204.

    >>> x = jnp.eye(2)[:1]
    >>> round(triplet_loss(x, x, x, jnp.array([1])).item(), 6)
    0.05
    """
    if not reference.shape == a.shape == b.shape or choice.shape != reference.shape[:1]:
        raise ValueError(
            f"three (n, d) and (n,) are due: {reference.shape}, {a.shape}, {b.shape}, "
            f"{choice.shape} came"
        )
    if violates(lambda c: np.isin(c, (-1, 1)), choice):
        raise ValueError("choices are 1 (a) and -1 (b); turn 0 and 1 into them with 2 * c - 1")
    reference, a, b = _unit(reference), _unit(a), _unit(b)
    closer = ((a - b) * reference).sum(-1)  # d(ref, b) - d(ref, a)
    return jnp.maximum(0, margin - choice * closer).mean()


def contrastive_loss(
    a: Float[Array, "n d"],
    b: Float[Array, "n d"],
    *,
    temperature: float | Array = 0.07,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The symmetric InfoNCE of CLIP: each row of `a` is to find its row of `b`, and vice versa.

    Embeddings are normalized here. With `axis_name`, the candidates are those of all devices.

    Raises:
      ValueError: shapes that differ.

    Reference: A. Radford et al., "Learning Transferable Visual Models From Natural Language
    Supervision", arXiv:2103.00020.

    >>> round(contrastive_loss(jnp.ones((4, 2)), jnp.ones((4, 2))).item(), 4), round(np.log(4), 4)
    (1.3863, np.float64(1.3863))
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"two (n, d) of one shape are due: {a.shape}, {b.shape} came")
    a, b = _unit(a), _unit(b)
    labels = jnp.arange(a.shape[0])
    every = lambda x: x
    if axis_name is not None:
        labels += lax.axis_index(axis_name) * a.shape[0]
        every = lambda x: lax.all_gather(x, axis_name, tiled=True)
    entropy = optax.softmax_cross_entropy_with_integer_labels
    there = entropy(a @ every(b).T / temperature, labels)
    back = entropy(b @ every(a).T / temperature, labels)
    loss = (there + back).mean() / 2
    return loss if axis_name is None else lax.pmean(loss, axis_name)
