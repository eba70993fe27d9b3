import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init
from jaxkit import probes

RNG = np.random.default_rng(0)
E = jnp.asarray(RNG.normal(size=(30, 6)), jnp.float32)
A = jnp.asarray(RNG.normal(size=(9, 6)), jnp.float32)
relative = jax.jit(probes.relative, static_argnames="metric")


def test_rotations_and_scales_of_the_latent_space_change_nothing():
    want = relative(E, A)
    for scale in (1e-3, 1.0, 250.0):
        q = jnp.asarray(np.linalg.qr(RNG.normal(size=(6, 6)))[0], jnp.float32)
        np.testing.assert_allclose(relative(scale * E @ q, scale * A @ q), want, atol=2e-6)
        # each latent has a length of its own
        lengths = jnp.asarray(RNG.uniform(0.1, 9, (30, 1)), jnp.float32)
        np.testing.assert_allclose(relative(lengths * E @ q, A @ q), want, atol=2e-6)


def test_a_translation_changes_it():
    assert jnp.abs(relative(E + 1, A + 1) - relative(E, A)).max() > 0.1


def test_the_definition():
    cosines = [[e @ a / np.linalg.norm(e) / np.linalg.norm(a) for a in A] for e in np.asarray(E)]
    np.testing.assert_allclose(relative(E, A), cosines, atol=1e-6)
    inner = np.asarray(E, float) @ np.asarray(A, float).T / np.sqrt(6)
    np.testing.assert_allclose(relative(E, A, metric="inner"), inner, atol=1e-5)
    stacked = relative(E.reshape(5, 6, 6), A)
    np.testing.assert_allclose(stacked, relative(E, A).reshape(5, 6, 9), atol=1e-6)
    half = relative(E.astype(jnp.bfloat16), A.astype(jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, cosines, atol=0.02)


def test_of_the_anchors_themselves_it_is_a_correlation_matrix():
    own = relative(A, A)
    np.testing.assert_allclose(jnp.diagonal(own), 1, atol=1e-6)
    np.testing.assert_allclose(own, own.T, atol=1e-6)


def test_enough_anchors_keep_the_direction():
    unit = lambda x: np.asarray(x, float) / np.linalg.norm(np.asarray(x, float), axis=1)[:, None]
    found = np.linalg.lstsq(unit(A), np.asarray(relative(E, A), float).T, rcond=None)[0].T
    np.testing.assert_allclose(found, unit(E), atol=1e-4)


def test_too_few_anchors_lose_what_is_off_their_span():
    few = A[:4]
    q = np.linalg.qr(np.asarray(few, float).T)[0]
    mirrored = 2 * np.asarray(E, float) @ q @ q.T - np.asarray(E, float)
    assert np.abs(mirrored - E).max() > 1
    np.testing.assert_allclose(relative(jnp.asarray(mirrored), few), relative(E, few), atol=1e-5)
    assert np.linalg.matrix_rank(np.asarray(relative(E, few)), tol=1e-4) == 4


def test_anchors_of_another_encoder_mean_nothing():
    q = jnp.asarray(np.linalg.qr(RNG.normal(size=(6, 6)))[0], jnp.float32)
    assert jnp.abs(relative(E @ q, A) - relative(E, A)).max() > 0.5


def test_latents_without_length_are_counted_and_give_0():
    dead = E.at[jnp.array([2, 5])].set(0)
    with pytest.warns(UserWarning, match="2 of 30 latents have length 0"):
        found = probes.relative(dead, A)
    np.testing.assert_array_equal(found[jnp.array([2, 5])], 0)
    np.testing.assert_allclose(found[6:], relative(E, A)[6:], atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 9 anchors have length 0"):
        probes.relative(E, A.at[3].set(0))
    grads = jax.jit(jax.grad(lambda e, a: jnp.sum(probes.relative(e, a) ** 2), (0, 1)))(dead, A)
    assert all(jnp.isfinite(g).all() for g in grads) and jnp.all(grads[0][2] == 0)
    assert jnp.abs(grads[0][0]).max() > 0 and jnp.abs(grads[1]).max() > 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"same encoder are due, and \(30, 6\) and \(9, 5\) came"):
        probes.relative(E, A[:, :5])
    with pytest.raises(ValueError, match=r"\(30, 6\) and \(6,\) came"):
        probes.relative(E, A[0])
    with pytest.raises(ValueError, match="metric='cos'"):
        probes.relative(E, A, metric="cos")


# ------------------------------------------------------------------------------------- stitching


def encode(params, x):
    first, second = params["layer_0"], params["layer_1"]
    return linear(second, jax.nn.relu(linear(first, x)))


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def fit(logits, params, batches, tx):
    def step(carry, batch):
        params, state = carry
        x, y = batch
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(logits(p, x), y).mean()
        updates, state = tx.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def swapped():
    """Accuracies {kind: (encoder, head)}: two encoders, and a head trained on each."""
    data = load(train=1200, test=500)
    x, x_test = (jnp.asarray(a, jnp.float32).reshape(-1, 64) for a in (data.x, data.x_test))
    y, y_test = jnp.asarray(data.y), jnp.asarray(data.y_test)

    def head(latents, again):
        zeros = {"kernel": jnp.zeros((latents.shape[1], 10)), "bias": jnp.zeros(10)}
        every = jax.tree.map(lambda a: jnp.broadcast_to(a, (again, *a.shape)), (latents, y))
        return fit(linear, zeros, every, optax.adam(0.1))

    def run(key):
        rows = jax.random.randint(key, (300, 64), 0, len(x))
        whole = lambda p, x: linear(p["layer_2"], encode(p, x))
        params = fit(whole, init(key, (64, 128, 64, 10)), (x[rows], y[rows]), optax.adam(3e-3))
        own, new = encode(params, x), encode(params, x_test)
        relate = lambda e: probes.relative(e, own[:100])
        pairs = {"absolute": (own, new), "relative": (relate(own), relate(new))}
        return {kind: (head(a, 300), b) for kind, (a, b) in pairs.items()}

    def every_pair(heads, latents):
        right = lambda h, z: jnp.mean(jnp.argmax(linear(h, z), 1) == y_test)
        return jax.vmap(lambda z: jax.vmap(lambda h: right(h, z))(heads))(latents)

    fitted = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 2))
    return {kind: np.asarray(every_pair(*pair)) for kind, pair in fitted.items()}


def test_heads_can_be_swapped_only_on_relative_representations():
    found = swapped()
    for accuracy in found.values():
        assert np.diag(accuracy).min() > 0.9
    assert found["absolute"][[0, 1], [1, 0]].max() < 0.4
    assert found["relative"][[0, 1], [1, 0]].min() > 0.9
