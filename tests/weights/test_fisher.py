import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import weights

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(40, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, 40))
PARAMS = {"kernel": jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32), "steps": jnp.arange(2)}
KEY = jax.random.key(0)


def softmax_regression(params, x):
    return x @ params["kernel"]


def mlp(params, x):
    return jnp.tanh(x @ params["kernel"]) @ params["out"]


# -------------------------------------------------------------------------------- the estimator


def test_softmax_regression_has_a_closed_form():
    """F[d, k] = mean of x_d^2 p_k (1 - p_k), which the square of the batch's gradient is not."""
    got = weights.fisher(softmax_regression, PARAMS, X)
    p = jax.nn.softmax(softmax_regression(PARAMS, X))
    want = jnp.einsum("nd,nk->dk", X**2, p * (1 - p)) / len(X)
    np.testing.assert_allclose(got["kernel"], want, rtol=2e-5)
    np.testing.assert_array_equal(got["steps"], PARAMS["steps"])
    ce = optax.softmax_cross_entropy_with_integer_labels
    loss = lambda w: ce(X @ w, Y).mean()
    batch = jnp.square(jax.grad(loss)(PARAMS["kernel"]))
    assert jnp.median(jnp.abs(batch / want - 1)) > 0.5


def test_exact_is_the_sum_over_labels_of_any_network():
    params = {"kernel": PARAMS["kernel"], "out": jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)}
    got = jax.jit(lambda p: weights.fisher(mlp, p, X))(params)
    log_p = lambda p, x: jax.nn.log_softmax(mlp(p, x[None])[0])
    jacobians = jax.vmap(jax.jacrev(log_p), (None, 0))(params, X)
    p = jax.nn.softmax(mlp(params, X))
    for name, j in jacobians.items():
        want = jnp.einsum("nk,nk...->...", p, j**2) / len(X)
        np.testing.assert_allclose(got[name], want, rtol=1e-4)


def test_sampled_labels_have_the_exact_mean():
    keys = jax.random.split(KEY, 400)
    run = lambda key: weights.fisher(softmax_regression, PARAMS, X, labels="sample", key=key)
    draws = np.asarray(jax.jit(jax.vmap(run))(keys)["kernel"], float)
    want = weights.fisher(softmax_regression, PARAMS, X)["kernel"]
    assert (np.abs(draws.mean(0) - want) < 4 * draws.std(0) / 20).all()
    assert draws.std() > 0


def test_empirical_takes_the_labels_that_are_given():
    got = weights.fisher(softmax_regression, PARAMS, (X, Y), labels="empirical")["kernel"]
    p = jax.nn.softmax(softmax_regression(PARAMS, X))
    want = jnp.einsum("nd,nk->dk", X**2, jnp.square(jax.nn.one_hot(Y, 3) - p)) / len(X)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    exact = weights.fisher(softmax_regression, PARAMS, X)["kernel"]
    assert jnp.abs(got / exact - 1).max() > 0.1


def test_the_fisher_of_bfloat16_is_float32():
    params = {"kernel": PARAMS["kernel"].astype(jnp.bfloat16)}
    got = weights.fisher(softmax_regression, params, X)["kernel"]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, weights.fisher(softmax_regression, PARAMS, X)["kernel"], rtol=0.05
    )


# ---------------------------------------------------------------------------------- the average


def model(seed):
    rng = np.random.default_rng(seed)
    return {
        "a": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32),
        "b": jnp.array(rng.normal(size=4), jnp.float32),
    }


def positive(seed):
    return jax.tree.map(lambda w: jnp.exp(w), model(seed))


MODELS, FISHERS = [model(0), model(1)], [positive(2), positive(3)]


def close(got, want, tol=1e-6):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


def merge(fishers, *args, models=MODELS, **options):
    return weights.merge(None, models, weights.fisher_average(fishers, *args, **options))


def test_equal_fishers_give_the_mean():
    ones = jax.tree.map(lambda w: jnp.full_like(w, 7.0), MODELS[0])
    close(merge([ones, ones], normalize=False), weights.merge(None, MODELS, weights.average()))


def test_the_formula():
    c = [0.3, 0.7]
    norms = [np.sqrt(sum(jnp.square(x).sum() for x in f.values())) for f in FISHERS]
    share = [jax.tree.map(lambda x, i=i: c[i] / norms[i] * x, FISHERS[i]) for i in (0, 1)]
    want = jax.tree.map(lambda f, g, x, y: (f * x + g * y) / (f + g), *share, *MODELS)
    close(merge(FISHERS, c), want)
    stack = jax.tree.map(lambda *x: jnp.stack(x), *FISHERS)
    close(merge(stack, c), want)
    base = model(9)
    method = weights.fisher_average(FISHERS, c)
    close(weights.merge(base, MODELS, method), want, 1e-5)


def test_normalized_fishers_have_no_unit():
    larger = [FISHERS[0], jax.tree.map(lambda f: 1000 * f, FISHERS[1])]
    close(merge(larger), merge(FISHERS), 1e-5)
    apart = jax.tree.map(
        lambda x, y: jnp.abs(x - y).max(), merge(larger, normalize=False), merge(FISHERS)
    )
    assert min(jax.tree.leaves(apart)) > 0.1


def test_where_no_model_knows_the_first_one_stays():
    dead = [f | {"a": f["a"].at[0].set(0)} for f in FISHERS]
    got = merge(dead)
    np.testing.assert_array_equal(got["a"][0], MODELS[0]["a"][0])
    close(merge([FISHERS[0], dead[1]])["a"][0], MODELS[0]["a"][0], 0)
    both = merge(dead, normalize=False, favor_first=False)
    np.testing.assert_allclose(both["a"][0], (MODELS[0]["a"][0] + MODELS[1]["a"][0]) / 2, rtol=1e-6)
    close(got["a"][1], merge(FISHERS, normalize=False)["a"][1], 0.5)


def test_two_regressions_give_the_pooled_least_squares():
    """F_i = X_i^T X_i / n_i diagonal, weighted by n_i."""
    rng = np.random.default_rng(5)
    xs = [np.linalg.qr(rng.normal(size=(n, 4)))[0] * rng.uniform(1, 3, 4) for n in (9, 14)]
    ys = [rng.normal(size=len(x)) for x in xs]
    solve = lambda x, y: np.linalg.lstsq(x, y, rcond=None)[0]
    models = [{"w": jnp.asarray(solve(x, y), jnp.float32)} for x, y in zip(xs, ys, strict=True)]
    fishers = [{"w": jnp.asarray((x**2).sum(0) / len(x), jnp.float32)} for x in xs]
    method = weights.fisher_average(fishers, [9.0, 14.0], normalize=False, floor=0.0)
    got = weights.merge(None, models, method)["w"]
    np.testing.assert_allclose(got, solve(np.concatenate(xs), np.concatenate(ys)), rtol=1e-5)


def test_a_line_of_weights_is_one_program():
    line = jnp.linspace(0.0, 1.0, 51)
    run = jax.jit(jax.vmap(lambda t: merge(FISHERS, jnp.stack([1 - t, t]))))(line)
    close(jax.tree.map(lambda x: x[20], run), merge(FISHERS, [0.6, 0.4]), 1e-5)
    close(jax.tree.map(lambda x: x[0], run), MODELS[0], 0)
    close(jax.tree.map(lambda x: x[-1], run), MODELS[1], 0)


def test_where_the_only_weighted_model_knows_nothing_the_first_one_stays():
    blind = [FISHERS[0], FISHERS[1] | {"a": FISHERS[1]["a"].at[0].set(0)}]
    for run in (merge, jax.jit(merge)):
        got = run(blind, jnp.array([0.0, 1.0]))
        np.testing.assert_array_equal(got["a"][0], MODELS[0]["a"][0])
        np.testing.assert_array_equal(got["a"][1], MODELS[1]["a"][1])


def test_the_head_is_the_first_models():
    method = weights.fisher_average(FISHERS)
    got = weights.merge(None, MODELS, method, where="a")
    assert got["b"] is MODELS[0]["b"]
    bodies = [{"a": tree["a"]} for tree in MODELS + FISHERS]
    close(got["a"], merge(bodies[2:], models=bodies[:2])["a"], 0)
    larger = [FISHERS[0], FISHERS[1] | {"b": 100 * FISHERS[1]["b"]}]
    close(got, weights.merge(None, MODELS, weights.fisher_average(larger), where="a"), 0)
    heads = [
        tree | {"b": jnp.ones(n)} for tree, n in zip(MODELS + FISHERS, (4, 9) * 2, strict=True)
    ]
    other = weights.merge(None, heads[:2], weights.fisher_average(heads[2:]), where="a")
    close(other["a"], got["a"], 0)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fishers", "options", "message"),
    [
        ([FISHERS[0], {**FISHERS[1], "a": -FISHERS[1]["a"]}], {}, "'a' has entries that are neg"),
        ([FISHERS[0], {**FISHERS[1], "a": FISHERS[1]["a"] * jnp.nan}], {}, "'a' has entries"),
        ([FISHERS[0], jax.tree.map(jnp.zeros_like, FISHERS[1])], {}, "model 1 is all zero"),
        ([f | {"b": f["b"].at[1].set(0)} for f in FISHERS], {"floor": 0.0}, "entries of 'b'"),
        ([FISHERS[0], {**FISHERS[1], "a": FISHERS[1]["a"] / 0}], {}, "'a' has entries"),
        ([FISHERS[0], {"a": FISHERS[1]["a"]}], {}, "Fisher of 'b' .* model 1, and none came"),
        ([FISHERS[0]["a"]], {}, "Fisher of 'a' .* and none came"),
        (FISHERS * 2, {}, "4 Fishers for 2 models"),
        (
            jax.tree.map(lambda f: jnp.stack([f] * 3), FISHERS[0]),
            {},
            r"Fisher of 'a' of shape \(2, 2, 3\) is due for all models, and one of \(3, 2, 3\)",
        ),
    ],
)
def test_bad_fishers_are_named(fishers, options, message):
    with pytest.raises(ValueError, match=message):
        merge(fishers, **options)


def test_64_bits_stay():
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        for labels, batch in (("exact", x), ("sample", x), ("empirical", (x, Y))):
            for dtype in (jnp.float32, jnp.float64):
                params = {"kernel": PARAMS["kernel"].astype(dtype)}
                got = weights.fisher(softmax_regression, params, batch, labels=labels, key=KEY)
                assert got["kernel"].dtype == dtype
        p = jax.nn.softmax(softmax_regression(params, x))
        want = jnp.einsum("nd,nk->dk", x**2, p * (1 - p)) / len(x)
        np.testing.assert_allclose(
            weights.fisher(softmax_regression, params, x)["kernel"], want, rtol=1e-12
        )


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="batch is empty"):
        weights.fisher(softmax_regression, PARAMS, X[:0])
    with pytest.raises(ValueError, match="labels='true'"):
        weights.fisher(softmax_regression, PARAMS, X, labels="true")
    with pytest.raises(ValueError, match="give a key"):
        weights.fisher(softmax_regression, PARAMS, X, labels="sample")
    with pytest.raises(ValueError, match="one row of logits"):
        weights.fisher(lambda p, x: (x @ p["kernel"])[0], PARAMS, X)
    with pytest.raises(TypeError, match="typed key"):
        weights.fisher(softmax_regression, PARAMS, X, labels="sample", key=jax.random.PRNGKey(0))
