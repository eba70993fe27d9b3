"""Numbers that are known, but jax arrays: checked outside jit, and no obstacle inside."""

import jax
import jax.numpy as jnp
import pytest

from jaxkit import data, masks, probes, reparam, weights
from jaxkit._known import violates
from jaxkit.masks import circuit, nested, route, tokens
from tests.knowing import check_known

KEY = jax.random.key(0)
W = {"kernel": jax.random.normal(KEY, (4, 4))}
THETA = {"kernel": jax.random.uniform(KEY, (4, 4))}
MASK = {"kernel": jnp.eye(4, dtype=bool)}
AXES = {"kernel": (None, "a")}
CIRCUIT = circuit.init(KEY, (-1, 0), 3, 2)
FLOWS = circuit.flows(CIRCUIT, (-1, 0), jnp.array([[0, 1], [1, 1]]))
MASKED = {"kernel": W["kernel"] * MASK["kernel"]}
ONES = jnp.ones((1, 2))
ZEROS = lambda key, params: jax.tree.map(jnp.zeros_like, params)
TYPES = jnp.array([0, 2, 1, 0])

CALLS = {
    "mass": (lambda r: route.mass(W["kernel"] ** 2, r), 0.5, 1.5),
    "visible": (lambda w: tokens.visible(TYPES, w), 2, -1),
    "decode": (
        lambda w: tokens.decode(tokens.cache(4, 1, 2), jnp.ones((2, 2)), ONES, ONES, TYPES[:1], w),
        2, -1,
    ),
    "prefix": (lambda n: nested.prefix(W, {"a": n}, AXES), 2, 5),
    "prune": (lambda f: circuit.prune(CIRCUIT, FLOWS, f), 0.25, 2.0),
    "fake_quantize": (lambda c: reparam.fake_quantize(W["kernel"], -1.0, c), 1.0, -2.0),
    "quantized_inputs": (
        lambda c: reparam.quantized_inputs(lambda p, x: x @ p["kernel"], {"kernel": (-1.0, c)})(
            {"kernel": jnp.eye(4)}, W["kernel"]
        ),
        1.0, -2.0,
    ),
    "signed_supermask": (
        lambda t: reparam.signed_supermask(threshold=t).apply(THETA, W), 0.5, 1.0,
    ),
    "mask_tuning": (
        lambda s: (r := reparam.mask_tuning(start=s)).apply(r.init(KEY, W), W), 0.5, 0.001,
    ),
    "recycle": (lambda q: reparam.recycle(W, THETA, q), 0.25, 0.75),
    "iterand": (lambda r: reparam.iterand(KEY, ZEROS, W, MASK, r), 0.5, 1.5),
    "swap": (lambda r: reparam.swap(MASK, THETA, r), 0.5, 1.5),
    "temperature": (lambda t: reparam.temperature(2.0, 5, final=t), 100.0, 0.5),
    "budget_pressure": (lambda t: reparam.budget_pressure(ONES.sum(), t, full=9.0), 3.0, 9.0),
    "gradient_dropout": (
        lambda x: masks.gradient_dropout(KEY, W, THETA, level=x), 0.5, 1.5,
    ),
    "perturb": (
        lambda s: probes.perturb(KEY, W, s, std={"kernel": 1.0}, fraction=s).params, 0.5, -1.0,
    ),
    "barrier": (lambda t: probes.barrier(jnp.arange(3.0), jnp.array([0.0, 0.5, 1.0]) * t), 1, 2),
    "ties": (
        lambda s: weights.merge(W, [THETA, MASKED], weights.ties(sparsity=s)), 0.5, 1.5,
    ),
    "dare": (
        lambda q: weights.merge(W, [THETA], weights.dare(KEY, drop_rate=q / 2, q=q)), 0.5, 1.5,
    ),
    "random_labels": (
        lambda p: data.random_labels(KEY, W["kernel"], TYPES, p=p, classes=3), 0.5, 1.5,
    ),
    "perplexity_filter": (lambda f: data.perplexity_filter(jnp.arange(4.0), f), 0.5, 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_known_array_is_checked_and_does_not_stop_jit(name):
    check_known(*CALLS[name], r"due|can")


def test_what_is_traced_violates_nothing():
    seen = []
    jax.jit(lambda x: seen.append(violates(lambda a, b: a < b, x, 0.0)))(1.0)
    assert seen == [False]
    assert violates(lambda a, b: a < b, jnp.array([0.0, 2.0]), 1)
