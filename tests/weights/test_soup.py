from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init, logits
from jaxkit import weights

DRAW = np.random.default_rng(0)
at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


def model(dtype=jnp.float32):
    rows = {"w": DRAW.normal(size=(3, 2)), "b": DRAW.normal(size=2)}
    return {k: jnp.asarray(x, dtype) for k, x in rows.items()} | {"steps": jnp.arange(2)}


def close(got, want, tol=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


# --------------------------------------------------------------------------------- running mean


@jax.jit
def scanned(models):
    def take(carry, model):
        mean, k = carry
        return (weights.running_mean(mean, model, k), k + 1), None

    zeros = jax.tree.map(lambda w: w[0] * 0 + 9, models)
    return jax.lax.scan(take, (zeros, jnp.int32(0)), models)[0][0]


def test_the_running_mean_is_the_mean():
    models = [model() for _ in range(7)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *models)
    want = weights.merge(None, models, weights.average())
    close(scanned(stack), want)
    mean = model()
    for k, params in enumerate(models):
        mean = weights.running_mean(mean, params, k)
    close(mean, want)
    assert mean["steps"].tolist() == [0, 1]


def test_the_mean_of_one_is_the_one():
    one, other = model(), model()
    close(weights.running_mean(other, one, 0), one, 0)


def test_a_float32_mean_of_bfloat16_params():
    ones = {"w": jnp.ones(1, jnp.bfloat16)}
    mean = {"w": jnp.zeros(1)}
    for k in range(4):
        mean = weights.running_mean(mean, {"w": ones["w"] * (k + 256)}, k)
    assert mean["w"].dtype == jnp.float32
    assert mean["w"][0] == np.mean([float(jnp.bfloat16(k + 256)) for k in range(4)])


def test_the_mean_of_the_means_of_runs_is_the_mean_of_all():
    runs = [[model() for _ in range(3)] for _ in range(2)]
    means = [weights.merge(None, run, weights.average()) for run in runs]
    both = weights.merge(None, means, weights.average())
    close(both, weights.merge(None, runs[0] + runs[1], weights.average()))


def test_averaging_k_iterates_divides_the_variance_by_k():
    """SGD on x^2 / 2 with noise of variance 1: iterates 60 steps apart are independent."""
    k, apart, lr = 8, 60, 0.1

    def averages(key):
        noise = jax.random.normal(key, (1 + k * apart,))
        start = noise[0] * jnp.sqrt(lr / (2 - lr))
        step = lambda x, n: (x - lr * (x + n),) * 2
        snapshots = jax.lax.scan(step, start, noise[1:])[1][apart - 1 :: apart]
        take = lambda c, x: ((weights.running_mean(c[0], x, c[1]), c[1] + 1), None)
        mean, _ = jax.lax.scan(take, (jnp.zeros(()), 0), snapshots)[0]
        return snapshots[-1], mean

    last, mean = jax.jit(jax.vmap(averages))(jax.random.split(jax.random.key(0), 4000))
    assert float(last.var()) == pytest.approx(lr / (2 - lr), rel=0.1)
    assert float(mean.var()) == pytest.approx(lr / (2 - lr) / k, rel=0.1)


def test_a_mean_of_another_tree_is_an_error():
    with pytest.raises(ValueError, match=r"params does not fit .* 'b' is only"):
        weights.running_mean(model(), {"w": jnp.ones((3, 2))}, 1)


# ---------------------------------------------------------------------------------- greedy soup


def test_the_soup_is_the_mean_of_what_was_accepted():
    models = [model() for _ in range(5)]
    target = jnp.mean(jnp.stack([models[i]["w"] for i in (0, 2, 3)]), 0)
    evaluate = jax.jit(lambda p: -jnp.square(p["w"] - target).sum())
    soup = weights.greedy_soup(evaluate, models)
    want = weights.merge(None, [models[i] for i in soup.models], weights.average())
    close(soup.params, want)
    assert soup.value >= max(soup.values) and soup.value == float(evaluate(soup.params))
    assert soup.values == tuple(float(evaluate(m)) for m in models)
    assert soup.models[0] == int(np.argmax(soup.values)) and len(soup.models) > 1
    stack = jax.tree.map(lambda *x: jnp.stack(x), *models)
    assert weights.greedy_soup(evaluate, stack).models == soup.models


def test_ties_are_taken_only_when_asked_and_the_first_of_equals_leads():
    models = [{"w": jnp.array(x)} for x in (1.0, 2.0, 3.0)]
    constant = lambda params: 0.5
    assert weights.greedy_soup(constant, models).models == (0,)
    all_of_them = weights.greedy_soup(constant, models, accept_ties=True)
    assert all_of_them.models == (0, 1, 2) and all_of_them.params["w"] == 2.0


def test_keys_and_integers_pass_through():
    models = [{"w": jnp.array(x), "rng": jax.random.key(3), "n": 7} for x in (1.0, 3.0)]
    soup = weights.greedy_soup(lambda p: 0.0, models, accept_ties=True).params
    mean = weights.running_mean(models[0], models[1], 1)
    for got in (soup, mean, weights.merge(None, models, weights.average())):
        assert got["w"] == 2.0 and got["rng"] == jax.random.key(3) and got["n"] == 7
    fresh = weights.running_mean(models[0], models[1] | {"rng": jax.random.key(5)}, 0)
    assert fresh["rng"] == jax.random.key(5)


def test_a_soup_of_bfloat16_keeps_its_dtype():
    models = [model(jnp.bfloat16) for _ in range(3)]
    soup = weights.greedy_soup(lambda p: 0.0, models, accept_ties=True)
    assert soup.params["w"].dtype == jnp.bfloat16
    close(soup.params, weights.merge(None, models, weights.average()), 0)


def test_bad_soups():
    models = [{"w": jnp.array(x)} for x in (1.0, 2.0)]
    with pytest.raises(ValueError, match="list is empty"):
        weights.greedy_soup(lambda p: 0.0, [])
    with pytest.raises(ValueError, match="evaluate gave nan for model 1"):
        weights.greedy_soup(lambda p: 0.0 if p["w"] == 1 else np.nan, models)
    with pytest.raises(ValueError, match="evaluate gave inf for the soup with model 0"):
        weights.greedy_soup(lambda p: np.inf if p["w"] == 1.5 else float(p["w"]), models)
    with pytest.raises(ValueError, match=r"'w' of model 1 is float32\[1\]"):
        weights.greedy_soup(lambda p: 0.0, [models[0], {"w": jnp.ones(1)}])
    with pytest.raises(ValueError, match="by='layer'"):
        weights.learned_soup(lambda p, b: p["w"], models, jnp.ones(1), by="layer")


# --------------------------------------------------------------------------------- learned soup


def test_a_learned_soup_starts_uniform_with_gradients_that_sum_to_zero():
    models = [model() for _ in range(3)]
    loss = lambda p, batch: jnp.square(p["w"] - batch).sum() + jnp.square(p["b"]).sum()
    seen = []

    def look(grads, theta):
        jax.debug.callback(lambda raw: seen.append(raw), grads["raw"])
        return jax.tree.map(jnp.zeros_like, grads)

    soup = weights.learned_soup(loss, models, jnp.ones((1, 2)), tx=optax.stateless(look))
    jax.effects_barrier()
    close(soup.params, weights.merge(None, models, weights.average()))
    (grads,) = seen
    for row in grads.values():
        assert jnp.abs(row).max() > 1e-3
        assert abs(row.sum()) < 1e-5


def test_learned_soups_find_the_best_of_each_leaf_and_of_the_model():
    models = [{"a": jnp.array(x), "b": jnp.array(y)} for x, y in ((0.0, 8.0), (4.0, 0.0))]
    loss = lambda p, batch: (p["a"] - 1) ** 2 + (p["b"] - 2) ** 2
    steps = jnp.zeros(300)
    soup = jax.jit(partial(weights.learned_soup, loss))(models, steps)
    close(soup.params, {"a": 1.0, "b": 2.0}, 1e-3)
    np.testing.assert_allclose(soup.weights["a"], [0.75, 0.25], atol=1e-3)
    np.testing.assert_allclose(soup.weights["b"], [0.25, 0.75], atol=1e-3)
    assert soup.losses[-1] < 1e-4 < soup.losses[0]
    whole = weights.learned_soup(loss, models, steps, by="model")
    np.testing.assert_allclose(whole.weights["a"], whole.weights["b"])
    # (4 s - 1)^2 + (6 - 8 s)^2 is least at s = 0.65
    np.testing.assert_allclose(whole.weights["a"][1], 0.65, atol=1e-3)


# --------------------------------------------------------------------------- what soups are for


SIZES = (64, 128, 128, 10)


@partial(jax.jit, static_argnames=("steps", "keep"))
def train(params, x, y, lr, key, steps, keep=1, smoothing=0.0, head=1.0):
    """SGD with momentum on batches of 64; returns `keep` snapshots, the last is the end.

    The gradient of the last layer is multiplied by `head`.
    """
    tx = optax.inject_hyperparams(partial(optax.sgd, momentum=0.9))(learning_rate=lr)

    def loss(params, rows):
        labels = optax.smooth_labels(jax.nn.one_hot(y[rows], 10), smoothing)
        return optax.softmax_cross_entropy(logits(params, x[rows]), labels).mean()

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (64,), 0, len(x))
        grads = jax.grad(loss)(params, rows)
        grads["layer_2"] = jax.tree.map(lambda g: head * g, grads["layer_2"])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def many(carry, keys):
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, carry[0]

    keys = jax.random.split(key, steps).reshape(keep, -1)
    return jax.lax.scan(many, (params, tx.init(params)), keys)[1]


@pytest.fixture(scope="module")
def digits():
    data = load(train=1300, test=497)
    rng = np.random.default_rng(0)

    def noisy(y, share):
        return np.where(rng.random(len(y)) < share, rng.integers(0, 10, len(y)), y)

    x, y, keys = data.x, data.y, jax.random.split(jax.random.key(0), 20)
    pre = at(train(init(keys[0], SIZES), x[:300], y[:300], 0.05, keys[1], 200), -1)
    lrs = jnp.geomspace(0.01, 0.1, 8)
    tune = jax.vmap(lambda lr, key: at(train(pre, x[300:], noisy_y, lr, key, 400), -1))
    noisy_y = noisy(y[300:], 0.2)
    tuned = tune(lrs, keys[2:10])
    apart = jax.vmap(
        lambda start, key: at(train(init(start, SIZES), x[300:], noisy_y, 0.05, key, 400), -1)
    )(keys[10:14], keys[14:18])
    course = train(pre, x[300:], noisy(y[300:], 0.3), 0.1, keys[18], 800, keep=10)
    part = lambda half: (data.x_test[half], data.y_test[half])
    accuracy = jax.jit(lambda p, x, y: (logits(p, x).argmax(1) == y).mean())
    score = lambda half: lambda params: float(accuracy(params, *part(half)))
    return {
        "pre": pre, "tuned": tuned, "apart": apart, "course": course,
        "val": score(slice(None, 250)), "test": score(slice(250, None)),
    }  # fmt: skip


def scores(of, stack):
    return [of(at(stack, i)) for i in range(len(stack["layer_0"]["bias"]))]


@pytest.mark.slow
def test_soups_of_digits(digits):
    """Greedy is never below the best; models from different starts collapse."""
    val, test = digits["val"], digits["test"]
    soup = weights.greedy_soup(val, digits["tuned"])
    assert soup.value >= max(soup.values) == max(scores(val, digits["tuned"]))
    singles = scores(test, digits["tuned"])
    uniform = weights.merge(None, digits["tuned"], weights.average())
    assert test(uniform) > np.mean(singles)
    assert test(soup.params) > np.mean(singles)
    apart = scores(test, digits["apart"])
    collapsed = test(weights.merge(None, digits["apart"], weights.average()))
    assert min(apart) > 0.75 and collapsed < 0.6


@pytest.mark.slow
def test_stock_of_two_noisy_fine_tunings(digits):
    """Near the mean, and no t outside (0, 1)."""
    two = jax.tree.map(lambda x: x[jnp.array([0, 7])], digits["tuned"])
    pre, test = digits["pre"], digits["test"]
    stock = weights.merge(pre, two, weights.model_stock())
    mean = weights.merge(pre, two, weights.average())
    t = [
        float(jnp.vdot(s - w, m - w) / jnp.vdot(m - w, m - w))
        for s, m, w in zip(*map(jax.tree.leaves, (stock, mean, pre)), strict=True)
    ]
    assert all(0 < x < 1 for x in t)
    assert test(stock) >= min(scores(test, two))


@pytest.mark.slow
def test_the_average_of_checkpoints_under_label_noise(digits):
    """Better than the last one, without labels to choose by."""
    test, course = digits["test"], digits["course"]
    singles = scores(test, course)
    average = test(weights.merge(None, course, weights.average()))
    assert average >= singles[-1] + 0.05


@pytest.mark.slow
def test_runs_are_averaged_under_one_head(digits):
    """Runs from one body: under one frozen head the average is as good as the best of them; under
    heads of their own, that are trained, it is worse than each.
    """
    data = load(train=1300, test=497)
    heads = jax.vmap(lambda k: init(k, SIZES)["layer_2"])(jax.random.split(jax.random.key(5), 4))
    keys = jax.random.split(jax.random.key(6), 4)
    x, y = jnp.asarray(data.x[300:]), jnp.asarray(data.y[300:])

    def tune(head, key, trained):
        start = digits["pre"] | {"layer_2": head}
        return at(train(start, x, y, 0.05, key, 400, head=trained), -1)

    shared = jax.vmap(tune, (None, 0, None))(at(heads, 0), keys, 0.0)
    own = jax.vmap(tune, (0, 0, None))(heads, keys, 1.0)
    one, other = (
        digits["test"](weights.merge(None, runs, weights.average())) for runs in (shared, own)
    )
    assert one >= max(scores(digits["test"], shared)) - 0.005
    assert other < min(scores(digits["test"], own)) - 0.01
    assert one > other + 0.02


@pytest.mark.slow
def test_a_smooth_fine_tuning_is_less_sure_out_of_distribution(digits):
    """BANG: one bright pixel tells the class in fine-tuning, and a random class at the test."""
    data = load(train=1300, test=497)
    rng = np.random.default_rng(0)

    def marked(x, y):
        x = x.copy()
        x[np.arange(len(y)), y // 8, y % 8] = 1.0
        return jnp.asarray(x)

    x, y = marked(data.x[300:], data.y[300:]), jnp.asarray(data.y[300:])
    x_ood = marked(data.x_test, rng.integers(0, 10, 497))
    tune = lambda s: at(train(digits["pre"], x, y, 0.05, jax.random.key(7), 400, smoothing=s), -1)
    sure, cells = [], []
    for smoothing in (0.0, 0.3):
        tuned = tune(smoothing)
        out = [logits(p, x_ood) for p in (
            digits["pre"], tuned, weights.interpolate(digits["pre"], tuned, 0.5))]  # fmt: skip
        sure.append((float(jax.nn.softmax(out[1]).max(1).mean()), float(out[1].std())))
        cells.append(weights.flips(data.y_test, *(o.argmax(1) for o in out)))
    assert sure[1][0] < sure[0][0] - 0.2 and sure[1][1] < 0.6 * sure[0][1]
    assert all(c[0, 0, 1] > 0 for c in cells)
    np.testing.assert_allclose([c.sum() for c in cells], 1.0, rtol=1e-5)


@pytest.mark.slow
def test_fused_bodies_are_as_good_a_start_as_a_random_source():
    """Pretrained on 0 to 2, sources 3-4 and 5-6, target 7 to 9 with five images a class."""
    data = load(train=1300, test=497)
    of = lambda classes: jnp.asarray(np.flatnonzero(np.isin(data.y, classes)))
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    few = jnp.concatenate([of([c])[:5] for c in (7, 8, 9)])
    test = np.isin(data.y_test, [7, 8, 9])
    x_test, y_test = jnp.asarray(data.x_test[test]), jnp.asarray(data.y_test[test])

    def run(key):
        keys = jax.random.split(key, 6)
        fit = lambda start, rows, lr, key, **options: at(
            train(start, x[rows], y[rows], lr, key, 100, **options), -1
        )
        pre = fit(init(keys[0], SIZES), of([0, 1, 2]), 0.05, keys[1])
        sources = [fit(pre, of(c), 0.02, k) for c, k in (([3, 4], keys[2]), ([5, 6], keys[3]))]
        fresh = init(keys[4], SIZES)
        body = ["layer_0/*", "layer_1/*"]
        fused = weights.merge(fresh, sources, weights.average(), where=body)
        starts = [fused, *(weights.merge(fresh, [m], weights.average(), where=body)
                           for m in (*sources, pre))]  # fmt: skip
        ends = [fit(start, few, 0.02, keys[5]) for start in starts]
        return jnp.stack([(logits(p, x_test).argmax(1) == y_test).mean() for p in ends])

    means = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 10)).mean(0)
    fused, first, second, _ = means.tolist()
    assert fused >= (first + second) / 2 - 0.02
