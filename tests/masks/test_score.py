"""Scores without data: by value, by movement, by a draw; and the masks of another library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks

KEY = jax.random.key(0)


def waves(*shape, a):
    """Numbers that any program can make."""
    return jnp.asarray(np.sin(a * np.arange(1, np.prod(shape) + 1)).astype(np.float32)).reshape(
        shape
    )


FIRST, SECOND = waves(6, 5, a=1.3), waves(5, 4, a=2.1) * 3
# torch.nn.utils.prune (torch 2.13) on these arrays: flat indices of the entries that stay
L1_UNSTRUCTURED_11 = [0, 2, 3, 5, 7, 8, 10, 12, 13, 14, 15, 17, 19, 20, 22, 24, 25, 27, 29]
L1_TWICE_30_PERCENT = [0, 3, 5, 7, 8, 10, 12, 15, 17, 19, 20, 22, 24, 27, 29]
GLOBAL_UNSTRUCTURED_30 = (
    [0, 5, 10, 17, 22, 29],
    [0, 1, 3, 4, 6, 7, 9, 10, 12, 13, 15, 16, 18, 19],
)


def indices(mask):
    return [np.flatnonzero(m).tolist() for m in jax.tree.leaves(mask)]


def test_magnitude_masks_of_torch():
    scores = masks.magnitude({"w0": FIRST})
    assert indices(masks.topk(scores, keep=30 - 11)) == [L1_UNSTRUCTURED_11]
    assert indices(masks.topk(scores, sparsity=0.45)) == indices(masks.topk(scores, keep=16))
    mask = {"w0": jnp.ones_like(FIRST, bool)}
    twice = masks.prune(masks.prune(mask, scores, 0.3), scores, 0.3)
    assert indices(twice) == [L1_TWICE_30_PERCENT]
    both = masks.magnitude({"w0": FIRST, "w1": SECOND})
    assert tuple(indices(masks.topk(both, keep=20))) == GLOBAL_UNSTRUCTURED_30


def test_the_rule_of_jaxpruner_is_topk_of_every_leaf():
    """max(1, round(n (1 - sparsity))) of each leaf stay, by lax.top_k: at least one."""
    params = {"w0": FIRST, "w1": SECOND}
    scores = masks.magnitude(params)
    for sparsity in (0.3, 0.85, 0.99):
        keep = {name: max(1, round(s.size * (1 - sparsity))) for name, s in scores.items()}
        mask = masks.topk(scores, keep=keep)
        for name, s in scores.items():
            best = jax.lax.top_k(s.ravel(), keep[name])[1]
            assert np.flatnonzero(mask[name]).tolist() == sorted(best.tolist())


def test_the_three_scopes_of_leaves_of_different_scales():
    """Blinded empties the small leaf, uniform halves both, distributed is blind to the scales."""
    params = {"w0": waves(20, 10, a=0.61), "w1": 100 * waves(20, 10, a=0.83)}
    count = lambda mask: [len(i) for i in indices(mask)]
    scores = masks.magnitude(params)
    blinded = masks.topk(scores, sparsity=0.5)
    assert count(blinded)[0] <= 2 and sum(count(blinded)) == 200
    assert count(masks.topk(scores, sparsity=masks.uniform(params, 0.5))) == [100, 100]
    distributed = masks.topk(masks.magnitude(params, standardize=True), sparsity=0.5)
    standardized = jax.tree.map(lambda w: w / jnp.std(w), params)
    assert indices(distributed) == indices(masks.topk(masks.magnitude(standardized), sparsity=0.5))
    rescaled = {"w0": 7 * params["w0"], "w1": params["w1"] / 100}
    again = masks.topk(masks.magnitude(rescaled, standardize=True), sparsity=0.5)
    assert indices(again) == indices(distributed)


def test_the_percentile_rule_is_the_quantile_of_live_scores():
    """np.percentile, keep >= threshold: what topk keeps, but for an entry of the rounding."""
    scores = masks.magnitude({"w0": FIRST, "w1": SECOND})
    flat = np.concatenate([np.ravel(s) for s in scores.values()])
    for percent in (10, 33, 50, 80):
        cut = np.percentile(flat, percent)
        published = [np.flatnonzero(np.asarray(s) >= cut) for s in scores.values()]
        mask = masks.threshold(scores, float(cut))
        assert indices(mask) == [i.tolist() for i in published]
        exact = masks.topk(scores, sparsity=percent / 100)
        assert abs(sum(map(len, indices(exact))) - sum(map(len, indices(mask)))) <= 1
        inside = jax.tree.map(
            lambda a, b: bool((a & b).sum() == min(a.sum(), b.sum())), exact, mask
        )
        assert all(jax.tree.leaves(inside))


def test_magnitude_of_odd_leaves():
    params = {
        "constant": jnp.full((2, 3), -2.0),
        "zero": jnp.zeros((2, 3)),
        "empty": jnp.zeros((0, 3)),
        "half": jnp.array([[1.0, -3.0]], jnp.bfloat16),
        "steps": jnp.arange(3),
    }
    got = masks.magnitude(params, standardize=True)
    assert (np.asarray(got["constant"]) == 2).all() and (np.asarray(got["zero"]) == 0).all()
    assert got["empty"].shape == (0, 3) and got["steps"] is params["steps"]
    assert got["half"].dtype == jnp.float32 and got["half"].tolist() == [[0.5, 1.5]]
    grads = jax.grad(lambda p: masks.magnitude({"w": p}, standardize=True)["w"].sum())(FIRST)
    assert np.isfinite(grads).all()


def test_movement():
    tuned = {"w0": FIRST, "w1": SECOND, "n": jnp.arange(2)}
    before = {"w0": FIRST + 0.25, "w1": SECOND, "n": jnp.arange(2)}
    got = masks.movement(tuned, before)
    np.testing.assert_allclose(got["w0"], 0.25, rtol=1e-6)
    assert not got["w1"].any() and got["n"] is tuned["n"]
    zero = jax.tree.map(jnp.zeros_like, tuned)
    np.testing.assert_array_equal(masks.movement(tuned, zero)["w0"], masks.magnitude(tuned)["w0"])
    # in float32: the bfloat16 difference would lose it
    wide = masks.movement({"w": jnp.array([1.0])}, {"w": jnp.array([0.9921875], jnp.bfloat16)})
    assert wide["w"].item() == 0.0078125
    with pytest.raises(
        ValueError, match=r"the reference does not fit params: 'w0' has shape \(5, 4"
    ):
        masks.movement(tuned, {**before, "w0": SECOND})
    with pytest.raises(ValueError, match="'w1' is only in the first"):
        masks.movement(tuned, {"w0": FIRST, "n": jnp.arange(2)})


# ----------------------------------------------------------------------------------------- gumbel

SCORES = {"w0": jnp.array([[4.0, 2.0, 0.0]]), "w1": jnp.array([[1.0, 1.0]])}
P = np.array([4, 2, 0, 1, 1]) / 8
DRAWS = 4000


def drawn(keep, temperature=1.0, scores=SCORES):
    def one(key):
        mask = masks.topk(masks.gumbel(key, scores, temperature), keep=keep)
        return jnp.concatenate([m.ravel() for m in mask.values()])

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, DRAWS)))


def test_the_first_draw_has_the_probabilities_of_the_scores():
    counts = drawn(1).sum(0)
    assert counts.sum() == DRAWS and counts[2] == 0
    expected = DRAWS * P[P > 0]
    chi2 = ((counts[P > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 16.3  # 3 degrees of freedom, at 0.1 %


def test_two_draws_are_without_replacement():
    """P(i and j) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j)."""
    pairs = drawn(2)
    assert (pairs.sum(1) == 2).all() and not pairs[:, 2].any()
    for i, j in [(0, 1), (0, 3), (1, 4), (3, 4)]:
        want = P[i] * P[j] * (1 / (1 - P[i]) + 1 / (1 - P[j]))
        got = (pairs[:, i] & pairs[:, j]).mean()
        assert abs(got - want) < 4 * np.sqrt(want * (1 - want) / DRAWS)


def test_equal_scores_draw_uniformly_and_temperature_zero_is_topk():
    flat = {"w0": jnp.full((1, 3), 0.2), "w1": jnp.full((1, 2), 0.2)}
    counts = drawn(2, scores=flat).sum(0)
    expected = DRAWS * 2 / 5
    # the counts of a sample of 2 of 5 without replacement: variances n (2/5)(3/5), summing to 2 n
    chi2 = ((counts - expected) ** 2).sum() / (DRAWS * 0.4 * 0.6) * 4 / 5
    assert chi2 < 18.5  # 4 degrees of freedom, at 0.1 %
    top = masks.topk(SCORES, keep=3)
    want = np.concatenate([np.ravel(m) for m in top.values()])
    assert (drawn(3, 0.0) == want).all()
    assert (drawn(1, 0.02) == [True, False, False, False, False]).all()
    hot = drawn(1, 1e6).mean(0)  # and at infinity any of the positive ones
    np.testing.assert_allclose(hot, [0.25, 0.25, 0, 0.25, 0.25], atol=4 * np.sqrt(3 / 16 / DRAWS))


def test_gumbel_draws_by_path_and_has_a_tail():
    one = masks.gumbel(KEY, {"a": jnp.ones((2, 2)), "c": jnp.ones((2, 2))})
    assert not np.array_equal(one["a"], one["c"])
    alone = masks.gumbel(KEY, {"a": jnp.ones((2, 2))})
    np.testing.assert_array_equal(alone["a"], one["a"])
    noise = np.asarray(masks.gumbel(KEY, {"w": jnp.ones((1000, 1000))})["w"]).ravel()
    x = np.sort(noise.astype(np.float64))
    distance = np.abs(np.exp(-np.exp(-x)) - np.arange(x.size) / x.size).max()
    assert distance < 1.95 / np.sqrt(x.size)  # Kolmogorov-Smirnov at 0.1 %
    assert np.unique(x[-1000:]).size == 1000  # no ties among the largest of a million


def test_gumbel_bad_input():
    with pytest.raises(ValueError, match="'w0' holds negative scores"):
        masks.gumbel(KEY, {"w0": jnp.array([[1.0, -0.5]])})
    under_jit = jax.jit(lambda s: masks.gumbel(KEY, s))({"w0": jnp.array([[1.0, -0.5]])})
    assert np.isnan(under_jit["w0"]).tolist() == [[False, True]]
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.gumbel(jax.random.PRNGKey(0), SCORES)
