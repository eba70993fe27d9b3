import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import probes, tree, weights

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)


def model(classes=3, vocabulary=5):
    return {
        "embed": draw(vocabulary, 4),
        "block": {"kernel": draw(4, 4), "bias": draw(4)},
        "head": {"kernel": draw(4, classes), "bias": draw(classes)},
    }


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


body = lambda path, leaf: not path.startswith("head")
average = weights.average()
FRESH = model(classes=7)

# ------------------------------------------------------------------------------------- fusing


def test_fusing_one_source_is_intertraining():
    """Without a base, bit for bit; onto a fresh model, up to the rounding of base + delta."""
    source = model()
    same(weights.merge(None, [source], average), source)
    started = weights.merge(FRESH, [source], average, where=body)
    same(started["head"], FRESH["head"])
    for path, x in tree.chosen(started, body).items():
        np.testing.assert_allclose(x, tree.flatten(source)[path], atol=1e-6)
    exact = weights.merge(None, [FRESH | {k: source[k] for k in ("embed", "block")}], average)
    same(exact, {**source, "head": FRESH["head"]})


def test_heads_of_equal_shape_are_averaged_unless_they_are_left_out():
    sources = [model(), model()]
    everything = weights.merge(None, sources, average)
    mean = (sources[0]["head"]["kernel"] + sources[1]["head"]["kernel"]) / 2
    np.testing.assert_allclose(everything["head"]["kernel"], mean, atol=1e-6)
    kept = weights.merge(None, sources, average, where=body)
    same(kept["head"], sources[0]["head"])
    same(kept["block"], everything["block"])


def test_other_heads_and_other_vocabularies_are_named():
    with pytest.raises(
        ValueError, match=r"'head/bias' of model 1 is float32\[5\], .*\[3\] was due"
    ):
        weights.merge(None, [model(), model(classes=5)], average)
    with pytest.raises(ValueError, match=r"'embed' of model 1 is float32\[6, 4\]"):
        weights.merge(FRESH, [model(), model(vocabulary=6)], average, where=body)


# ----------------------------------------------------------------------- averages of training


def test_the_mean_starts_after_the_warm_up():
    """The count stays 0 until then, and each model replaces the one before."""
    models = draw(9, 3)
    start = 4

    def take(mean, k):
        count = jnp.maximum(k - start, 0)
        return weights.running_mean(mean, {"w": models[k]}, count), None

    mean, _ = jax.jit(lambda m: jax.lax.scan(take, m, jnp.arange(9)))({"w": jnp.zeros(3)})
    np.testing.assert_allclose(mean["w"], models[start:].mean(0), atol=1e-6)


def test_runs_of_other_heads_are_averaged_under_the_first_ones_head():
    runs = [[model(classes=n) for _ in range(2)] for n in (3, 4)]
    means = [weights.merge(None, run, average) for run in runs]
    with pytest.raises(ValueError, match="'head/bias' of model 1"):
        weights.merge(None, means, average)
    shared = weights.merge(None, means, average, where=body)
    same(shared["head"], means[0]["head"])
    all_of_them = np.stack([m["block"]["kernel"] for run in runs for m in run])
    np.testing.assert_allclose(shared["block"]["kernel"], all_of_them.mean(0), atol=1e-6)


# -------------------------------------------------------------------------------------- soups


def test_a_greedy_soup_is_never_below_its_best_model():
    """Whatever the evaluation: smooth, rough, or the hash of the params."""
    models = [{"w": draw(3)} for _ in range(6)]
    rough = lambda p: float(jnp.sin(1e4 * p["w"].sum()))
    levels = lambda p: round(float(p["w"].sum()))
    hashed = lambda p: zlib.crc32(np.asarray(p["w"]).tobytes()) % 1000
    for evaluate in (rough, levels, hashed):
        for ties in (False, True):
            soup = weights.greedy_soup(evaluate, models, accept_ties=ties)
            assert soup.value >= max(soup.values)
            assert soup.value == evaluate(soup.params)
            inside = np.stack([models[i]["w"] for i in soup.models]).mean(0)
            np.testing.assert_allclose(soup.params["w"], inside, atol=1e-6)


def test_a_barrier_tells_models_of_different_starts():
    """A network and itself with its units in another order: alike in all but their average."""
    one = {"in": draw(4, 32), "out": draw(32, 2)}
    order = RNG.permutation(32)
    reordered = {"in": one["in"][:, order], "out": one["out"][order]}
    near = jax.tree.map(lambda w: w + 0.02 * draw(*w.shape), one)
    x = draw(100, 4)
    apply_fn = lambda p: jax.nn.relu(x @ p["in"]) @ p["out"]
    error = lambda p: (
        jnp.square(apply_fn(p) - apply_fn(one)).mean() / jnp.square(apply_fn(one)).mean()
    )
    assert float(error(reordered)) < 1e-6
    barriers = {
        name: float(probes.lmc(error, one, other, points=5).lmc)
        for name, other in (("near", near), ("reordered", reordered))
    }
    assert abs(barriers["near"]) < 0.01 and barriers["reordered"] < -0.2
    soup = weights.merge(None, [one, reordered], average)
    assert float(error(soup)) == pytest.approx(-barriers["reordered"], rel=0.01)


# --------------------------------------------------------------------- two models as an ensemble


def test_a_sure_model_takes_over_the_ensemble():
    """Of linear models the average in weights is that in logits; scale one's, and it decides."""
    x, old, new = draw(300, 6), {"w": draw(6, 4)}, {"w": draw(6, 4)}
    predict = lambda p: (x @ p["w"]).argmax(1)

    @jax.jit
    def agreement(s):
        mixed = weights.interpolate(old, {"w": s * new["w"]}, 0.5)
        return jnp.stack([(predict(mixed) == predict(p)).mean() for p in (old, new)])

    with_old, with_new = jax.vmap(agreement)(jnp.array([0.0, 0.1, 1.0, 10.0, 1e4])).T
    assert with_old[0] == 1 and with_new[-1] == 1
    assert (jnp.diff(with_new) > 0).all() and (jnp.diff(with_old) < 0).all()
