import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import data, weights

RNG = np.random.default_rng(0)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def of_model(logits, labels, mask):
    return data.perplexity(cross_entropy(logits, labels), mask)


def test_a_uniform_model_of_v_tokens_has_perplexity_v():
    labels = jnp.asarray(RNG.integers(0, 7, (3, 9)))
    mask = jnp.asarray(RNG.random((3, 9)) < 0.7)
    for v in (7, 50, 1000):
        np.testing.assert_allclose(of_model(jnp.zeros((3, 9, v)), labels, mask), v, rtol=1e-4)


def test_shifts_of_logits_and_what_is_not_the_answer_do_not_matter():
    logits = jnp.asarray(RNG.normal(size=(4, 6, 5)), jnp.float32)
    labels = jnp.asarray(RNG.integers(0, 5, (4, 6)))
    mask = jnp.arange(6) >= jnp.arange(4)[:, None]  # a prompt of 0 to 3 tokens
    want = of_model(logits, labels, mask)
    nll = -np.log(np.asarray(jax.nn.softmax(logits), float))
    for i in range(4):
        own = nll[i, np.arange(i, 6), np.asarray(labels)[i, i:]]
        assert float(want[i]) == pytest.approx(np.exp(own.mean()), rel=1e-5)
    shifted = logits + jnp.asarray(RNG.normal(size=(4, 6, 1)), jnp.float32)
    np.testing.assert_allclose(of_model(shifted, labels, mask), want, rtol=1e-5)
    for fill in (3.0, jnp.nan, jnp.inf):
        loose = jnp.where(mask, cross_entropy(logits, labels), fill)
        np.testing.assert_array_equal(data.perplexity(loose, mask), want)
        pads = jnp.full((4, 3), fill)
        longer = data.perplexity(
            jnp.concatenate([loose, pads], 1), jnp.concatenate([mask, jnp.zeros((4, 3), bool)], 1)
        )
        np.testing.assert_allclose(longer, want, rtol=1e-6)


def test_long_answers_are_not_penalized():
    """The same answer twice is as perplexing as once; the sum of its nll is not."""
    nll = jnp.asarray(RNG.random((1, 8)), jnp.float32)
    once = data.perplexity(nll, jnp.ones((1, 8), bool))
    twice = data.perplexity(jnp.tile(nll, 2), jnp.ones((1, 16), bool))
    np.testing.assert_allclose(once, twice, rtol=1e-6)


def test_no_tokens_and_bfloat16():
    nll = jnp.ones((2, 300), jnp.bfloat16)
    out = data.perplexity(nll, jnp.arange(300) < jnp.array([[300], [0]]))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, [np.e, np.inf], rtol=1e-6)  # a sum in bfloat16 stops at 256


def test_the_filter_keeps_what_a_stable_sort_would():
    keep = jax.jit(data.perplexity_filter)
    for n, levels in ((100, 4), (101, 1000), (7, 1), (1, 1)):
        values = RNG.integers(0, levels, n).astype(np.float32)
        for fraction in (0.0, 0.2, 0.29, 0.5, 0.8, 1.0):
            k = int(fraction * 100 + 0.5) * n // 100
            want = np.zeros(n, bool)
            want[np.argsort(values, kind="stable")[:k]] = True
            np.testing.assert_array_equal(
                data.perplexity_filter(jnp.asarray(values), fraction), want
            )
            traced = keep(jnp.asarray(values), fraction)
            assert abs(int(traced.sum()) - k) <= 1  # 0.29 * 100 is 28.999998 in float32


def test_means_of_nll_rank_as_perplexities_do_and_infinities_go_first():
    nll = jnp.asarray(RNG.random((50, 3)), jnp.float32)
    everything = jnp.ones((50, 3), bool)
    kept = data.perplexity_filter(data.perplexity(nll, everything), 0.3)
    np.testing.assert_array_equal(kept, data.perplexity_filter(nll.mean(1), 0.3))
    odd = jnp.array([jnp.inf, 2.0, 3.0, jnp.nan])
    assert jax.jit(data.perplexity_filter)(odd, 0.75).tolist() == [True, True, True, False]
    assert data.perplexity_filter(odd[:3], 0.7).tolist() == [False, True, True]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"mask is \(3,\), and nll is \(2, 3\)"):
        data.perplexity(jnp.ones((2, 3)), jnp.ones(3, bool))
    with pytest.raises(TypeError, match="mask is float32, and bool"):
        data.perplexity(jnp.ones((2, 3)), jnp.ones((2, 3)))
    for fraction in (-0.1, 1.5, 20):
        with pytest.raises(ValueError, match=rf"fraction={fraction}, and a number in \[0, 1\]"):
            data.perplexity_filter(jnp.ones(3), fraction)
    with pytest.raises(ValueError, match=r"one perplexity an example .* \(2, 3\)"):
        data.perplexity_filter(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="'perplexities' holds NaN"):
        data.perplexity_filter(jnp.array([1.0, jnp.nan]))


def test_shuffled_lines_are_filtered_out_of_documentation():
    """A bigram model of half of the lines finds those of the other half that make no sense."""
    from pydoc_data.topics import topics

    lines = [line.strip() for key in sorted(topics) for line in topics[key].splitlines()]
    lines = [line for line in lines if len(line) >= 40 and line.isascii()][:3000]
    model, rest = lines[::2], lines[1::2]
    rng = np.random.default_rng(0)
    spoiled = rng.random(len(rest)) < 0.2
    rest = [
        "".join(rng.permutation(list(line))) if bad else line
        for line, bad in zip(rest, spoiled, strict=True)
    ]
    counts = np.ones((128, 128))
    for line in model:
        codes = np.frombuffer(line.encode(), np.uint8)
        np.add.at(counts, (codes[:-1], codes[1:]), 1)
    width = max(map(len, rest))
    codes = np.array([list(line.encode().ljust(width, b"\0")) for line in rest])
    logits = jnp.log(counts)[codes[:, :-1]]
    values = of_model(logits, jnp.asarray(codes[:, 1:]), jnp.asarray(codes[:, 1:] > 0))
    kept = np.asarray(data.perplexity_filter(values, 0.8))
    assert kept.sum() == int(0.8 * len(rest))
    assert (~kept & spoiled).sum() >= 0.9 * spoiled.sum()


def test_a_soup_over_data_sets_is_never_below_its_best_model():
    """One linear model tuned on the base set and each of six others, of uneven quality."""
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(5, 3))

    def labelled(n, noise):
        x = rng.normal(size=(n, 5))
        return x, (x @ truth + noise * rng.normal(size=(n, 3))).argmax(1)

    base, held_out = labelled(60, 1.0), labelled(200, 0.0)
    sets = [labelled(60, noise) for noise in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)]
    x = jnp.asarray([np.concatenate([base[0], each[0]]) for each in sets])
    y = jnp.asarray([np.concatenate([base[1], each[1]]) for each in sets])

    def tune(x, y):
        loss = lambda w: cross_entropy(x @ w, y).mean()
        step = lambda w, _: (w - 0.5 * jax.grad(loss)(w), None)
        return jax.lax.scan(step, jnp.zeros((5, 3)), None, 100)[0]

    models = jax.jit(jax.vmap(tune))(x, y)
    score = jax.jit(lambda w: (jnp.asarray(held_out[0]) @ w).argmax(1) == held_out[1])
    soup = weights.greedy_soup(lambda params: score(params["w"]).mean(), {"w": models})
    assert soup.value >= max(soup.values) > min(soup.values)
    assert soup.value == float(score(soup.params["w"]).mean())
