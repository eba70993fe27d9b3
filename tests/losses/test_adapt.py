"""Predictions for the target domain against a joint distribution that is known."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import losses


def test_it_is_the_posterior_of_a_known_joint_distribution():
    """p(x, y, domain) over 6 x 4 x 2 cells, label shift and all."""
    joint = np.random.default_rng(0).dirichlet(np.ones(48)).reshape(6, 4, 2)
    with jax.enable_x64(True):
        class_given_x = joint.sum(2) / joint.sum((1, 2))[:, None]
        source, target = joint[..., 0], joint[..., 1]
        got = losses.target_posterior(
            jnp.log(jnp.asarray(class_given_x)) + 5, jnp.log(jnp.asarray(source / target))
        )
        np.testing.assert_allclose(got, target / target.sum(1, keepdims=True), rtol=1e-10)


def test_a_discriminator_that_knows_nothing_changes_nothing_and_extremes_are_finite():
    logits = jax.random.normal(jax.random.key(0), (5, 3)) * 4
    np.testing.assert_allclose(
        losses.target_posterior(logits, jnp.full((5, 3), 0.7)), jax.nn.softmax(logits), rtol=1e-5
    )
    sure = losses.target_posterior(logits, jnp.array([500.0, 500.0, -500.0]))
    np.testing.assert_allclose(sure[:, 2], 1, rtol=1e-6)
    low = losses.target_posterior(logits.astype(jnp.bfloat16), jnp.zeros((5, 3), jnp.bfloat16))
    assert low.dtype == jnp.float32 and np.allclose(low.sum(1), 1)
