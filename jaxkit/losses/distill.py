"""Distillation: what a student learns from one teacher, or token by token from one of two."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxkit import tree

__all__ = ["compatibility_loss", "kd_loss"]

Rule = Literal["old_right", "old_right_new_wrong", "student_wrong"]


def compatibility_loss(
    student: Float[Array, "*tokens vocabulary"],
    old: Float[Array, "*tokens vocabulary"],
    new: Float[Array, "*tokens vocabulary"],
    labels: Int[Array, "*tokens"],
    mask: Bool[Array, "*tokens"] | None = None,
    *,
    select: Rule | Bool[Array, "*tokens"] = "old_right",
) -> Float[Array, "*tokens"]:
    """Return m KL(old||student) + (1 - m) KL(new||student): each token has one of two teachers.

    So that an update of a language model stays right where the old version was right. Train an
    adapter on the new base, from the new version's task adapter, on it; `old` and `new` are the
    two versions, fine-tuned to the task, and get no gradient. Compare versions by
    `jaxkit.weights.flips`, negative flips beside the gain in accuracy::

        cells = weights.flips(labels, old_prediction, student_prediction)
        negative, positive = cells[1, 0], cells[0, 1]       # gain = positive - negative
        moved = (old_prediction != student_prediction).mean() - negative - positive

    where `moved` are those that both get wrong, in different ways. Of a score of generated text,
    ``(new_score < old_score - margin).mean()`` are the negative flips.

    Args:
      student: logits of the model that is trained.
      old: logits of the old version.
      new: logits of the new version, of the same vocabulary.
      labels: the right tokens.
      mask: False where a token does not count: padding, prompts. Default: all count.
      select: which tokens learn from the old version, m = 1: "old_right", those that it predicts
        right; "old_right_new_wrong"; "student_wrong", those that the student gets wrong so far; or
        m itself.

    Returns:
      A loss per token in nats, 0 (without a gradient, whatever the logits are) where the mask is
      False: for the mean over tokens divide the sum by ``mask.sum()``. An entry of the vocabulary
      that a teacher rules out by a logit of -inf adds nothing.

    Raises:
      ValueError: logits of other shapes (other vocabularies have no tokens in common), labels,
        mask or m of other shapes, another `select`.
      TypeError: a mask or m that is not boolean.

    Reference: J. Echterhoff, F. Faghri, R. Vemulapalli, T.-Y. Hu, C.-L. Li, O. Tuzel, H.
    Pouransari, "MUSCLE: A Model Update Strategy for Compatible LLM Evolution", arXiv:2407.09435.
    (That a token is the old version's where it is right is our choice.)

    >>> sure = jnp.array([[9.0, 0.0], [9.0, 0.0]])
    >>> loss = compatibility_loss(sure, old=sure, new=-sure, labels=jnp.array([0, 1]))
    >>> loss.round(2).tolist()  # the old version is right on the first token alone
    [0.0, 9.0]
    """
    shape = jnp.shape(student)
    for name, logits in (("old", old), ("new", new)):
        if jnp.shape(logits) != shape:
            raise ValueError(
                f"the logits of `{name}` are {jnp.shape(logits)}, and {shape} was due: the "
                "student's tokens over the student's vocabulary"
            )
    mask = jnp.ones(shape[:-1], bool) if mask is None else jnp.asarray(mask)
    own = {} if isinstance(select, str) else {"select": select}
    for name, x in {"labels": labels, "mask": mask, **own}.items():
        if jnp.shape(x) != shape[:-1]:
            raise ValueError(f"{name} is {jnp.shape(x)}, and one a token, {shape[:-1]}, was due")
        if name != "labels" and not jnp.issubdtype(jnp.result_type(x), jnp.bool_):
            raise TypeError(f"{name} is {jnp.result_type(x)}, and bool was due")
    counted = lambda logits: jnp.where(mask[..., None], tree.float32(jnp.asarray(logits)), 0)
    student, old, new = (counted(logits) for logits in (student, old, new))
    m = _learn_from_old(select, *(x.argmax(-1) == labels for x in (student, old, new)))
    teacher = jax.lax.stop_gradient(jnp.where(m[..., None], old, new))
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    each = optax.losses.kl_divergence_with_log_targets(log_q, log_p, where=log_p > -jnp.inf)
    return jnp.where(mask, each, 0)


def _learn_from_old(select: Rule | Array, student: Array, old: Array, new: Array) -> Array:
    """Return m, from who is right."""
    if not isinstance(select, str):
        return jnp.asarray(select)
    if select == "old_right":
        return old
    if select == "old_right_new_wrong":
        return old & ~new
    if select == "student_wrong":
        return ~student
    raise ValueError(
        f"select={select!r}; 'old_right', 'old_right_new_wrong', 'student_wrong' or a boolean "
        "array was due"
    )


def kd_loss(
    logits: Float[Array, "*n classes"],
    teacher: Float[Array, "*n classes"],
    labels: Int[Array, " *n"],
    *,
    temperature: float | Array = 1.0,
) -> Float[Array, " *n"]:
    r"""Learn from labels and from a teacher: :math:`T^2 H(p_t, p_s) + H(y, s)`.

    p_t = softmax(teacher / T), without a gradient, and p_s = softmax(logits / T); H is the
    cross-entropy, in nats, and s the softmax of the logits themselves.

    Args:
      logits: of the student, a sub-network say.
      teacher: of the teacher, the full network.
      labels: the classes.
      temperature: T > 0.

    Returns:
      A loss per example.

    Reference: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network",
    arXiv:1503.02531.

    >>> logits = jnp.array([[0.0, 0.0]])
    >>> kd_loss(logits, logits, jnp.array([0]))
    Array([1.3862944], dtype=float32)
    """
    soft = jax.nn.softmax(jax.lax.stop_gradient(teacher) / temperature)
    distilled = -(soft * jax.nn.log_softmax(logits / temperature)).sum(-1)
    hard = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    return temperature**2 * distilled - hard
