"""Masks that are learned over frozen weights: scores are trained, the weights never.

One form behind all: theta holds a score s for every entry w of the chosen leaves; a hard function
turns scores into e (0 or 1, or a sign), and the model runs with ``value(w, e)``, w e unless said
otherwise. In the backward pass e is taken for s: dL/ds = dL/dw_eff * w.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import Mask, topk
from jaxkit.reparam.core import Reparam, Theta, install, matched

Initializer = Callable[[PRNGKeyArray, Sequence[int], Any], Array]

__all__ = [
    "biprop",
    "edge_popup",
    "learned_mask",
    "mask_norm",
    "mask_tuning",
    "random_signs",
    "signed_supermask",
    "straight_through",
    "supermask",
]


def straight_through(real: Float[Array, "*shape"], hard: Array) -> Float[Array, "*shape"]:
    """Return `hard`, exactly, with the gradient of `real`: stop(hard) + (real - stop(real)).

    (With other parentheses, ``real + stop(hard - real)``, the value is off by rounding.) `hard` is
    cast to the dtype of `real`.

    Reference: Y. Bengio, N. Léonard, A. Courville, "Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation", arXiv:1308.3432.

    >>> step = lambda s: straight_through(3 * s, s > 0.1)
    >>> step(jnp.float32(0.7)).item(), jax.grad(step)(jnp.float32(0.7)).item()
    (1.0, 3.0)
    """
    hard = jnp.asarray(hard).astype(real.dtype)
    return stop_gradient(hard) + (real - stop_gradient(real))


def supermask(
    scores: Initializer,
    hard: Callable[[Theta], Mapping[str, Array]],
    *,
    soft: Callable[[Array], Array] = lambda s: s,
    value: Callable[[Array, Array], Array] = lambda w, e: jnp.where(e == 0, 0, w * e),
    where: tree.Where = None,
) -> Reparam:
    """Return the reparametrization by a mask over frozen weights, of which the others are special.

    With z = soft(s) and e = hard(z): w_eff = value(w, e) + w (z - stop(z)), so that the model sees
    value(w, e) exactly and dL/ds = dL/dw_eff w dz/ds, also at the entries that are masked.

    theta is ``{path: scores}``, in float32 or wider: one number for each entry of the chosen
    leaves. No weight decay is to reach params, and none is needed: they are not trained.

    Args:
      scores: ``(key, shape, dtype) -> s``, as in ``jax.nn.initializers``.
      hard: ``{path: z} -> {path: e}``, over all chosen leaves, so that they may compete.
      soft: what is ranked, entry by entry (``jnp.abs``).
      value: ``(w, e) -> w_eff``; no gradient goes to e.
      where: the leaves that are masked; default: the weights.

    Raises:
      ValueError: a leaf that is masked whole at the start, as no gradient will ever bring it
        back (if the scores are known: not under jit); a `where` that matches nothing.
      TypeError: a legacy uint32 key.

    >>> keep = lambda z: jax.tree.map(lambda z: z > 0, z)
    >>> r = supermask(jax.nn.initializers.ones, keep)
    >>> params = {"kernel": jnp.array([[2.0, -3.0]]), "bias": jnp.zeros(2)}
    >>> theta = r.init(jax.random.key(0), params)
    >>> jax.grad(lambda t: r.apply(t, params)["kernel"].sum())(theta)["kernel"].tolist()
    [[2.0, -3.0]]
    """

    def init(key: PRNGKeyArray, params: PyTree) -> Theta:
        keys = tree.flatten(tree.keys(key, params, "jaxkit.reparam.supermask"))
        theta = {}
        for path, w in tree.chosen(params, where).items():
            dtype = jnp.promote_types(w.dtype, jnp.float32)
            empty = jnp.zeros(w.shape, dtype)
            theta[path] = scores(keys[path], w.shape, dtype) if w.size else empty
        if tree.concrete(theta):
            for path, e in hard(jax.tree.map(soft, theta)).items():
                if e.size and violates(np.any, e):
                    raise ValueError(
                        f"all {e.size} entries of {path!r} are masked at the start, and no "
                        "gradient would reach their scores again; start the scores on the other "
                        "side of the threshold, or lower it"
                    )
        return theta

    def apply(theta: Theta, params: PyTree) -> PyTree:
        z = {path: soft(s) for path, s in theta.items()}
        e = stop_gradient(hard(stop_gradient(z)))

        def effective(path, w):
            w = tree.float32(w)
            return value(w, e[path].astype(w.dtype)) + stop_gradient(w) * (
                z[path] - stop_gradient(z[path])
            )

        return install(params, {p: effective(p, w) for p, w in matched(params, theta).items()})

    return Reparam(init, apply)


def learned_mask(reparam: Reparam, theta: Theta, params: PyTree) -> Mask:
    """Return which entries are not masked: a mask like params, all True where theta has no scores.

    For `masks.apply`, `masks.report`, `masks.pack` and counting. Warns (if the values are known)
    of leaves that are masked whole: they are dead, and in a chain of layers so is the model.

    Args:
      reparam: any of this module; it is applied to a tree of ones.
      theta: its scores.
      params: any tree of the shapes of params.

    >>> r = mask_tuning()
    >>> params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    >>> learned_mask(r, {"kernel": jnp.array([[0.01, 0.0]])}, params)["kernel"].tolist()
    [[True, False]]
    """
    ones = jax.tree.map(lambda w: jnp.ones_like(w) if tree.is_array(w) else w, params)
    full = reparam.apply(theta, ones)
    mask = jax.tree.map(lambda w: w != 0 if tree.is_array(w) else w, full)
    if tree.concrete(mask):
        for path, m in tree.flatten(mask).items():
            if path in theta and m.size and not m.any():
                warnings.warn(f"all {m.size} entries of {path!r} are masked", stacklevel=2)
    return mask


def _uniform(scale: float) -> Initializer:
    return jax.nn.initializers.variance_scaling(scale, "fan_in", "uniform")


def _ranked(sparsity: Any, together: bool) -> Callable[[Theta], Mapping[str, Array]]:
    """Return the hard function that keeps the largest scores, exactly as many as are due."""

    def hard(z: Theta) -> Mapping[str, Array]:
        due: Any = sparsity
        if jax.tree.structure(sparsity) != jax.tree.structure(0):
            given = tree.flatten(sparsity)
            if lost := [path for path in z if path not in given]:
                raise ValueError(f"sparsity has no number for {lost[0]!r}")
            due = {path: given[path] for path in z}
        elif not together:
            due = dict.fromkeys(z, sparsity)
        return topk(dict(z), sparsity=due, where=dict.fromkeys(z, True))

    return hard


def edge_popup(
    sparsity: float | Array | PyTree,
    *,
    together: bool = False,
    scores: Initializer | None = None,
    where: tree.Where = None,
) -> Reparam:
    """Find a sub-network of frozen weights: the entries with the largest |s| stay.

    w_eff = w m with m the top round((1 - sparsity) n) of |s|, in each leaf for itself as in the
    paper, and dL/ds = dL/dw_eff w sign(s).

    Args:
      sparsity: the fraction of zeros, in [0, 1); it may be traced. A tree of numbers like params
        (`masks.erk`) has one for each leaf.
      together: rank the entries of all leaves together (of one number).
      scores: their initializer; default: U(±1 / sqrt(fan_in)), of a kernel laid out (..., in, out).
      where: the leaves that are masked; default: the weights.

    Raises:
      ValueError: what `supermask` and `masks.topk` raise.

    Reference: V. Ramanujan, M. Wortsman, A. Kembhavi, A. Farhadi, M. Rastegari, "What's Hidden in a
    Randomly Weighted Neural Network?", arXiv:1911.13299. (Its code keeps n - int((1 - k) n) in
    float arithmetic, which may be one more.)

    >>> r = edge_popup(0.75)
    >>> params = {"kernel": jnp.ones((4, 5))}
    >>> r.apply(r.init(jax.random.key(0), params), params)["kernel"].sum().item()
    5.0
    """
    draw = _uniform(1 / 3) if scores is None else scores
    return supermask(draw, _ranked(sparsity, together), soft=jnp.abs, where=where)


def biprop(
    sparsity: float | Array | PyTree | None = None,
    *,
    together: bool = False,
    scores: Initializer | None = None,
    where: tree.Where = None,
) -> Reparam:
    """Find a binary sub-network of frozen weights: signs, and one number for each leaf.

    w_eff = a sign(w) m with a = sum(|w| m) / sum(m), which is a constant in the backward pass, and
    m the entries with the largest |s| (dL/ds = dL/dw_eff w sign(s)); without a sparsity m is s > 0,
    as many as there come (dL/ds = dL/dw_eff w; `recycle` then needs ``soft=lambda s: s``).

    Args:
      sparsity, together, scores, where: as for `edge_popup`.

    References:
      J. Diffenderfer, B. Kailkhura, "Multi-Prize Lottery Ticket Hypothesis: Finding Accurate Binary
      Neural Networks by Pruning A Randomly Weighted Network", arXiv:2103.09377. The threshold at
      0: M. Gorbett, D. Whitley, "Randomly Initialized Subnetworks with Iterative Weight Recycling",
      arXiv:2303.15953.

    >>> r = biprop(0.5, scores=lambda key, shape, dtype: jnp.array([[1.0, 3.0], [-2.0, 0.5]]))
    >>> params = {"kernel": jnp.array([[9.0, 1.0], [-3.0, 9.0]])}
    >>> r.apply(r.init(jax.random.key(0), params), params)["kernel"].tolist()
    [[0.0, 2.0], [-2.0, 0.0]]
    """

    def value(w, e):
        scale = (jnp.abs(w) * e).sum() / jnp.maximum(e.sum(), 1)
        return jnp.sign(w) * stop_gradient(scale) * e

    positive = lambda z: {path: s > 0 for path, s in z.items()}
    return supermask(
        _uniform(1 / 3) if scores is None else scores,
        positive if sparsity is None else _ranked(sparsity, together),
        soft=(lambda s: s) if sparsity is None else jnp.abs,
        value=value,
        where=where,
    )


def signed_supermask(
    threshold: float | Array = 0.4,
    *,
    scores: Initializer | None = None,
    where: tree.Where = None,
) -> Reparam:
    """Keep, hide or invert frozen weights: w_eff = w e with e = sign(s) [|s| > t].

    dL/ds = dL/dw_eff w. The threshold t = threshold sqrt(6 / (fan_in + fan_out)) is a share of the
    bound of the uniform draw of s, and fixed, so that 1 - threshold of the entries are kept at the
    start. There is no sparsity to choose: weight decay of s drives entries under t unless the
    gradient holds them. The paper decays s by wd s a step, not multiplied by the learning rate::

        tx = optax.chain(
            optax.sgd(5e-3, momentum=0.9, nesterov=True), optax.add_decayed_weights(-3e-4)
        )

    and multiplies both by 0.9 in every 10 epochs. Its weights are `random_signs`, without biases.

    Args:
      threshold: in [0, 1). (The paper multiplies the largest score drawn in place of the bound.)
      scores: their initializer; default: Glorot uniform. With another, t stays what it is.
      where: the leaves that are masked; default: the weights.

    Raises:
      ValueError: a threshold outside [0, 1), which would mask everything, and what `supermask`
        raises.

    Reference: N. Koster, O. Grothe, A. Rettinger, "Signing the Supermask: Keep, Hide, Invert",
    arXiv:2201.13361.

    >>> r = signed_supermask()
    >>> params = {"kernel": jnp.ones((8, 8))}
    >>> w = r.apply(r.init(jax.random.key(0), params), params)["kernel"]
    >>> jnp.unique(w).tolist()
    [-1.0, 0.0, 1.0]
    """
    if violates(lambda t: (t >= 0) & (t < 1), threshold):
        raise ValueError(
            f"threshold is {threshold}, and a share in [0, 1) of the largest start was due"
        )

    def hard(z):
        bound = lambda s: math.sqrt(6 / max(1, sum(_fans(s.shape))))
        return {p: jnp.sign(s) * (jnp.abs(s) > threshold * bound(s)) for p, s in z.items()}

    glorot = jax.nn.initializers.glorot_uniform()
    return supermask(glorot if scores is None else scores, hard, where=where)


def _fans(shape: Sequence[int]) -> tuple[int, int]:
    """Return fan_in and fan_out of a kernel (..., in, out), as `variance_scaling` counts them."""
    if len(shape) < 2:
        raise ValueError(f"a kernel of two or more dimensions is due, and {tuple(shape)} came")
    taps = math.prod(shape[:-2])
    return taps * shape[-2], taps * shape[-1]


def random_signs(scale: float | Array = 3.0) -> Initializer:
    """Return the initializer of constant weights: ±sqrt(scale / fan_in), signs at random.

    Args:
      scale: 2 is He's variance; 3 that of the signed supermask.

    Reference: as for `signed_supermask`.

    >>> random_signs(2.0)(jax.random.key(0), (8, 100), jnp.float32).std().round(2).item()
    0.5
    """

    def init(key: PRNGKeyArray, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        signs = jax.random.rademacher(key, tuple(shape), dtype)
        return signs * jnp.sqrt(scale / max(1, _fans(shape)[0])).astype(dtype)

    return init


def mask_tuning(
    *,
    start: float | Array = 0.01,
    threshold: float | Array = 0.005,
    where: tree.Where = None,
) -> Reparam:
    """Tune a pretrained model by masking: w_eff = w [s > threshold], dL/ds = dL/dw_eff w.

    All scores start at `start`, above the threshold, so that the model starts as it was, bit for
    bit. In the paper the leaves are the attention projections of the image encoder, and s is
    trained by Adam (8e-5, no decay) on the cross entropy plus 1e-4 `mask_norm`, with
    `masks.gradient_dropout` against the distillation loss of the same batch, whose teacher is the
    model as it was::

        optax.softmax_cross_entropy(logits / T, jax.nn.softmax(teacher / T)).mean() * T**2

    Args:
      start, threshold: of the scores.
      where: the leaves that are masked; default: the weights.

    Raises:
      ValueError: a start that is not above the threshold, and what `supermask` raises.

    Reference: K. Zheng, W. Wu, R. Feng, K. Zhu, J. Liu, D. Zhao, Z.-J. Zha, W. Chen, Y. Shen,
    "Regularized Mask Tuning: Uncovering Hidden Knowledge in Pre-trained Vision-Language Models",
    arXiv:2307.15049.

    >>> r = mask_tuning()
    >>> params = {"kernel": jnp.array([[2.0, -3.0]])}
    >>> r.apply(r.init(jax.random.key(0), params), params)["kernel"].tolist()
    [[2.0, -3.0]]
    """
    if violates(lambda s, t: s > t, start, threshold):
        raise ValueError(f"start={start} is due above threshold={threshold}: all would be masked")
    constant = lambda key, shape, dtype: jnp.full(shape, start, dtype)
    hard = lambda z: {path: s > threshold for path, s in z.items()}
    return supermask(constant, hard, where=where)


def mask_norm(theta: Theta, *, eps: float = 1e-12) -> Float[Array, ""]:
    """Return sum_l sqrt(|s_l|^2 + eps), the norms (not squared) of the scores of each leaf.

    Its gradient is s_l / |s_l|; eps keeps it finite at 0.

    Reference: as for `mask_tuning`.

    >>> mask_norm({"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}).item()
    6.0
    """
    squares = [jnp.square(tree.float32(s)).sum() for s in jax.tree.leaves(theta)]
    return sum((jnp.sqrt(s + eps) for s in squares), jnp.zeros(()))
