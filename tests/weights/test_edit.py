from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from experiments.perceptron import init
from jaxkit import weights

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape)
single = lambda x: jnp.asarray(x, jnp.float32)
IN, OUT = 7, 5
MIX = draw(IN, IN) * np.geomspace(0.2, 3, IN)
KEYS = draw(400, IN) @ MIX
C = KEYS.T @ KEYS / 400
W = draw(IN, OUT)
rewrite = jax.jit(weights.rewrite, static_argnames="in_axis")


def collateral(change, c=C):
    """E |k dW|^2."""
    return np.trace(change.T @ c @ change)


# -------------------------------------------------------------------------------- second moment


def test_keys_in_pieces_are_keys_in_one():
    rows, want = single(KEYS), None
    for a, b in pairwise([0, 3, 100, 101, 400]):
        want = weights.second_moment(rows[a:b], want)
    whole = weights.second_moment(rows)
    assert want.count == whole.count == 400
    np.testing.assert_allclose(want.mean, C, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.mean, C, rtol=1e-5, atol=1e-5)


def test_every_position_of_an_image_is_a_key():
    images = single(KEYS.reshape(4, 10, 10, IN))
    np.testing.assert_allclose(weights.second_moment(images).mean, C, rtol=1e-5, atol=1e-5)
    scanned, _ = jax.lax.scan(
        lambda m, x: (weights.second_moment(x, m), None),
        weights.second_moment(images[0]),
        images[1:],
    )
    np.testing.assert_allclose(scanned.mean, C, rtol=1e-5, atol=1e-5)


def test_keys_on_many_devices_are_keys_on_one():
    rows = single(KEYS).reshape(2, 8, 25, IN)

    def both(a, b):
        moment = weights.second_moment(a, axis_name="data")
        return weights.second_moment(b, moment, axis_name="data")

    found = jax.pmap(both, "data")(*rows)
    assert (found.count == 400).all()
    np.testing.assert_allclose(found.mean[5], C, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------- the closed form


@pytest.mark.parametrize("pairs", [(), (1,), (3,)])
def test_the_keys_get_their_values_by_a_change_of_their_number_in_rank(pairs):
    keys, values = single(draw(*pairs, IN)), single(draw(*pairs, OUT))
    for ridge in (0.0, 1e-4, 10.0):
        found = rewrite(single(W), single(C), keys, values, ridge=ridge)
        np.testing.assert_allclose(keys @ found, values, atol=2e-5)
        singular = np.linalg.svd(np.asarray(found, float) - W)[1]
        n = sum(pairs) or 1
        assert singular[n - 1] > 1e-2 and singular[n:].max() < 1e-5


@pytest.mark.parametrize("n", [1, 3])
def test_it_solves_the_bordered_system(n):
    """The least collateral subject to the answers, with multipliers."""
    keys, values = draw(n, IN), draw(n, OUT)
    border = np.block([[KEYS.T @ KEYS, keys.T], [keys, np.zeros((n, n))]])
    want = np.linalg.solve(border, np.concatenate([KEYS.T @ KEYS @ W, values]))[:IN]
    with jax.enable_x64(True):
        found = weights.rewrite(W, C, keys, values, ridge=0.0)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, want, rtol=1e-10, atol=1e-11)


def test_any_other_solution_disturbs_more():
    key, value = draw(IN), draw(OUT)
    edit = lambda c: np.asarray(rewrite(single(W), single(c), key, value, ridge=0.0), float) - W
    best, plain = collateral(edit(C)), collateral(edit(np.eye(IN)))
    assert best < 0.9 * plain
    for _ in range(5):  # move along what leaves the answer alone
        other = draw(IN, OUT)
        other -= np.outer(key, key @ other) / (key @ key)
        assert best < collateral(edit(C) + 0.01 * other)
    # where C has no preferred direction, there is nothing to gain
    assert collateral(edit(3 * np.eye(IN)), np.eye(IN)) == pytest.approx(
        collateral(edit(np.eye(IN)), np.eye(IN)), rel=1e-4
    )


def test_of_a_round_covariance_it_is_the_plain_projection():
    key, value = draw(IN), draw(OUT)
    want = W + np.outer(key, value - key @ W) / (key @ key)
    for c in (np.eye(IN), 40 * np.eye(IN)):
        np.testing.assert_allclose(rewrite(single(W), single(c), key, value), want, atol=1e-5)


def test_keys_that_are_orthogonal_to_the_direction_have_their_old_answers():
    key, value = draw(IN), draw(OUT)
    d = np.linalg.solve(C, key)
    others = draw(20, IN)
    others -= np.outer(others @ d, d) / (d @ d)
    found = np.asarray(rewrite(single(W), single(C), key, value, ridge=0.0))
    np.testing.assert_allclose(others @ found, others @ W, atol=1e-4)
    # exactly, where the numbers are: no entry is shared
    half = single(np.where(np.arange(IN) < 3, key, 0))
    rest = single(np.where(np.arange(IN) < 3, 0, draw(9, IN)))
    exact = rewrite(single(W), 2 * jnp.eye(IN), half, value)
    np.testing.assert_array_equal(rest @ exact, rest @ single(W))
    np.testing.assert_array_equal(exact[3:], single(W)[3:])


# ----------------------------------------------------------------------------------- the layouts


def test_every_place_of_a_window_answers():
    kernel, key, value = draw(3, 2, IN, OUT), draw(IN), draw(3, 2, OUT)
    found = rewrite(single(kernel), single(C), key, value)
    np.testing.assert_allclose(np.einsum("i,hwio->hwo", key, found), value, atol=2e-5)
    one = rewrite(single(kernel[2, 1]), single(C), key, value[2, 1])
    np.testing.assert_allclose(found[2, 1], one, atol=1e-5)


def test_a_position_of_an_image_gets_its_answer():
    kernel, image, value = single(draw(1, 1, IN, OUT)), single(draw(1, 6, 6, IN)), draw(OUT)
    found = rewrite(kernel, single(C), image[0, 2, 4], value[None, None])
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(image, found, (1, 1), "SAME", dimension_numbers=numbers)
    np.testing.assert_allclose(out[0, 2, 4], value, atol=2e-5)


def test_the_input_axis_may_be_any():
    key, value = draw(IN), draw(OUT)
    want = rewrite(single(W), single(C), key, value)
    found = rewrite(single(W.T), single(C), key, value, in_axis=-1)
    np.testing.assert_array_equal(found.T, want)
    heads = rewrite(single(W[:, None]), single(C), key, value[None], in_axis=0)
    np.testing.assert_array_equal(heads[:, 0], want)


def test_a_kernel_keeps_its_dtype():
    key, value = draw(IN), draw(OUT)
    kernel = jnp.asarray(W, jnp.bfloat16)
    found = rewrite(kernel, single(C), key, value)
    want = rewrite(kernel.astype(jnp.float32), single(C), key, value)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, want.astype(jnp.bfloat16))


# ------------------------------------------------------------------- directions, and training them


def by_eigenvectors(c, keys, rank):
    """Return the directions as in the paper: by the symmetric root of the inverse, in float64."""
    values, vectors = np.linalg.eigh(c)
    root = vectors / np.sqrt(values) @ vectors.T
    first = np.linalg.svd(keys @ root)[2][:rank]
    return np.linalg.qr(root @ first.T)[0]


@pytest.mark.parametrize("rank", [1, 3])
def test_directions_are_those_of_the_symmetric_root(rank):
    keys = draw(6, IN) + 1
    found = np.asarray(
        weights.edit_directions(single(C), single(keys), rank=rank, ridge=0.0), float
    )
    want = by_eigenvectors(C, keys, rank)
    np.testing.assert_allclose(found.T @ found, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(np.abs(found.T @ want), np.eye(rank), atol=1e-4)
    assert (keys.mean(0) @ found > 0).all()


def test_the_direction_of_one_key_is_that_of_the_closed_form():
    key, value = draw(IN), draw(OUT)
    d = weights.edit_directions(single(C), single(key)[None])
    change = np.asarray(rewrite(single(W), single(C), key, value)) - W
    along = np.asarray(d) @ (np.asarray(d).T @ change)
    np.testing.assert_allclose(along, change, atol=1e-4)
    exact = np.linalg.solve(C + 1e-4 * np.trace(C) / IN * np.eye(IN), key)
    np.testing.assert_allclose(d[:, 0], exact / np.linalg.norm(exact), atol=1e-4)


@pytest.mark.parametrize("window", [(), (3, 3)])
def test_confined_is_the_start_and_the_projection_of_the_rest(window):
    start, w = draw(*window, IN, OUT), draw(*window, IN, OUT)
    d = np.linalg.qr(draw(IN, 2))[0]
    found = np.asarray(weights.confine(single(w), single(start), single(d)))
    outside = np.einsum("ij,...jo->...io", np.eye(IN) - d @ d.T, found - start)
    np.testing.assert_allclose(outside, 0, atol=1e-5)
    on = lambda x: np.einsum("ij,...jo->...io", d @ d.T, x)
    np.testing.assert_allclose(found, start - on(start) + on(w), atol=1e-5)
    again = weights.confine(single(found), single(start), single(d))
    np.testing.assert_allclose(again, found, atol=1e-5)
    turned = weights.confine(
        single(w).swapaxes(-1, -2), single(start).swapaxes(-1, -2), single(d), in_axis=-1
    )
    np.testing.assert_allclose(turned.swapaxes(-1, -2), found, atol=1e-6)


def test_training_within_a_direction_reaches_answers_behind_a_relu():
    """Mean absolute error of what a further layer makes of the keys, by Adam at 0.05."""
    keys = single(draw(1, IN) + 0.05 * draw(4, IN))
    behind = single(draw(OUT, 3) / OUT**0.5)
    start = single(W)
    answer = lambda w: jax.nn.relu(keys @ w) @ behind
    goal = answer(start + single(np.outer(draw(IN), draw(OUT))))
    loss_fn = lambda w: jnp.abs(answer(w) - goal).mean()
    d = weights.edit_directions(single(C), keys)
    tx = optax.adam(0.05)

    def step(carry, i):
        w, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(w), state)
        w = optax.apply_updates(w, updates)
        return (jnp.where(i % 10 == 9, weights.confine(w, start, d), w), state), None

    w, _ = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), jnp.arange(600))[0])()
    assert loss_fn(w) < 0.2 * loss_fn(start)
    d, change = np.asarray(d, float), np.asarray(w, float) - W
    np.testing.assert_allclose(change - d @ (d.T @ change), 0, atol=1e-5)
    assert np.linalg.matrix_rank(change, tol=1e-4) == 1


# ---------------------------------------------------------------------------------------- digits


@pytest.fixture(scope="module")
def digits():
    """A trained perceptron 64-128-64-10, as its last kernel, and keys with a 1 for the bias."""
    data = load(train=1200, test=597)
    x, x_test = (single(a).reshape(-1, 64) for a in (data.x, data.x_test))
    dense = lambda layer, x: x @ layer["kernel"] + layer["bias"]

    def hidden(p, x):
        return jax.nn.relu(dense(p["layer_1"], jax.nn.relu(dense(p["layer_0"], x))))

    def train(key):
        params, tx = init(key, (64, 128, 64, 10)), optax.adam(2e-3)

        def step(carry, rows):
            params, state = carry
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                dense(p["layer_2"], hidden(p, x[rows])), jnp.asarray(data.y)[rows]
            ).mean()
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        rows = jax.random.randint(key, (400, 64), 0, len(x))
        params, _ = jax.lax.scan(step, (params, tx.init(params)), rows)[0]
        one = lambda h: jnp.concatenate([h, jnp.ones((len(h), 1))], 1)
        kernel = jnp.concatenate([params["layer_2"]["kernel"], params["layer_2"]["bias"][None]])
        return kernel, one(hidden(params, x)), one(hidden(params, x_test))

    return *jax.jit(train)(jax.random.key(0)), data.y, data.y_test


def test_threes_become_eights(digits):
    w, keys, new, y, y_test = digits
    label = lambda w: np.asarray((new @ w).argmax(1))
    assert (label(w) == y_test).mean() > 0.9
    c = weights.second_moment(keys).mean
    three, eight = keys[y == 3].mean(0), (keys[y == 8] @ w).mean(0)
    edited = rewrite(w, c, three, eight)
    plain = rewrite(w, jnp.eye(len(c)), three, eight)
    changed = lambda other: (label(other) != label(w))[y_test != 3].mean()
    energy = lambda other: jnp.square(new[y_test != 3] @ (other - w)).sum(1).mean()
    assert (label(edited)[y_test == 3] == 8).mean() > 0.95
    assert (label(w)[y_test == 3] == 3).mean() > 0.9
    assert changed(edited) < 0.02 and changed(edited) < changed(plain)
    assert energy(edited) < 0.3 * energy(plain)


# ------------------------------------------------------------------------------------- bad input


def test_a_singular_covariance_needs_the_ridge():
    few = single(KEYS[:4])
    c = weights.second_moment(few).mean
    key, value = single(draw(IN)), single(draw(OUT))
    with pytest.raises(ValueError, match=r"covariance is singular \(with ridge=0"):
        weights.rewrite(single(W), c, key, value, ridge=0.0)
    with pytest.raises(ValueError, match="covariance is singular"):
        weights.edit_directions(c, few, ridge=0.0)
    with pytest.raises(ValueError, match="covariance is singular"):
        weights.rewrite(single(W), jnp.zeros((IN, IN)), key, value)
    found = weights.rewrite(single(W), c, key, value)
    np.testing.assert_allclose(key @ found, value, atol=1e-4)
    # the directions that no key has shown are free to use
    assert collateral(np.asarray(found) - W, np.asarray(c)) < 1e-3


def test_keys_that_depend_on_each_other_cannot_have_answers_of_their_own():
    key = single(draw(IN))
    for keys in (jnp.stack([key, 2 * key]), jnp.stack([key, 0 * key]), single(draw(IN + 1, IN))):
        with pytest.raises(ValueError, match=f"{len(keys)} keys .*depend on each other"):
            weights.rewrite(single(W), single(C), keys, jnp.ones((len(keys), OUT)))


def test_keys_from_behind_the_layer_and_wrong_axes_are_refused():
    key, value = draw(IN), draw(OUT)
    with pytest.raises(ValueError, match=r"what the layer is given, of size 7 .* and \(5,\) came"):
        weights.rewrite(single(W), single(C), single(value), single(value))
    kernel = single(draw(3, 2, IN, OUT))
    with pytest.raises(ValueError, match=r"of size 5 \(axis -1 of the kernel \(3, 2, 7, 5\)\)"):
        weights.rewrite(kernel, single(C), single(key), single(value), in_axis=-1)
    with pytest.raises(ValueError, match=r"values \(3, 2, 5\) are due, and \(5,\) came"):
        weights.rewrite(kernel, single(C), single(key), single(value))
    with pytest.raises(ValueError, match=r"covariance of keys of size 7 is due, and \(5, 5\)"):
        weights.rewrite(single(W), jnp.eye(OUT), single(key), single(value))
    with pytest.raises(ValueError, match="in_axis=4 is no axis"):
        weights.rewrite(kernel, single(C), single(key), single(value), in_axis=4)
    d = jnp.ones((OUT, 1))
    with pytest.raises(ValueError, match=r"what the layer is given, of size 7"):
        weights.confine(kernel, kernel, d)
    with pytest.raises(ValueError, match="the kernel is"):
        weights.confine(kernel, kernel[0], d)
    with pytest.raises(ValueError, match="keys of size 5 were due"):
        weights.second_moment(single(KEYS), weights.second_moment(jnp.ones((2, OUT))))
    with pytest.raises(ValueError, match="of rank 3 or more are due"):
        weights.edit_directions(single(C), single(KEYS[:2]), rank=3)
