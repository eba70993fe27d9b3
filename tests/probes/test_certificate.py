import inspect
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import beta, binom

from jaxkit import probes

KEY = jax.random.key(0)
errors = lambda k, n: np.arange(n) < np.asarray(k)[..., None]
bounds = lambda found: np.stack(found[1:])


@pytest.mark.parametrize(
    ("n", "k", "count", "want"),
    [
        (80, 4, 1000, [0.2988, 0.2305, 0.2128]),
        (80, 4, 100_000, [0.3511, 0.2836, 0.2675]),
        (5, 0, 1000, [0.995, 0.862, 0.862]),
    ],
)
def test_known_bounds(n, k, count, want):
    found = probes.certificate(errors(k, n), count)
    assert found.risk == k / n
    np.testing.assert_allclose(bounds(found), want, atol=5e-4 if n == 5 else 5e-5)


def test_the_binomial_bound_is_where_so_few_errors_are_that_unlikely():
    k, delta, count = np.arange(41), 0.05, 300
    found = probes.certificate(errors(k, 40), count, delta=delta)
    np.testing.assert_allclose(binom.cdf(k[:-1], 40, found.binomial[:-1]), delta / count, rtol=1e-6)
    oracle = beta.ppf(1 - delta / count, k[:-1] + 1, 40 - k[:-1])
    np.testing.assert_allclose(found.binomial[:-1], oracle, rtol=1e-9)
    assert found.binomial[-1] == found.kl[-1] == 1


def test_the_kl_bound_solves_its_equation_from_above():
    risks = np.linspace(0, 0.9, 31)
    found = probes.certificate(np.repeat(risks[:, None], 7, 1), 12, delta=0.2)
    p, q = found.risk[1:], found.kl[1:]
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(kl, np.log(12 / 0.2) / 7, rtol=1e-9)
    assert found.kl[0] == pytest.approx(1 - (0.2 / 12) ** (1 / 7), rel=1e-12)
    assert (found.kl < 1).all()
    assert found.kl[0] >= 1 - (0.2 / 12) ** (1 / 7) - 1e-15


def test_the_order_and_the_growth_with_the_count():
    for n in (1, 5, 30, 400):
        k = np.arange(0, n + 1, max(n // 20, 1))
        tables = []
        for count in (1, 2, 50, 10**4, 10**9):
            for delta in (0.01, 0.3):
                found = probes.certificate(errors(k, n), count, delta=delta)
                assert (found.hoeffding >= found.kl - 1e-12).all()
                assert (found.kl >= found.binomial - 1e-12).all()
                assert (found.binomial >= found.risk).all()
            tables.append(bounds(found))
        below_one = np.stack(tables)[:, :, :-1]
        assert (np.diff(below_one, axis=0) > 0).all()
    per_model = [probes.certificate(errors(3, 20), m) for m in (7, 9)]
    both = probes.certificate(errors([3, 3], 20), np.array([7, 9]))
    np.testing.assert_array_equal(bounds(both), np.stack([bounds(c) for c in per_model], 1))


def test_one_model_has_the_bound_of_a_test_set():
    found = probes.certificate(errors(3, 20), 1, delta=0.1)
    assert found.hoeffding == pytest.approx(0.15 + np.sqrt(np.log(10) / 40))
    assert found.binomial == pytest.approx(beta.ppf(0.9, 4, 17))


def test_of_losses_that_are_fractions_there_is_no_binomial_bound():
    found = probes.certificate(np.array([[0.5, 0.5], [1.0, 0.0]]), 3)
    assert np.isnan(found.binomial[0]) and not np.isnan(found.binomial[1])
    assert found.kl[0] == found.kl[1]


def test_the_bounds_hold_and_counting_too_few_models_does_not():
    """2000 tasks, 50 examples, the best of 200 models of known risk."""
    rng = np.random.default_rng(0)
    risks = rng.uniform(0.1, 0.6, (2000, 200))
    seen = rng.binomial(50, risks)
    best = seen.argmin(1)
    risk, k = np.take_along_axis(risks, best[:, None], 1)[:, 0], seen.min(1)
    found = probes.certificate(errors(k, 50), 200, delta=0.1)
    assert ((risk > bounds(found)).mean(1) <= 0.1).all()
    # all models are as good as chance: as if the chosen one had been the only one in the running
    alike = errors(rng.binomial(50, 0.5, (2000, 200)).min(1), 50)
    assert (bounds(probes.certificate(alike, 1, delta=0.1)) < 0.5).mean(1).min() > 0.9
    # four rounds of 50 models each, of which the best is the best of all
    assert (bounds(probes.certificate(alike, 200, delta=0.1)) < 0.5).mean(1).max() <= 0.1
    fresh = errors(rng.binomial(50, 0.5, 2000), 50)  # examples that nothing was chosen on
    assert (bounds(probes.certificate(fresh, 1, delta=0.1)) < 0.5).mean(1).max() <= 0.1


@pytest.mark.parametrize(
    ("losses", "count", "delta", "message"),
    [
        ([0.0, 1.5], 3, 0.05, r"losses in \[0, 1\] are due, and they are from 0.0 to 1.5"),
        ([0.0, -0.1], 3, 0.05, "from -0.1 to 0.0"),
        ([0.0, np.nan], 3, 0.05, "from nan"),
        ([], 3, 0.05, "one or more examples"),
        ([0.0], 0, 0.05, "count=0"),
        ([0.0], 3, 1.0, "delta=1.0"),
    ],
)
def test_bad_input_is_named(losses, count, delta, message):
    with pytest.raises(ValueError, match=message):
        probes.certificate(np.array(losses), count, delta=delta)


# --------------------------------------------------------------------------------------- the best

TARGET = jnp.array([0.3, -0.2])
sample = lambda key: {"w": jax.random.normal(key, (2,))}
loss_fn = lambda params, target: jnp.square(params["w"] - target).sum()


@cache
def best(count, chunk):
    run = lambda key: probes.best_of(key, sample, loss_fn, TARGET, count=count, chunk=chunk)
    return jax.jit(run)(KEY)


def test_the_best_is_the_least_loss_of_all_draws():
    found = best(60, None)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(60))
    losses = jax.vmap(lambda k: loss_fn(sample(k), TARGET))(keys)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert found.index == losses.argmin()
    np.testing.assert_array_equal(found.params["w"], sample(keys[found.index])["w"])


def test_neither_the_chunk_nor_the_count_changes_a_draw():
    one, seven, more = best(60, None), best(60, 7), best(150, 64)
    np.testing.assert_allclose(one.losses, seven.losses, rtol=1e-5)
    np.testing.assert_allclose(one.losses, more.losses[:60], rtol=1e-5)
    assert one.index == seven.index
    np.testing.assert_array_equal(one.params["w"], seven.params["w"])
    assert more.losses[more.index] <= one.losses[one.index]


def test_the_generator_is_not_given_the_support():
    """Nothing but a key reaches it: what a certificate needs, as far as a program can see to it."""
    given = []

    def spy(*args, **options):
        given.append((args, options))
        return sample(args[0])

    probes.best_of(KEY, spy, loss_fn, TARGET, count=3)
    for args, options in given:
        assert len(args) == 1 and not options
        assert jnp.issubdtype(args[0].dtype, jax.dtypes.prng_key)
    assert list(inspect.signature(probes.best_of).parameters)[:4] == [
        "key",
        "sample",
        "loss_fn",
        "support",
    ]


def test_what_is_not_finite_loses():
    spoiled = lambda w, _: jnp.where(w < 0.5, jnp.nan, w)
    found = probes.best_of(KEY, jax.random.uniform, spoiled, None, count=40)
    assert found.params >= 0.5
    with pytest.raises(ValueError, match="none of the 3 losses is finite"):
        probes.best_of(KEY, jax.random.uniform, lambda w, _: w / 0 - jnp.inf, None, count=3)


def test_bad_draws_are_named():
    with pytest.raises(ValueError, match="count=0"):
        probes.best_of(KEY, sample, loss_fn, TARGET, count=0)
    with pytest.raises(ValueError, match="chunk=0"):
        probes.best_of(KEY, sample, loss_fn, TARGET, count=3, chunk=0)
    with pytest.raises(TypeError, match="typed key"):
        probes.best_of(jax.random.PRNGKey(0), sample, loss_fn, TARGET, count=3)


def test_few_shots_of_a_task_whose_kin_the_generator_knows():
    """Classifiers by the sign of <w, x>, drawn about what the tasks of a family have in common."""
    kin = lambda key: jnp.array([1.0, 0.5, 0, 0]) + 0.3 * jax.random.normal(key, (4,))
    label = lambda w, x: (x @ w > 0).astype(int)
    wrong = lambda w, task: jnp.mean(label(w, task[0]) != task[1])

    def episode(key):
        task, support, draws, query = jax.random.split(key, 4)
        truth = kin(task)
        x, new = jax.random.normal(support, (40, 4)), jax.random.normal(query, (2000, 4))
        chosen = probes.best_of(draws, kin, wrong, (x, label(truth, x)), count=100, chunk=100)
        on_support = label(chosen.params, x) != label(truth, x)
        return on_support, wrong(chosen.params, (new, label(truth, new)))

    losses, risk = jax.jit(jax.vmap(episode))(jax.random.split(KEY, 50))
    found = probes.certificate(losses, 100)
    assert (risk <= found.binomial).mean() >= 0.95
    assert np.median(found.binomial) < 0.25  # far below chance
