"""Lottery jackpots: swaps keep counts, restrict as asked, and find better masks than magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, reparam
from tests.reparam import nets

KEY = jax.random.key(0)
PARAMS = nets.mlp([6, 8, 5], jax.random.key(1), bias=True)
MASK = masks.topk(masks.magnitude(PARAMS), sparsity=masks.uniform(PARAMS, 0.5))
X = jax.random.normal(jax.random.key(2), (7, 6))
PATHS = ["layer_0/kernel", "layer_1/kernel"]


def kernel(params, i):
    return np.asarray(params[f"layer_{i}"]["kernel"])


def drawn(key):
    """Scores without ties."""
    return {
        p: jax.random.permutation(k, jnp.arange(kernel(PARAMS, i).size) / 100.0).reshape(
            kernel(PARAMS, i).shape
        )
        for i, (p, k) in enumerate(zip(PATHS, jax.random.split(key), strict=True))
    }


def reference(b, s, rho):
    """The rule of the paper's code for one leaf, in numpy."""
    b, s, k = b.ravel().copy(), s.ravel(), int((~b).sum())
    t = np.sort(s)[k - 1]
    enter = [i for i in np.argsort(-s) if not b[i] and s[i] > t]
    leave = [i for i in np.argsort(s) if b[i] and s[i] <= t]
    assert len(enter) == len(leave)
    c = int(np.ceil(np.float32(rho) * len(enter)))
    b[enter[:c]], b[leave[:c]] = True, False
    return b, c


def test_the_start_is_the_first_mask():
    r = reparam.jackpots(MASK)
    theta = r.init(KEY, PARAMS)
    for i, path in enumerate(PATHS):
        want = np.where(kernel(MASK, i), 1, 0.99).astype(np.float32)
        np.testing.assert_array_equal(theta[path], want)
    jax.tree.map(np.testing.assert_array_equal, r.apply(theta, PARAMS), masks.apply(PARAMS, MASK))
    jax.tree.map(np.testing.assert_array_equal, reparam.swap(MASK, theta), MASK)
    assert reparam.swap(MASK, theta)["layer_0"]["bias"] is MASK["layer_0"]["bias"]


def test_the_gradient_of_a_score():
    r = reparam.jackpots(MASK)
    loss = lambda params: nets.cross_entropy(params, (X, jnp.arange(7) % 5))
    dense = jax.jit(jax.grad(loss))(masks.apply(PARAMS, MASK))
    own = jax.jit(jax.grad(lambda t: loss(r.apply(t, PARAMS))))(r.init(KEY, PARAMS))
    for i, path in enumerate(PATHS):
        want = kernel(dense, i) * kernel(PARAMS, i)
        np.testing.assert_allclose(own[path], want, rtol=1e-5, atol=1e-7)
        assert np.abs(own[path])[~kernel(MASK, i)].max() > 0


@pytest.mark.parametrize("rho", [1.0, 0.4, 1e-7, 0.0])
def test_swaps_are_those_of_the_sorted_reference(rho):
    run = jax.jit(reparam.swap)
    for seed in range(3):
        theta = drawn(jax.random.key(seed))
        new = run(MASK, theta, rho)
        for i, path in enumerate(PATHS):
            want, c = reference(kernel(MASK, i), np.asarray(theta[path]), rho)
            np.testing.assert_array_equal(kernel(new, i).ravel(), want)
            assert kernel(new, i).sum() == kernel(MASK, i).sum()
            assert (kernel(new, i) != kernel(MASK, i)).sum() == 2 * c
            if rho == 1e-7:
                assert c == 1
        if rho == 1:
            due = masks.topk(theta, sparsity=dict.fromkeys(PATHS, 0.5))
            for i, path in enumerate(PATHS):
                np.testing.assert_array_equal(kernel(new, i), due[path])


def test_ties_swap_nothing_but_strict_improvements_and_keep_the_count():
    mask = {"w": jnp.array([[True, True, False, False, False]])}
    theta = {"w": jnp.array([[0.5, 0.5, 0.5, 0.9, 0.5]])}
    new = reparam.swap(mask, theta)["w"]
    assert new.sum() == 2 and new[0, 3]
    same = reparam.swap(mask, {"w": jnp.ones((1, 5))})["w"]
    np.testing.assert_array_equal(same, mask["w"])
    full = {"w": jnp.ones((1, 5), bool)}
    np.testing.assert_array_equal(reparam.swap(full, theta)["w"], full["w"])


def test_bad_input():
    with pytest.raises(ValueError, match="rho is 2"):
        reparam.swap(MASK, drawn(KEY), 2)
    wrong = {**MASK, "layer_0": {**MASK["layer_0"], "kernel": jnp.ones((3, 3), bool)}}
    with pytest.raises(ValueError, match="the mask does not fit params: 'layer_0/kernel'"):
        reparam.jackpots(wrong).init(KEY, PARAMS)
    with pytest.raises(ValueError, match="all 48 entries of 'layer_0/kernel' are masked"):
        reparam.jackpots(jax.tree.map(jnp.zeros_like, MASK)).init(KEY, PARAMS)


@pytest.mark.slow
def test_a_mask_of_a_trained_network_is_found_without_training_a_weight():
    """Digits: a tenth of the weights of two layers, by magnitude and searched."""
    *_, x_test, y_test = nets.digits()
    steps, where = 600, ["layer_0/kernel", "layer_1/kernel"]
    params = nets.mlp([64, 128, 64, 10], KEY, bias=True)
    params = nets.train(nets.cross_entropy, params, optax.adam(1e-3), 1500, KEY)
    assert nets.accuracy(params, x_test, y_test) > 0.96
    first = masks.topk(masks.magnitude(params), sparsity=0.9, where=where)
    assert nets.accuracy(masks.apply(params, first), x_test, y_test) < 0.9
    rho = optax.polynomial_schedule(1.0, 0.0, 4, steps)
    tx = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9),
    )
    run = lambda mask: reparam.jackpots(mask, where=where)
    _, mask = nets.train(
        lambda theta, mask, batch: nets.cross_entropy(run(mask).apply(theta, params), batch),
        (run(first).init(KEY, params), first),
        tx,
        steps,
        KEY,
        after=lambda i, theta, mask: reparam.swap(mask, theta, rho(i)),
    )
    found = float(nets.accuracy(masks.apply(params, mask), x_test, y_test))
    overlap = []
    for i in range(2):
        a, b = kernel(first, i), kernel(mask, i)
        assert a.sum() == b.sum()
        overlap.append(float((a & b).sum() / a.sum()))
    assert found > 0.93 and max(overlap) < 0.95
