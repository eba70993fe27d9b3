import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import probes

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 5))
WIDE = RNG.standard_normal((6, 9))


def by_gram_matrices(x, y):
    """Another formula for the same: centered Gram matrices of the examples."""
    h = np.eye(len(x)) - 1 / len(x)
    k, m = (h @ a @ a.T @ h for a in (x, y))
    return np.sum(k * m) / np.linalg.norm(k) / np.linalg.norm(m)


@pytest.mark.parametrize("x", [X, WIDE])
def test_rotations_and_scales_change_nothing(x):
    q = np.linalg.qr(RNG.standard_normal((x.shape[1],) * 2))[0]
    for y in (x, x @ q, -3e4 * x, 1e-9 * x + 7, np.concatenate([x, x], 1)):
        with jax.enable_x64(True):
            assert probes.cka(x, y) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("x", [X, WIDE])
def test_equals_the_formula_by_gram_matrices(x):
    for width in (3, 5, 30):
        y = x[:, :1] + 0.5 * RNG.standard_normal((len(x), width))
        found = probes.cka(jnp.asarray(x), jnp.asarray(y))
        assert found == pytest.approx(by_gram_matrices(x, y), rel=1e-4)
        assert found == pytest.approx(float(probes.cka(jnp.asarray(y), jnp.asarray(x))), rel=1e-4)


def test_nothing_in_common_is_zero():
    angle = 2 * np.pi * np.arange(16) / 16
    first, second = np.cos(angle)[:, None], np.stack([np.sin(angle), np.cos(2 * angle)], 1)
    assert probes.cka(jnp.asarray(first), jnp.asarray(second)) < 1e-12
    assert probes.cka(jnp.ones((4, 3)), jnp.asarray(X[:4])) == 0
    assert probes.cka(jnp.ones((4, 3)), jnp.ones((4, 3))) == 0


def test_all_but_the_first_dimension_are_features():
    images = RNG.standard_normal((8, 3, 2, 2)).astype(np.float32)
    y = RNG.standard_normal((8, 4)).astype(np.float32)
    assert probes.cka(images, y) == probes.cka(images.reshape(8, -1), y)
    huge = probes.cka(1e15 * images, 1e-15 * y)
    assert huge == pytest.approx(float(probes.cka(images, y)), rel=1e-5)


def test_other_examples_are_refused():
    for x, y in ((X, X[:5]), (X[:1], X[:1]), (X[0, 0], X)):
        with pytest.raises(ValueError, match="features of the same two or more examples"):
            probes.cka(jnp.asarray(x), jnp.asarray(y))
