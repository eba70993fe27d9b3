"""Convolution-aware initialization: variance, spectra, the space that the filters span."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.fourier import convaware, orthonormal_rows

KEY = jax.random.key(0)


def draw(init, shape, dtype=jnp.float32):
    return np.asarray(jax.jit(init, static_argnums=(1, 2))(KEY, shape, dtype))


def test_orthonormal_in_groups():
    with jax.enable_x64(True):
        rows = np.asarray(orthonormal_rows(KEY, 16, 6, jnp.float64))
    for start in (0, 6, 12):
        group = rows[start : start + 6]
        np.testing.assert_allclose(group @ group.T, np.eye(len(group)), atol=1e-12)
    assert np.abs(rows[:6] @ rows[6:12].T).max() > 0.1  # another basis


@pytest.mark.parametrize("shape", [(3, 3, 16, 8), (4, 4, 5, 3), (5, 8, 3), (3, 2, 3, 9, 2)])
def test_variance_and_spectra(shape):
    *taps, n, m = shape
    half = math.prod([*taps[:-1], taps[-1] // 2 + 1])
    axes = tuple(range(len(taps)))
    with jax.enable_x64(True):
        kernel = draw(convaware(), shape, jnp.float64)
        assert abs(kernel.var() - 2 / (math.prod(taps) * n)) < 1e-12
        clean = draw(convaware(eps_std=0.0, scale=0.3), shape, jnp.float64)
    assert kernel.shape == shape
    assert abs(clean.var() - 0.3 / (math.prod(taps) * n)) < 1e-12
    for axis in axes:  # even under tap -> -tap, jointly in all spatial axes
        assert clean.shape[axis] == taps[axis]
    reflected = np.roll(np.flip(clean, axes), 1, axes)
    np.testing.assert_allclose(clean, reflected, atol=1e-12)
    if shape == (3, 3, 16, 8):
        assert np.linalg.matrix_rank(clean.reshape(9, -1)) == 5
        assert np.linalg.matrix_rank(kernel.reshape(9, -1)) == 9
    # irfftn drops the imaginary parts and the asymmetry of the self-conjugate columns, so that the
    # spectrum is seen through it: the same linear map of orthonormal rows, scaled
    for out in range(m):
        spectra = np.asarray(_spectra(out, m, n, half))
        expected = np.fft.irfftn(spectra.reshape(n, *taps[:-1], -1), taps, [a + 1 for a in axes])
        drawn = np.moveaxis(clean[..., out], -1, 0)
        ratio = np.vdot(drawn, expected) / np.vdot(expected, expected)
        np.testing.assert_allclose(drawn, ratio * expected, atol=1e-12)


def _spectra(out, m, n, half):
    with jax.enable_x64(True):
        basis = jax.random.split(jax.random.split(KEY, m)[out])[0]
        rows = orthonormal_rows(basis, n, half, jnp.float64)
        for start in range(0, n, half):
            group = rows[start : start + half]
            np.testing.assert_allclose(group @ group.T, np.eye(len(group)), atol=1e-12)
        return rows


def test_one_tap_and_no_tap():
    dense = convaware()(KEY, (6, 10))
    np.testing.assert_allclose(dense @ dense.T, np.eye(6), atol=1e-5)
    pointwise = draw(convaware(eps_std=0.0), (1, 1, 64, 64))
    assert np.isfinite(pointwise).all()
    np.testing.assert_allclose(pointwise.var(), 2 / 64, rtol=1e-5)
    kurtosis = (pointwise**4).mean() / (pointwise**2).mean() ** 2
    assert abs(kurtosis - 3) < 5 * math.sqrt(24 / 64**2)
    assert len(np.unique(pointwise)) > 4000


def test_depthwise_stack_and_layout():
    depthwise = draw(convaware(), (3, 3, 1, 12))
    np.testing.assert_allclose(depthwise.var(), 2 / 9, rtol=1e-5)
    stack = draw(convaware(batch_axis=0), (2, 3, 3, 4, 5))
    np.testing.assert_allclose(stack.var((1, 2, 3, 4)), 2 / 36, rtol=1e-5)
    assert bool((stack[0] != stack[1]).any())
    torch = draw(convaware(in_axis=1, out_axis=0), (5, 4, 3, 3))
    np.testing.assert_array_equal(torch.transpose(2, 3, 1, 0), draw(convaware(), (3, 3, 4, 5)))


def test_protocol():
    init = convaware()
    kernel = init(KEY, (3, 3, 4, 6))
    np.testing.assert_array_equal(draw(init, (3, 3, 4, 6)), draw(init, (3, 3, 4, 6)))
    assert bool((kernel != init(jax.random.key(1), (3, 3, 4, 6))).any())
    jitted = jax.jit(lambda key: init(key, (3, 3, 4, 6)))(KEY)
    np.testing.assert_allclose(jitted, kernel, atol=2e-6)
    assert init(KEY, (3, 3, 4, 6), jnp.bfloat16).dtype == jnp.bfloat16
    keys = jax.random.split(KEY, 2)
    many = jax.vmap(lambda key: init(key, (3, 3, 4, 6)))(keys)
    np.testing.assert_allclose(many[1], init(keys[1], (3, 3, 4, 6)), atol=1e-6)
    axis_types = (jax.sharding.AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=axis_types)):
        spec = jax.sharding.PartitionSpec(None, None, "a", "b")
        assert init(KEY, (3, 3, 4, 8), jnp.float32, spec).sharding.spec == spec


def test_bad_input():
    with pytest.raises(ValueError, match="negative"):
        convaware(eps_std=-1.0)
    with pytest.raises(ValueError, match="two or more"):
        convaware()(KEY, (3,))
