"""Greedy removal: what it accepts lowers the loss, what it never tries, and hard attention."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks
from jaxkit.masks import greedy_removal, hard_attention
from jaxkit.masks.nested import subnet
from tests.counting import counting

WIDTHS = (6, 8, 8, 3)
AXES = [
    {"kernel": (None, "h0"), "bias": ("h0",)},
    {"kernel": ("h0", "h1"), "bias": ("h1",)},
    {"kernel": ("h1", None), "bias": (None,)},
]


def logits(params, x):
    for i, layer in enumerate(params):
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x


X = jax.random.normal(jax.random.key(1), (64, 6))


def init(key):
    keys = jax.random.split(key, 3)
    return [
        {"kernel": jax.random.normal(k, (a, b)) * (2 / a) ** 0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]


TRUE = init(jax.random.key(2))
EXTRA = 6  # a unit of the last hidden layer that fires often, and that the true network ignores
TRUE[2]["kernel"] = TRUE[2]["kernel"].at[EXTRA].set(0)
TARGET = logits(TRUE, X)
ORDER = ["h0", "h1"]
ALL = {"h0": np.ones(8, bool), "h1": np.ones(8, bool)}


def losses(params):
    """The squared errors of the examples, without some units."""

    def fn(unit_mask, batch):
        x, y = batch
        small = masks.apply(params, subnet(params, unit_mask, AXES))
        return ((logits(small, x) - y) ** 2).sum(-1)

    return jax.jit(fn)


def planted():
    """The true network, and one more unit that adds noise to the output."""
    noise = 0.3 * jax.random.normal(jax.random.key(3), (3,))
    return [TRUE[0], TRUE[1], TRUE[2] | {"kernel": TRUE[2]["kernel"].at[EXTRA].set(noise)}]


def test_a_harmful_unit_goes_when_it_is_first_tried():
    found = greedy_removal(
        losses(planted()), ALL, (X, TARGET), order=ORDER, parts={"h1": 8, "h0": 8}
    )
    tried = [visit for visit in found.visits if visit.name == "h1" and visit.units == (EXTRA,)]
    assert [visit.removed for visit in tried] == [True]
    assert not found.unit_mask["h1"][EXTRA]
    assert found.loss < found.start


def test_accepted_losses_fall_and_all_is_evaluated_once():
    calls = []
    fn, traces = counting(losses(planted()))
    counted = lambda unit_mask, batch: calls.append(1) or fn(unit_mask, batch)
    found = greedy_removal(counted, ALL, (X, TARGET), order=ORDER, parts={"h0": 4, "h1": 8})
    accepted = [found.start, *(visit.loss for visit in found.visits if visit.removed)]
    assert len(accepted) > 1
    assert all(b < a for a, b in pairwise(accepted))
    assert accepted[-1] == found.loss
    assert len(calls) == 1 + len(found.visits)
    assert len(found.visits) <= 2 + 4 + 8  # axes, and parts
    assert len(traces) == 1
    np.testing.assert_allclose(float(fn(found.unit_mask, (X, TARGET)).mean()), found.loss)


def test_the_true_network_keeps_all_to_gain_accuracy():
    found = greedy_removal(losses(TRUE), ALL, (X, TARGET), order=ORDER, parts={"h0": 8, "h1": 8})
    assert all(mask.all() for mask in found.unit_mask.values())
    assert len(found.visits) == 18
    assert found.loss == found.start == 0


def test_tolerance():
    fn, parts = losses(planted()), {"h0": 8, "h1": 8}
    none = greedy_removal(fn, ALL, (X, TARGET), order=ORDER, parts=parts, eps=-np.inf)
    assert all(mask.all() for mask in none.unit_mask.values())
    everything = greedy_removal(fn, ALL, (X, TARGET), order=ORDER, parts=parts, eps=np.inf)
    assert not any(mask.any() for mask in everything.unit_mask.values())
    # parts of what is gone are not tried
    assert [(v.name, len(v.units)) for v in everything.visits] == [("h1", 8), ("h0", 8)]
    eps = 0.5 * (everything.loss - everything.start)
    some = greedy_removal(fn, ALL, (X, TARGET), order=ORDER, parts=parts, eps=eps)
    assert none.loss == some.start
    assert some.start < some.loss <= some.start + eps
    left = sum(mask.sum() for mask in some.unit_mask.values())
    assert 0 < left < 16


def test_a_gain_by_chance_needs_more_than_its_error():
    """Removal that only shuffles the errors of the examples: the mean gains a little by chance."""
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(size=50))
    noise = noise - noise.mean() + 0.02
    fn = lambda unit_mask, batch: 5.0 + jnp.where(unit_mask["a"][0], noise, 0.0)
    unit_mask = {"a": np.ones(1, bool)}
    found = greedy_removal(fn, unit_mask, None, order=["a"])
    (visit,) = found.visits
    assert visit.removed
    np.testing.assert_allclose(visit.gain, 0.02, rtol=1e-4)
    np.testing.assert_allclose(visit.error, np.asarray(noise).std(ddof=1) / 50**0.5, rtol=1e-4)
    assert not greedy_removal(fn, unit_mask, None, order=["a"], errors=1.0).visits[0].removed
    scalar = greedy_removal(
        lambda u, _: jnp.where(u["a"][0], 1.0, 0.5), unit_mask, None, order=["a"]
    )
    assert scalar.visits[0].removed
    assert np.isnan(scalar.visits[0].error)


def test_switches_of_the_model_come_last_if_they_are_first():
    harm = {"soft": jnp.array([1.0]), "a": jnp.array([1.0, -1.0])}
    fn = lambda u, _: sum((u[name] * h).sum() for name, h in harm.items())
    found = greedy_removal(
        fn, jax.tree.map(lambda h: h > -9, harm), None, order=["soft", "a"], parts={"a": 2}
    )
    assert [visit.name for visit in found.visits] == ["a", "soft", "a"]  # not the last unit
    assert not found.unit_mask["soft"].any()


def test_bad_input():
    fn = lambda u, batch: jnp.where(u["a"][0], jnp.nan, 0.0)
    mask = {"a": np.ones(2, bool)}
    with pytest.raises(ValueError, match="the loss at the start is nan"):
        greedy_removal(fn, mask, None, order=["a"])
    with pytest.raises(ValueError, match="order: there is no 'c'"):
        greedy_removal(fn, mask, None, order=["c"])
    with pytest.raises(ValueError, match="parts: there is no 'b'"):
        greedy_removal(fn, mask, None, order=["a"], parts={"b": 2})
    with pytest.raises(ValueError, match="'a': 2 units make no 3 parts"):
        greedy_removal(fn, mask, None, order=["a"], parts={"a": 3})
    with pytest.raises(TypeError, match="'a': the mask is int"):
        greedy_removal(fn, {"a": np.ones(2, int)}, None, order=["a"])
    with pytest.raises(ValueError, match="k=0"):
        hard_attention(jnp.ones((2, 2)), 0)


# ---------------------------------------------------------------------------- hard attention

SCORES = jax.random.normal(jax.random.key(0), (2, 5, 5))
CAUSAL = jnp.tri(5, dtype=bool)


def test_all_keys_are_soft_attention():
    for k in (5, 8):
        np.testing.assert_allclose(hard_attention(SCORES, k), jax.nn.softmax(SCORES), atol=1e-6)
    due = jax.nn.softmax(jnp.where(CAUSAL, SCORES, -jnp.inf))
    np.testing.assert_allclose(hard_attention(SCORES, 5, mask=CAUSAL), due, atol=1e-6)


def test_one_key_is_the_argmax_and_ties_keep_the_first():
    best = np.asarray(jnp.where(CAUSAL, SCORES, -jnp.inf).argmax(-1))
    np.testing.assert_array_equal(hard_attention(SCORES, 1, mask=CAUSAL), np.eye(5)[best])
    assert hard_attention(jnp.ones(4), 2).tolist() == [0.5, 0.5, 0, 0]


def test_the_k_best_allowed_keys_share_the_row():
    weights = np.asarray(hard_attention(SCORES, 3, mask=CAUSAL))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    for h, i in np.ndindex(2, 5):
        row = np.asarray(SCORES[h, i, : i + 1], np.float64)
        top = np.argsort(-row)[:3]
        due = np.zeros(5)
        due[top] = np.exp(row[top]) / np.exp(row[top]).sum()
        np.testing.assert_allclose(weights[h, i], due, rtol=1e-5, atol=1e-7)


def test_hidden_scores_touch_neither_value_nor_gradient():
    huge = SCORES.at[..., 4].set(1e4)
    fn = lambda s: (hard_attention(s, 2, mask=CAUSAL)[:, :4] * jnp.arange(5.0)).sum()
    value, grads = jax.value_and_grad(fn)(huge)
    np.testing.assert_allclose(value, fn(SCORES), rtol=1e-6)
    assert jnp.isfinite(grads).all()
    assert (grads[..., 4] == 0).all()
    assert jnp.count_nonzero(grads[0, 3]) == 2
    blind = hard_attention(SCORES, 2, mask=CAUSAL & (jnp.arange(5) > 0))
    assert (blind[:, 0] == 0).all()
    grads = jax.grad(lambda s: hard_attention(s, 2, mask=CAUSAL & (jnp.arange(5) > 0)).sum())
    assert jnp.isfinite(grads(SCORES)).all()
