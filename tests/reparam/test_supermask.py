"""Masks learned over frozen weights: the gradients in closed form, exact counts, the phenomena."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, reparam
from tests.reparam import nets

KEY = jax.random.key(0)
PARAMS = nets.mlp([6, 8, 5], jax.random.key(1), bias=True)
X = jax.random.normal(jax.random.key(2), (7, 6))
Y = jnp.arange(7) % 5
PATHS = ["layer_0/kernel", "layer_1/kernel"]


def loss(params):
    return nets.cross_entropy(params, (X, Y))


def grads(r, theta):
    """Return dL/dtheta, and dL/dw_eff as a dict by path."""
    at = r.apply(theta, PARAMS)
    dense = jax.jit(jax.grad(loss))(at)
    own = jax.jit(jax.grad(lambda t: loss(r.apply(t, PARAMS))))(theta)
    return own, {f"layer_{i}/kernel": dense[f"layer_{i}"]["kernel"] for i in range(2)}


def kernels(params):
    return {f"layer_{i}/kernel": params[f"layer_{i}"]["kernel"] for i in range(2)}


METHODS = {
    "edge_popup": reparam.edge_popup(0.5),
    "edge_popup together": reparam.edge_popup(0.5, together=True),
    "biprop": reparam.biprop(0.5),
    "biprop at 0": reparam.biprop(),
    "signed": reparam.signed_supermask(),
    "tuning": reparam.mask_tuning(),
}
BY_NAME = pytest.mark.parametrize("name", METHODS)


# ------------------------------------------------------------------------------- straight through


def test_straight_through_is_exact_where_the_common_form_is_not():
    real, hard = jax.random.normal(KEY, (2, 10_000)) * 10
    value = jax.jit(reparam.straight_through)(real, hard)
    np.testing.assert_array_equal(value, hard)
    common = real + jax.lax.stop_gradient(hard - real)
    assert (common != hard).any()
    slope = jax.grad(lambda r: (reparam.straight_through(r, jnp.sign(r)) * hard).sum())(real)
    np.testing.assert_array_equal(slope, hard)


# --------------------------------------------------------------------------- what all methods keep


@BY_NAME
def test_one_score_for_each_entry_of_a_weight(name):
    theta = METHODS[name].init(KEY, PARAMS)
    assert {p: s.shape for p, s in theta.items()} == {
        p: w.shape for p, w in kernels(PARAMS).items()
    }
    assert sum(s.size for s in theta.values()) == 6 * 8 + 8 * 5


@BY_NAME
def test_the_gradient_of_a_score_is_that_of_the_weight_times_the_weight(name):
    r = METHODS[name]
    theta = r.init(KEY, PARAMS)
    own, dense = grads(r, theta)
    magnitudes = name.startswith("edge_popup") or name == "biprop"
    for path, w in kernels(PARAMS).items():
        sign = jnp.sign(theta[path]) if magnitudes else 1
        np.testing.assert_allclose(own[path], dense[path] * w * sign, rtol=1e-5, atol=1e-7)
        masked = np.asarray(kernels(r.apply(theta, PARAMS))[path] == 0)
        if name != "tuning":
            assert masked.any() and np.abs(own[path])[masked].max() > 0


@BY_NAME
def test_every_score_moves_and_what_is_frozen_does_not(name):
    r, tx = METHODS[name], optax.sgd(0.1)

    @jax.jit
    def run(theta):
        def step(carry, _):
            theta, state = carry
            g = jax.grad(lambda t: loss(r.apply(t, PARAMS)))(theta)
            updates, state = tx.update(g, state)
            return (optax.apply_updates(theta, updates), state), None

        return jax.lax.scan(step, (theta, tx.init(theta)), None, length=3)[0][0]

    theta = r.init(KEY, PARAMS)
    after = run(theta)
    for path in PATHS:
        assert (after[path] != theta[path]).any(), path
    deployed = r.apply(after, PARAMS)
    for i in range(2):
        assert deployed[f"layer_{i}"]["bias"] is PARAMS[f"layer_{i}"]["bias"]


def test_the_primitive_with_another_value_and_function_of_the_score():
    r = reparam.supermask(
        jax.nn.initializers.normal(1.0),
        lambda z: {p: s > 0.5 for p, s in z.items()},
        soft=jax.nn.sigmoid,
        value=lambda w, e: jnp.where(e > 0, 2 * w, -w),
    )
    theta = r.init(KEY, PARAMS)
    own, dense = grads(r, theta)
    for path, w in kernels(PARAMS).items():
        due = jnp.where(theta[path] > 0, 2 * w, -w)
        np.testing.assert_array_equal(kernels(r.apply(theta, PARAMS))[path], due)
        p = jax.nn.sigmoid(theta[path])
        np.testing.assert_allclose(own[path], dense[path] * w * p * (1 - p), rtol=1e-5, atol=1e-7)


def test_half_precision_weights_have_scores_in_float32():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PARAMS)
    r = reparam.edge_popup(0.5)
    theta = r.init(KEY, params)
    assert {s.dtype for s in theta.values()} == {jnp.dtype("float32")}
    assert r.apply(theta, params)["layer_0"]["kernel"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------- edge-popup


def test_edge_popup_keeps_exactly_as_many_as_are_due():
    for sparsity in (0.0, 0.3, 0.9, 0.97):
        r = reparam.edge_popup(sparsity)
        mask = reparam.learned_mask(r, r.init(KEY, PARAMS), PARAMS)
        for path, m in kernels(mask).items():
            assert m.sum() == round((1 - sparsity) * m.size), path
        assert mask["layer_0"]["bias"].all()


def test_edge_popup_together_and_by_an_allocation():
    r = reparam.edge_popup(0.7, together=True)
    theta = r.init(KEY, PARAMS)
    mask = kernels(reparam.learned_mask(r, theta, PARAMS))
    due = masks.topk({p: jnp.abs(s) for p, s in theta.items()}, sparsity=0.7, where="**")
    for path in PATHS:
        np.testing.assert_array_equal(mask[path], due[path])
    assert sum(int(m.sum()) for m in mask.values()) == round(0.3 * 88)

    layers = masks.erk(PARAMS, 0.5)
    r = reparam.edge_popup(layers)
    mask = kernels(reparam.learned_mask(r, theta, PARAMS))
    for i, path in enumerate(PATHS):
        n = mask[path].size
        assert mask[path].sum() == round((1 - layers[f"layer_{i}"]["kernel"]) * n)


def test_two_seeds_of_the_scores_share_as_many_entries_as_chance():
    params = {"kernel": jnp.ones((200, 200))}
    r = reparam.edge_popup(0.75)
    a, b = (
        reparam.learned_mask(r, r.init(jax.random.key(i), params), params)["kernel"]
        for i in range(2)
    )
    iou = float((a & b).sum() / (a | b).sum())
    assert iou == pytest.approx(0.25 / (2 - 0.25), abs=0.01)


def test_biprop_is_one_number_and_signs():
    for r in (METHODS["biprop"], METHODS["biprop at 0"]):
        theta = r.init(KEY, PARAMS)
        mask = kernels(reparam.learned_mask(r, theta, PARAMS))
        for path, w in kernels(PARAMS).items():
            scale = np.abs(w)[mask[path]].mean()
            due = np.where(mask[path], np.sign(w) * scale, 0)
            np.testing.assert_allclose(kernels(r.apply(theta, PARAMS))[path], due, rtol=1e-6)
    np.testing.assert_array_equal(mask[PATHS[1]], theta[PATHS[1]] > 0)


# ------------------------------------------------------------------------------- signed supermask


def test_signed_supermask_keeps_hides_and_inverts():
    params = {"kernel": reparam.random_signs()(KEY, (100, 80))}
    c = np.sqrt(3 / 100).astype(np.float32)
    np.testing.assert_allclose(jnp.abs(params["kernel"]), c, rtol=1e-6)
    r = reparam.signed_supermask()
    theta = r.init(KEY, params)
    s, bound = theta["kernel"], np.sqrt(6 / 180)
    assert jnp.abs(s).max() == pytest.approx(bound, rel=1e-3)
    e = r.apply(theta, {"kernel": jnp.ones((100, 80))})["kernel"]
    np.testing.assert_array_equal(e, np.where(np.abs(s) > 0.4 * bound, np.sign(s), 0))
    kept = float((e != 0).mean())  # binomial: three standard deviations
    assert abs(kept - 0.6) < 3 * np.sqrt(0.6 * 0.4 / 8000)
    w = r.apply(theta, params)["kernel"]
    np.testing.assert_allclose(jnp.unique(jnp.abs(w)), [0, c], rtol=1e-6)

    # all scores large and positive: the frozen network as it is
    plain = r.apply({"kernel": jnp.ones((100, 80))}, params)
    np.testing.assert_array_equal(plain["kernel"], params["kernel"])
    # a score and its weight change sign together: nothing happens
    flip = jnp.where(jax.random.bernoulli(KEY, 0.5, (100, 80)), -1.0, 1.0)
    both = r.apply({"kernel": s * flip}, {"kernel": params["kernel"] * flip})
    np.testing.assert_array_equal(both["kernel"], w)


def test_the_decay_of_the_scores_is_not_multiplied_by_the_learning_rate():
    sgd = optax.sgd(5e-3, momentum=0.9, nesterov=True)
    tx = optax.chain(sgd, optax.add_decayed_weights(-3e-4))
    s, g = jnp.array([2.0]), jnp.array([1.0])
    update, _ = tx.update(g, tx.init(s), s)
    plain, _ = sgd.update(g, sgd.init(s), s)
    np.testing.assert_allclose(update, plain - 3e-4 * s, rtol=1e-6)


# ------------------------------------------------------------------------------------ mask tuning


def test_mask_tuning_starts_as_the_model_was():
    r = reparam.mask_tuning()
    tuned = r.apply(r.init(KEY, PARAMS), PARAMS)
    np.testing.assert_array_equal(nets.logits(tuned, X), nets.logits(PARAMS, X))
    jax.tree.map(np.testing.assert_array_equal, tuned, PARAMS)


def test_the_gradient_of_the_norm_is_the_direction():
    theta = {"a": jax.random.normal(KEY, (5, 4)), "b": jnp.full((3, 3), 0.01)}
    got = jax.grad(reparam.mask_norm)(theta)
    for path, s in theta.items():
        np.testing.assert_allclose(got[path], s / jnp.linalg.norm(s), rtol=1e-5)
    flat = jax.grad(reparam.mask_norm)({"a": jnp.zeros((2, 2))})
    np.testing.assert_array_equal(flat["a"], 0)


# -------------------------------------------------------------------------------------- bad input


def test_what_is_masked_whole_is_an_error_at_the_start_and_a_warning_later():
    far = reparam.supermask(
        jax.nn.initializers.uniform(0.07), lambda z: {p: jnp.abs(s) > 0.4 for p, s in z.items()}
    )
    with pytest.raises(ValueError, match=r"all 48 entries of 'layer_0/kernel' are masked"):
        far.init(KEY, PARAMS)
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        reparam.signed_supermask(1.5)
    with pytest.raises(ValueError, match=r"start=0\.001 is due above threshold=0\.005"):
        reparam.mask_tuning(start=0.001)
    r = reparam.mask_tuning()
    theta = r.init(KEY, PARAMS) | {PATHS[1]: jnp.zeros((8, 5))}
    with pytest.warns(UserWarning, match="all 40 entries of 'layer_1/kernel' are masked"):
        reparam.learned_mask(r, theta, PARAMS)


def test_trees_that_do_not_fit():
    r = reparam.edge_popup({"layer_0": {"kernel": 0.5}})
    with pytest.raises(ValueError, match="sparsity has no number for 'layer_1/kernel'"):
        r.init(KEY, PARAMS)
    r = reparam.edge_popup(0.5)
    theta = r.init(KEY, PARAMS)
    with pytest.raises(ValueError, match="theta has 'other'"):
        r.apply(theta | {"other": jnp.ones(2)}, PARAMS)
    with pytest.raises(ValueError, match=r"sparsity at 'layer_0/kernel' is 1\.5"):
        reparam.edge_popup(1.5).init(KEY, PARAMS)
    with pytest.raises(TypeError, match="typed key"):
        r.init(jax.random.PRNGKey(0), PARAMS)
    shrinking = reparam.leafwise(lambda key, path, w: jnp.zeros(()), lambda t, w: w[:1])
    with pytest.raises(ValueError, match=r"'layer_0/kernel' became \(1, 8\).*\(6, 8\) was due"):
        shrinking.apply(shrinking.init(KEY, PARAMS), PARAMS)


# -------------------------------------------------------------------------------------- phenomena


@pytest.mark.slow
def test_the_decay_of_the_scores_is_what_makes_them_sparse():
    """Digits: without decay about as many stay as at the start, and too much empties the layers."""
    elu, steps = jax.nn.elu, 1500
    *_, x_test, y_test = nets.digits()
    params = nets.mlp([64, 256, 256, 10], KEY, reparam.random_signs())
    r = reparam.signed_supermask()
    theta = r.init(jax.random.key(1), params)
    rate = optax.exponential_decay(5e-3, steps // 10, 0.9)

    def train(decay):
        tx = optax.chain(
            optax.sgd(rate, momentum=0.9, nesterov=True),
            optax.add_decayed_weights(lambda i: -decay * rate(i) / rate(0)),
        )
        fn = lambda t, batch: nets.cross_entropy(r.apply(t, params), batch, elu)
        theta_ = nets.train(fn, theta, tx, steps, KEY)
        at = r.apply(theta_, params)
        kept = [float((layer["kernel"] != 0).mean()) for layer in at.values()]
        return kept, float(nets.accuracy(at, x_test, y_test, elu))

    none, some, much = train(0.0), train(3e-4), train(3e-3)
    assert none[1] > 0.93 and some[1] > 0.93
    assert all(0.55 < k < 0.68 for k in none[0])
    assert all(k < n - 0.08 for k, n in zip(some[0], none[0], strict=True))
    assert max(much[0]) == 0 and much[1] < 0.2
