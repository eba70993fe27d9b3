"""Masks chosen per input: which channels or neurons this example, token or sentence uses.

A batch of masks that differ per example saves no time in a compiled program: what is counted here
(`macs`, `activity`) is counted. `sentence_core` gives one set of a fixed size for many steps, which
`trace.take` turns into smaller arrays: that one is faster.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal
from jaxkit.trace.taps import taps

__all__ = [
    "activity",
    "cluster_cores",
    "largest",
    "macs",
    "mass",
    "measure",
    "nearest_core",
    "predict",
    "predictor_loss",
    "sentence_core",
    "token_core",
    "top_activations",
]


def largest(x: Float[Array, "*rows n"], k: int) -> Bool[Array, "*rows n"]:
    """Mark the k largest entries of each row: exactly k, ties keep the lower index.

    Args:
      x: rows of numbers.
      k: how many, static.

    Raises:
      ValueError: k outside 0 ... n.

    >>> largest(jnp.array([1.0, 3.0, 3.0, 3.0]), 2).tolist()
    [False, True, True, False]
    """
    if not 0 <= k <= np.shape(x)[-1]:
        raise ValueError(f"{k} of {np.shape(x)[-1]} entries are to be marked")
    _, index = jax.lax.top_k(x, k)
    false = jnp.zeros(np.shape(x), bool)
    return jnp.put_along_axis(false, index, True, axis=-1, inplace=False)


# ------------------------------------------------------------------------ activation sparsity


def top_activations(h: Float[Array, "*rows n"], k: int) -> Float[Array, "*rows n"]:
    """Keep the k largest activations of each token, and set the others to zero.

    ``h = top_activations(relu(x @ w_up), k) @ w_down`` is the Top-k Transformer's feed-forward
    layer. The gradient goes through the kept ones alone; k = n is the identity.

    Args:
      h: activations, of which the largest are to stay.
      k: how many, static.

    Raises:
      ValueError: k outside 0 ... n.

    >>> top_activations(jnp.array([1.0, 3.0, 2.0]), 2).tolist()
    [0.0, 3.0, 2.0]

    Reference: Li, You, Bhojanapalli, Li, Rawat, Reddi, Ye, Chern, Yu, Guo, Kumar, "The Lazy Neuron
    Phenomenon: On Emergence of Activation Sparsity in Transformers", arXiv:2210.06313.
    """
    return jnp.where(largest(h, k), h, jnp.zeros((), h.dtype))


def activity(
    h: Float[Array, "*tokens n"],
    *,
    threshold: float | Array | None = None,
    where: Bool[Array, " *tokens"] | None = None,
) -> Float[Array, ""]:
    """Measure the fraction of activations that are not zero: rho = mean(h != 0).

    Args:
      h: activations after the nonlinearity.
      threshold: count |h| > threshold. Needed for anything but ReLU: GELU and SiLU have no exact
        zeros but where they underflow; 0 is right for the product of a gated ReLU.
      where: True for the tokens that count; False for padding.

    Raises:
      ValueError: (eagerly) no threshold, and activations without one exact zero or with negative
        ones; no token that counts.

    >>> activity(jax.nn.relu(jnp.array([[1.0, -1.0], [2.0, 3.0]])))
    Array(0.75, dtype=float32)

    Reference: as for `top_activations`.
    """
    return _activity(h, threshold, where, 0)


def _activity(h: Array, threshold: Any, where: Any, layers: int) -> Float[Array, "*layers"]:
    """Measure the activity over all axes but the first few."""
    active = h != 0 if threshold is None else jnp.abs(h) > threshold
    counted = jnp.broadcast_to(True if where is None else where, h.shape[:-1])
    if tree.concrete(active, counted):
        if not counted.any():
            raise ValueError("no token counts")
        if threshold is None and active.size and (active.all() or (h < 0).any()):
            what = "none is exactly zero" if active.all() else "some are negative"
            raise ValueError(
                f"these are not activations of ReLU: {what}; give a threshold (0 counts what is "
                "not exactly zero)"
            )
    over = tuple(range(layers, h.ndim))
    return jnp.mean(active, over, where=counted[..., None], dtype=jnp.float32)


def measure(
    apply_fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    where: tree.Where,
    threshold: float | Array | None = None,
    tokens: Bool[Array, "..."] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Measure the `activity` of what feeds the chosen leaves: rho, layer by layer.

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      params: a tree of arrays.
      *args: the input.
      where: the leaves that read the activations: the output projections of the MLPs.
      threshold: as for `activity`.
      tokens: True for the tokens that count, False for padding: of the shape of every layer's
        activations without their last axis, or one that broadcasts to it.

    Returns:
      By path, one number; for a leaf that a scan takes apart into layers, one each; and for one
      that is used several times, those of every use in order, along a new first axis.

    Raises:
      ValueError: as for `activity`, naming the leaf, and for `jaxkit.trace.taps`; tokens that do
        not fit; layers in a scan that is itself inside a scan over something else.

    >>> params = {"up": jnp.array([[1.0, -1.0]]), "down": jnp.ones((2, 1))}
    >>> mlp = lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"]
    >>> measure(mlp, params, jnp.ones((3, 1)), where="down")
    {'down': Array(0.5, dtype=float32)}

    Reference: as for `top_activations`.
    """
    _, tapped = taps(apply_fn, where)(params, *args)
    leaves, out = tree.flatten(params), {}
    for path, tap in tapped.items():
        layers = jnp.shape(leaves[path])[: jnp.ndim(leaves[path]) - len(tap.x_axes)]
        each = []
        for use in (tap, *tap.later):
            h = use.input
            if h.shape[: len(layers)] != layers:
                raise ValueError(f"{path!r}: its layers are stacked inside another scan")
            try:
                each.append(_activity(h, threshold, tokens, len(layers)))
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}") from None
        out[path] = jnp.stack(each) if tap.later else each[0]
    return out


# ------------------------------------------------------------------------- fire together ...


def mass(response: Float[Array, "*rows n"], r: float | Array | None) -> Bool[Array, "*rows n"]:
    """Keep the strongest channels whose responses sum to at most the part r of the sum.

    With p = response / sum(response), sorted from large to small, channels stay while the
    cumulative sum of p is at most r + 1e-5: the one that crosses r goes, so how many stay depends
    on the input. At least one stays (the published code may keep none); equal ones keep the lower
    index. It is scale-free, and a target: no gradient. (The paper's other mode, a fixed number of
    channels, is ``largest(response, k) & (response > 1e-5)``.)

    Args:
      response: nonnegative, one per channel: the largest |activation| of its feature map.
      r: the part of the mass, in (0, 1]; 1 drops what is at most 1e-5 of the sum, None nothing.
        May be traced.

    Raises:
      ValueError: r outside (0, 1].

    >>> mass(jnp.array([2.0, 4.0, 1.0, 3.0]), 0.75).tolist()
    [False, True, False, True]

    Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning
    Approach with Self-Supervised Mask Prediction", arXiv:2110.08232.
    """
    if r is None:
        return jnp.ones(np.shape(response), bool)
    if violates(lambda r: (r > 0) & (r <= 1), r):
        raise ValueError(f"the kept mass is {r}, and a number in (0, 1] is due")
    response = tree.float32(jax.lax.stop_gradient(response))
    order = jnp.argsort(-response, axis=-1)
    total = response.sum(-1, keepdims=True)
    p = jnp.take_along_axis(response / jnp.where(total > 0, total, 1), order, -1)
    kept = (jnp.cumsum(p, -1) <= r + 1e-5) & (p > 1e-5)
    kept = kept | (jnp.arange(p.shape[-1]) == 0)
    false = jnp.zeros(response.shape, bool)
    return jnp.put_along_axis(false, order, kept, axis=-1, inplace=False)


def predict(
    theta: PyTree,
    x: Float[Array, "batch *pixels channels"],
    *,
    joint: bool = False,
    softmax: bool = True,
) -> Float[Array, "batch channels_out"]:
    """Predict which channels of the next layer will fire: the logits of a linear predictor.

    z = softmax(mean over pixels of x) W + b; the mask at inference is z > 0. The input is detached,
    so that the predictor learns beside the network; the mask has no gradient at all.

    Args:
      theta: ``{"kernel": (channels, channels_out), "bias": (channels_out,)}``.
      x: the layer's input, channels last.
      joint: let the predictor's loss train the network, too.
      softmax: False: the means themselves go into W.

    >>> theta = {"kernel": jnp.eye(2), "bias": jnp.full(2, -0.5)}
    >>> (predict(theta, jnp.array([[[9.0, 0.0]]])) > 0).tolist()
    [[True, False]]

    Reference: as for `mass`.
    """
    x = x if joint else jax.lax.stop_gradient(x)
    pooled = x.mean(tuple(range(1, x.ndim - 1)))
    return (jax.nn.softmax(pooled) if softmax else pooled) @ theta["kernel"] + theta["bias"]


def predictor_loss(
    logits: Float[Array, "batch channels"], target: Bool[Array, "batch channels"]
) -> Float[Array, ""]:
    """Compute the predictor's loss: binary cross-entropy, summed over channels, mean over examples.

    The paper adds w / L of the sum over its L layers to the loss of the task, with w = 1 in the
    first half of the training; then w = 0, and the predictors stay.

    Args:
      logits: from `predict`.
      target: from `mass`, of the responses of the dense layer.

    >>> predictor_loss(jnp.zeros((1, 2)), jnp.array([[True, False]]))
    Array(1.3862944, dtype=float32)

    Reference: as for `mass`.
    """
    target = jax.lax.stop_gradient(jnp.asarray(target, logits.dtype))
    return optax.sigmoid_binary_cross_entropy(logits, target).sum(-1).mean()


def macs(
    active: Bool[Array, "batch channels_out"],
    previous: Bool[Array, "batch channels_in"],
    *,
    pixels: int,
    taps: int,
    groups: int = 1,
) -> Float[Array, ""]:
    """Count the multiplications of a convolution with masked channels, per example.

    mean over the batch of active * (previous / groups) * pixels * taps.

    Args:
      active: which output channels are computed.
      previous: which input channels are not zero.
      pixels: positions of the output, H W.
      taps: positions of the kernel, k^2.
      groups: of the convolution.

    >>> macs(jnp.ones((1, 8), bool), jnp.ones((1, 3), bool), pixels=16, taps=9)
    Array(3456., dtype=float32)

    Reference: as for `mass`.
    """
    each = active.sum(-1).astype(jnp.float32) * previous.sum(-1) / groups
    return each.mean() * pixels * taps


# --------------------------------------------------------------------------- core neurons


def _ceil(part: float, n: int) -> int:
    """Return the exact ceiling of part * n for a decimal number (in floats .1 * 30 exceeds 3)."""
    return math.ceil(decimal(part) * n)


def _check_part(name: str, part: float) -> None:
    if not 0 < part <= 1:
        raise ValueError(f"{name}={part}: a part in (0, 1] is due")


def token_core(a: Float[Array, "*tokens n"], alpha: float = 0.4) -> Bool[Array, "*tokens n"]:
    """Mark the core of each token: the strongest part alpha of its positive activations.

    Of m positive activations, ceil(alpha m) are marked; ties keep the lower index. A token without
    a positive activation has an empty core.

    Args:
      a: the activations of a feed-forward layer; act(gate) in a gated one.
      alpha: the part, in (0, 1].

    Raises:
      ValueError: alpha outside (0, 1].

    >>> token_core(jnp.array([[3.0, -1.0, 2.0, 1.0]]), 0.5).tolist()
    [[True, False, True, False]]

    Reference: Wang, Vahidian, Ye, Gu, Zhang, Chen, "CoreInfer: Accelerating Large Language Model
    Inference with Semantics-Inspired Adaptive Sparse Activation", arXiv:2410.18311.
    The paper speaks of a percentile; this is ours of the positive ones.
    """
    _check_part("alpha", alpha)
    n = np.shape(a)[-1]
    counts = jnp.array([_ceil(alpha, m) for m in range(n + 1)])
    rank = jnp.argsort(jnp.argsort(-a, axis=-1), axis=-1)
    return rank < counts[(a > 0).sum(-1)][..., None]


def sentence_core(
    cores: Bool[Array, "tokens n"],
    beta: float = 0.2,
    *,
    where: Bool[Array, " tokens"] | None = None,
) -> Int[Array, " kept"]:
    """Choose the neurons that are in the cores of most tokens: ceil(beta n) of them.

    Fixed after the prompt, they serve all of the decoding: with the neurons as an axis,
    ``trace.take(params, axes, {"mlp": sentence_core(cores)})`` gathers the columns of the up
    projection and the rows of the down projection, and compiles once for all sentences.

    Args:
      cores: from `token_core`, of one sentence. Sentences of a batch have a core each (`vmap`), or
        are joined to one by concatenation.
      beta: the part of all neurons, in (0, 1].
      where: True for the tokens that count; False for padding.

    Returns:
      Indices, the most frequent first, ties keep the lower index.

    Raises:
      ValueError: beta outside (0, 1]; no tokens: the prompt comes first; none that counts (if that
        is known; else the first neurons come out); cores of several sentences.

    >>> cores = jnp.array([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 0]], bool)
    >>> sentence_core(cores, 0.4).tolist()
    [0, 1]

    Reference: as for `token_core`.
    """
    _check_part("beta", beta)
    if np.ndim(cores) != 2:
        raise ValueError(
            f"the cores of one sentence, (tokens, n) is due, and shape {np.shape(cores)} came; "
            "vmap over sentences, or join their tokens"
        )
    if not np.shape(cores)[0]:
        raise ValueError("the prompt has no tokens: a core is what its tokens agree on")
    if where is not None and violates(np.any, where):
        raise ValueError(
            f"none of its {np.shape(cores)[0]} tokens counts: a sentence has one or more"
        )
    counted = cores if where is None else cores & jnp.asarray(where)[:, None]
    return jax.lax.top_k(counted.sum(0), _ceil(beta, np.shape(cores)[1]))[1]


def cluster_cores(
    cores: Bool[Array, "sentences n"], cluster: Int[Array, " sentences"], n: int, gamma: float = 0.2
) -> Int[Array, "clusters kept"]:
    """Choose the core of each cluster of sentences: the neurons in most of its sentence cores.

    For prompts that are too short to be stable. The clusters are those of the embeddings of a
    corpus, by any clustering (the paper names none).

    Args:
      cores: the cores of the sentences of a corpus, as masks.
      cluster: the cluster of each sentence.
      n: the number of clusters.
      gamma: the part of all neurons, in (0, 1].

    Returns:
      Indices, one row for each cluster.

    Raises:
      ValueError: gamma outside (0, 1].

    >>> cores = jnp.array([[True, False], [True, False], [False, True]])
    >>> cluster_cores(cores, jnp.array([0, 0, 1]), 2, 0.5).tolist()
    [[0], [1]]

    Reference: as for `token_core`.
    """
    _check_part("gamma", gamma)
    counts = jax.ops.segment_sum(cores.astype(jnp.int32), cluster, n)
    return jax.lax.top_k(counts, _ceil(gamma, np.shape(cores)[1]))[1]


def nearest_core(
    embedding: Float[Array, " d"],
    centroids: Float[Array, "clusters d"],
    cores: Int[Array, "clusters kept"],
) -> Int[Array, " kept"]:
    """Return the core of the cluster whose centroid is nearest to a prompt, by cosine.

    Args:
      embedding: of the prompt.
      centroids: of the clusters.
      cores: from `cluster_cores`.

    >>> nearest_core(jnp.array([0.1, 5.0]), jnp.eye(2), jnp.array([[7], [9]])).tolist()
    [9]

    Reference: as for `token_core`.
    """
    directions = centroids / jnp.linalg.norm(centroids, axis=-1, keepdims=True)
    return cores[jnp.argmax(directions @ embedding)]
