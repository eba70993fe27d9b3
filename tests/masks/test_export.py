"""Sparse formats multiply as the masked matrix does, and store no more than they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks

KEY = jax.random.key(0)
W = jax.random.normal(KEY, (24, 40))
X = jax.random.normal(jax.random.key(1), (2, 5, 24))
SCORES = {"kernel": jnp.abs(W)}


def due(mask, x=X):
    return np.asarray(x, np.float64) @ np.where(mask, np.asarray(W, np.float64), 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_the_formats_of_jax(sparsity):
    mask = masks.topk(SCORES, sparsity=sparsity)["kernel"]
    want = due(mask, X[0])
    for to in (masks.to_bcoo, masks.to_bcsr):
        packed = to(W, mask)
        assert packed.nse == mask.sum()
        np.testing.assert_array_equal(packed.todense(), jnp.where(mask, W, 0))
    got = jax.jit(lambda x, m: x @ m)(X[0], masks.to_bcoo(W, mask))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got = jax.jit(lambda x, m: (m @ x.T).T)(X[0], masks.to_bcsr(W.T, mask.T))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_blocks(sparsity):
    mask = masks.blocks(SCORES, {-2: 4, -1: 8}, sparsity=sparsity)["kernel"]
    packed = masks.pack_blocks(W, mask, (4, 8))
    assert packed.values.shape == (round((1 - sparsity) * 30), 4, 8)
    np.testing.assert_array_equal(masks.to_dense(packed), jnp.where(mask, W, 0))
    got = jax.jit(masks.sparse_matmul)(X, packed)
    np.testing.assert_allclose(got, due(mask), rtol=1e-5, atol=1e-5)


def test_blocks_of_a_scattered_mask_and_of_none():
    mask = jnp.zeros((24, 40), bool).at[3, 9].set(True).at[23, 39].set(True)
    packed = masks.pack_blocks(W, mask, (4, 8))
    assert packed.values.shape == (2, 4, 8) and (packed.values != 0).sum() == 2
    np.testing.assert_allclose(masks.sparse_matmul(X, packed), due(mask), rtol=1e-5, atol=1e-6)
    empty = masks.pack_blocks(W, jnp.zeros_like(mask), (4, 8))
    np.testing.assert_array_equal(masks.sparse_matmul(X, empty), jnp.zeros((2, 5, 40)))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 8), (4, 4)])
def test_n_of_m(n, m):
    mask = masks.n_of_m(SCORES, n, m)["kernel"]
    packed = masks.pack_n_of_m(W, mask, n, m)
    size = packed.values.nbytes + packed.places.nbytes
    assert size * 4 * m == W.nbytes * 5 * n
    np.testing.assert_array_equal(masks.to_dense(packed), jnp.where(mask, W, 0))
    got = jax.jit(masks.sparse_matmul)(X, packed)
    np.testing.assert_allclose(got, due(mask), rtol=1e-5, atol=1e-5)


def test_groups_with_fewer_entries():
    mask = masks.n_of_m(SCORES, 2, 4)["kernel"].at[:5].set(False)
    packed = masks.pack_n_of_m(W, mask, 2, 4)
    np.testing.assert_array_equal(masks.to_dense(packed), jnp.where(mask, W, 0))


def test_gradients_reach_the_values_alone():
    mask = masks.blocks(SCORES, {-2: 4, -1: 8}, sparsity=0.5)["kernel"]
    packed = masks.pack_blocks(W, mask, (4, 8))
    loss = lambda packed, x: jnp.sin(masks.sparse_matmul(x, packed)).sum()
    got, dx = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(packed, X)
    dense = lambda w, x: jnp.sin(x @ w).sum()
    dw, due_dx = jax.grad(dense, (0, 1))(jnp.where(mask, W, 0), X)
    want = masks.pack_blocks(dw, mask, (4, 8)).values
    np.testing.assert_allclose(got.values, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dx, due_dx, rtol=1e-4, atol=1e-5)


def test_bad_input():
    mask = jnp.ones((24, 40), bool)
    with pytest.raises(ValueError, match=r"blocks of 5 x 8 do not divide the shape \(24, 40\)"):
        masks.pack_blocks(W, mask, (5, 8))
    with pytest.raises(ValueError, match="a group of 4 has 4 entries under the mask, and 2"):
        masks.pack_n_of_m(W, mask, 2, 4)
    with pytest.raises(ValueError, match="2 of 5 does not divide the 24 inputs"):
        masks.pack_n_of_m(W, mask, 2, 5)
    with pytest.raises(ValueError, match=r"the mask has shape \(40,\)"):
        masks.to_bcoo(W, mask[0])
    with pytest.raises(ValueError, match=r"a matrix was due.*\(2, 24, 40\)"):
        masks.to_bcsr(jnp.ones((2, 24, 40)), mask)
    with pytest.raises(TypeError, match="not under jit"):
        jax.jit(lambda mask: masks.to_bcoo(W, mask).data)(mask)
    with pytest.raises(ValueError, match="x has 7 features, and the matrix 24 inputs"):
        masks.sparse_matmul(jnp.ones((2, 7)), masks.pack_blocks(W, mask, (4, 8)))
