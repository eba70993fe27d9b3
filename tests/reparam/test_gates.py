"""Gates: their laws in closed form, what they close is what shrink removes, growth to a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, reparam, trace
from tests import zoo
from tests.reparam import nets

KEY = jax.random.key(0)
S = {"a": jnp.array([-1.5, -0.2, 0.3, 2.0]), "b": jnp.array([0.7])}

# ------------------------------------------------------------------------------------ the gates


def test_sigmoid_and_its_slope():
    tau = 3.0
    got = jax.grad(lambda s: reparam.gate(s, tau)["a"].sum())(S)["a"]
    p = jax.nn.sigmoid(tau * S["a"])
    np.testing.assert_allclose(reparam.gate(S, tau)["a"], p, rtol=1e-6)
    np.testing.assert_allclose(got, tau * p * (1 - p), rtol=1e-5)
    np.testing.assert_allclose(reparam.gate_penalty(S, tau), p.sum() + jax.nn.sigmoid(2.1), 1e-6)


def test_all_modes_become_the_sign_as_they_sharpen():
    want = jax.tree.map(lambda s: (s > 0).astype(jnp.float32), S)
    for mode in ("sigmoid", "hard", "bernoulli", "gumbel"):
        got = reparam.gate(S, jnp.inf, mode=mode, key=KEY)
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-12), got, want)
    for s in (-1000.0, 1000.0):  # beta s overflows float16
        g, slope = jax.value_and_grad(lambda s: reparam.gate(s, 500.0))(jnp.float16(s))
        assert jnp.isfinite(g) and jnp.isfinite(slope)


def test_a_sampled_gate_has_mean_p_squared_and_a_gumbel_gate_p():
    n, beta = 100_000, 1.3
    wide = {"a": jnp.broadcast_to(S["a"], (n, 4))}
    p = np.asarray(jax.nn.sigmoid(beta * S["a"]))
    drawn = np.asarray(reparam.gate(wide, beta, mode="bernoulli", key=KEY)["a"])
    np.testing.assert_allclose(np.unique(drawn), np.unique([0, *p]), rtol=1e-6)
    sigma = p * np.sqrt(p * (1 - p) / n)
    assert (np.abs(drawn.mean(0, dtype=np.float64) - p**2) < 3 * sigma).all()
    hard = np.asarray(reparam.gate(wide, beta, mode="gumbel", key=KEY)["a"])
    assert set(np.unique(hard)) == {0, 1}
    assert (np.abs(hard.mean(0) - p) < 3 * np.sqrt(p * (1 - p) / n)).all()


def test_gradients_of_the_modes_that_draw():
    s = jnp.linspace(-2, 2, 200)
    total = lambda mode: lambda s: reparam.gate(s, 2.0, mode=mode, key=KEY).sum()
    p = jax.nn.sigmoid(2 * s)
    opened = reparam.gate(s, 2.0, mode="bernoulli", key=KEY) > 0
    assert 0 < opened.sum() < 200
    slope = jax.grad(total("bernoulli"))(s)
    np.testing.assert_allclose(slope, jnp.where(opened, 2 * p * (1 - p), 0), rtol=1e-5)
    assert (jax.grad(total("gumbel"))(s) > 0).all()
    np.testing.assert_array_equal(jax.grad(total("hard"))(s), 0)


def test_one_temperature_for_each_unit():
    beta = {"a": jnp.array([1.0, 2.0, 3.0, 4.0]), "b": 5.0}
    got = reparam.gate(S, beta)
    np.testing.assert_allclose(got["a"], jax.nn.sigmoid(beta["a"] * S["a"]), rtol=1e-6)
    np.testing.assert_allclose(got["b"], jax.nn.sigmoid(5.0 * S["b"]), rtol=1e-6)


def test_temperature():
    epochs = 20
    tau = reparam.temperature(jnp.arange(epochs), epochs)
    assert tau[0] == 1 and tau[-1] == pytest.approx(200, abs=1e-4)
    np.testing.assert_allclose(tau[1:] / tau[:-1], 200 ** (1 / 19), rtol=1e-5)
    with pytest.raises(ValueError, match="epochs=1"):
        reparam.temperature(0, 1)
    with pytest.raises(ValueError, match=r"final=1\.0"):
        reparam.temperature(0, 5, final=1.0)


# ----------------------------------------------------------------------------------- gates of units


MODELS = ["mlp", "recurrent", "vgg", "resnet_batch_norm", "unet", "llama", "second_order"]


@pytest.mark.parametrize("name", MODELS)
def test_closed_units_are_those_that_shrink_removes(name):
    model = next(m for m in zoo.MODELS if m.name == name)
    apply_fn, params, args = model.build()
    axes = trace.axes(apply_fn, params, *args)
    roles = trace.roles(apply_fn, params, *args)
    scores = {
        a.name: jax.random.normal(jax.random.fold_in(KEY, i), (a.size,)).at[0].set(1.0)
        for i, a in enumerate(trace.named(axes).values())
        if not a.pinned
    }
    gates = reparam.gate(scores, mode="hard")
    gated = reparam.gate_units(params, gates, axes, roles)
    unit_mask = {a: g > 0 for a, g in gates.items()}
    small, _, report = masks.shrink(params, unit_mask, axes, same_constants=True)
    assert report.entries[1] < report.entries[0]
    np.testing.assert_allclose(
        reparam.expected_entries(params, gates, axes), report.entries[1], rtol=1e-6
    )
    run = jax.jit(apply_fn, compiler_options={"xla_backend_optimization_level": 0})
    shapes = {np.shape(x) for x in jax.tree.leaves(small)} - {
        np.shape(x) for x in jax.tree.leaves(params)
    }
    assert shapes
    masked = masks.apply(params, masks.units(params, unit_mask, axes))
    for a, b in zip(*(jax.tree.leaves(run(p, *args)) for p in (gated, masked)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
    if name in ("mlp", "vgg", "resnet_batch_norm"):  # these read all sizes off params
        np.testing.assert_allclose(run(small, *args), run(gated, *args), rtol=1e-4, atol=1e-5)


def _net():
    params = nets.mlp([5, 6, 7, 3], jax.random.key(1), bias=True)
    x = jax.random.normal(jax.random.key(2), (9, 5))
    fn = lambda p, x: nets.logits(p, x, jax.nn.sigmoid)  # sigmoid(0) is not 0
    axes = trace.rename(
        trace.axes(fn, params, x), {"layer_0/kernel:1": "one", "layer_1/kernel:1": "two"}
    )
    return fn, params, x, axes, trace.roles(fn, params, x)


def test_a_soft_gate_scales_what_the_reader_sees():
    fn, params, x, axes, roles = _net()
    g = jnp.linspace(0.1, 1, 6)
    gated = reparam.gate_units(params, {"one": g}, axes, roles)
    h = g * jax.nn.sigmoid(x @ params["layer_0"]["kernel"] + params["layer_0"]["bias"])
    rest = {"layer_0": params["layer_1"], "layer_1": params["layer_2"]}
    np.testing.assert_allclose(fn(gated, x), fn(rest, h), rtol=1e-5, atol=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal,
        reparam.gate_units(params, {"one": jnp.ones(6)}, axes, roles),
        params,
    )


def test_a_closed_unit_gets_no_gradient_but_its_score_the_penalty():
    fn, params, x, axes, roles = _net()
    scores = {"one": jnp.zeros(6), "two": jnp.zeros(7)}
    opened = {"one": jnp.arange(6) % 2 == 0, "two": jnp.arange(7) != 3}

    def loss(params, scores):
        soft = reparam.gate(scores, 2.0)
        gates = {a: jnp.where(opened[a], g, 0) for a, g in soft.items()}
        out = fn(reparam.gate_units(params, gates, axes, roles), x)
        return jnp.square(out).sum() + 0.1 * reparam.gate_penalty(scores, 2.0)

    dw, ds = jax.jit(jax.grad(loss, (0, 1)))(params, scores)
    kept = masks.units(params, opened, axes)
    for g, m in zip(jax.tree.leaves(dw), jax.tree.leaves(kept), strict=True):
        assert (np.asarray(g)[~np.asarray(m)] == 0).all() and (np.asarray(g)[m] != 0).all()
    np.testing.assert_allclose(ds["one"][1::2], 0.1 * 2 * 0.25, rtol=1e-5)
    assert (jnp.abs(ds["one"][::2] - 0.05) > 1e-4).all()


def test_the_gate_of_a_residual_branch():
    params = {"in": jnp.ones((3, 4)), "out": jnp.ones((4, 3)), "bias": jnp.ones((3,))}
    branch = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"] + p["bias"]
    x = jax.random.normal(KEY, (5, 3))
    r = reparam.leafwise(
        lambda key, path, w: jnp.float32(0.4),
        lambda s, w: w * reparam.gate(s, 2.0),
        where=["out", "bias"],
    )
    theta = r.init(KEY, params)
    m = jax.nn.sigmoid(0.8)
    np.testing.assert_allclose(
        x + branch(r.apply(theta, params), x), x + m * branch(params, x), rtol=1e-5
    )


def test_bad_units():
    _, params, x, axes, roles = _net()
    with pytest.raises(ValueError, match="no axis is named 'three'"):
        reparam.gate_units(params, {"three": jnp.ones(6)}, axes, roles)
    with pytest.raises(ValueError, match=r"axis 'one' has size 6, and its gates \(5,\)"):
        reparam.expected_entries(params, {"one": jnp.ones(5)}, axes)
    for target in (0, 100, -1):
        with pytest.raises(ValueError, match=f"the budget is {target}"):
            reparam.budget_pressure(jnp.array(50.0), target, full=100)
    with pytest.raises(ValueError, match="all of its 6 units are masked"):
        masks.shrink(params, {"one": np.zeros(6, bool)}, axes)
    with pytest.raises(ValueError, match="mode='soft'"):
        reparam.gate(S, mode="soft")
    with pytest.raises(ValueError, match="needs a key"):
        reparam.gate(S, mode="gumbel")
    attend = lambda p, x: jax.nn.softmax((x @ p["q"]) @ (x @ p["k"]).T) @ x
    p = {"q": jnp.ones((5, 4)), "k": jnp.ones((5, 4))}
    axes, roles = trace.axes(attend, p, x), trace.roles(attend, p, x)
    (name,) = trace.named(axes)
    with pytest.raises(ValueError, match="no leaf reads the axis"):
        reparam.gate_units(p, {name: jnp.ones(4)}, axes, roles)


@pytest.mark.slow
def test_a_network_grows_or_shrinks_to_its_budget():
    """Digits, 128 units; a seed of 4 grows to a budget, and 120 shrink to it."""
    x, y, x_test, y_test = nets.digits()
    params = nets.mlp([64, 128, 10], KEY, bias=True)
    fn = nets.logits
    axes = trace.rename(trace.axes(fn, params, x), {"layer_0/kernel:1": "mlp"})
    roles = trace.roles(fn, params, x)
    epochs, steps, full = 40, 20, 64 * 128 + 128 + 1280 + 10
    target = 0.3 * full
    tx = optax.partition({"w": optax.adam(3e-3), "s": optax.adam(1e-2)}, ("w", "s"))

    def run(seed_units):
        s = {"mlp": jnp.where(jnp.arange(128) < seed_units, 1.0, -1.0)}
        s["mlp"] = s["mlp"] + 0.1 * jax.random.normal(KEY, (128,))

        def loss(both, beta, opened, batch):
            params, scores = both
            soft = reparam.gate(scores, beta)
            gates = {"mlp": jnp.where(opened["mlp"], soft["mlp"], 0)}
            cost = reparam.expected_entries(params, reparam.gate(scores, mode="hard"), axes)
            lam = reparam.budget_pressure(cost, target, full=full, base=0.1)
            task = nets.cross_entropy(reparam.gate_units(params, gates, axes, roles), batch)
            return task + lam * reparam.gate_penalty(scores, beta)

        def epoch(carry, e):
            both, state, age = carry
            key = jax.random.fold_in(KEY, e)
            beta = {"mlp": reparam.temperature(age["mlp"], epochs + 1)}
            drawn = reparam.gate(both[1], beta, mode="bernoulli", key=key)
            opened = {"mlp": drawn["mlp"] > 0}
            age = {"mlp": age["mlp"] + opened["mlp"]}

            def step(carry, i):
                both, state = carry
                rows = jax.random.randint(jax.random.fold_in(key, i), (64,), 0, len(x))
                g = jax.grad(loss)(both, beta, opened, (x[rows], y[rows]))
                updates, state = tx.update(g, state, both)
                return (optax.apply_updates(both, updates), state), None

            (both, state), _ = jax.lax.scan(step, (both, state), jnp.arange(steps))
            return (both, state, age), (both[1]["mlp"] > 0).sum()

        both = (params, s)
        start = (both, tx.init(both), {"mlp": jnp.zeros(128)})
        (both, _, _), kept = jax.lax.scan(epoch, start, jnp.arange(epochs))
        hard = reparam.gate(both[1], mode="hard")
        cost = reparam.expected_entries(params, hard, axes)
        final = reparam.gate_units(both[0], hard, axes, roles)
        return kept, cost / target, nets.accuracy(final, x_test, y_test)

    kept, cost, accuracy = jax.jit(jax.vmap(run))(jnp.array([4, 120]))
    assert kept[0, -1] > 4 + 20 and kept[1, -1] < 120 - 40
    assert (jnp.abs(cost - 1) < 0.15).all()
    assert (accuracy > 0.9).all()


# ------------------------------------------------------------------------------------ gates of rows


def _table(key=KEY):
    return {"embedding": jax.random.normal(key, (6, 3)), "head": jnp.ones((3, 1))}


def test_rows_start_as_they_were_and_end_as_a_smaller_table():
    params = _table()
    lookup = lambda p, ids: p["embedding"][ids].prod(1) @ p["head"]  # a product of two features
    ids = jnp.array([[0, 1], [2, 5], [5, 5], [3, 4]])
    r = reparam.optfs(1.0, where="embedding")
    theta = r.init(KEY, params)
    assert sum(c.size for c in theta.values()) == 6
    np.testing.assert_allclose(lookup(r.apply(theta, params), ids), lookup(params, ids), rtol=1e-6)
    tau, c = 3.0, jnp.array([0.5, -0.5, 0.2, -2.0, 0.0, 1.0])
    at = reparam.optfs(tau, where="embedding").apply({"embedding": c}, params)
    g = jax.nn.sigmoid(tau * c) / jax.nn.sigmoid(0.5)
    np.testing.assert_allclose(at["embedding"], g[:, None] * params["embedding"], rtol=1e-5)
    slope = jax.grad(
        lambda c: (
            reparam.optfs(tau, where="embedding").apply({"embedding": c}, params)["embedding"].sum()
        )
    )(c)
    rows = params["embedding"].sum(1)
    want = rows * tau * g * (1 - jax.nn.sigmoid(tau * c))
    np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-6)

    kept = {"embedding": c > 0}
    hard = reparam.keep_rows(params, kept)
    alive = np.flatnonzero(c > 0)
    small = jnp.concatenate([params["embedding"][alive] / jax.nn.sigmoid(0.5), jnp.zeros((1, 3))])
    remap = np.full(6, len(alive))
    remap[alive] = np.arange(len(alive))
    got = lookup({**params, "embedding": small}, jnp.asarray(remap)[ids])
    np.testing.assert_allclose(lookup(hard, ids), got, rtol=1e-6)
    np.testing.assert_allclose(
        reparam.optfs(1e6, where="embedding").apply({"embedding": c.at[4].set(-1)}, params)[
            "embedding"
        ],
        hard["embedding"],
        rtol=1e-6,
        atol=1e-10,
    )


def test_every_gate_of_a_row_moves():
    params = _table()
    theta = reparam.optfs(1.0, where="embedding").init(KEY, params)
    loss = lambda t: jnp.square(
        reparam.optfs(1.0, where="embedding").apply(t, params)["embedding"]
    ).sum()
    moved = optax.apply_updates(theta, jax.tree.map(lambda g: -0.1 * g, jax.grad(loss)(theta)))
    assert (moved["embedding"] != theta["embedding"]).all()


def _auc(score, y):
    ranks = np.argsort(np.argsort(score)) + 1
    n = y.sum()
    return (ranks[y == 1].sum() - n * (n + 1) / 2) / (n * (len(y) - n))


@pytest.mark.slow
def test_optfs_keeps_the_values_that_inform():
    """Three informative and twelve noise fields of eight values, 20000 examples.

    A value informs that moves the logit by more than 0.5; the others (0.3) are not worth the
    penalty.
    """
    rng = np.random.default_rng(0)
    fields, values, n = 15, 8, 24_000
    ids = rng.integers(values, size=(n, fields))
    effect = np.stack([rng.permutation(np.linspace(-2.1, 2.1, values)) for _ in range(3)])
    logit = sum(effect[f, ids[:, f]] for f in range(3))
    y = jnp.asarray(rng.random(n) < 1 / (1 + np.exp(-logit)), jnp.float32)
    rows = jnp.asarray(ids + values * np.arange(fields))
    train, test = slice(0, 20_000), slice(20_000, None)
    params = {
        "embedding": 0.1 * jax.random.normal(KEY, (fields * values, 4)),
        "head": 0.1 * jax.random.normal(jax.random.key(1), (fields * 4,)),
        "bias": jnp.zeros(()),
    }
    apply_fn = lambda p, r: p["embedding"][r].reshape(len(r), -1) @ p["head"] + p["bias"]
    loss = lambda p, b: optax.sigmoid_binary_cross_entropy(apply_fn(p, b[0]), b[1]).mean()
    epochs, steps, size = 20, 40, 500

    def fit(loss, theta, tx):
        def epoch(carry, e):
            def step(carry, i):
                theta, state = carry
                start = i * size
                cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size)
                batch = (cut(rows[train]), cut(y[train]))
                g = jax.grad(lambda t: loss(t, e, batch))(theta)
                updates, state = tx.update(g, state, theta)
                return (optax.apply_updates(theta, updates), state), None

            carry, _ = jax.lax.scan(step, carry, jnp.arange(steps))
            return carry, carry[0]

        run = jax.jit(lambda: jax.lax.scan(epoch, (theta, tx.init(theta)), jnp.arange(epochs)))
        (theta, _), history = run()
        return theta, history

    def searched(both, e, batch):
        params, theta = both
        tau = reparam.temperature(e, epochs)
        at = reparam.optfs(tau, where="embedding").apply(theta, params)
        return loss(at, batch) + 1e-3 * reparam.gate_penalty(theta, tau)

    tx = optax.adam(1e-2)
    slow = optax.partition({"w": tx, "c": optax.adam(2e-3)}, ("w", "c"))
    theta = reparam.optfs(1.0, where="embedding").init(KEY, params)
    (_, theta), history = fit(searched, (params, theta), slow)
    early = jax.tree.map(lambda h: h[0], history[0])
    kept = {"embedding": theta["embedding"] > 0}
    bits = np.asarray(kept["embedding"]).reshape(fields, values)
    recall, off = bits[:3][np.abs(effect) > 0.5].mean(), 1 - bits[3:].mean()

    final, _ = fit(lambda p, e, b: loss(reparam.keep_rows(p, kept), b), early, tx)
    dense, _ = fit(lambda p, e, b: loss(p, b), params, tx)
    auc = [
        _auc(np.asarray(apply_fn(p, rows[test])), np.asarray(y[test]))
        for p in (reparam.keep_rows(final, kept), dense)
    ]
    assert recall >= 0.9 and off >= 0.8
    assert auc[0] > auc[1] - 0.005
