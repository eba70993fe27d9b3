"""Stochastic depth and ghost batches: limits, expectations, flax as an oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxkit import nn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def raw(x):
    """Turn typed keys into words so that numpy can compare them."""
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def test_expected_depth_and_ends():
    p = nn.linear_decay(54)
    np.testing.assert_allclose(p.sum(), (3 * 54 - 1) / 4, rtol=1e-6)
    assert p[0] < 1 and float(p[-1]) == 0.5
    assert nn.linear_decay(3, 1.0).tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="last=0"):
        nn.linear_decay(3, 0.0)


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_a_gate_of_one_is_the_branch_and_of_zero_has_no_gradient(mode):
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
    apply = lambda w, p: nn.stochastic_depth(KEY, lambda x: jnp.tanh(x @ w), x, p, mode=mode)
    assert jnp.array_equal(apply(w, 1.0), jnp.tanh(x @ w))
    assert not np.any(apply(w, 0.0))
    assert not np.any(jax.grad(lambda w: apply(w, 0.0).sum())(w))


@pytest.mark.parametrize("mode", ["batch", "row"])
@pytest.mark.parametrize("scale", ["test", "train"])
def test_the_mean_over_gates_is_the_prediction(mode, scale):
    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    run = lambda key: nn.stochastic_depth(key, lambda x: 2 * x, x, 0.7, mode=mode, scale=scale)
    draws = jax.jit(jax.vmap(run))(jax.random.split(KEY, 20_000))
    error = np.asarray(draws.mean(0) - run(None))
    assert np.all(np.abs(error) < 4 * np.asarray(draws.std(0)) / np.sqrt(20_000))
    kept = np.asarray(draws != 0)
    if mode == "batch":
        assert np.all(kept.reshape(20_000, -1).all(1) | ~kept.reshape(20_000, -1).any(1))
    else:
        assert np.all(kept.all(2) == kept.any(2)) and not np.all(
            kept.all((1, 2)) == kept.any((1, 2))
        )
        rows = kept[:, :, 0].astype(float)
        assert np.abs(np.corrcoef(rows.T) - np.eye(4)).max() < 0.04
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.02)


def test_folding_gives_the_same_prediction():
    x, w = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 3), (3, 3)))
    b = jnp.ones(3)
    scaled = nn.stochastic_depth(None, lambda x: jnp.tanh(x) @ w + b, x, 0.6)
    kernel, bias = nn.fold_depth(w, b, 0.6)
    np.testing.assert_allclose(jnp.tanh(x) @ kernel + bias, scaled, atol=1e-6)


class Block(linen.Module):
    """The branch of a residual block, with normalization."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(3, use_bias=False)(x)
        return linen.Dense(3)(jnp.tanh(linen.BatchNorm(use_running_average=False)(x)))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)  # its key and count are state, too

    def __call__(self, x):
        return self.drop(jnp.tanh(self.norm(self.dense(x))))


def linen_branch():
    x = jnp.asarray(RNG.normal(size=(8, 3)) + 1, jnp.float32)
    block = Block()
    params, stats = (block.init(KEY, x)[name] for name in ("params", "batch_stats"))

    def branch(params, stats, x):
        return block.apply({"params": params, **stats}, x, mutable=["batch_stats"])

    return branch, params, {"batch_stats": stats}, x


def nnx_branch():
    x = jnp.asarray(RNG.normal(size=(8, 3)) + 1, jnp.float32)
    graph, params, state = nnx.split(NnxBlock(nnx.Rngs(0)), nnx.Param, ...)

    def branch(params, state, x):
        block = nnx.merge(graph, params, state, copy=True)
        y = block(x)
        return y, nnx.split(block, nnx.Param, ...)[2]

    return branch, params, state, x


@pytest.mark.parametrize("make", [linen_branch, nnx_branch])
def test_a_dropped_block_leaves_its_statistics_and_has_no_gradient(make):
    branch, params, stats, x = make()

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def run(key, survival):
        def total(params):
            f = lambda x: branch(params, stats, x)
            y, new = nn.stochastic_depth(key, f, x, survival, state=stats)
            return jnp.sum(y**2), (y, new)

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, (y, new)), grads = run(jax.random.split(KEY, 12), 0.5)
    kept = np.asarray(jnp.any(y != 0, axis=(1, 2)))
    assert 0 < kept.sum() < 12
    bits = lambda t: [raw(x) for x in jax.tree.leaves(t)]
    want, update = jax.jit(branch)(params, stats, x)
    for i in range(12):
        for got, old, fresh in zip(bits(new), bits(stats), bits(update), strict=True):
            np.testing.assert_allclose(got[i], fresh if kept[i] else old, rtol=1e-6)
        assert any(np.any(g[i]) for g in jax.tree.leaves(grads)) == kept[i]
        np.testing.assert_allclose(y[i], want if kept[i] else 0, atol=1e-6)
    assert any(np.any(a != b) for a, b in zip(bits(stats), bits(update), strict=True))
    for options in ({"key": None}, {"key": KEY, "mode": "row"}):
        f = lambda x: branch(params, stats, x)
        _, after = nn.stochastic_depth(branch=f, x=x, survival=0.5, state=stats, **options)
        for got, fresh in zip(bits(after), bits(update), strict=True):
            np.testing.assert_allclose(got, fresh, rtol=1e-6)


def test_a_residual_network_of_linen_blocks_trains_with_its_statistics():
    """Of blocks with probability 1 it is the plain residual network."""
    branch, params, stats, x = linen_branch()
    many = lambda t: jax.tree.map(lambda w: jnp.stack([w] * 3), t)
    p = nn.linear_decay(3)

    def net(key, p):
        def block(x, each):
            w, s, p, k = each
            y, s = nn.stochastic_depth(k, lambda x: branch(w, s, x), x, p, state=s)
            return jax.nn.relu(x + y), s

        return jax.lax.scan(block, x, (many(params), many(stats), p, jax.random.split(key, 3)))

    got, new = jax.jit(net)(KEY, jnp.ones(3))
    want = x
    for i in range(3):
        y, s = branch(params, stats, want)
        want = jax.nn.relu(want + y)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(s), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.isfinite(jax.jit(net)(KEY, p)[0]).all()


def test_layers_without_state_may_be_inline_in_a_linen_module():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, key=None):
            return x + nn.stochastic_depth(key, lambda x: linen.Dense(3)(x), x, 0.5)

    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    params = Net().init(KEY, x)
    assert list(params["params"]) == ["Dense_0"]
    dense = linen.Dense(3).apply({"params": params["params"]["Dense_0"]}, x)
    np.testing.assert_allclose(Net().apply(params, x), x + dense / 2, rtol=1e-6)
    run = jax.jit(jax.vmap(lambda key: Net().apply(params, x, key)))
    out = run(jax.random.split(KEY, 8)) - x
    kept = np.any(out != 0, axis=(1, 2))
    assert 0 < kept.sum() < 8
    np.testing.assert_allclose(out, np.where(kept[:, None, None], dense, 0), atol=1e-6)


def test_bad_gates():
    x = jnp.ones((2, 2))
    for options in (
        {"survival": 1.5},
        {"survival": jnp.float32(1.5)},
        {"survival": np.float32(np.nan)},
        {"survival": 0.0, "scale": "train"},
    ):
        with pytest.raises(ValueError, match="a probability was due"):
            nn.stochastic_depth(KEY, lambda x: x, x, **options)
    with pytest.raises(ValueError, match="mode='rows'"):
        nn.stochastic_depth(KEY, lambda x: x, x, 0.5, mode="rows")
    with pytest.raises(TypeError, match="typed key"):
        nn.stochastic_depth(jax.random.PRNGKey(0), lambda x: x, x, 0.5)
    known = jnp.float32(1.0)
    assert jax.jit(lambda: nn.stochastic_depth(KEY, lambda x: x, x, known))().tolist() == x.tolist()


def test_one_ghost_is_flax_batch_norm():
    x = jnp.asarray(RNG.normal(size=(8, 5, 3)) * 3 + 1, jnp.float32)
    norm = linen.BatchNorm(use_running_average=False, momentum=0.9, use_bias=False, use_scale=False)
    variables = norm.init(KEY, x)
    want, updated = norm.apply(variables, x, mutable=["batch_stats"])
    got, stats = nn.ghost_batch_norm(x, size=8)
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(stats.mean, updated["batch_stats"]["mean"], rtol=1e-5)
    np.testing.assert_allclose(stats.var, updated["batch_stats"]["var"], rtol=1e-5)


def test_ghosts_do_not_see_each_other_and_running_statistics_have_their_closed_form():
    x = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
    start = nn.GhostStats(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 2.0]))
    got, stats = nn.ghost_batch_norm(x, start, size=4, momentum=0.8)
    alone = jnp.concatenate([nn.ghost_batch_norm(x[i : i + 4], size=4)[0] for i in (0, 4, 8)])
    np.testing.assert_allclose(got, alone, atol=1e-6)
    first = jax.jacobian(lambda x: nn.ghost_batch_norm(x, size=4)[0][:4].sum())(x)
    assert not np.any(first[4:])
    g = x.reshape(3, 4, 3)
    for running, new, old in zip(stats, (g.mean(1), g.var(1)), start, strict=True):
        want = 0.8**3 * old + 0.2 * sum(0.8 ** (2 - i) * new[i] for i in range(3))
        np.testing.assert_allclose(running, want, rtol=1e-5)
    low, _ = nn.ghost_batch_norm(x.astype(jnp.bfloat16), size=4)
    assert low.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="a batch of 12 is not a number of ghosts of 5"):
        nn.ghost_batch_norm(x, size=5)
    none, same = nn.ghost_batch_norm(jnp.zeros((0, 7, 3)), start, size=4)
    assert none.shape == (0, 7, 3)
    np.testing.assert_array_equal(same, start)


def test_dropout_before_a_linear_head_is_a_ridge():
    """E |mask(X) w - y|^2 / n = |X w - y|^2 / n + p / (1 - p) sum_j w_j^2 mean(x_j^2)."""
    x, w, y = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((30, 6), 6, 30))
    p = 0.9
    drop = linen.Dropout(p, deterministic=False)
    loss = lambda key: jnp.mean((drop.apply({}, x, rngs={"dropout": key}) @ w - y) ** 2)
    draws = jax.jit(jax.vmap(loss))(jax.random.split(KEY, 100_000))
    want = jnp.mean((x @ w - y) ** 2) + p / (1 - p) * jnp.sum(w**2 * jnp.mean(x**2, 0))
    assert abs(float(draws.mean() - want)) < 4 * float(draws.std()) / np.sqrt(100_000)


def test_very_large_dropout_uses_redundant_features():
    """Eight blocks of features of falling strength; the two strongest say nothing at test time."""
    rates = jnp.array([0.0, 0.5, 0.9, 0.99])
    strength = jnp.repeat(3 / (1 + jnp.arange(8.0)), 8)

    def one(key):
        keys = jax.random.split(key, 5)
        signs = jnp.sign(jax.random.normal(keys[0], (64,)))

        def draw(k, n, silent):
            y = jnp.sign(jax.random.normal(jax.random.fold_in(k, 0), (n,)))
            noise = 2 * jax.random.normal(jax.random.fold_in(k, 1), (n, 64))
            shown = strength * jnp.where(jnp.arange(64) < silent, 0, 1)
            return y[:, None] * signs * shown + noise, y

        x, y = draw(keys[1], 200, 0)
        held, labels = draw(keys[2], 1000, 16)
        heads = jax.vmap(lambda p: nn.dropout_head(x, y, rate=p))(rates)
        return jnp.mean(jnp.sign(heads @ held.T) == labels, axis=1)

    accuracy = jax.jit(jax.vmap(one))(jax.random.split(KEY, 20)).mean(0)
    assert accuracy[2] > accuracy[0] + 0.05 and np.all(np.diff(accuracy) > -0.01), accuracy
    for rate in (1.0, np.float32(1.0), jnp.float32(-0.1)):
        with pytest.raises(ValueError, match="the share to drop"):
            nn.dropout_head(jnp.ones((2, 1)), jnp.ones(2), rate=rate)
