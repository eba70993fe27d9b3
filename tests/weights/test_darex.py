from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments.data import load
from experiments.perceptron import init, logits
from jaxkit import weights
from tests.counting import counting

KEY = jax.random.key(0)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
    return {"l0": {"kernel": draw(6, 5), "bias": draw(5)}, "l1": {"kernel": draw(5, 3)}}


def apply_fn(params, x):
    h = jnp.tanh(x @ params["l0"]["kernel"] + params["l0"]["bias"])
    return h @ params["l1"]["kernel"]


BASE = tree(0)
MODEL = jax.tree.map(jnp.add, BASE, tree(1, 2.0))
X = jnp.asarray(np.random.default_rng(2).normal(1.0, 1.0, size=(30, 6)), jnp.float32)


def close(got, want, tol=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


# ----------------------------------------------------------------------------------- searched q


def test_the_search_walks_two_grids_and_stops_early():
    best, values = weights.search_q(lambda q: -abs(q - 0.437), 0.1, 0.9, step=0.1)
    assert best == pytest.approx(0.44)
    coarse = [q for q in values if round(q * 10) == pytest.approx(q * 10)]
    assert max(coarse) == pytest.approx(0.8)  # four points after the best, 0.4

    assert len(values) == 8 + 18 - 1  # 0.1 to 0.8, and 0.31 to 0.48 with 0.4 in both
    low, _ = weights.search_q(lambda q: -q, 0.1)
    high, _ = weights.search_q(lambda q: q, 0.1)
    assert (low, high) == (0.1, 1.0)


def test_bad_searches_are_named():
    with pytest.raises(ValueError, match="low=0, high=1"):
        weights.search_q(lambda q: q, 0, 1)
    with pytest.raises(ValueError, match=r"low=0\.5, high=0\.4"):
        weights.search_q(lambda q: q, 0.5, 0.4)
    with pytest.raises(ValueError, match=r"evaluate gave nan for q=0\.5"):
        weights.search_q(lambda q: np.nan, 0.5)


def test_the_change_of_the_output_is_the_mean_of_masks_without_the_farthest():
    q, p = 0.6, 0.5
    got = weights.output_change(KEY, apply_fn, BASE, MODEL, X, drop_rate=p, q=q)
    changes = []
    for key in jax.random.split(KEY, 4):
        dropped = weights.merge(BASE, [MODEL], weights.dare(key, drop_rate=p, q=q))
        changes.append(float(jnp.abs(apply_fn(dropped, X) - apply_fn(MODEL, X)).mean()))
    changes = np.array(changes)
    kept = np.delete(changes, np.abs(changes - changes.mean()).argmax())
    assert float(got) == pytest.approx(kept.mean(), rel=1e-5)


def test_leaves_that_are_not_dropped_from_are_the_models():
    change = partial(weights.output_change, KEY, apply_fn, BASE, drop_rate=0.5, q=0.5)
    head_only = MODEL | {"l0": BASE["l0"]}
    assert change(head_only, X, where="l0/**") == 0
    assert change(head_only, X) > 0
    with pytest.raises(ValueError, match="draws=2"):
        change(MODEL, X, draws=2)


def test_one_program_searches_all_q():
    change, traces = counting(
        lambda q: weights.output_change(KEY, apply_fn, BASE, MODEL, X, drop_rate=0.8, q=q)
    )
    best, values = weights.search_q(lambda q: -change(q), 0.2)
    assert len(traces) == 1
    assert values[best] == max(values.values()) > values[0.2]


# ----------------------------------------------------------------------------------- analytic q


def published(c, p, eta=0.45, gamma=0.95, stop=0.8):
    """The published sweep, point by point, in numpy."""
    phi = 0.5 if p == 0.5 else (1 - 2 * p) / np.log((1 - p) / p)
    best, q_best, stopped = np.full(len(c), np.inf), np.full(len(c), 1 - p), np.zeros(len(c), bool)
    for k in range(round((1 - p) * 1000), 999):
        q = k * 0.001
        linear = eta * (1 - (1 - p) / q) * c.sum(1)
        value = abs(linear + eta**2 * phi * (c**2).sum(1) / (4 * q**2) + np.log(2 / (1 - gamma)))
        better, not_better = value <= best, value >= best
        best[better], q_best[better] = value[better], q
        stopped |= not_better
        if stopped.mean() >= stop:
            break
    return q_best.mean()


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_analytic_q_is_the_published_sweep_of_every_kernel(p):
    q = weights.analytic_q(apply_fn, BASE, MODEL, X, drop_rate=p)
    tau = jax.tree.map(lambda m, b: np.asarray(m - b, float), MODEL, BASE)
    h = jnp.tanh(X @ MODEL["l0"]["kernel"] + MODEL["l0"]["bias"])
    c0 = (tau["l0"]["kernel"] * np.asarray(X.mean(0))[:, None]).T
    c0 = np.concatenate([c0, tau["l0"]["bias"][:, None]], 1)
    c1 = (tau["l1"]["kernel"] * np.asarray(h.mean(0))[:, None]).T
    want = [published(c, p) for c in (c0, c1)]
    assert float(q["l0"]["kernel"]) == pytest.approx(want[0], abs=2e-3)
    assert float(q["l1"]["kernel"]) == pytest.approx(want[1], abs=2e-3)
    assert q["l0"]["bias"] == q["l0"]["kernel"]
    assert want[0] != pytest.approx(want[1], abs=0.01) and max(want) > 1 - p + 0.01
    merged = weights.merge(BASE, [MODEL], weights.dare(KEY, drop_rate=0.5, q=q))
    left = np.asarray((merged["l1"]["kernel"] - BASE["l1"]["kernel"]) / tau["l1"]["kernel"])
    assert set(np.round(left, 3).ravel()) == {0.0, np.round(np.float32(1 / q["l1"]["kernel"]), 3)}


@pytest.mark.parametrize("p", [5e-4, 1e-3, 0.9992])
def test_analytic_q_at_the_ends_of_the_grid(p):
    q = weights.analytic_q(apply_fn, BASE, MODEL, X, drop_rate=p)
    assert all(1 - p - 1e-6 <= x <= 1 for x in jax.tree.leaves(q))
    c = np.asarray((MODEL["l1"]["kernel"] - BASE["l1"]["kernel"]).T, float)
    if p == 0.9992:
        h = jnp.tanh(X @ MODEL["l0"]["kernel"] + MODEL["l0"]["bias"])
        want = published(c * np.asarray(h.mean(0)), 0.999)  # the same grid, without 0
        assert float(q["l1"]["kernel"]) == pytest.approx(want, abs=5e-3)


def test_analytic_q_of_a_flax_model_with_attention_and_norm():
    """A kernel (embed, heads, size) has its bias (heads, size); the other leaves the mean."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
            return nn.Dense(3)(nn.LayerNorm()(x))

    module = Block()
    x = jax.random.normal(KEY, (2, 5, 4))
    base = module.init(KEY, x)
    model = jax.tree.map(lambda w: w + jnp.cos(jnp.arange(w.size) + 1.0).reshape(w.shape) * 5, base)
    q = jax.jit(lambda m: weights.analytic_q(module.apply, base, m, x, drop_rate=0.9))(model)
    assert jax.tree.structure(q) == jax.tree.structure(base)
    attention = q["params"]["MultiHeadDotProductAttention_0"]
    for part in attention.values():
        assert part["bias"] == part["kernel"]
    kernels = [part["kernel"] for part in attention.values()] + [q["params"]["Dense_0"]["kernel"]]
    assert q["params"]["LayerNorm_0"]["scale"] == pytest.approx(float(sum(kernels)) / 5, rel=1e-5)
    tau = jax.tree.map(lambda m, b: np.asarray(m - b, float), model, base)["params"]
    query = tau["MultiHeadDotProductAttention_0"]["query"]
    c = (query["kernel"] * np.asarray(x.mean((0, 1)))[:, None, None]).reshape(4, -1).T
    c = np.concatenate([c, query["bias"].reshape(-1, 1)], 1)
    assert float(attention["query"]["kernel"]) == pytest.approx(published(c, 0.9), abs=2e-3)


def test_bad_rates_are_named():
    with pytest.raises(ValueError, match=r"drop_rate is 1\.0"):
        weights.analytic_q(apply_fn, BASE, MODEL, X, drop_rate=1.0)
    with pytest.raises(ValueError, match="no kernel was found"):
        weights.analytic_q(lambda p, x: x + p["l0"]["bias"].sum(), BASE, MODEL, X, drop_rate=0.5)


# ---------------------------------------------------------------------------------------- AdamR


def course(tx, steps, start):
    """Follow the gradients of a quadratic with its minimum at 3."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(lambda w: w - 3, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), params

    return jax.lax.scan(step, (start, tx.init(start)), None, steps)


def published_adamr(w, anchor, lr, strength, steps, norm):
    """The published loop in numpy, over a flat vector."""
    m = v = np.zeros_like(w)
    for t in range(1, steps + 1):
        g = w - 3
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        v_hat = v / (1 - 0.999**t)
        away = w - anchor if norm == "l2" else np.sign(w - anchor)
        w = w - strength * lr / np.sqrt(v_hat.mean()) * away
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v_hat) + 1e-8)
    return w


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_adamr_is_the_published_loop(norm):
    tx = weights.adamr(0.1, BASE, strength=0.5, norm=norm)
    (params, _), _ = course(tx, 5, MODEL)
    flat = lambda t: np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(t)])
    want = published_adamr(flat(MODEL), flat(BASE), 0.1, 0.5, 5, norm)
    np.testing.assert_allclose(flat(params), want, atol=2e-5)


def test_adamr_without_a_pull_is_adam():
    close(
        course(weights.adamr(0.1, BASE, strength=0.0), 5, MODEL)[1],
        course(optax.adam(0.1), 5, MODEL)[1],
    )
    first = lambda tx: jax.tree.map(lambda x: x[1], course(tx, 2, BASE)[1])
    close(first(weights.adamr(0.1, BASE, strength=10.0)), first(optax.adam(0.1)), 0)


def test_adamr_keeps_deltas_smaller():
    size = lambda t: sum(
        jnp.square(a - b).sum() for a, b in zip(*map(jax.tree.leaves, (t, BASE)), strict=True)
    )
    sizes = [
        float(size(course(weights.adamr(0.1, BASE, strength=s), 200, BASE)[0][0]))
        for s in (0.0, 0.3, 3.0)
    ]
    assert sizes[0] > 1.1 * sizes[1] > 1.1**2 * sizes[2]


def test_adamr_with_schedules_injected_numbers_and_zero_gradients():
    tx = optax.inject_hyperparams(lambda strength: weights.adamr(0.1, BASE, strength=strength))(0.5)
    direct = weights.adamr(optax.constant_schedule(0.1), BASE, strength=0.5)
    close(course(tx, 3, MODEL)[0][0], course(direct, 3, MODEL)[0][0])
    zeros = jax.tree.map(jnp.zeros_like, MODEL)
    updates, _ = direct.update(zeros, direct.init(MODEL), MODEL)
    close(updates, jax.tree.map(lambda m, b: -0.1 * 0.5 * (m - b), MODEL, BASE))
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), MODEL)
    updates, _ = direct.update(half, direct.init(half), half)
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))


def test_bad_adamr():
    with pytest.raises(ValueError, match="norm='linf'"):
        weights.adamr(0.1, BASE, norm="linf")
    with pytest.raises(ValueError, match="the start does not fit params: 'l1/kernel' is only"):
        weights.adamr(0.1, {"l0": BASE["l0"]}).init(BASE)
    tx = weights.adamr(0.1, BASE)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(BASE, tx.init(BASE))


# ----------------------------------------------------------------- large deltas at a high rate


@pytest.mark.slow
def test_large_deltas_want_another_factor_or_other_entries():
    """From a random start, by Adam at 0.001 and at 0.01, 90% of the entries dropped.

    Where deltas are small, random entries with DARE's factor 1 / (1 - p) are good and those of
    large magnitude, without a factor, are worse. Where they are large, that factor ruins the model,
    a larger q is better, and magnitudes tell most.
    """
    data = load(train=1300, test=497)
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    base = init(KEY, (64, 256, 256, 10))

    def train(lr):
        tx = optax.adam(lr)

        def loss(params, rows):
            ce = optax.softmax_cross_entropy_with_integer_labels
            return ce(logits(params, x[rows]), y[rows]).mean()

        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (64,), 0, 1300)
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (base, tx.init(base)), jax.random.split(KEY, 400))[0][0]

    accuracy = lambda p: (logits(p, data.x_test).argmax(1) == data.y_test).mean()

    @jax.jit
    def dropped(model, q):
        one = lambda key: weights.merge(base, [model], weights.dare(key, drop_rate=0.9, q=q))
        return jax.vmap(lambda key: accuracy(one(key)))(jax.random.split(KEY, 6)).mean()

    def curve(lr):
        model = jax.jit(train)(lr)
        assert accuracy(model) > 0.95
        largest = weights.merge(base, [model], weights.breadcrumbs(sparsity=0.9, outliers=0.0))
        return [float(dropped(model, q)) for q in (0.1, 0.15, 0.3, 0.5)], float(accuracy(largest))

    (dare, *_), largest = curve(1e-3)
    assert dare > 0.8 and dare > largest + 0.2
    (dare, *others), largest = curve(1e-2)
    assert max(others) > dare + 0.2 and largest > max(others) + 0.1
