from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import weights
from tests.counting import counting

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)


def model():
    return {
        "body": {"kernel": draw(3, 4), "bias": draw(4)},
        "head": draw(4, 2),
        "steps": jnp.arange(2),
    }


BASE, A, B, C = (model() for _ in range(4))
MODELS = [A, B, C]


def stack(models):
    return jax.tree.map(lambda *x: jnp.stack(x), *models)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def close(got, want, tol=1e-6):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(leaves(got), leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=tol, atol=tol)


def floats(fn, *trees):
    """Map over the float leaves in float64; the integers are the first tree's."""
    one = lambda w, *x: w if w.dtype == jnp.int32 else fn(*(np.asarray(y, float) for y in (w, *x)))
    return jax.tree.map(one, *trees)


def test_the_average_is_the_mean_of_every_float_leaf():
    mean = floats(lambda a, b, c: (a + b + c) / 3, *MODELS)
    close(weights.merge(None, MODELS, weights.average()), mean)
    close(weights.merge(BASE, MODELS, weights.average()), mean)


def test_copies_of_one_model_average_to_it():
    for method in (weights.average(), weights.average([0.2, 0.5, 0.3])):
        close(weights.merge(None, [A, A, A], method), A)


def test_weights_of_a_model_of_a_leaf_and_of_an_entry():
    by_model = floats(lambda a, b: 0.25 * a + 0.75 * b, A, B)
    close(weights.merge(None, [A, B], weights.average([1.0, 3.0])), by_model)
    own = {"body": {"kernel": jnp.array([1.0, 3.0]), "bias": draw(2, 4) ** 2}, "head": [0.0, 2.0]}
    own["head"] = jnp.array(own["head"])
    got = weights.merge(None, [A, B], weights.average(own))
    close(got["body"]["kernel"], by_model["body"]["kernel"])
    close(got["head"], B["head"])
    c = own["body"]["bias"]
    mean = (c[0] * A["body"]["bias"] + c[1] * B["body"]["bias"]) / (c[0] + c[1])
    close(got["body"]["bias"], mean)


def test_scale_multiplies_the_delta():
    task = weights.task_arithmetic
    want = floats(lambda w, a, b: w + 0.3 * (a - w + b - w), BASE, A, B)
    close(weights.merge(BASE, [A, B], task(), scale=0.3), want)
    scales = {"body": {"kernel": 0.0, "bias": jnp.ones(4)}, "head": 2.0, "steps": 0.0}
    got = weights.merge(BASE, [A], task(), scale=scales)
    close(got["body"]["kernel"], BASE["body"]["kernel"], 0)
    close(got["body"]["bias"], A["body"]["bias"])
    close(got["head"], 2 * A["head"] - BASE["head"], 1e-5)


def test_negation_and_analogy():
    """theta_0 - tau undoes a step; tau_a + tau_b - tau_c of linear shifts is exact."""
    minus = weights.merge(BASE, [A], weights.task_arithmetic([-1.0]))
    close(weights.merge(None, [minus, A], weights.average()), BASE, 1e-5)
    sum_of = weights.merge(BASE, MODELS, weights.task_arithmetic([1.0, 1.0, -1.0]))
    close(sum_of, floats(lambda w, a, b, c: a + b - c, BASE, *MODELS), 1e-5)


def test_a_stack_is_a_list():
    for method in (weights.average(), weights.task_arithmetic([0.1, 0.2, 0.3])):
        for base in (None, BASE)[method.needs_base :]:
            got = weights.merge(base, stack(MODELS), method)
            close(got, weights.merge(base, MODELS, method), 0)


def test_fifty_scales_in_one_program():
    scales = jnp.linspace(0.0, 1.5, 50)
    method = weights.ties(sparsity=0.5)
    one = lambda s, k: weights.merge(BASE, MODELS, weights.ties(sparsity=k), scale=s)
    sweep, traces = counting(jax.vmap(one, (0, None)))
    swept = sweep(scales, 0.5)
    sweep(scales + 1, 0.7)
    assert len(traces) == 1
    for i in (0, 17, 49):
        want = weights.merge(BASE, MODELS, method, scale=scales[i])
        close(jax.tree.map(lambda x, i=i: x[i], swept), want)
    close(jax.tree.map(lambda x: x[0], swept), BASE, 0)


def test_leaves_that_are_not_chosen_are_those_of_the_base_or_of_the_first():
    body = "body/**"
    with_base = weights.merge(BASE, MODELS, weights.average(), where=body)
    assert with_base["head"] is BASE["head"]
    without = weights.merge(None, MODELS, weights.average(), where=body)
    assert without["head"] is A["head"]
    close(without["body"], weights.merge(None, MODELS, weights.average())["body"], 0)


def test_fusing_bodies_under_a_fresh_head():
    """Heads of different label spaces differ in shape, and only the fresh one is used."""
    fresh = model() | {"head": draw(4, 7)}
    tuned = [m | {"head": draw(4, n)} for n, m in enumerate(MODELS, 2)]
    fused = weights.merge(fresh, tuned, weights.average(), where="body/**")
    np.testing.assert_array_equal(fused["head"], fresh["head"])
    mean = floats(lambda a, b, c: (a + b + c) / 3, *(m["body"] for m in MODELS))
    close(fused["body"], mean)
    off = floats(lambda f, a, b, c: a + b + c - 3 * f, fused["body"], *(m["body"] for m in MODELS))
    assert max(np.abs(x).max() for x in leaves(off)) < 1e-5
    one = weights.merge(fresh, tuned[1:2], weights.average(), where="body/**")
    close(one["body"], tuned[1]["body"])


def test_dtypes_stay_and_sums_are_in_float32():
    """256 models of 1 and one of 3: in bfloat16 the sum would stop at 256."""
    models = {"w": jnp.ones((257, 2), jnp.bfloat16).at[0].set(3)}
    total = weights.merge({"w": jnp.zeros(2, jnp.bfloat16)}, models, weights.task_arithmetic())
    assert total["w"].dtype == jnp.bfloat16
    assert total["w"].tolist() == [260.0, 260.0]  # 259 to 8 bits
    half = weights.merge(None, [{"w": np.float16([1, 2])}] * 2, weights.average())
    assert half["w"].dtype == jnp.float16


def test_interpolation_ends_where_it_should():
    """WiSE-FT: bit for bit the endpoints, and the output ensemble of a linear model."""
    close(weights.interpolate(A, B, 0.0), A, 0)
    close(weights.interpolate(A, B, 1.0), B, 0)
    x = draw(5, 3)
    apply_fn = lambda p: x @ p["body"]["kernel"] + p["body"]["bias"]
    path = jax.vmap(lambda t: apply_fn(weights.interpolate(A, B, t)))(jnp.array([0.0, 0.3, 2.0]))
    for out, t in zip(path, (0.0, 0.3, 2.0), strict=True):
        np.testing.assert_allclose(out, (1 - t) * apply_fn(A) + t * apply_fn(B), atol=1e-5)
    per_leaf = {"body": {"kernel": 0.0, "bias": 1.0}, "head": 0.5, "steps": 0.0}
    got = weights.interpolate(A, B, per_leaf)
    close(got["body"], {"kernel": A["body"]["kernel"], "bias": B["body"]["bias"]}, 0)


def test_the_soup_of_linear_models_is_their_ensemble():
    x = draw(6, 3)
    logits = lambda p: x @ p["body"]["kernel"] + p["body"]["bias"]
    soup = weights.merge(None, MODELS, weights.average())
    np.testing.assert_allclose(logits(soup), sum(map(logits, MODELS)) / 3, atol=1e-5)


def test_deltas_are_task_vectors():
    taus = weights.deltas(BASE, MODELS, where="head")
    assert list(taus) == ["head"] and taus["head"].shape == (3, 4, 2)
    close(taus["head"][1], B["head"] - BASE["head"], 0)


def test_a_method_of_your_own():
    middle = weights.Method(lambda path, deltas, aux: jnp.median(deltas, 0), needs_base=False)
    close(weights.merge(None, MODELS, middle), floats(lambda *x: np.median(x, 0), *MODELS))
    counts = weights.Method(
        lambda path, deltas, aux: deltas[0] * aux,
        lambda deltas: dict.fromkeys(deltas, len(deltas)),
    )
    close(weights.merge(BASE, MODELS, counts), floats(lambda w, a: w + 3 * (a - w), BASE, A), 1e-5)


def without(tree, name):
    return {k: v for k, v in tree.items() if k != name}


NAN = A | {"head": A["head"].at[0, 0].set(jnp.nan)}
BAD = {
    "no models": (BASE, [], {}, "list is empty"),
    "a missing leaf": (BASE, [A, without(B, "head")], {}, "model 1 does not fit .* 'head' is only"),
    "no base": (None, MODELS, {}, "give the base"),
    "another shape": (BASE, [A, B | {"head": draw(4, 3)}], {}, r"'head' of model 1 .*\[4, 3\]"),
    "another dtype": (BASE, [A | {"head": jnp.zeros((4, 2), jnp.bfloat16)}], {}, "bfloat16"),
    "another integer": (BASE, [A, B | {"steps": jnp.array([0, 2])}], {}, "'steps' .* model 1"),
    "NaN": (BASE, [B, NAN], {}, "'head' of model 1 holds NaN"),
    "NaN in the base": (NAN, [B], {}, "'head' of the base holds NaN"),
    "NaN in a stack": (BASE, stack([B, NAN]), {}, "'head' of model 1 holds NaN"),
    "an integer in a stack": (BASE, stack([B, C | {"steps": jnp.ones(2, int)}]), {}, "'steps'"),
    "stacks of two lengths": (BASE, stack([A, B]) | {"head": draw(3, 4, 2)}, {}, "numbers of mod"),
    "no stack": (BASE, A, {}, r"'body/bias' of the stack is float32\[4\]"),
    "no scale": (BASE, [A], {"scale": {"head": 1.0}}, "scale has no number for 'body/bias'"),
    "a wide scale": (BASE, [A], {"scale": stack([BASE] * 2)}, "became"),
    "no such leaf": (BASE, [A], {"where": "tail"}, "matches no leaf"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    base, models, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        weights.merge(base, models, weights.task_arithmetic(), **options)


def test_bad_weights_are_named():
    for given, message in (
        ([1.0], r"shape \(1,\) for 2 models"),
        ({"body/bias": jnp.ones(3)}, r"shape \(3,\) for 2 models of 'body/bias'"),
        ([1.0, -1.0], "weights sum to 0"),
        ({"head": jnp.ones(2)}, "nothing for 'body/bias'"),
    ):
        merge = partial(weights.merge, None, method=weights.average(given))
        for run in (merge, jax.jit(merge)):
            with pytest.raises(ValueError, match=message):
                run([A, B])
    with pytest.raises(ValueError, match="there is no base"):
        weights.merge(None, [A, B], weights.average(), scale=0.5)
    with pytest.raises(ValueError, match="t has no number for 'head'"):
        weights.interpolate(A, B, {"body": {"kernel": 0.0, "bias": 0.0}})


def test_flips_are_the_cells():
    y = jnp.array([0, 1, 2, 0, 1, 2])
    old, new, avg = (
        jnp.array(p) for p in ([0, 0, 2, 1, 1, 0], [0, 1, 1, 1, 1, 1], [0, 1, 2, 0, 0, 0])
    )
    cells = weights.flips(y, old, new, avg)
    assert cells.shape == (2, 2, 2)
    assert cells.sum() == pytest.approx(1)
    assert cells[0, 0, 1] == pytest.approx(1 / 6)  # the fourth example: FalseFalseTrue
    two = weights.flips(y, old, new)
    close(two, cells.sum(2))
    accuracy = lambda p: float((p == y).mean())
    assert two[0, 1] - two[1, 0] == pytest.approx(accuracy(new) - accuracy(old), abs=1e-6)
    same = weights.flips(y, old, old)
    assert same[0, 1] == same[1, 0] == 0
    with pytest.raises(ValueError, match="prediction 1"):
        weights.flips(y, old, new[:3])


def vote_errors(p, invariant, spurious):
    """The error of a majority vote of features, of three classes, by enumeration.

    Invariant features vote for the true class, a spurious one with probability p for any of the
    three; ties are split evenly.
    """
    error = 0.0
    for votes in np.ndindex(*(3,) * spurious):
        chance = np.prod([1 - p + p / 3 if v == 0 else p / 3 for v in votes])
        count = np.bincount(votes, minlength=3) + np.array([invariant, 0, 0])
        winners = count == count.max()
        error += chance * (1 - winners[0] / winners.sum())
    return error


def test_diverse_spurious_features_cancel():
    """The theory of BANG: averaging adds the votes of features, and errors fall with p."""
    for p in (0.3, 0.9):
        assert vote_errors(p, 2, 3) == pytest.approx(5 * p**3 / 27)
        assert vote_errors(p, 4, 6) == pytest.approx(2 * p**5 / 81 + 17 * p**6 / 729)
    draws = 1_000_000
    rng = np.random.default_rng(0)
    random = rng.random((draws, 6)) < 0.9
    votes = np.where(random, rng.integers(0, 3, (draws, 6)), 0)
    count = np.stack([(votes == c).sum(1) for c in range(3)], 1) + [4, 0, 0]
    winners = count == count.max(1, keepdims=True)
    error = (1 - winners[:, 0] / winners.sum(1)).mean()
    assert error == pytest.approx(0.02697, abs=1e-3)


def test_sums_over_models_are_written_out():
    """Of few models; of many they are one reduction, and equal."""
    stack = draw(80, 50)
    c = jnp.asarray(RNG.random(80), jnp.float32)
    text = lambda n: str(jax.make_jaxpr(weights.combine)(stack[:n], c[:n]))
    assert "reduce_sum" not in text(3) and "reduce_sum" in text(80)
    for n in (1, 3, 64, 65, 80):
        want = (np.asarray(c[:n], float) @ np.asarray(stack[:n], float)) / float(c[:n].sum())
        np.testing.assert_allclose(weights.combine(stack[:n], c[:n]), want, atol=1e-6)
