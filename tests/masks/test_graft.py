"""Grafting: hard masks to the bit, soft ones by the formula, and a skill found where it is."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, probes, reparam
from tests.masks import digits

KEY = jax.random.key(0)


def models():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    tree = lambda: {"w0": draw(5, 6), "w1": draw(6, 3), "bias0": draw(6), "bias1": draw(3)}
    return tree(), tree(), draw(16, 5), jnp.asarray(rng.integers(0, 3, 16))


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def test_nothing_is_the_pretrained_and_all_the_fine_tuned_model():
    pre, tuned, _, _ = models()
    ones = jax.tree.map(lambda w: jnp.ones_like(w, bool), pre)
    assert same_bits(masks.graft(pre, tuned, jax.tree.map(jnp.logical_not, ones)), pre)
    assert same_bits(masks.graft(pre, tuned, ones), tuned)
    every = masks.most_moved(tuned, pre, keep=5 * 6 + 6 * 3 + 9, where="*")
    assert same_bits(masks.graft(pre, tuned, every), tuned)


def test_the_base_patch_by_hand():
    pre, tuned, x, _ = models()
    base = masks.most_moved(tuned, pre, keep=10)
    flat = np.concatenate([np.abs(np.asarray(tuned[k] - pre[k])).ravel() for k in ("w0", "w1")])
    bar = np.sort(flat)[-10]
    by_hand = {
        k: np.where(np.abs(tuned[k] - pre[k]) >= bar, tuned[k], pre[k]) for k in ("w0", "w1")
    }
    by_hand |= {k: pre[k] for k in ("bias0", "bias1")}
    grafted = masks.graft(pre, tuned, base)
    assert same_bits(grafted, by_hand)
    np.testing.assert_array_equal(digits.logits(grafted, x), digits.logits(by_hand, x))


def test_soft_masks_start_at_the_base_patch_and_have_the_gradient_of_the_formula():
    pre, tuned, x, y = models()
    base = masks.most_moved(tuned, pre, keep=10)
    r = reparam.grafting(tuned, base)
    theta = r.init(KEY, pre)
    assert sorted(theta) == ["w0", "w1"]
    assert all(((s >= 0) & (s < 1)).all() for s in theta.values())
    start, hard = r.apply(theta, pre), masks.graft(pre, tuned, base)
    for k in pre:
        np.testing.assert_allclose(start[k], hard[k], atol=1e-3)
    assert start["bias0"] is pre["bias0"]
    loss = lambda p: digits.cross_entropy(p, x, y)
    got = jax.grad(lambda theta: loss(r.apply(theta, pre)))(theta)
    dense = jax.grad(loss)(start)
    for k in theta:
        sign, s = 1.0 - 2.0 * np.asarray(base[k]), np.asarray(theta[k], np.float64)
        slope = np.exp(s - 10) / (1 + np.exp(s - 10)) ** 2
        want = sign * slope * np.asarray(dense[k]) * np.asarray(tuned[k] - pre[k])
        np.testing.assert_allclose(got[k], want, rtol=1e-4, atol=1e-9)
    for a, b in zip(*map(jax.tree.leaves, (reparam.hardened(theta, base), base)), strict=True):
        np.testing.assert_array_equal(a, b)
    far = {k: jnp.full_like(s, 20.0) for k, s in theta.items()}  # every entry has changed sides
    flipped = reparam.hardened(far, base)
    np.testing.assert_array_equal(flipped["w0"], ~base["w0"])
    assert not flipped["bias0"].any()
    exact = jax.tree.map(lambda w, v, m: jnp.where(m, v, w), pre, tuned, flipped)
    for k in pre:
        np.testing.assert_allclose(r.apply(far, pre)[k], exact[k], atol=1e-3)


def test_a_difference_of_one_unit_is_found_by_movement():
    pre, tuned, _, _ = models()
    only = dict(pre)
    only |= {"w0": pre["w0"].at[:, 2].set(tuned["w0"][:, 2]), "w1": pre["w1"].at[2].add(1.0)}
    mask = masks.most_moved(only, pre, keep=5 + 3)
    assert mask["w0"][:, 2].all() and mask["w1"][2].all()
    assert same_bits(masks.graft(pre, only, mask), only)


def test_a_skill_of_one_unit_is_found_there():
    """Only unit 2 knows the second task; others have moved further, and do not matter."""
    pre, _, x, _ = models()
    tuned = dict(pre)
    pre["w1"] = pre["w1"].at[4].set(0.0)  # nothing reads unit 4
    tuned["w0"] = pre["w0"].at[:, 2].add(1.0).at[:, 4].add(30.0)
    tuned["w1"] = pre["w1"].at[2].set(jnp.array([-8.0, 8.0, 0.0]))
    y = digits.logits(tuned, x).argmax(1)
    base = masks.most_moved(tuned, pre, keep=5)
    assert base["w0"][:, 4].all()  # the largest movement is beside the point
    r = reparam.grafting(tuned, base)

    @jax.jit
    def localize(theta):
        loss = lambda theta: digits.cross_entropy(r.apply(theta, pre), x, y)
        step = lambda theta, _: (
            jax.tree.map(lambda s, g: s - 1e4 * g, theta, jax.grad(loss)(theta)),
            None,
        )
        return jax.lax.scan(step, theta, None, 50)[0]

    found = reparam.hardened(localize(r.init(KEY, pre)), base)
    gained = {k: np.asarray(found[k] & ~base[k]) for k in ("w0", "w1")}
    assert gained["w0"][:, 2].any() or gained["w1"][2].any()
    assert not np.delete(gained["w0"], 2, 1).any() and not np.delete(gained["w1"], 2, 0).any()
    own = jnp.asarray(np.asarray(jax.nn.one_hot(2, 6, dtype=bool)))
    unit = {"w0": jnp.broadcast_to(own, (5, 6)), "w1": jnp.broadcast_to(own[:, None], (6, 3))}
    unit |= {k: jnp.zeros_like(pre[k], bool) for k in ("bias0", "bias1")}
    grafted = masks.graft(pre, tuned, unit)
    assert float((digits.logits(grafted, x).argmax(1) == y).mean()) == 1.0
    assert float((digits.logits(pre, x).argmax(1) == y).mean()) < 0.9


def test_overlap_of_masks():
    masks_of = lambda *rows: {"w": jnp.asarray([rows], bool), "bias": jnp.ones(2, bool)}
    a, b = masks_of(1, 1, 1, 0, 0, 0), masks_of(0, 1, 1, 1, 1, 0)
    np.testing.assert_allclose(masks.overlap(a, b), 2 / 3, rtol=1e-6)
    assert masks.overlap(a, b) == masks.overlap(b, a)
    assert masks.overlap(a, masks_of(1, 0, 0, 0, 0, 0)) == 1.0
    assert np.isnan(masks.overlap(a, masks_of(0, 0, 0, 0, 0, 0)))
    params = {"w": jnp.zeros((100, 100))}
    draw = lambda key, s: masks.topk(masks.random(key, params), sparsity=s)
    two = masks.overlap(draw(KEY, 0.7), draw(jax.random.key(1), 0.9))
    assert abs(float(two) - 0.3) < 3 * np.sqrt(0.3 * 0.7 / 1000)


def test_models_that_do_not_fit():
    pre, tuned, _, _ = models()
    mask = masks.most_moved(tuned, pre, keep=3)
    with pytest.raises(ValueError, match="'w1' is only in the first"):
        masks.graft(pre, {k: v for k, v in tuned.items() if k != "w1"}, mask)
    with pytest.raises(TypeError, match="'w0' is float32 here and bfloat16 in the other"):
        masks.graft(pre, tuned | {"w0": tuned["w0"].astype(jnp.bfloat16)}, mask)
    with pytest.raises(ValueError, match=r"'w0' has shape \(6, 5\)"):
        masks.graft(pre, tuned | {"w0": tuned["w0"].T}, mask)
    with pytest.warns(UserWarning, match=r"\['w1'\] did not move and count"):
        masks.most_moved(tuned | {"w1": pre["w1"]}, pre, sparsity=0.5)
    with pytest.raises(ValueError, match="'bias0' is only in the first"):
        reparam.grafting({"w0": tuned["w0"]}, mask).init(KEY, pre)
    half = {**tuned, "w0": tuned["w0"].astype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="'w0' is float32 in params and bfloat16 in the fine-tune"):
        reparam.grafting(half, mask).init(KEY, pre)


# -------------------------------------------------------------------------------- calibration


def ece_by_loop(p, labels, bins):
    confidence, right = p.max(1), p.argmax(1) == labels
    total, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_a_loop(bins):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(4, 0.5), 500)
    labels = rng.integers(0, 4, 500)
    got = probes.ece(jnp.asarray(p), jnp.asarray(labels), bins=bins)
    np.testing.assert_allclose(got, ece_by_loop(p, labels, bins), rtol=1e-5)


def test_calibration_error_of_who_is_calibrated_and_who_is_sure():
    coins = jnp.array([0, 1] * 50)
    sure = jnp.tile(jnp.array([[1.0, 0.0]]), (100, 1))
    assert float(probes.ece(sure, coins)) == 0.5
    honest = jnp.tile(jnp.array([[0.8, 0.2]]), (100, 1))
    labels = jnp.arange(100) >= 80
    np.testing.assert_allclose(probes.ece(honest, labels.astype(int)), 0.0, atol=1e-6)
    with pytest.raises(ValueError, match="softmax the logits"):
        probes.ece(jnp.log(honest), coins)
    with pytest.raises(ValueError, match="softmax the logits"):
        probes.ece(2 * honest, coins)
    with pytest.raises(ValueError, match="are due, and"):
        probes.ece(honest, coins[:3])


# ---------------------------------------------------------------------------------- in training


@pytest.mark.slow
def test_a_movement_graft_carries_the_skill_and_a_random_one_does_not():
    """Digits, then inverted digits: 30 % of the entries keep most of what was learned."""
    x, x_test, y, y_test = digits.data()
    sgd = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def run(key):
        pre, _ = digits.fit(key, sgd, digits.init(key), x, y, 800)
        tuned, _ = digits.fit(jax.random.fold_in(key, 1), sgd, pre, 1 - x, y, 800)
        draw = lambda scores: masks.topk(scores, sparsity=0.7, where="*")
        found = [masks.movement(tuned, pre), masks.random(key, pre)]
        models = [pre, tuned, *(masks.graft(pre, tuned, draw(s)) for s in found)]
        return jnp.array([digits.accuracy(p, 1 - x_test, y_test) for p in models])

    pre, tuned, moved, random = map(float, run(KEY))
    assert pre < 0.2 and tuned > 0.85, (pre, tuned)
    assert moved > 0.7 * tuned and random < 0.5 * tuned, (moved, random)
