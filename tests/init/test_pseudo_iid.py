"""Pseudo-iid weights: variances, ranks, supports, and the Gaussian limit they share."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.kernel import propagate
from jaxkit.init.pseudo_iid import block_sparse, low_rank, orthogonal

N = 64
IID = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")
ROOT = math.sqrt(2)
SAMPLERS = {
    "iid": IID,
    "orthogonal": orthogonal(ROOT),
    "low_rank": low_rank(0.5, ROOT),
    "block_sparse": block_sparse(4, ROOT),
}


@functools.cache
def deep_outputs(name, draws=100):
    """Preactivations (draws, 2, N) of layer 3 for two inputs of correlation 0.6."""
    sampler = SAMPLERS[name] if name != "rank_one" else low_rank(1 / N, ROOT)
    a = jax.random.normal(jax.random.key(1), (2, N))
    a, b = a / jnp.linalg.norm(a, axis=-1, keepdims=True)
    b = b - a * (a @ b)
    x = math.sqrt(N) * jnp.stack([a, 0.6 * a + 0.8 * b / jnp.linalg.norm(b)]) / ROOT

    @jax.jit
    @jax.vmap
    def run(key):
        h = x
        for k in jax.random.split(key, 3):
            z = h @ sampler(k, (N, N), jnp.float32)
            h = jax.nn.relu(z)
        return z

    return np.asarray(run(jax.random.split(jax.random.key(2), draws)), np.float64)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_kernel_of_a_wide_network_is_the_iid_one(name):
    z = deep_outputs(name)
    expected = propagate(jax.nn.relu, 2, sigma_w=ROOT, c=0.6)
    # the kernel of one draw fluctuates by sqrt(5 * 2 / N) = 0.4 or so
    q = (z**2).mean()
    c = (z[:, 0] * z[:, 1]).mean() / q
    np.testing.assert_allclose(q, 1.0, rtol=0.12)
    np.testing.assert_allclose(c, expected.c[-1], atol=0.03)
    kurtosis = (z[:, 0] ** 4).mean() / (z[:, 0] ** 2).mean() ** 2 - 3
    assert kurtosis <= 2  # of order 1/N, and a half or a quarter of N units mix


def test_rank_one_has_no_gaussian_limit():
    """The negative control: a rank that does not grow breaks the fourth moments."""
    z = deep_outputs("rank_one")
    kurtosis = (z[:, 0] ** 4).mean() / (z[:, 0] ** 2).mean() ** 2 - 3
    assert kurtosis > 8


@pytest.mark.parametrize("name", ["orthogonal", "low_rank", "block_sparse"])
@pytest.mark.parametrize("shape", [(32, 64), (2, 2, 64, 32)])
def test_entries_have_the_variance_of_fan_in(name, shape):
    draw = jax.vmap(lambda key: SAMPLERS[name](key, shape, jnp.float32))
    w = np.asarray(draw(jax.random.split(jax.random.key(0), 30)), np.float64)
    fan_in = math.prod(shape[:-1])
    np.testing.assert_allclose(w.var() * fan_in, 2.0, rtol=0.03)
    assert abs(w.mean()) * math.sqrt(fan_in) < 0.02
    x = jax.random.normal(jax.random.key(1), (fan_in,))
    z = np.einsum("i,dim->dm", np.asarray(x), w.reshape(30, fan_in, -1))
    np.testing.assert_allclose((z**2).mean() / (np.asarray(x) ** 2).mean(), 2.0, rtol=0.1)
    # uncorrelated entries: neighbours in a row and in a column
    for shift in ((0, 1), (1, 0)):
        rolled = np.roll(w, shift, axis=(-2, -1))
        assert abs((w * rolled).mean() * fan_in) < 0.05


def test_orthogonal_is_an_isometry_on_both_sides():
    for n, m in [(8, 8), (12, 5), (5, 12)]:
        w = np.asarray(orthogonal(3.0)(jax.random.key(0), (n, m)))
        gram = w.T @ w if m <= n else w @ w.T
        np.testing.assert_allclose(gram, 9 * max(1, m / n) * np.eye(min(n, m)), atol=1e-4)
    w = orthogonal()(jax.random.key(0), (2, 2, 6, 6)).reshape(4, 6, 6)
    gram = jnp.einsum("tij,tik->tjk", w, w)
    np.testing.assert_allclose(gram, jnp.broadcast_to(jnp.eye(6) / 4, (4, 6, 6)), atol=1e-5)
    assert float(jnp.abs(w[0] - w[1]).max()) > 0.1


@pytest.mark.parametrize(("gamma", "rank"), [(0.29, 29), (0.5, 50), (1.0, 100), (0.01, 1)])
def test_the_rank_is_the_floor(gamma, rank):
    w = low_rank(gamma)(jax.random.key(0), (100, 120))
    assert np.linalg.matrix_rank(np.asarray(w), tol=1e-4) == rank


def test_block_sparse_support():
    draw = jax.vmap(lambda key: block_sparse(4)(key, (16, 24), jnp.float32))
    draws = draw(jax.random.split(jax.random.key(0), 600))
    masks = (np.asarray(draws) != 0).astype(float)
    assert (masks.sum((1, 2)) == 16 * 24 // 4).all()
    assert (masks.sum(1) == 4).all() and (masks.sum(2) == 6).all()
    for mask in masks[:5]:  # four groups of equal rows
        assert len({row.tobytes() for row in mask}) == 4
    # exchangeable: every entry, every pair of rows and every pair of columns, equally often; with
    # an axis in order, neighbours would always share a group
    assert np.abs(masks.mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 600)
    for sets, size, ones in ((masks, 16, 6), (masks.swapaxes(1, 2), 24, 4)):
        together = np.einsum("dij,dkj->ik", sets, sets) / (600 * ones)
        p = (size // 4 - 1) / (size - 1)
        off = together[~np.eye(size, dtype=bool)]
        assert np.abs(off - p).max() < 5 * math.sqrt(p * (1 - p) / 600)


@pytest.mark.parametrize("name", ["orthogonal", "low_rank", "block_sparse"])
def test_initializer_protocol(name):
    init, key = SAMPLERS[name], jax.random.key(3)
    draw = lambda key: init(key, (8, 8), jnp.float32)
    eager, keys = draw(key), jax.random.split(key, 2)
    np.testing.assert_allclose(eager, jax.jit(draw)(key), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(draw)(keys)[1], draw(keys[1]), rtol=1e-5, atol=1e-6)
    assert (eager == draw(key)).all() and not (eager == draw(keys[0])).all()
    shape = jax.eval_shape(lambda key: (init(key, (8, 8), jnp.bfloat16), init(key, (8, 8))), key)
    assert [x.dtype for x in shape] == [jnp.bfloat16, jnp.float32]
    turned = {"orthogonal": orthogonal, "low_rank": low_rank, "block_sparse": block_sparse}
    options = {"orthogonal": (), "low_rank": (0.5,), "block_sparse": (4,)}[name]
    other = turned[name](*options, ROOT, in_axis=1, out_axis=0)(key, (16, 8))
    np.testing.assert_allclose(
        other.T, turned[name](*options, ROOT)(key, (8, 16)), rtol=1e-5, atol=1e-6
    )


def test_sharded_output():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spec = jax.sharding.PartitionSpec("x", None)
        w = block_sparse(4)(jax.random.key(0), (8, 8), jnp.float32, spec)
        assert w.sharding.spec == spec
    alone = block_sparse(4)(jax.random.key(0), (8, 8))
    np.testing.assert_allclose(np.asarray(w), np.asarray(alone), rtol=1e-6)


def test_bad_input():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="no rank"):
        low_rank(0.1)(key, (8, 8))
    for gamma in (0.0, 1.5):
        with pytest.raises(ValueError, match="gamma"):
            low_rank(gamma)
    with pytest.raises(ValueError, match="3 blocks do not divide 8 inputs and 6 outputs"):
        block_sparse(3)(key, (8, 6))
    with pytest.raises(ValueError, match="one or more blocks"):
        block_sparse(0)
    with pytest.raises(ValueError, match="two or more dimensions"):
        orthogonal()(key, (8,))
