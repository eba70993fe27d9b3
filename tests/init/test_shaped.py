"""The shaped Transformer: rows, the identity at zero logits, no rank collapse, the limit law."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.residual import Wire, convex_wire, residual
from jaxkit.init.shaped import shaped_attention, shaped_relu, shaped_relu_moment, shaped_scale

KEY = jax.random.key(0)
CAUSAL = np.tril(np.ones((6, 6), bool))


@pytest.mark.parametrize("mask", [None, CAUSAL, CAUSAL[None, ::-1, ::-1]])
def test_rows_sum_to_one_and_zero_logits_give_the_identity(mask):
    logits = 3 * jax.random.normal(KEY, (2, 6, 6))
    rows = shaped_attention(logits, mask)
    np.testing.assert_allclose(rows.sum(-1), 1, atol=1e-6)
    identity = shaped_attention(jnp.zeros((2, 6, 6)), mask)
    np.testing.assert_array_equal(identity, np.broadcast_to(np.eye(6), (2, 6, 6)))
    if mask is not None:
        outside = ~np.broadcast_to(mask, rows.shape) & ~np.eye(6, dtype=bool)
        np.testing.assert_array_equal(np.asarray(rows)[outside], 0)


def test_terms_and_coefficients():
    logits = jax.random.normal(KEY, (2, 6, 6))
    plain = shaped_attention(logits, CAUSAL, identity=0.0, uniform=0.0)
    oracle = jax.nn.softmax(jnp.where(CAUSAL, logits, -jnp.inf))
    np.testing.assert_allclose(plain, oracle, atol=1e-6)
    full = shaped_attention(logits, CAUSAL)
    flat = CAUSAL / np.arange(1, 7)[:, None]
    np.testing.assert_allclose(full, np.eye(6) + oracle - flat, atol=1e-6)
    heads = shaped_attention(logits, CAUSAL, softmax=jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(heads[1], full[1] + oracle[1], atol=1e-6)
    np.testing.assert_allclose(heads[0], full[0], atol=1e-6)


def test_masked_rows_dtype_and_bad_input():
    mask = jnp.array([[False, False], [True, True]])
    logits = jax.random.normal(KEY, (2, 2))
    np.testing.assert_array_equal(shaped_attention(logits, mask)[0], [1, 0])
    grads = jax.grad(lambda x: (shaped_attention(x, mask) ** 2).sum())(logits)
    assert bool(jnp.isfinite(grads).all())
    assert bool((grads[0] == 0).all())
    assert shaped_attention(logits.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="tokens"):
        shaped_attention(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="positive"):
        shaped_scale(0, 4)
    with pytest.raises(ValueError, match="width"):
        shaped_relu(logits, 0)
    np.testing.assert_allclose(jax.jit(shaped_attention)(logits), shaped_attention(logits))


def test_shaped_relu():
    x = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_allclose(shaped_relu(x, 16, plus=1.0), [-1.5, 0, 3.75])
    np.testing.assert_array_equal(shaped_relu(x, 1), jax.nn.relu(x))  # slopes 1 and 0
    np.testing.assert_array_equal(shaped_relu(x, 9, minus=0.0), x)
    z = np.random.default_rng(0).normal(size=1_000_000)
    moment = shaped_relu_moment(9, plus=0.5, minus=-2.0)
    assert abs((np.asarray(shaped_relu(z, 9, plus=0.5, minus=-2.0)) ** 2).mean() - moment) < 5e-3


def cosines(attention, share, n=64, tokens=8, depth=48, seeds=8):
    """Return token cosines (seeds, tokens, tokens) and squared norms after a stack of weights."""

    @jax.jit
    @jax.vmap
    def run(key):
        first, rest = jax.random.split(key)
        x = jax.random.normal(first, (tokens, n))

        def block(x, inputs):
            key, numbers = inputs
            q, k, v = (jax.random.normal(each, (n, n)) for each in jax.random.split(key, 3))
            logits = (x @ q) @ (x @ k).T / n
            mix = lambda x: attention(logits, n) @ (x @ v) / math.sqrt(n)
            return residual(mix, x, numbers), None

        wire = share if isinstance(share, Wire) else convex_wire(depth, share)
        x = jax.lax.scan(block, x, (jax.random.split(rest, depth), wire))[0]
        square = (x**2).sum(-1)
        return x @ x.T / jnp.sqrt(square[:, None] * square), square / n

    cosine, square = run(jax.random.split(KEY, seeds))
    off = ~np.eye(tokens, dtype=bool)
    return np.asarray(cosine)[:, off], np.asarray(square)


SHAPED = lambda logits, n: shaped_attention(logits * shaped_scale(n, n))
PLAIN = lambda logits, n: jax.nn.softmax(logits / math.sqrt(n))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_no_rank_collapse(share):
    shaped, _ = cosines(SHAPED, share)
    plain, _ = cosines(PLAIN, share)
    assert abs(shaped.mean()) < 0.1
    assert plain.mean() > 0.9


def test_norms_drift_unless_the_wire_is_convex():
    depth, gamma2 = 24, 0.1
    _, kept = cosines(SHAPED, gamma2, depth=depth, seeds=32)
    assert abs(kept.mean() - 1) < 0.15
    ones = jnp.ones(depth)
    _, grown = cosines(SHAPED, Wire(ones, ones * gamma2**0.5, ones), depth=depth, seeds=32)
    # each block multiplies the expected square by lambda^2 + gamma^2
    assert abs(grown.mean() / 1.1**depth - 1) < 0.15


def test_the_limit_depends_on_depth_over_width():
    """The covariance of two tokens has the same law at (n, L) = (64, 16) and (256, 64).

    Given x, ``x W`` with Gaussian W is Gaussian over columns with the covariance of the tokens: so
    it is drawn without W.
    """

    def law(n, depth, seeds=2000, tokens=2):
        @jax.jit
        @jax.vmap
        def run(key):
            first, rest = jax.random.split(key)
            x = jax.random.normal(first, (tokens, n)) * 0.5 + jnp.ones((1, n)) * 0.75**0.5

            def block(x, inputs):
                key, numbers = inputs
                root = jnp.linalg.cholesky(x @ x.T / n)
                q, k, v = (
                    root @ jax.random.normal(s, (tokens, n)) for s in jax.random.split(key, 3)
                )
                a = shaped_attention(q @ k.T * shaped_scale(n, n))
                return residual(lambda x: a @ v, x, numbers), None

            wire = convex_wire(depth, 0.25)
            x = jax.lax.scan(block, x, (jax.random.split(rest, depth), wire))[0]
            return (x @ x.T / n)[0, 1]

        entry = np.asarray(run(jax.random.split(KEY, seeds)))
        return entry.mean(), entry.std(), 1 / math.sqrt(seeds)

    (mean_a, std_a, error), (mean_b, std_b, _) = law(64, 16), law(256, 64)
    assert abs(mean_a - mean_b) < 4 * error * math.hypot(std_a, std_b) + 1 / 64
    assert abs(std_a / std_b - 1) < 0.1
    _, shallow, _ = law(256, 16)
    assert shallow / std_b < 0.7  # a quarter of the depth over width: half the deviation
