import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from jaxkit import data

KEY = jax.random.key(0)


def test_fits_random_labels_of_digits_with_2n_plus_d_weights():
    x = load_digits().data[:200] / 16
    y = np.random.default_rng(0).integers(0, 10, 200)
    net = data.two_layer(KEY, x, y)
    assert sum(part.size for part in net) == 2 * 200 + 64
    assert np.abs(data.evaluate(net, x) - y).max() < 1e-8

    a, b, w, x32 = (part.astype(np.float32) for part in (*net, x))
    single = np.maximum((x32 @ a)[:, None] - b, 0) @ w
    np.testing.assert_array_equal(np.round(single), y)


def test_is_the_solution_of_the_triangular_system():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=30)
    net = data.two_layer(KEY, x, y)
    order = np.argsort(x @ net.a)
    hidden = np.maximum((x[order] @ net.a)[:, None] - net.b, 0)
    assert (np.triu(hidden, 1) == 0).all()
    assert (np.diag(hidden) > 0).all()
    np.testing.assert_allclose(net.w, np.linalg.solve(hidden, y[order]), rtol=1e-6, atol=1e-9)


def test_is_linear_between_the_examples_and_beyond():
    x = np.array([[0.0], [1.0], [3.0]])
    net = data.two_layer(KEY, x, np.array([2.0, -1.0, 5.0]))
    low, high = data.evaluate(net, np.array([[0.5], [2.0]]))
    np.testing.assert_allclose([low, high], [0.5, 2.0], atol=1e-12)
    knots = x @ net.a
    lowest = knots.min() - 1
    outside = data.evaluate(net, np.array([[(lowest - 1) / net.a[0]]]))
    assert outside == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_fits_any_real_labels(n, d, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=n) * 100
    net = data.two_layer(KEY, x, y)
    gap = np.diff(np.sort(x @ net.a)).min(initial=1.0)
    np.testing.assert_allclose(data.evaluate(net, x), y, atol=1e-10 / min(gap, 1))


def test_bad_input():
    x, y = np.eye(3), np.arange(3)
    with pytest.raises(TypeError, match="typed key"):
        data.two_layer(jax.random.PRNGKey(0), x, y)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(data.two_layer)(KEY, x, y)
    with pytest.raises(ValueError, match="examples 0 and 2 are equal"):
        data.two_layer(KEY, x[[0, 1, 0]], y)
    with pytest.raises(ValueError, match=r"x\(3, 3\) and y\(2,\) came"):
        data.two_layer(KEY, x, y[:2])
    with pytest.raises(ValueError, match="n > 0"):
        data.two_layer(KEY, x[:0], y[:0])
    with pytest.raises(ValueError, match="not finite"):
        data.two_layer(KEY, x * np.nan, y)
    with pytest.raises(ValueError, match=r"\(m, 3\) is due"):
        data.evaluate(data.two_layer(KEY, x, y), x[:, :2])
