"""Laws of whole runs: planted laws come back; sparse pre-training and dense fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks

PLANTED = masks.Law(1.7, 400.0, 410.0, 0.34, 0.28)
GPT3_XL = {"layers": 24, "width": 2048, "context": 2048, "vocabulary": 50257}


def runs():
    grid = np.meshgrid(np.geomspace(1e7, 1e9, 10), np.geomspace(1e9, 1e11, 6))
    return tuple(x.ravel() for x in grid)


def test_a_planted_law_comes_back():
    n, d = runs()
    np.testing.assert_allclose(masks.fit_law(n, d, PLANTED.loss(n, d)), PLANTED, rtol=1e-6)


def test_noise_and_outliers_move_the_prediction_little():
    n, d = runs()
    losses = PLANTED.loss(n, d) * np.exp(0.001 * np.random.default_rng(0).normal(size=60))
    losses[::20] *= 1.2  # a square would follow these
    law = masks.fit_law(n, d, losses)
    np.testing.assert_allclose(law.loss(n, d), PLANTED.loss(n, d), rtol=0.01)


def test_schedules_of_equal_average_and_tokens_have_equal_predictions():
    steps = 4000
    step = lambda t: jnp.where(t < steps // 4, 0.0, 0.8)
    line = optax.linear_schedule(0.0, 0.8, steps // 2, steps // 2)
    shifted = lambda t: jnp.where(t < steps // 2, 0.4, 0.8)
    counts = [1e8 * float(masks.average_density(s, steps)) for s in (step, line, shifted)]
    assert counts[0] == pytest.approx(counts[2], rel=1e-5)
    assert counts[1] > 1.3 * counts[0]
    losses = [PLANTED.loss(n, 1e10) for n in counts]
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    assert losses[1] < losses[0]
    dense = 1e8 * float(masks.average_density(lambda t: 0.0, steps))
    assert PLANTED.loss(dense, 1e10) == PLANTED.loss(1e8, 1e10)


def test_bad_runs():
    n, d = runs()
    losses = PLANTED.loss(n, d)
    with pytest.raises(ValueError, match="5 unknowns, and 4 runs"):
        masks.fit_law(n[:4], d[:4], losses[:4])
    with pytest.raises(ValueError, match="one length"):
        masks.fit_law(n, d[:5], losses)
    with pytest.raises(ValueError, match="losses are due to be positive"):
        masks.fit_law(n, d, -losses)


def test_flops_of_the_published_models():
    dense = masks.transformer_flops(**GPT3_XL)
    ratio = lambda s: dense / masks.transformer_flops(**GPT3_XL, sparsity=s)
    assert ratio(0.75) == pytest.approx(2.494, abs=5e-4)  # the paper rounds to 2.5
    assert ratio(0.5) == pytest.approx(1.665, abs=5e-4)
    assert masks.transformer_flops(1, 8, 0, 0) / masks.transformer_flops(
        1, 8, 0, 0, sparsity=0.75
    ) == pytest.approx(4)  # what attention and readout are left out of
    with pytest.raises(ValueError, match="sparsity is 1"):
        masks.transformer_flops(**GPT3_XL, sparsity=1)


# --------------------------------------- sparse pre-training, dense fine-tuning


@pytest.fixture(scope="module")
def pretrained():
    key = jax.random.key(0)
    shapes = {"up": (8, 16), "down": (16, 8), "head": (8, 3)}
    params = {
        p: jax.random.normal(jax.random.fold_in(key, i), s) / 3
        for i, (p, s) in enumerate(shapes.items())
    }
    x = jax.random.normal(key, (32, 8))
    y = jnp.argmax(x[:, :3], 1)
    sparsity = masks.uniform(params, 0.75, where=["up", "down"])
    mask = masks.topk(masks.random(key, params), sparsity=sparsity)

    def logits(params):
        return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"]) @ params["head"]

    grads = jax.grad(lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p), y).mean())

    def train(tx, params, state, steps):
        def step(carry, _):
            updates, state = tx.update(grads(carry[0]), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, state), length=steps)[0]

    inner = optax.adam(1e-2)
    tx = masks.sparse(inner, mask)
    params = masks.apply(params, mask)
    trained, state = jax.jit(lambda p: train(tx, p, tx.init(p), 50))(params)
    return mask, trained, state, grads, train, logits


def test_pretraining_is_exactly_sparse_leaf_by_leaf(pretrained):
    mask, params, *_ = pretrained
    for path, n in {"up": 32, "down": 32, "head": 24}.items():
        assert np.count_nonzero(params[path]) == n == int(mask[path].sum())


def test_fine_tuning_revives_what_has_a_gradient(pretrained):
    mask, params, _, grads, train, _ = pretrained
    lr = 1e-3
    tx = optax.adam(lr)
    tuned, _ = train(tx, params, tx.init(params), 1)
    g = jax.tree.map(np.asarray, grads(params))
    for path in ("up", "down"):
        out = ~np.asarray(mask[path])
        moves = out & (g[path] != 0)
        assert (np.asarray(tuned[path])[moves] != 0).all()
        assert (np.asarray(tuned[path])[out & ~moves] == 0).all()
        clear = out & (np.abs(g[path]) > 1e-4)  # Adam's first step has length lr
        first = -lr * np.sign(g[path])
        np.testing.assert_allclose(np.asarray(tuned[path])[clear], first[clear], rtol=1e-3)
    # A zero is no fixed point, but where the unit behind it leads nowhere, or has no input before
    # it: a unit without live edges on both sides never comes back.
    leads_nowhere, no_input = ~mask["down"].any(1), ~mask["up"].any(0)
    np.testing.assert_array_equal((g["up"] == 0).all(0), leads_nowhere)
    np.testing.assert_array_equal((g["up"] == 0).any(0), leads_nowhere)
    np.testing.assert_array_equal((g["down"] == 0).all(1), no_input)
    np.testing.assert_array_equal((g["down"] == 0).any(1), no_input)


def test_two_ways_to_get_the_switch_wrong(pretrained):
    mask, params, state, _, train, _ = pretrained
    still = masks.sparse(optax.adam(1e-3), mask)
    kept, _ = train(still, params, still.init(params), 3)
    assert np.count_nonzero(kept["up"]) == 32  # the mask was never taken off: nothing revives
    # Adam's moments of 0 at the revived entries, after a long run: steps of length
    # (1 - b1) / sqrt(1 - b2) = 3.16 lr at first, and longer ones next
    first, *rest = state.inner
    old = (first._replace(count=jnp.int32(100_000)), *rest)
    steps = []
    for n in (1, 2):
        stale, _ = train(optax.adam(1e-3), params, old, n)
        steps.append(np.median(np.abs(np.asarray(stale["up"])[~np.asarray(mask["up"])])))
    assert steps[0] == pytest.approx(0.1 / 0.001**0.5 * 1e-3, rel=1e-2)
    assert steps[1] - steps[0] > 4e-3


def test_the_switch_itself_changes_nothing(pretrained):
    mask, params, _, _, _, logits = pretrained
    np.testing.assert_array_equal(logits(params), logits(masks.apply(params, mask)))
