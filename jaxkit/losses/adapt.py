"""Labels for a domain that has none, from what the domains tell."""

import jax
from jaxtyping import Array, Float, Inexact

from jaxkit import tree

__all__ = ["target_posterior"]


def target_posterior(
    logits: Inexact[Array, "... classes"], source_logits: Inexact[Array, "... classes"]
) -> Float[Array, "... classes"]:
    """Refine a classifier's prediction for the target domain by what tells the domains apart.

    By Bayes, with d_k(x) = p(source | x, y = k) of a domain discriminator for each class:

        p(y = k | x, target) = p(y = k | x) (1 - d_k(x)) / sum_j p(y = j | x) (1 - d_j(x)).

    The cross entropy of the classifier to it (as a constant) on unlabeled data of the target domain
    stands for the classification loss that its missing labels would give; its gradient on held-out
    data is the guidance of `optim.pareto_direction`::

        labels = jax.lax.stop_gradient(target_posterior(logits, source_logits))
        loss = optax.softmax_cross_entropy(logits, labels).mean()

    Args:
      logits: of the classes, trained on both domains together.
      source_logits: of "source" against "target", one for each class: d_k is their sigmoid.

    Returns:
      Probabilities, in float32 or wider.

    Reference: F. Lv et al., "Pareto Domain Adaptation", arXiv:2112.04137. (Its exact form is not
    known to us; this is the theorem of Bayes that it names.)

    >>> import jax.numpy as jnp
    >>> even, source = jnp.zeros(2), jnp.log(jnp.array([3.0, 1.0]))  # d = 3 / 4, 1 / 2
    >>> [round(float(p), 4) for p in target_posterior(even, source)]
    [0.3333, 0.6667]
    """
    target = jax.nn.log_sigmoid(-tree.float32(source_logits))
    return jax.nn.softmax(jax.nn.log_softmax(tree.float32(logits), axis=-1) + target, axis=-1)
