"""Rules against other packages (their numbers frozen here), solvers, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from scipy.optimize import linprog

from jaxkit import optim

RNG = np.random.default_rng(0)


def wave(*shape):
    """Numbers that any package can make: sin(k^2 / 10), k = 1, 2, ..."""
    return np.sin(np.arange(1, 1 + np.prod(shape)) ** 2 / 10).reshape(shape)


def run(tx, w, gradient, steps):
    def step(carry, t):
        w, state = carry
        updates, state = tx.update(gradient(w, t), state, w)
        return (optax.apply_updates(w, updates), state), updates

    return jax.jit(lambda: jax.lax.scan(step, (w, tx.init(w)), jnp.arange(steps)))()


# ----------------------------------------------------------------------------- Adam and AdaMax

# torch 2.13.0, float64: Adam(lr=0.01) and Adamax(lr=0.01, eps=0) from wave(5), 100 steps with the
# gradients cos(t j + t) + w / 10, j = 0, ..., 4
TORCH = {
    "adam": [0.06548531174490611, 0.32012820212632437, 0.665733960978025]
    + [0.8518417961757037, 0.4989404505791408],
    "adamax": [0.07127087183690183, 0.33678717376721123, 0.6971394228667185]
    + [0.8955805053853193, 0.5247684150235262],
}


def test_trajectories_of_torch():
    with jax.enable_x64(True):
        gradient = lambda w, t: jnp.cos(t * jnp.arange(5.0) + t) + 0.1 * w
        for name, tx in (("adam", optax.adam(0.01)), ("adamax", optim.adamax(0.01))):
            (w, _), _ = run(tx, jnp.asarray(wave(5)), gradient, 100)
            np.testing.assert_allclose(w, TORCH[name], rtol=1e-9, err_msg=name)


def test_adamax_forgets_a_spike_in_bfloat16_too():
    """0.999 is 1 there: a state in the dtype of the params would keep it for ever."""
    gradient = lambda w, t: jnp.where(t == 0, 10.0, 1.0).astype(w.dtype) * jnp.ones_like(w)
    (w, state), _ = run(optim.adamax(0.01), jnp.zeros(1, jnp.bfloat16), gradient, 300)
    np.testing.assert_allclose(state[0].nu, 10 * 0.999**299, rtol=1e-4)
    assert w.dtype == jnp.bfloat16


def test_first_steps_of_adam():
    with jax.enable_x64(True):
        g = jnp.asarray(RNG.normal(size=7)) * 10.0 ** jnp.arange(-6, 1)
        _, steps = run(optax.adam(0.1, eps=1e-3), jnp.zeros(7), lambda w, t: g, 1)
        np.testing.assert_allclose(steps[0], -0.1 * g / (jnp.abs(g) + 1e-3), rtol=1e-12)


def test_largest_steps_of_adam():
    """After zeros a spike moves by (1 - b1) / sqrt(1 - b2); gradients that grow can do more.

    The paper takes the former for a bound. By the inequality of Cauchy and Schwarz it is
    (1 - b1) / sqrt(1 - b2) sqrt(sum_k (b1^2 / b2)^k), which gradients (b1 / b2)^-t attain.
    """
    rate, b1, b2, n = 0.1, 0.9, 0.95, 200
    with jax.enable_x64(True):
        tx = optax.adam(rate, b1=b1, b2=b2, eps=0, eps_root=1e-30)
        sparse = jnp.asarray(RNG.normal(size=(n, 50)) * (RNG.random((n, 50)) < 0.1))
        grown = (b1 / b2) ** -(jnp.arange(n) - n + 1.0)
        spike = jnp.zeros(n).at[-1].set(5.0)
        grads = jnp.concatenate([sparse, grown[:, None], spike[:, None]], axis=1)
        _, steps = run(tx, jnp.zeros(52), lambda w, t: grads[t], n)
        t = np.arange(1, n + 1)
        correction = np.sqrt(1 - b2**t) / (1 - b1**t)
        single = rate * correction * (1 - b1) / np.sqrt(1 - b2)
        bound = single * np.sqrt(np.cumsum((b1**2 / b2) ** (t - 1.0)))
        np.testing.assert_allclose(-steps[-1, 51], single[-1], rtol=1e-9)
        np.testing.assert_allclose(-steps[-1, 50], bound[-1], rtol=1e-9)
        assert np.all(np.abs(steps) <= bound[:, None] * (1 + 1e-9))
        assert bound[-1] > 2 * single[-1]


def test_where_eps_is_added():
    """eps after the bias correction is eps sqrt(1 - b2^t) before it: the rule `in_basis` has."""
    with jax.enable_x64(True):
        g = jnp.asarray(RNG.normal(size=(20, 4)))
        eps, b1, b2, w, m, v = 1e-2, 0.9, 0.99, np.zeros(4), 0.0, 0.0
        for t in range(1, 21):
            m, v = b1 * m + (1 - b1) * g[t - 1], b2 * v + (1 - b2) * g[t - 1] ** 2
            hat = eps * np.sqrt(1 - b2**t)
            w -= 0.1 * np.sqrt(1 - b2**t) / (1 - b1**t) * m / (np.sqrt(v) + hat)
        tx = optax.adam(0.1, b1=b1, b2=b2, eps=eps)
        (got, _), _ = run(tx, jnp.zeros(4), lambda w, t: g[t], 20)
        np.testing.assert_allclose(got, w, rtol=1e-9)


def test_the_average_of_the_weights_has_no_bias():
    """avg <- b2 avg + (1 - b2) w, read over 1 - b2^t: of constant weights, these weights."""
    tx = optax.ema(0.99, debias=True)
    _, averages = run(tx, jnp.ones(3), lambda w, t: jnp.full(3, 2.5), 30)
    np.testing.assert_allclose(averages, 2.5, rtol=1e-5)


# --------------------------------------------------------------------------------------- TrAct

# torch_tract 1.0.0 on torch 2.13.0, float64, lambda = 0.1: loss mean(sin(3 y)), y of inputs
# wave(b, n) and weights wave(2, n); gradients as (n, 2), flat
LINEAR = {
    (7, 3): [0.014683410473809722, 0.4247622129999331, 0.4960930029631793]
    + [0.4270933154696465, -0.4615342434105171, 0.08388812096317147],
    (3, 5): [-0.27711315002653014, -0.30376007487799067, 0.4551340970991373]
    + [0.3328475331740567, 0.025088416470587585, -0.15341028691312686, 1.1657623773531]
    + [0.9305792620636775, -0.03143187381536041, -0.18091084013438716],
}
# a convolution of 3 x 2 from 2 to 3 channels, stride (2, 1), padding (1, 0), of wave(2, 2, 5, 4),
# weights wave(3, 2, 3, 2) in torch's order; every fifth entry as (3, 2, 2, 3), and the norm
CONV = [-0.03562425865633309, -0.20759618703868285, 0.36360966264578176, -0.13990648811697332]
CONV += [0.24171693643953307, -0.12586884832599068, 0.06925694615409794, -0.03855298470920113]
CONV_NORM = 1.3618017216815665


def test_tract_of_its_authors():
    with jax.enable_x64(True):
        for (b, n), want in LINEAR.items():
            x, w = jnp.asarray(wave(b, n)), jnp.asarray(wave(2, n)).T
            slope = jax.grad(lambda w, x=x: jnp.mean(jnp.sin(3 * x @ w)))
            got = jax.jit(lambda w, x=x, slope=slope: optim.tract(slope(w), x))(w)
            np.testing.assert_allclose(got.ravel(), want, rtol=1e-9)
        x = jnp.asarray(wave(2, 2, 5, 4)).transpose(0, 2, 3, 1)
        w = jnp.asarray(wave(3, 2, 3, 2)).transpose(2, 3, 1, 0)
        options = {"padding": [(1, 1), (0, 0)]}

        def loss(w):
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, w, (2, 1), dimension_numbers=numbers, **options)
            return jnp.mean(jnp.sin(3 * y))

        got = jax.jit(lambda w: optim.tract(jax.grad(loss)(w), x, strides=(2, 1), **options))(w)
        np.testing.assert_allclose(got.ravel()[::5], CONV, rtol=1e-9)
        np.testing.assert_allclose(jnp.linalg.norm(got), CONV_NORM, rtol=1e-9)


def test_tract_of_split_data_is_that_of_all():
    x, w = jnp.asarray(RNG.normal(size=(8, 5, 3))), jnp.asarray(RNG.normal(size=(3, 2)))
    slope = lambda x: jax.grad(lambda w: jnp.mean(jnp.sin(x @ w)))(w)
    whole = jax.jit(lambda x: optim.tract(slope(x), x))(x)
    part = lambda x: optim.tract(jax.lax.pmean(slope(x), "data"), x, axis_name="data")
    split = jax.jit(jax.vmap(part, axis_name="data"))(x)
    np.testing.assert_allclose(split[3], whole, rtol=1e-4)
    alone = jax.jit(jax.vmap(lambda x: optim.tract(slope(x), x)))(x).mean(0)
    assert jnp.linalg.norm(alone - whole) > 0.05 * jnp.linalg.norm(whole)


# -------------------------------------------------------------------------- several objectives


def epo_by_linprog(c, losses, r):
    """The two linear programs of exact Pareto optimal search, by scipy."""
    m = len(losses)
    share = r * losses / np.sum(r * losses)
    mu = np.sum(share * np.log(m * share))
    a = r * (np.log(m * share) - mu)
    ca = c @ a
    simplex = {"A_eq": np.ones((1, m)), "b_eq": [1.0], "bounds": [(0, None)] * m}
    if mu > 1e-4:
        floor = np.where(ca > 0, -np.inf, ca) if np.any(ca > 0) else np.zeros(m)
        if np.any(ca > 0):
            floor[np.argmax(r * losses)] = 0
        rows = np.isfinite(floor)
        found = linprog(-ca, -c[rows], -floor[rows], **simplex)
        return ca, found
    rows = np.concatenate([c, ca[None]])
    floor = np.concatenate([np.zeros(m), [min(0, ca.max())]])
    return c.sum(0), linprog(-c.sum(0), -rows, -floor, **simplex)


def test_epo_weights_solve_the_authors_linear_programs():
    solved = 0
    for m in (2, 3, 4):
        solve = jax.jit(optim.epo_weights)
        for seed in range(8):
            rng = np.random.default_rng(10 * m + seed)
            g = rng.normal(size=(m, 9))
            c, losses, r = g @ g.T, rng.uniform(0.2, 2, m), rng.uniform(0.2, 2, m)
            if seed % 4 == 3:
                losses = rng.uniform(*((1, 1) if seed == 3 else (0.995, 1.005)), m) / r  # descend
            objective, want = epo_by_linprog(c, losses, r)
            got = np.asarray(solve(*(jnp.asarray(v, jnp.float32) for v in (c, losses, r))))
            np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
            if want.success:
                solved += 1
                scale = np.abs(objective).max()
                np.testing.assert_allclose(objective @ got, -want.fun, atol=2e-3 * scale)
    assert solved >= 20


def test_a_guide_that_is_an_objective_is_followed_where_nothing_conflicts():
    """v = g_j, all gradients of one length with angles below 90 degrees: a = e_j."""
    g = np.abs(RNG.normal(size=(5, 3, 20)))
    g = jnp.asarray(g / np.linalg.norm(g, axis=-1, keepdims=True), jnp.float32)
    one = lambda g, j: optim.pareto_direction({"w": g}, {"w": g[j]}).weights
    found = jax.jit(jax.vmap(jax.vmap(one, (None, 0)), (0, None)))(g, jnp.arange(3))
    np.testing.assert_allclose(found, np.stack([np.eye(3)] * 5), atol=1e-4)


# ------------------------------------------------------------------------- bilevel, federated


def test_bo_rep_with_an_exact_lower_level_walks_along_the_exact_hypergradient():
    rng = np.random.default_rng(3)
    a = rng.normal(size=(3, 3))
    a = jnp.asarray(a @ a.T / 3 + np.eye(3), jnp.float32)
    b, c = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 2), 3))
    outer = lambda x, y, _: 0.5 * jnp.sum((y - c) ** 2) + 0.05 * jnp.sum(x**2)
    inner = lambda x, y, _: 0.5 * y @ a @ y - y @ (b @ x)
    slope = jax.grad(lambda x: outer(x, jnp.linalg.solve(a, b @ x), None))
    start = jnp.array([2.0, 1.0])

    def distance(step, **options):
        """Of where x is after a walk of length 2, y and z solved at its start."""
        init, update = optim.bo_rep(
            outer, inner, step=step, inner_step=0.3, solution_step=0.3, momentum=0.0, **options
        )
        y = jnp.linalg.solve(a, b @ start)
        state = init(start, y)._replace(solution=jnp.linalg.solve(a, y - c))

        def both(_, carry):
            state, x = carry
            g = slope(x)
            return update(state, (None, None)), x - step * g / jnp.linalg.norm(g)

        state, x = jax.lax.fori_loop(0, round(2 / step), both, (state, start))
        return jnp.linalg.norm(state.upper - x)

    near, nearer, stale = jax.jit(
        lambda: (
            distance(0.1, every=1, inner_updates=40),
            distance(0.01, every=1, inner_updates=40),
            distance(0.01, every=100, inner_updates=40),
        )
    )()
    assert nearer < near / 5 and nearer < 0.01 and nearer < stale / 5, (near, nearer, stale)


def test_inner_products_of_rounds_are_summed_in_float32():
    """A thousand small entries in bfloat16: a sum in that dtype would stop growing at 256."""
    init, update = optim.fed_hyper(bound=1e9, hyper_rate=1.0)
    w = {"w": jnp.zeros(1000, jnp.bfloat16)}
    clients = {"w": jnp.ones((1, 1000), jnp.bfloat16)}
    _, state = update(w, clients, init(w))
    _, state = update(w, clients, state)
    np.testing.assert_allclose(state.rate, 1 + 1000, rtol=1e-6)


# ----------------------------------------------------------- stability, rates that are learned


def test_decay_of_adamw_depends_on_the_peak_rate():
    """What independent weight decay (`chain`, a negative sign, after the rate) is there for."""

    def left(peak):
        w = jnp.ones(())
        (w, _), _ = run(optax.adamw(peak, weight_decay=1e-4), w, lambda w, t: 0.0 * w, 10)
        return 1 - float(w)

    assert left(1e-1) > 50 * left(1e-3)


def test_normalized_queries_and_keys_bound_the_attention_logits():
    """|q k| / sqrt(d) <= max |s_q| max |s_k| sqrt(d) however large the kernels are."""
    x, d = jnp.asarray(RNG.normal(size=(2, 6, 8)), jnp.float32), 4

    def largest(factor, normalize):
        seen = []

        def attention(q, k, v, **_):
            seen.append(jnp.abs(jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d)).max())
            return v

        layer = linen.MultiHeadDotProductAttention(
            2, qkv_features=8, normalize_qk=normalize, attention_fn=attention
        )
        params = layer.init(jax.random.key(0), x)
        layer.apply(jax.tree.map(lambda w: factor * w if w.ndim > 1 else w, params), x)
        return seen[-1]

    factors = jnp.array([1.0, 1e3])
    plain, bounded = jax.jit(
        lambda: [jax.vmap(lambda f, on=on: largest(f, on))(factors) for on in (False, True)]
    )()
    assert plain[1] > 1e5 * plain[0]
    assert np.all(bounded <= np.sqrt(d) * (1 + 1e-4)) and bounded[1] > 0.5 * np.sqrt(d)


def test_learned_rates_do_not_depend_on_the_scale_of_the_loss():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
    batches = jax.random.randint(jax.random.key(1), (200, 64), 0, 1400)

    def accuracy(tx, scale):
        def step(carry, i):
            w, state = carry
            loss = lambda w: optax.softmax_cross_entropy_with_integer_labels(
                x[i] @ w["k"] + w["b"], y[i]
            ).mean()
            g = jax.tree.map(lambda g: scale * g, jax.grad(loss)(w))
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), None

        w = {"k": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
        w = jax.lax.scan(step, (w, tx.init(w)), batches)[0][0]
        return jnp.mean(jnp.argmax(x[1400:] @ w["k"] + w["b"], axis=1) == y[1400:])

    scales = jnp.array([0.01, 1.0, 100.0])
    sweep = lambda tx: np.asarray(jax.jit(jax.vmap(lambda s: accuracy(tx, s)))(scales))
    for tx in (optax.contrib.dog(), optax.contrib.prodigy()):
        found = sweep(tx)
        assert found.max() - found.min() <= 0.02 and found.min() > 0.8, found
    plain = sweep(optax.sgd(0.05))
    assert plain.max() - plain.min() > 0.1, plain


def test_the_calibrated_configuration_is_no_worse_than_any_default():
    times = RNG.uniform(1, 5, size=(12, 4))
    times[RNG.random((12, 4)) < 0.2] = np.inf
    times[7] = 1.1 * times.min(0)  # planted: never the fastest but always near
    best = optim.calibrate_jointly(times)
    score = optim.algoperf(times).score
    assert np.all(score[best] >= score) and best == 7


@pytest.mark.parametrize("workload", range(4))
def test_no_single_workload_would_choose_the_planted_one(workload):
    times = RNG.uniform(2, 5, size=(6, 4))
    times[np.arange(4), np.arange(4)] = 1.0
    times[5] = 1.2
    alone = optim.calibrate_jointly(times[:, [workload]])
    assert alone == workload and optim.calibrate_jointly(times) == 5
