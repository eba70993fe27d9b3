"""Scaled weight standardization: exact moments, and the signal of a normalizer-free ResNet."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.gauss import moments
from jaxkit.init.residual import nf_wire, residual
from jaxkit.init.standardize import signal_moments, standardize, standardized, unit_gains

KEY = jax.random.key(0)


def test_mean_and_norm_per_channel():
    w = 5 + 3 * jax.random.normal(KEY, (3, 3, 8, 6))
    gain = jnp.linspace(0.5, 2.0, 6)
    s = np.asarray(standardize(w, gain), np.float64)
    np.testing.assert_allclose(s.mean((0, 1, 2)), 0, atol=1e-7)
    np.testing.assert_allclose((s**2).sum((0, 1, 2)), gain**2, rtol=2e-6)
    # the formula of the paper, in float64
    wide = np.asarray(w, np.float64)
    oracle = (wide - wide.mean((0, 1, 2))) / np.sqrt(72 * wide.var((0, 1, 2))) * np.asarray(gain)
    np.testing.assert_allclose(s, oracle, atol=1e-6)


def test_scale_and_shift_do_not_matter():
    w = jax.random.normal(KEY, (4, 5, 6))
    np.testing.assert_allclose(standardize(3 * w + 2), standardize(w), atol=1e-6)


def test_layouts_and_dtype():
    w = jax.random.normal(KEY, (3, 4, 5))
    np.testing.assert_allclose(
        standardize(w.transpose(2, 1, 0), out_axis=0).transpose(2, 1, 0), standardize(w), atol=1e-6
    )
    stack = jnp.stack([w, 2 * w + 1])
    gain = jnp.array([[1.0] * 5, [2.0] * 5])
    both = standardize(stack, gain, batch_axis=0)
    np.testing.assert_allclose(both[1], 2 * standardize(w), atol=1e-6)
    half = standardize(w.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), standardize(w), atol=0.01)


def test_a_constant_kernel_is_zero_with_finite_gradients():
    w = jnp.full((3, 3, 2, 4), 0.7)
    np.testing.assert_allclose(standardize(w), 0, atol=1e-9)
    weights = jax.random.normal(KEY, w.shape)
    grads = jax.grad(lambda w: (standardize(w) * weights).sum())(w)
    assert bool(jnp.isfinite(grads).all())
    # eps is a floor: above it nothing changes, below it the kernel is linear in w
    v = jax.random.normal(KEY, (8, 3))
    np.testing.assert_array_equal(standardize(v, eps=1e-4), standardize(v, eps=1e-12))
    small = standardize(1e-5 * v)
    np.testing.assert_allclose(small, (v - v.mean(0)) * 1e-5 / math.sqrt(1e-4), rtol=1e-4)


def test_trees():
    params = {
        "conv": {"kernel": jax.random.normal(KEY, (3, 3, 2, 4)), "bias": jnp.ones(4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }
    gains = unit_gains(params, where="conv/kernel")
    new = standardized(gains, params, where="conv/kernel")
    np.testing.assert_array_equal(new["conv"]["kernel"], standardize(params["conv"]["kernel"]))
    assert new["head"]["kernel"] is params["head"]["kernel"]
    assert new["conv"]["bias"] is params["conv"]["bias"]
    with pytest.raises(ValueError, match="head/kernel"):
        standardized(gains, params, where="*/kernel")
    with pytest.raises(ValueError, match=r"conv/kernel.*\(4,\) is due"):
        standardized({"conv/kernel": jnp.ones(3)}, params, where="conv/kernel")
    with pytest.raises(ValueError, match="no axis"):
        standardize(jnp.ones(3))


def moments_of_the_stack(scaled: bool, blocks: int = 20, n: int = 256):
    gamma = math.sqrt(2 / (1 - 1 / math.pi)) if scaled else 1.0

    @jax.jit
    @jax.vmap
    def run(key):
        first, rest = jax.random.split(key)

        def block(x, inputs):
            key, wire = inputs
            draws = jax.random.normal(key, (2, n, n))
            first, second = (
                standardize(w) if scaled else w * math.sqrt(2 / n) for w in (draws[0], draws[1])
            )
            phi = lambda x: gamma * jax.nn.relu(x)
            x = residual(lambda x: phi(phi(x) @ first) @ second, x, wire)
            return x, signal_moments(x)

        keys = jax.random.split(rest, blocks)
        x = jax.random.normal(first, (128, n))
        return jax.lax.scan(block, x, (keys, nf_wire((blocks,))))[1]

    return jax.tree.map(lambda m: np.asarray(m.mean(0)), run(jax.random.split(KEY, 3)))


def test_signal_of_a_normalizer_free_stack():
    moments = moments_of_the_stack(scaled=True)
    predicted = 1 + 0.04 * np.arange(1, 21)
    np.testing.assert_allclose(moments["avg_var"], predicted, rtol=0.05)
    assert moments["avg_sq_mean"].max() < 0.03  # 1 / 128 of the variance is the batch's own
    plain = moments_of_the_stack(scaled=False)
    assert plain["avg_sq_mean"][-1] > 0.2
    assert plain["avg_var"][-1] < 0.9 * predicted[-1]


def test_signal_moments():
    x = jax.random.normal(KEY, (7, 5, 6, 3)) + jnp.array([0.0, 1.0, 2.0])
    got = signal_moments(x)
    x = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(got["avg_sq_mean"], (x.mean(0) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(got["avg_var"], x.var(0).mean(), rtol=1e-5)


def test_jit_and_vmap():
    w = jax.random.normal(KEY, (2, 3, 4, 5))
    np.testing.assert_allclose(jax.jit(standardize)(w), standardize(w), atol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(standardize)(w), jnp.stack([standardize(each) for each in w]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "sampled"),
    [
        ("relu", 1.7139588594436646),
        ("gelu", 1.7015043497085571),
        ("silu", 1.7881293296813965),
        ("elu", 1.2716004848480225),
        ("selu", 1.0008515119552612),
        ("sigmoid", 4.803835391998291),
        ("leaky_relu", 1.70590341091156),
        ("tanh", 1.5939117670059204),
    ],
)
def test_activations_of_unit_variance(name, sampled):
    """``1 / std(phi(z))``, against the constants that the authors sampled."""
    m = moments(getattr(jax.nn, name), order=0)
    gamma = 1 / math.sqrt(m.m2 - m.m1**2)
    assert abs(gamma / sampled - 1) < 1e-3
    if name == "relu":
        assert abs(gamma - math.sqrt(2 / (1 - 1 / math.pi))) < 1e-9
