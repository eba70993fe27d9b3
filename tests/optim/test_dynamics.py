"""Langevin, full-batch, bilevel, federated: closed forms, stationary laws, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import comb, gammaln

from jaxkit import optim

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


# ------------------------------------------------------------------------------------ Langevin


def test_langevin_samples_a_gaussian_posterior():
    """n = 40 data with precision n: the posterior N(mean, 1 / n); noise before the rate is off."""
    n, mean, rate = 40, 0.7, 0.05

    def run(tx, steps=400):
        x = jnp.full(20_000, mean)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(x - mean, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), None, length=steps)[0][0])()

    for temperature in (1.0, 0.25):
        x = run(optim.langevin(rate, key=KEY, num_data=n, temperature=temperature))
        want = temperature / n / (1 - rate / 2)  # of the discrete chain
        np.testing.assert_allclose([x.mean(), x.var()], [mean, want], rtol=0.05)
    noise = optax.add_noise(2 * rate / n, 0.0, jax.random.key(1))
    wrong = run(optax.chain(noise, optax.scale_by_learning_rate(rate)))
    assert abs(wrong.var() * n - 1) > 0.5


def test_langevin_noise_is_the_leafs_own_and_follows_the_schedule():
    tx = optim.langevin(lambda t: 0.1 / (1 + t), key=KEY, num_data=10)
    params = {"a": jnp.zeros(50_000), "b": jnp.zeros(50_000), "n": jnp.arange(2)}
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(params, state)
        np.testing.assert_allclose(updates["a"].std(), np.sqrt(0.02 / (1 + t)), rtol=0.02)
        assert abs(np.corrcoef(updates["a"], updates["b"])[0, 1]) < 0.03
        assert updates["n"].dtype == jnp.int32
    with pytest.raises(TypeError, match="typed key"):
        optim.langevin(0.1, key=jax.random.PRNGKey(0), num_data=10)


def test_a_mixture_and_its_regret():
    """Bernoulli models on a grid, truth 0.3, n = 200: the exact expected regret is in its bound."""
    theta, truth, n = np.arange(1, 100) / 100, 0.3, 200
    k = np.arange(n + 1)
    log_p = k * np.log(theta)[:, None] + (n - k) * np.log1p(-theta)[:, None]
    truth_p = k * np.log(truth) + (n - k) * np.log1p(-truth)
    chance = np.exp(np.log(comb(n, k)) + truth_p)
    with jax.enable_x64(True):
        loss = optim.mixture_log_loss(jnp.asarray(log_p))
        regret = float(np.sum(chance * (truth_p + loss)))
        kl = truth * np.log(truth / theta) + (1 - truth) * np.log((1 - truth) / (1 - theta))
        bound = float(optim.regret_bound(jnp.asarray(kl), jnp.zeros(99), n))
        twice = float(optim.regret_bound(jnp.asarray(np.tile(kl, 10)), jnp.zeros(990), n))
        ten = optim.mixture_log_loss(jnp.asarray(np.tile(log_p, (10, 1))))
    np.testing.assert_allclose([regret, bound], [2.006, 3.096], atol=2e-3)
    assert regret <= bound <= np.log(99)
    np.testing.assert_allclose(twice, bound, rtol=1e-9)
    np.testing.assert_allclose(ten, loss, rtol=1e-9)
    # the uniform prior on [0, 1]: Q(x^n) = 1 / ((n + 1) binom(n, k))
    grid = (np.arange(20_000) + 0.5) / 20_000
    fine = k[:, None] * np.log(grid) + (n - k[:, None]) * np.log1p(-grid)
    with jax.enable_x64(True):
        got = optim.mixture_log_loss(jnp.asarray(fine.T))
    log_binom = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    np.testing.assert_allclose(got, np.log(n + 1) + log_binom, rtol=1e-6)


# ---------------------------------------------------------------------------------- full batch


def test_the_penalty_on_a_parabola_and_by_autodiff():
    with jax.enable_x64(True):
        a = RNG.normal(size=(4, 4))
        a = jnp.asarray(a @ a.T)
        loss = lambda w, chunk: 0.5 * w @ a @ w
        w = jnp.asarray(RNG.normal(size=4))
        options = {"learning_rate": 0.3, "strength": 0.5}
        want = a @ w + 0.3 * 0.5 / 4 * a @ (a @ w)
        for method in ("exact", "finite"):
            got = optim.regularized_gradient(loss, w, jnp.zeros(2), method=method, **options)
            np.testing.assert_allclose(got, want, rtol=1e-9)
        data = jnp.asarray(RNG.normal(size=(5, 6, 4)))
        loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2) + 0.1 * jnp.sum(w**4)

        def penalized(w):
            square = lambda c: jnp.sum(jax.grad(loss)(w, c) ** 2)
            each = jax.vmap(lambda c: loss(w, c) + 0.5 * 0.3 / 8 * square(c))(data)
            return each.mean()

        got = jax.jit(lambda w: optim.regularized_gradient(loss, w, data, **options))(w)
        np.testing.assert_allclose(got, jax.grad(penalized)(w), rtol=1e-8)
        finite = optim.regularized_gradient(loss, w, data, method="finite", eps=1e-6, **options)
        np.testing.assert_allclose(finite, got, rtol=1e-5)


def test_without_a_penalty_it_is_the_full_gradient_and_chunks_matter_with_one():
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w["k"]) ** 2)
    w = {"k": jnp.asarray(RNG.normal(size=4), jnp.float32)}
    x = jnp.asarray(RNG.normal(size=(30, 4)), jnp.float32)
    whole = jax.grad(loss)(w, x)["k"]
    split = x.reshape(5, 6, 4)
    plain = optim.regularized_gradient(loss, w, split, learning_rate=0.5, strength=0.0)["k"]
    np.testing.assert_allclose(plain, whole, rtol=1e-5)
    zero = optim.regularized_gradient(
        loss, {"k": jnp.zeros(4)}, split, learning_rate=0.5, method="finite"
    )
    assert not np.any(zero["k"])  # no gradient: nothing to divide by
    ragged = jnp.stack([x[:6], jnp.tile(x[6:9], (2, 1))])
    both = optim.regularized_gradient(
        loss, w, ragged, learning_rate=0.0, weights=jnp.array([6.0, 3.0])
    )
    np.testing.assert_allclose(both["k"], jax.grad(loss)(w, x[:9])["k"], rtol=1e-5)
    # parabolas A_c: the penalty's gradient is mean(A_c A_c) w, but with one chunk mean(A_c)^2 w
    a = RNG.normal(size=(5, 4, 4))
    a = jnp.asarray(a @ a.swapaxes(1, 2), jnp.float32)
    parabola = lambda w, a: 0.5 * w @ a.mean(0) @ w
    call = lambda chunks: optim.regularized_gradient(parabola, w["k"], chunks, learning_rate=8.0)
    many = call(a[:, None]) - a.mean(0) @ w["k"]
    np.testing.assert_allclose(many, (a @ a).mean(0) @ w["k"], rtol=1e-4)
    with pytest.warns(UserWarning, match="one chunk"):
        one = call(a[None]) - a.mean(0) @ w["k"]
    np.testing.assert_allclose(one, a.mean(0) @ a.mean(0) @ w["k"], rtol=1e-4)
    assert w["k"] @ many > 1.1 * w["k"] @ one  # twice the penalties themselves


@pytest.mark.parametrize("method", ["exact", "finite"])
def test_leaves_that_are_no_floats_have_no_gradient(method):
    loss = lambda p, x: jnp.sum(p["w"] ** 2) * p["n"][1] + jnp.sum(x)
    params = {"w": jnp.array([1.0, 2.0]), "n": jnp.array([0, 3])}
    run = lambda s, method: optim.regularized_gradient(
        loss, params, jnp.zeros((2, 1)), learning_rate=0.4, strength=s, method=method
    )
    found = run(0.5, method)
    np.testing.assert_allclose(found["w"], 6 * (1 + 0.05 * 6) * params["w"], rtol=1e-3)
    assert found["n"].dtype == jnp.int32 and not np.any(found["n"])
    with pytest.raises(ValueError, match="method='exakt'"):
        run(0.5, "exakt")


# ------------------------------------------------------------------------------------- bilevel


def parabolas():
    a = RNG.normal(size=(3, 3))
    a = jnp.asarray(a @ a.T / 3 + np.eye(3), jnp.float32)
    b, c = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((3, 2), 3))
    outer = lambda x, y, _: 0.5 * jnp.sum((y - c) ** 2) + 0.05 * jnp.sum(x**2)
    inner = lambda x, y, _: 0.5 * y @ a @ y - y @ (b @ x)
    best = lambda x: jnp.linalg.solve(a, b @ x)
    return a, b, c, outer, inner, best


def test_hypergradients_and_bo_rep_on_parabolas():
    a, b, c, outer, inner, best = parabolas()
    x = jnp.array([0.5, -1.0])
    y = best(x)
    z = jnp.linalg.solve(a, y - c)
    got = optim.hypergradient(outer, inner, x, y, z, (None, None))
    np.testing.assert_allclose(got, b.T @ z + 0.1 * x, rtol=1e-4)
    np.testing.assert_allclose(got, jax.grad(lambda x: outer(x, best(x), None))(x), rtol=1e-4)

    rate = lambda t: 0.3 / (1 + t / 20)
    x, y = jnp.array([3.0, 3.0]), jnp.zeros(3)
    init, _ = optim.bo_rep(outer, inner, step=0.1, inner_step=0.3)
    state = init(x, y)

    def one(state, t):
        options = {"inner_step": 0.3, "solution_step": 0.3, "momentum": 0.5, "every": 2}
        new = optim.bo_rep(outer, inner, step=rate(t), **options)[1](state, (None, None))
        moved = jnp.linalg.norm(new.upper - state.upper)
        return new, (moved, jnp.array_equal(new.lower, state.lower), new.upper)

    state, (moved, still, _) = jax.lax.scan(one, state, jnp.arange(3000))
    np.testing.assert_allclose(moved, rate(jnp.arange(3000)), rtol=1e-3)
    assert np.all(still[1::2]) and not np.any(still[:100:2])
    solve = lambda x: jax.grad(lambda x: outer(x, best(x), None))(x)
    hessian = jax.jacfwd(solve)(jnp.zeros(2))
    optimum = -jnp.linalg.solve(hessian, solve(jnp.zeros(2)))
    np.testing.assert_allclose(state.upper, optimum, atol=0.03)
    np.testing.assert_allclose(state.solution, jnp.linalg.solve(a, state.lower - c), atol=0.05)


def test_bo_rep_accumulates_in_float32():
    """Steps that bfloat16 would round away add up; x and y keep their dtype."""
    low = jnp.bfloat16
    outer = lambda x, y, _: jnp.sum(x) + jnp.sum(y)
    inner = lambda x, y, _: 0.5 * jnp.sum(y**2)
    options = {"step": jnp.float32(0.1), "inner_step": jnp.float32(0.1), "radius": 9.0}
    init, update = optim.bo_rep(outer, inner, solution_step=1e-3, momentum=0.999, **options)
    state = init(jnp.zeros(2, low), jnp.ones(3, low))
    run = lambda s, _: (update(s, (None, None)), None)
    state = jax.jit(lambda s: jax.lax.scan(run, s, None, length=1000)[0])(state)
    np.testing.assert_allclose(state.solution, 1 - (1 - 1e-3) ** 1000, rtol=5e-3)
    np.testing.assert_allclose(state.momentum, 1 - 0.999**1000, rtol=5e-3)
    assert state.upper.dtype == state.lower.dtype == low


def test_a_ball_holds_the_lower_variables():
    _, _, _, outer, inner, _ = parabolas()
    init, update = optim.bo_rep(outer, inner, step=0.1, inner_step=0.9, inner_updates=9, radius=0.2)
    state = init(jnp.array([5.0, 5.0]), jnp.zeros(3))
    new = update(state, (None, None))
    np.testing.assert_allclose(jnp.linalg.norm(new.lower - state.lower), 0.2, rtol=1e-4)


def test_a_ridge_is_tuned_to_the_best_of_a_grid():
    x = jnp.asarray(RNG.normal(size=(60, 20)), jnp.float32)
    w = jnp.asarray(RNG.normal(size=20), jnp.float32) * (jnp.arange(20) < 5)
    y = x @ w + 2.0 * jnp.asarray(RNG.normal(size=60), jnp.float32)
    train, held = (x[:30], y[:30]), (x[30:], y[30:])
    fit = lambda s: jnp.linalg.solve(
        train[0].T @ train[0] / 30 + jnp.exp(s) * jnp.eye(20), train[0].T @ train[1] / 30
    )
    error = lambda w: jnp.mean((held[0] @ w - held[1]) ** 2)
    grid = jnp.linspace(-5, 4, 400)
    losses = jax.vmap(lambda s: error(fit(s)))(grid)
    outer = lambda s, w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    inner = lambda s, w, b: 0.5 * jnp.mean((b[0] @ w - b[1]) ** 2) + 0.5 * jnp.exp(s) * w @ w
    init, _ = optim.bo_rep(outer, inner, step=0.1, inner_step=0.1)

    def one(state, t):
        update = optim.bo_rep(
            outer, inner, step=0.2 / (1 + t / 50), inner_step=0.1, solution_step=0.1, every=1
        )[1]
        return update(state, (held, train)), None

    state, _ = jax.lax.scan(one, init(jnp.float32(-3.0), jnp.zeros(20)), jnp.arange(3000))
    assert error(fit(state.upper)) <= 1.01 * losses.min()


# ----------------------------------------------------------------------------------- federated


def test_fed_hyper_without_hypergradients_is_federated_averaging():
    init, update = optim.fed_hyper(hyper_rate=0.0)
    params = {"w": jnp.zeros(3), "h": jnp.zeros(2, jnp.bfloat16)}
    clients = {"w": jnp.arange(12.0).reshape(4, 3), "h": jnp.ones((4, 2), jnp.bfloat16)}
    new, _ = update(params, clients, init(params))
    np.testing.assert_allclose(new["w"], clients["w"].mean(0), rtol=1e-6)
    share = jnp.array([1.0, 1.0, 2.0, 0.0])
    new, _ = update(params, clients, init(params), share)
    np.testing.assert_allclose(new["w"], share @ clients["w"] / 4, rtol=1e-6)
    assert new["h"].dtype == jnp.bfloat16
    own, theirs = {"n": jnp.arange(3), **params}, {"n": jnp.full((4, 3), 9), **clients}
    new, state = update(own, theirs, init(own))
    assert new["n"].dtype == jnp.int32 and new["n"].tolist() == [0, 1, 2]
    jax.eval_shape(update, new, theirs, state)


def test_the_rate_follows_the_hypergradient_within_its_bounds():
    """On a parabola -d f(W_{t+1}) / d alpha = <grad f, D> has the sign of the increment."""
    init, update = optim.fed_hyper(bound=3.0)
    target = jnp.array([10.0, -4.0])
    w, state = jnp.zeros(2), init(jnp.zeros(2))
    f = lambda w: 0.5 * jnp.sum((w - target) ** 2)
    local = lambda w: w[None] + 0.1 * (target - w)[None]
    w1, s1 = update(w, local(w), state)
    w2, s2 = update(w1, local(w1), s1)
    slope = lambda e: f(w + (1.0 + e) * (local(w)[0] - w))
    assert jax.grad(slope)(0.0) < 0 < s2.rate - s1.rate
    np.testing.assert_allclose(s2.rate - s1.rate, min(2.0, float((w1 - w) @ (local(w1)[0] - w1))))
    for _ in range(5):
        w2, s2 = update(w2, w2[None] + jnp.array([[9.0, 0.0]]), s2)
    assert float(s2.rate) == 3.0
    for sign in (1, -1, 1, -1):
        w2, s2 = update(w2, w2[None] + sign * jnp.array([[9.0, 0.0]]), s2)
    np.testing.assert_allclose(s2.rate, 1 / 3, rtol=1e-6)
    init, update = optim.fed_hyper(cosine=True, hyper_rate=0.1, bound=99.0)
    state, w = init(jnp.zeros(2)), jnp.zeros(2)
    for _ in range(4):
        w, state = update(w, w[None] + jnp.array([[1e-3, 0.0]]), state)
    np.testing.assert_allclose(state.rate, 1.3, rtol=1e-4)


def test_clients_speed_up_where_steps_agree():
    g = {"w": jnp.array([2.0, 0.0])}
    along, against = {"w": jnp.array([-1.0, 0.0])}, {"w": jnp.array([1.0, 0.0])}
    rate = lambda last, d: float(optim.fed_hyper_client(0.5, g, last, d, steps=4, start=0.5))
    zeros = {"w": jnp.zeros(2)}
    np.testing.assert_allclose(rate(g, zeros), 4.5)
    np.testing.assert_allclose([rate(zeros, along), rate(zeros, against)], [1.0, 0.05])
    assert rate({"w": 9 * g["w"]}, zeros) == 5.0  # clipped


@pytest.mark.slow
def test_fed_hyper_needs_fewer_rounds_from_a_rate_that_is_too_small():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = digits.data[:1700] / 16, digits.target[:1700]
    order = np.argsort(y, kind="stable")[:1700].reshape(10, 170)  # one or two classes a client
    data = jnp.asarray(x[order], jnp.float32), jnp.asarray(y[order])
    flat = data[0].reshape(-1, 64), data[1].ravel()

    def loss(w, batch):
        logits = batch[0] @ w["k"] + w["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def client(w, batch):
        step = lambda w, _: (
            jax.tree.map(lambda p, g: p - 0.02 * g, w, jax.grad(loss)(w, batch)),
            None,
        )
        return jax.lax.scan(step, w, None, length=5)[0]

    def rounds(hyper_rate):
        init, update = optim.fed_hyper(hyper_rate=hyper_rate)
        w = {"k": jnp.zeros((64, 10)), "b": jnp.zeros(10)}

        def one(carry, _):
            w, state = carry
            w, state = update(w, jax.vmap(client, (None, 0))(w, data), state)
            right = jnp.argmax(flat[0] @ w["k"] + w["b"], axis=1) == flat[1]
            return (w, state), right.mean()

        accuracy = jax.jit(lambda: jax.lax.scan(one, (w, init(w)), None, length=300)[1])()
        return optim.reached(np.arange(300), accuracy, 0.92, maximize=True)

    averaging, adaptive, bold = rounds(0.0), rounds(1.0), rounds(10.0)
    assert bold < adaptive < averaging < np.inf and averaging > 1.5 * bold, (
        averaging,
        adaptive,
        bold,
    )
