"""Distinct features and ranks of gradients: planted copies, known ranks, the authors' loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import probes

RNG = np.random.default_rng(0)


def by_hand(phi, threshold):
    """Drop, one after the other, units that are correlated with any unit that is still there."""
    keep = np.flatnonzero((phi > 0).any(0))
    corr = np.corrcoef(phi[:, keep].T) - np.eye(len(keep))
    alive = list(range(len(keep)))
    for i in range(len(keep)):
        if np.any(np.abs(corr[i, [j for j in alive if j != i]]) > threshold):
            alive.remove(i)
    return 1 - (phi[:, keep[alive]] > 0).sum() / phi.size


def test_sparsity_of_features_is_that_of_a_loop():
    phi = np.maximum(RNG.normal(size=(60, 12)) - 0.3, 0)
    phi[:, 5] = 2 * phi[:, 1] + 1e-3 * RNG.random(60)
    phi[:, 8] = phi[:, 5] * 3
    phi[:, 10] = 0
    for threshold in (0.95, 0.2, 2.0):
        got = probes.feature_sparsity(phi, correlation=threshold)
        np.testing.assert_allclose(got, by_hand(phi, threshold), rtol=1e-5)


def test_copies_and_dead_units_count_as_zeros():
    base = np.maximum(RNG.normal(size=(200, 4)), 0)
    alone = float(probes.feature_sparsity(base))
    np.testing.assert_allclose(alone, (base == 0).mean(), rtol=1e-5)
    wide = np.concatenate([base, 3 * base, np.zeros((200, 8))], axis=1)
    np.testing.assert_allclose(1 - probes.feature_sparsity(wide), (1 - alone) / 4, rtol=1e-5)
    np.testing.assert_allclose(
        probes.feature_sparsity(wide.reshape(200, 4, 4)), probes.feature_sparsity(wide)
    )
    constant = np.ones((9, 3))  # no correlation is defined: each counts
    assert probes.feature_sparsity(constant) == 0 and probes.feature_sparsity(0 * constant) == 1
    with pytest.raises(ValueError, match=r"two or more examples were due; \(1, 3\) came"):
        probes.feature_sparsity(constant[:1])


def test_ranks_of_gradients_of_diagonal_nets():
    """[X v, X u] has the rank of the features that either factor lets through."""
    x = jnp.asarray(RNG.normal(size=(9, 6)), jnp.float32)
    net = lambda p, x: x @ (p["u"] * p["v"])
    for count in (0, 1, 4, 6):
        on = jnp.arange(6) < count
        params = {"u": on * 1.0, "v": on * 0.5, "step": jnp.arange(3)}
        assert probes.gradient_rank(net, params, x) == count
        only = probes.gradient_rank(net, {**params, "v": jnp.zeros(6)}, x, where="v")
        assert only == count
    few = x.at[2:].set(x[0])
    assert probes.gradient_rank(net, {"u": jnp.ones(6), "v": jnp.ones(6)}, few) == 2
    # tolerance is relative to the largest singular value
    params = {"u": jnp.array([1.0, 1e-3]), "v": jnp.zeros(2)}
    rank = lambda t: probes.gradient_rank(net, params, jnp.eye(2), tolerance=t)
    assert (rank(1e-4), rank(1e-2)) == (2, 1)


def test_ranks_of_several_outputs_and_in_half_precision():
    x = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    linear = lambda w, x: x @ w
    for dtype in (jnp.float32, jnp.bfloat16):
        w = jnp.ones((4, 5), dtype)
        assert jax.jit(lambda w: probes.gradient_rank(linear, w, x.astype(w.dtype)))(w) == 15
