"""Recycling copies the best weights over the worst, and changes nothing that is in use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import init, reparam
from tests.reparam import nets

KEY = jax.random.key(0)
PARAMS = nets.mlp([6, 8, 5], jax.random.key(1), bias=True)
POPUP = reparam.edge_popup(0.5)
THETA = POPUP.init(KEY, PARAMS)
X = jax.random.normal(jax.random.key(2), (7, 6))


def kernel(params, i):
    return np.asarray(params[f"layer_{i}"]["kernel"]).ravel()


@pytest.mark.parametrize("fraction", [0.2, 0.5])
def test_the_last_are_copied_over_the_first_in_order(fraction):
    new = reparam.recycle(PARAMS, THETA, fraction)
    for i in range(2):
        w, got = kernel(PARAMS, i), kernel(new, i)
        order = np.argsort(np.abs(np.asarray(THETA[f"layer_{i}/kernel"]).ravel()), kind="stable")
        n, q = w.size, int(fraction * w.size)
        want = w.copy()
        for j in range(q):
            want[order[j]] = w[order[n - q + j]]
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got[order[q:]], w[order[q:]])
        assert len(set(w)) - len(set(got)) == q
        assert new[f"layer_{i}"]["bias"] is PARAMS[f"layer_{i}"]["bias"]


def test_nothing_that_is_in_use_changes():
    mask = reparam.learned_mask(POPUP, THETA, PARAMS)
    new = reparam.recycle(PARAMS, THETA, 0.5, mask=mask)
    assert (kernel(new, 0) != kernel(PARAMS, 0)).any()
    before, after = (nets.logits(POPUP.apply(THETA, p), X) for p in (PARAMS, new))
    np.testing.assert_array_equal(before, after)
    jax.tree.map(np.testing.assert_array_equal, reparam.recycle(PARAMS, THETA, 0.0), PARAMS)


SIGNED = reparam.biprop(scores=jax.nn.initializers.normal(1.0))


@pytest.mark.parametrize("options", ["soft", "mask", "both"])
def test_nothing_in_use_changes_where_the_sign_of_the_score_decides(options):
    """A small positive score is in use, and a large negative one is not."""
    theta = SIGNED.init(KEY, PARAMS)
    mask = reparam.learned_mask(SIGNED, theta, PARAMS)
    given = {"soft": {"soft": lambda s: s}, "mask": {"mask": mask}}
    given["both"] = given["soft"] | given["mask"]
    new = reparam.recycle(PARAMS, theta, 0.3, **given[options])
    for i in range(2):
        live = np.asarray(mask[f"layer_{i}"]["kernel"]).ravel()
        w, got = kernel(PARAMS, i), kernel(new, i)
        np.testing.assert_array_equal(got[live], w[live])
        assert (got != w).sum() == int(0.3 * w.size) <= (~live).sum()
        if options != "mask":  # the first are those of the lowest scores
            order = np.argsort(np.asarray(theta[f"layer_{i}/kernel"]).ravel(), kind="stable")
            q = int(0.3 * w.size)
            np.testing.assert_array_equal(got[order[:q]], w[order[-q:]])
    before, after = (nets.logits(SIGNED.apply(theta, p), X) for p in (PARAMS, new))
    np.testing.assert_array_equal(before, after)


def test_a_traced_fraction():
    fn = jax.jit(lambda f: reparam.recycle(PARAMS, THETA, f))
    want = reparam.recycle(PARAMS, THETA, 0.3)
    jax.tree.map(np.testing.assert_array_equal, fn(0.3), want)


def test_iterand_draws_masked_weights_anew_at_the_rate():
    params = {"kernel": jax.random.normal(KEY, (200, 200)), "bias": jnp.zeros(3)}
    mask = reparam.learned_mask(POPUP, POPUP.init(KEY, params), params)
    draw = init.rules((None, jax.nn.initializers.normal(1.0)))
    new = reparam.iterand(jax.random.key(5), draw, params, mask, 0.3)
    changed = np.asarray(new["kernel"] != params["kernel"])
    assert not changed[mask["kernel"]].any()
    n = 20_000
    assert abs(changed.sum() - 0.3 * n) < 3 * np.sqrt(0.3 * 0.7 * n)
    fresh = np.asarray(new["kernel"])[changed]
    assert abs(fresh.mean()) < 3 / np.sqrt(fresh.size) and fresh.std() == pytest.approx(1, abs=0.05)
    for rate, due in ((0.0, 0), (1.0, n)):
        new = reparam.iterand(jax.random.key(5), draw, params, mask, rate)
        assert (new["kernel"] != params["kernel"]).sum() == due


def test_bad_input():
    with pytest.raises(ValueError, match=r"fraction is 0\.6"):
        reparam.recycle(PARAMS, THETA, 0.6)
    dense = reparam.edge_popup(0.25)
    mask = reparam.learned_mask(dense, THETA, PARAMS)
    with pytest.raises(ValueError, match=r"'layer_0/kernel': 24 entries .* only 12 are masked"):
        reparam.recycle(PARAMS, THETA, 0.5, mask=mask)
    with pytest.raises(ValueError, match=r"rate is 2"):
        reparam.iterand(KEY, init.rules(), PARAMS, mask, 2)


@pytest.mark.slow
def test_recycling_finds_better_subnetworks_of_the_digits():
    """A twentieth of a small network, three seeds at once; a fifth is recycled every 100 steps."""
    *_, x_test, y_test = nets.digits()
    r, steps = reparam.edge_popup(0.95), 500
    tx = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    tx = optax.chain(optax.add_decayed_weights(5e-4), tx)

    def run(seed, fraction):
        key = jax.random.key(seed)
        params = nets.mlp([64, 96, 96, 10], key)
        theta = r.init(jax.random.fold_in(key, 1), params)

        def after(i, theta, params):
            due = (i % 100 == 99) & (i < steps - 1)
            return jax.lax.cond(
                due, lambda: reparam.recycle(params, theta, fraction), lambda: params
            )

        fn = lambda theta, params, batch: nets.cross_entropy(r.apply(theta, params), batch)
        theta, params = nets.train(fn, (theta, params), tx, steps, key, after=after)
        return nets.accuracy(r.apply(theta, params), x_test, y_test)

    seeds, fractions = jnp.array([3, 3, 4, 4, 5, 5]), jnp.array([0.0, 0.2] * 3)
    got = np.asarray(jax.vmap(run)(seeds, fractions)).reshape(3, 2)
    assert (got[:, 1] > got[:, 0]).all() and (got[:, 1] - got[:, 0]).mean() > 0.02, got
