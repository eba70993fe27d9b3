"""Ensembles of features and of predictions: networks kept apart, and what joins them."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates

__all__ = [
    "FeatureStats",
    "concatenated_features",
    "levi_apply",
    "levi_init",
    "levi_loss",
    "mask_classes",
    "max_probability",
]


# ----------------------------------------------------------------------------- of predictions


def mask_classes(
    logits: Float[Array, "*n classes"], classes: Bool[Array, " classes"]
) -> Float[Array, "*n classes"]:
    """Rule out the classes that are not marked: their probability and their gradient are 0.

    For learning one task after another under one head: train on the current task's classes alone,
    ``optax.softmax_cross_entropy_with_integer_labels(mask_classes(logits, task == i), labels)``
    with ``task`` the task of each class, and predict on those seen so far, ``task <= i``. The mask
    may be traced: one program serves all tasks.

    Args:
      logits: of all classes.
      classes: the classes in question, in any order.

    Returns:
      The logits, and half the lowest number of their dtype at the other classes: finite, so that a
      one-hot label of 0 times its logarithm is 0. (The loss of a label that is ruled out is huge.)

    Raises:
      ValueError: a mask of another shape, or (if it is known) of no class.
      TypeError: a mask that is not boolean.

    Reference: as for `max_probability`.

    >>> logits = jnp.array([1.0, 9.0, 1.0])
    >>> jax.nn.softmax(mask_classes(logits, jnp.array([True, False, True]))).tolist()
    [0.5, 0.0, 0.5]
    """
    logits = jnp.asarray(logits)
    if jnp.shape(classes) != logits.shape[-1:]:
        raise ValueError(f"classes is {jnp.shape(classes)}, and {logits.shape[-1:]} was due")
    if not jnp.issubdtype(jnp.result_type(classes), jnp.bool_):
        raise TypeError(f"classes is {jnp.result_type(classes)}, and a boolean mask was due")
    if violates(np.any, classes):
        raise ValueError("classes marks no class")
    return jnp.where(classes, logits, jnp.finfo(logits.dtype).min / 2)


def max_probability(*logits: Float[Array, "*n classes"]) -> Float[Array, "*n classes"]:
    """Return the elementwise maximum of softmax(logits) over the members: predict its argmax.

    Of two experts, one that learned fast (online, right on new tasks) and one that learned slowly
    (offline, right on old ones), each example goes with whichever is surer. The rows sum to 1 or
    more. (The mean, ``jax.nn.softmax(jnp.stack(logits)).mean(0)``, is another ensemble.)

    The offline one accumulates the trained part of the online one (an adapter, say: not the whole
    tree) after every step, in float32, from its copy at the start of the second task::

        offline = optax.incremental_update(online, offline, 1e-4)
        adapt = optax.conditionally_mask(optax.adam(lr), lambda step: step >= frozen_steps)
        tx = optax.partition({"adapter": adapt, "head": optax.adam(lr)}, labels)

    where, in every task but the first, the head learns alone for the first `frozen_steps` (3 of 5
    epochs in the paper), on the classes of the task (`mask_classes`).

    Args:
      logits: one array of each member, on the classes seen so far.

    Raises:
      ValueError: no member, or logits of different shapes.

    Reference: Q. Gao, C. Zhao, Y. Sun, T. Xi, G. Zhang, B. Ghanem, J. Zhang, "A Unified Continual
    Learning Framework with General Parameter-Efficient Tuning", arXiv:2303.10070.

    >>> online, offline = jnp.array([0.0, 0.0]), jnp.log(jnp.array([0.25, 0.75]))
    >>> max_probability(online, offline).round(4).tolist()
    [0.5, 0.75]
    """
    shapes = [jnp.shape(each) for each in logits]
    if len(set(shapes)) != 1:
        raise ValueError(f"logits of one shape were due, of one member or more, and {shapes} came")
    return jax.nn.softmax(jnp.stack(logits)).max(0)


# -------------------------------------------------------------------------------- of features


class FeatureStats(NamedTuple):
    """What features are standardized with, one number a feature."""

    mean: Float[Array, " features"]
    std: Float[Array, " features"]


def concatenated_features(
    apply_fn: Callable[..., Float[Array, "n features"]],
    stack: PyTree,
    *args: PyTree,
    stats: FeatureStats | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "n all"], FeatureStats]:
    """Concatenate the features of networks that differ in the seed, standardized one by one.

    phi(x) = ((f_1(x), ..., f_m(x)) - mean) / std, in one program for all members. Train a linear
    probe on it: it is richer than the features of one network, above all for tasks that the
    networks were not trained on. The networks stay frozen; to fine-tune, tune each for itself on
    the new task and concatenate then. (Tuning them through their concatenation is the poor variant:
    it finds one set of features as one network does.)

    Args:
      apply_fn: ``apply_fn(params, *args) -> features`` of one network, often the input of the last
        layer: ``lambda p, x: trace.taps(model, "head/kernel")(p, x)[1]["head/kernel"].input``.
      stack: params with a leading axis of members on every leaf, as a training under `jax.vmap`
        over seeds returns. (Snapshots of one training with a large step size do as well.)
      args: the examples.
      stats: of the training set: None computes those of these examples; give what that returned to
        the examples to predict.
      axis_name: of the mapped axis, if the training examples are split over devices by `pmap` or
        `shard_map`.

    Returns:
      Features in float32 or wider, member by member, and the statistics. A feature that is
      constant in the training set, up to rounding (a dead or a saturated unit), is only shifted, to
      0.

    Raises:
      ValueError: features that are no matrix, or statistics of another size.

    Warns:
      UserWarning: two members with the same features (if they are known): they add nothing. Were
        they trained from one seed?

    Reference: J. Zhang, L. Bottou, "Learning useful representations for shifting tasks and
    distributions", arXiv:2212.07346. (Their code normalizes by BatchNorm.)

    >>> stack = {"kernel": jnp.array([[[1.0]], [[-2.0]]])}
    >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["kernel"])
    >>> x = jnp.array([[1.0], [-1.0]])
    >>> features, stats = concatenated_features(apply_fn, stack, x)
    >>> features.tolist()
    [[1.0, -1.0], [-1.0, 1.0]]
    >>> concatenated_features(apply_fn, stack, 2 * x, stats=stats)[0].tolist()
    [[3.0, -1.0], [-1.0, 3.0]]
    """
    each = jax.vmap(lambda params: apply_fn(params, *args))(stack)
    if each.ndim != 3:
        raise ValueError(f"features (n, features) were due of a member, and {each.shape[1:]} came")
    if tree.concrete(each):
        _warn_of_copies(np.asarray(each))
    features = tree.float32(jnp.moveaxis(each, 0, 1).reshape(each.shape[1], -1))
    if stats is None:
        over = (lambda x: x) if axis_name is None else partial(jax.lax.pmean, axis_name=axis_name)
        mean = over(features.mean(0))
        stats = FeatureStats(mean, jnp.sqrt(over(jnp.square(features - mean).mean(0))))
    elif stats.mean.shape != features.shape[1:] or stats.std.shape != features.shape[1:]:
        raise ValueError(
            f"the statistics are of {stats.mean.shape[0]} features, and {features.shape[1]} came"
        )
    noise = 64 * jnp.finfo(features.dtype).eps * jnp.abs(stats.mean)
    return (features - stats.mean) / jnp.where(stats.std > noise, stats.std, 1), stats


def _warn_of_copies(each: np.ndarray) -> None:
    same: dict[bytes, list[int]] = {}
    for i, features in enumerate(each):
        same.setdefault(features.tobytes(), []).append(i)
    copies = [members for members in same.values() if len(members) > 1]
    if copies and each.size:
        warnings.warn(
            f"members {copies[0]} have the same features: were they trained from one seed?",
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------- of layers


def levi_init(
    key: PRNGKeyArray,
    features: Mapping[str, Float[Array, "n *positions d"]],
    task: Float[Array, "n s"],
    classes: int,
    *,
    width: int = 256,
) -> dict[str, PyTree[Float[Array, "..."]]]:
    """Draw the adapting layers of `levi_apply`: two dense layers for each of the features.

    Kernels are He normal (hidden) and LeCun normal (out), biases zero.

    Args:
      key: a typed key. The draw of a layer depends on its name, not on the other layers.
      features: of the pretrained model, by layer (or their shapes).
      task: the output of the task model (or its shape).
      classes: how many.
      width: units of each hidden layer.

    Raises:
      ValueError: no features.
      TypeError: a legacy uint32 key.

    >>> shapes = {"last": jax.ShapeDtypeStruct((1, 12, 8), jnp.float32)}
    >>> theta = levi_init(jax.random.key(0), shapes, jnp.zeros((1, 2)), 3, width=5)
    >>> jax.tree.map(jnp.shape, theta["last"])
    {'hidden': {'bias': (5,), 'kernel': (10, 5)}, 'out': {'bias': (3,), 'kernel': (5, 3)}}
    """
    if not features:
        raise ValueError("features of one layer at least were due")
    keys = tree.keys(key, dict.fromkeys(features, 0), "levi")
    he, lecun = jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal()

    def adapter(key: PRNGKeyArray, inputs: int) -> PyTree:
        hidden, out = jax.random.split(key)
        return {
            "hidden": {"kernel": he(hidden, (inputs, width)), "bias": jnp.zeros(width)},
            "out": {"kernel": lecun(out, (width, classes)), "bias": jnp.zeros(classes)},
        }

    return {name: adapter(keys[name], z.shape[-1] + task.shape[-1]) for name, z in features.items()}


def levi_apply(
    theta: Mapping[str, PyTree[Float[Array, "..."]]],
    features: Mapping[str, Float[Array, "n *positions d"]],
    task: Float[Array, "n s"],
    *,
    frozen: bool = True,
) -> Float[Array, "layers n classes"]:
    """Join layers of a pretrained model, each with a small model of the task; predict the mean.

    logits_l = W'_l relu(W_l [norm(z_l), norm(s)] + b_l) + b'_l for each layer l, where z_l is the
    layer's features, averaged over positions (so that sequences may have any lengths), s(x) the
    output of a small model, trained from scratch with the adapting layers, and norm brings a vector
    to mean 0 and variance 1. The prediction is ``logits.mean(0)``, the loss `levi_loss`. What the
    pretrained model has not learned the small one can, and what the data of the task has not, the
    pretrained layers have::

        taps = trace.taps(pretrained, ["block_1/kernel", "block_3/kernel", "head/kernel"])
        features = {path: tap.input for path, tap in taps(params, x)[1].items()}
        theta = levi_init(key, features, small(task_params, x), classes)

        def loss(trained):                                          # theta and task_params alone
            theta, task_params = trained
            return levi_loss(levi_apply(theta, features, small(task_params, x)), labels).mean()

    Keep the small model small: within a tenth of the parameters of the pretrained one, say.

    Args:
      theta: the adapting layers, of `levi_init`.
      features: the same layers' features, by name.
      task: the output of the task model.
      frozen: no gradient goes into the features. False where the pretrained model is tuned as well
        (by LoRA, say).

    Returns:
      The logits of each layer, in the order of their names.

    Raises:
      ValueError: features of other layers than theta, naming them.

    Reference: Y. Roh, Q. Liu, H. Gui, Z. Yuan, Y. Tang, S. E. Whang, L. Liu, S. Bi, L. Hong, E. H.
    Chi, Z. Zhao, "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views",
    arXiv:2402.04644. (The shape of the adapting layers, their mean and the loss are our choice.)

    >>> from jaxkit import trace
    >>> pretrained = lambda p, x: jnp.tanh(x @ p["first"]) @ p["last"]
    >>> params = {"first": jnp.ones((2, 4)), "last": jnp.ones((4, 3))}
    >>> x = jnp.array([[0.0, 1.0], [1.0, 2.0]])
    >>> _, tapped = trace.taps(pretrained)(params, x)
    >>> features = {path: tap.input for path, tap in tapped.items()}
    >>> theta = levi_init(jax.random.key(0), features, x, 3)
    >>> levi_apply(theta, features, x).shape
    (2, 2, 3)
    """
    if set(theta) != set(features):
        raise ValueError(f"theta is of the layers {sorted(theta)}, and {sorted(features)} came")

    def logits(layer: PyTree, z: Array) -> Array:
        z = tree.float32(jnp.asarray(z))
        z = z.mean(tuple(range(1, z.ndim - 1)))
        z = jax.lax.stop_gradient(z) if frozen else z
        h = jnp.concatenate([_norm(z), _norm(tree.float32(jnp.asarray(task)))], -1)
        h = jax.nn.relu(h @ layer["hidden"]["kernel"] + layer["hidden"]["bias"])
        return h @ layer["out"]["kernel"] + layer["out"]["bias"]

    return jnp.stack([logits(theta[name], features[name]) for name in sorted(features)])


def _norm(x: Array, eps: float = 1e-6) -> Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + eps)


def levi_loss(
    logits: Float[Array, "layers n classes"], labels: Float[Array, " n"]
) -> Float[Array, " n"]:
    """Return H(y, mean_l logits_l) + mean_l H(y, logits_l), the cross-entropy of all and of each.

    Args:
      logits: of `levi_apply`.
      labels: the classes.

    Reference: as for `levi_apply`.

    >>> round(levi_loss(jnp.zeros((3, 1, 2)), jnp.array([0])).item(), 4)  # 2 log 2
    1.3863
    """
    nll = lambda z: -jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], -1)[..., 0]
    return nll(logits.mean(0)) + jax.vmap(nll)(logits).mean(0)
