"""Gradient dropout: probabilities in closed form; what passes is never the other gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks

KEY = jax.random.key(0)
A = {"w": jnp.array([[1.0, 1.0, -2.0, 3.0, 0.5, 0.0]]), "b": jnp.array([1.0, -1.0])}
B = {"w": jnp.array([[2.0, -3.0, 2.0, -1.0, -0.5, 7.0]]), "b": jnp.array([-3.0, 1.0])}
AGREE = jnp.sign(A["w"]) == jnp.sign(B["w"])
P = np.where(AGREE, 1.0, np.abs(A["w"]) / (np.abs(A["w"]) + np.abs(B["w"])))


@pytest.fixture(scope="module")
def draws():
    keys = jax.random.split(KEY, 100_000)
    return jax.jit(jax.vmap(lambda k: masks.gradient_dropout(k, A, B)))(keys)


def test_what_passes_is_the_first_gradient_or_nothing(draws):
    w = np.asarray(draws["w"])
    assert ((w == 0) | (w == np.asarray(A["w"]))).all()
    assert (w[:, 0, 0] == 1).all()


def test_probabilities(draws):
    passed = np.asarray(draws["w"] != 0)[:, 0, :5].mean(0)
    due = P[0, :5]
    np.testing.assert_allclose(due, [1, 0.25, 0.5, 0.75, 0.5], rtol=1e-6)
    sigma = np.sqrt(due * (1 - due) / 100_000)
    assert (np.abs(passed - due) <= 4 * sigma + 1e-12).all()
    mean = np.asarray(draws["w"]).mean(0)[0, :5]
    assert (np.abs(mean - A["w"][0, :5] * due) <= 4 * sigma * np.abs(A["w"][0, :5]) + 1e-6).all()


def test_leaves_draw_for_themselves(draws):
    """Entries of two leaves that pass with probabilities 1/2 and 1/4 do so independently."""
    a, b = np.asarray(draws["w"])[:, 0, 2] != 0, np.asarray(draws["b"])[:, 0] != 0
    sigma = np.sqrt(1 / 8 * 7 / 8 / 100_000)
    assert abs((a & b).mean() - 1 / 8) < 4 * sigma


def test_nothing_is_dropped_at_level_zero_or_without_another_gradient():
    drop = lambda **options: masks.gradient_dropout(KEY, A, options.pop("other", B), **options)
    jax.tree.map(np.testing.assert_array_equal, drop(level=0.0), A)
    zero = jax.tree.map(jnp.zeros_like, B)
    jax.tree.map(np.testing.assert_array_equal, drop(other=zero), A)
    at_half = np.asarray(drop(level=0.5)["w"])
    ratio = at_half[0, :5] / np.asarray(A["w"])[0, :5]
    assert np.isin(ratio, [0.5, 1.0]).all() and (ratio == 0.5).any()


def test_bad_input():
    with pytest.raises(ValueError, match="level is 2"):
        masks.gradient_dropout(KEY, A, B, level=2)
    with pytest.raises(ValueError, match="other gradient does not fit"):
        masks.gradient_dropout(KEY, A, {"w": B["w"]})
    with pytest.raises(TypeError, match="typed key"):
        masks.gradient_dropout(jax.random.PRNGKey(0), A, B)
