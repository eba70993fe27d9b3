"""Fake quantization: gradients in closed form in float64, levels, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import losses, reparam, trace


def closed_form(x, low, high, bits, g):
    """The derivatives by hand, in numpy."""
    n = 2**bits - 1
    s = n / (high - low)
    u = (x - low) * s
    e = (u - np.round(u)) / n
    inside = (x > low) & (x < high)
    dx = np.where(inside, g, 0)
    dhigh = np.where(inside, -e * g, 0) + np.where(x >= high, g, 0)
    dlow = np.where(inside, e * g, 0) + np.where(x <= low, g, 0)
    return dx, dlow.sum(), dhigh.sum()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_gradients_are_the_closed_form(bits):
    with jax.enable_x64(True):
        rng = np.random.default_rng(bits)
        low, high = -1.3, 2.1
        x = np.concatenate([rng.normal(size=2000) * 1.5, [low, high, -9.0, 9.0]])
        g = rng.normal(size=x.shape)
        fn = lambda x, low, high: (reparam.fake_quantize(x, low, high, bits) * g).sum()
        got = jax.jit(jax.grad(fn, (0, 1, 2)))(jnp.asarray(x), low, high)
        assert got[0].dtype == np.float64
        for a, b in zip(got, closed_form(x, low, high, bits, g), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_levels_and_clips():
    x = jnp.linspace(-5, 5, 10_001)
    y = jax.jit(reparam.fake_quantize, static_argnums=3)(x, -1.3, 2.1, 4)
    levels = np.unique(np.asarray(y).round(5))
    assert len(levels) == 16
    np.testing.assert_allclose(levels, -1.3 + np.arange(16) * 3.4 / 15, atol=2e-5)
    inside = (x > -1.3) & (x < 2.1)
    assert jnp.abs(jnp.where(inside, y - x, 0)).max() <= 3.4 / 15 / 2 + 1e-5
    fine = reparam.fake_quantize(x, -5.0, 5.0, 16)
    assert jnp.abs(fine - x).max() <= 10 / (2**16 - 1) / 2 + 1e-5
    assert reparam.fake_quantize(x.astype(jnp.bfloat16), -1.0, 1.0).dtype == jnp.bfloat16


def test_half_goes_to_even():
    y = reparam.fake_quantize(jnp.array([0.5, 1.5, 2.5]), 0.0, 3.0, 2)
    np.testing.assert_array_equal(y, [0, 2, 2])


def test_inputs_of_a_model_and_their_clips_learn():
    params = {"up": jax.random.normal(jax.random.key(0), (5, 8)), "down": jnp.ones((8, 2))}
    apply_fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    x = jax.random.normal(jax.random.key(1), (9, 5))
    clips = {"up": (-4.0, 4.0), "down": (-0.9, 0.9)}
    got = reparam.quantized_inputs(apply_fn, clips, bits=3)(params, x)
    q = lambda x, clip: reparam.fake_quantize(x, *clip, 3)
    want = q(jnp.tanh(q(x, clips["up"]) @ params["up"]), clips["down"]) @ params["down"]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    loss = lambda clips: jnp.square(
        reparam.quantized_inputs(apply_fn, clips, bits=3)(params, x) - apply_fn(params, x)
    ).mean()
    theta = jax.tree.map(jnp.float32, clips)
    slopes = jax.jit(jax.grad(loss))(theta)
    assert all(g != 0 for g in jax.tree.leaves(slopes))
    better = jax.tree.map(lambda c, g: c - 0.01 * g / max(1, abs(g)), theta, slopes)
    assert loss(better) < loss(theta)


def net(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize("clip", [(-4.0, 4.0), (np.float32(-4), np.float32(4))])
def test_fixed_clips_go_under_jit_grad_and_taps_with_the_penalty(clip):
    """The loss to train with, composed of both, is that written by hand; and so is its gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"w": (5, 6), "v": (6, 3)}
    params = {k: jax.random.normal(key, shapes[k]) for k, key in zip(shapes, keys[:2], strict=True)}
    x = jax.random.normal(keys[2], (9, 5))
    quantized = reparam.quantized_inputs(net, {"w": clip, "v": (-0.9, 0.9)}, bits=5)
    with_penalty = losses.kurtosis_penalty(quantized)

    def by_hand(p, x):
        first = reparam.fake_quantize(x, *clip, 5) @ p["w"]
        out = reparam.fake_quantize(jnp.tanh(first), -0.9, 0.9, 5) @ p["v"]
        return out, sum(losses.kurtosis(y).mean() for y in (first, out))

    def total(fn):
        def loss(p):
            out, penalty = fn(p, x)
            return jnp.square(out).mean() + 0.1 * penalty

        return loss

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, with_penalty(params, x), by_hand(params, x))
    _, found = trace.taps(quantized)(params, x)
    close(found["w"].input, reparam.fake_quantize(x, *clip, 5))
    got, want = (jax.jit(jax.value_and_grad(total(fn)))(params) for fn in (with_penalty, by_hand))
    jax.tree.map(close, got, want)


def test_bad_input():
    with pytest.raises(ValueError, match=r"the upper clip 1\.0 is due above the lower one, 2\.0"):
        reparam.fake_quantize(jnp.ones(2), 2.0, 1.0)
    with pytest.raises(ValueError, match="bits=0"):
        reparam.fake_quantize(jnp.ones(2), -1.0, 1.0, 0)
    with pytest.raises(ValueError, match="the upper clip"):
        reparam.quantized_inputs(lambda p, x: x @ p, {"": (1.0, 1.0)})
