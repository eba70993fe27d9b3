"""Augmentations of networks: the same function, the function elsewhere, or near it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import data, trace

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Z = jnp.asarray(RNG.uniform(-1, 1, (7, 2)), jnp.float32)


def draw(**shapes):
    return {name: jnp.asarray(RNG.normal(size=s) / 3, jnp.float32) for name, s in shapes.items()}


def siren(p, z, w0=30.0):
    z = jnp.sin(w0 * (z @ p["w0"] + p["b0"]))
    return jnp.sin(w0 * (z @ p["w1"] + p["b1"])) @ p["w2"] + p["b2"]


def residual(p, z):
    z = z @ p["into"]
    return (z + jnp.tanh(z @ p["inner"] + p["bias"])) @ p["out"]


def heads(p, z):
    """One leaf for two hidden layers, and a product of axes."""
    h = jnp.tanh(z @ p["up"])
    left, right = h[:, :6].reshape(-1, 2, 3), h[:, 6:]
    return jnp.einsum("zhs,hso->zo", left, p["down"]) + right @ p["other"]


# hidden weights are drawn of the order of 1 / 30, as those of a SIREN
SIREN = draw(w0=(2, 6), b0=(6,), w1=(6, 5), b1=(5,), w2=(5, 3), b2=(3,))
SIREN["w1"] = SIREN["w1"] / 10
RESIDUAL = draw(into=(2, 4), inner=(4, 4), bias=(4,), out=(4, 1))
HEADS = draw(up=(2, 10), down=(2, 3, 2), other=(4, 2))
NETS = {
    "siren": (siren, SIREN, jnp.sin),
    "residual": (residual, RESIDUAL, jnp.tanh),
    "heads": (heads, HEADS, jnp.tanh),
}


def traced(apply_fn, params):
    return trace.axes(apply_fn, params, Z), trace.roles(apply_fn, params, Z)


def differs(a, b):
    return {name for name in a if not np.allclose(a[name], b[name], atol=1e-6)}


# ----------------------------------------------------------------------------------- symmetries


@pytest.mark.parametrize("name", NETS)
def test_permuted_units_and_flipped_signs_keep_the_function(name):
    apply_fn, params, activation = NETS[name]
    axes, roles = traced(apply_fn, params)
    hidden = {leaf for leaf, entries in axes.items() if any(e is not None for e in entries)}

    @jax.jit
    @jax.vmap
    def both(key):
        permuted = data.permuted_units(key, params, axes)
        flipped = data.flipped_signs(key, params, axes, roles, activation=activation)
        return permuted, flipped, [apply_fn(p, Z) for p in (params, permuted, flipped)]

    permuted, flipped, (want, *got) = both(jax.random.split(KEY, 5))
    for outputs in got:
        np.testing.assert_allclose(outputs, want, atol=1e-5)
    for moved in (permuted, flipped):
        changed = [differs(jax.tree.map(lambda w: w[i], moved), params) for i in range(5)]
        assert set().union(*changed) == hidden
    for leaf, w in params.items():
        np.testing.assert_array_equal(jnp.abs(flipped[leaf]), jnp.stack([jnp.abs(w)] * 5))
        sort = lambda x: np.sort(np.ravel(x))
        np.testing.assert_array_equal(sort(permuted[leaf][0]), sort(w))


def test_rates_and_names_choose_the_units():
    axes, roles = traced(siren, SIREN)
    flip = lambda **how: data.flipped_signs(KEY, SIREN, axes, roles, activation=jnp.sin, **how)
    assert differs(flip(rate=0.0), SIREN) == set()
    first = flip(rate=1.0, names=["w0:1"])
    assert differs(first, SIREN) == {"w0", "b0", "w1"}
    np.testing.assert_array_equal(first["w1"], -SIREN["w1"])
    every = flip(rate=1.0)
    np.testing.assert_array_equal(every["w1"], SIREN["w1"])
    np.testing.assert_array_equal(flip(names=["w0:1"])["w0"], flip()["w0"])


def test_shifted_phases_keep_the_function():
    axes, roles = traced(siren, SIREN)
    sine = lambda x: jnp.sin(30 * x)
    shift = lambda key, **how: data.shifted_phases(key, SIREN, axes, roles, **how)

    @jax.jit
    @jax.vmap
    def run(key):
        p = shift(key, activation=sine)
        return p, siren(p, Z)

    shifted, outputs = run(jax.random.split(KEY, 40))
    want = np.broadcast_to(siren(SIREN, Z), outputs.shape)
    np.testing.assert_allclose(outputs, want, atol=1e-5)
    turns = (np.asarray(shifted["b0"]) - np.asarray(SIREN["b0"])) / (np.pi / 30)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-4)
    assert set(np.round(turns).ravel()) == set(range(-4, 4))
    signs = np.asarray(shifted["w1"] / SIREN["w1"])
    np.testing.assert_allclose(signs, np.repeat((-1.0) ** np.round(turns)[..., None], 5, 2))
    np.testing.assert_array_equal(shifted["w0"][0], SIREN["w0"])

    # the frequency outside, sin(w0 W x + b): the shift of pi / w0 is wrong, and that of pi right
    outside = lambda p, z: jnp.sin(30 * (z @ p["w0"]) + p["b0"]) @ p["w1"]
    change = lambda p: np.abs(outside(p, Z) - outside(SIREN, Z)).max()
    assert change(shift(KEY, activation=sine)) > 0.1
    assert change(shift(KEY, activation=jnp.sin, w0=1.0)) < 1e-5


def test_symmetries_that_a_network_has_not_are_refused():
    axes, roles = traced(siren, SIREN)
    for activation in (jax.nn.relu, jax.nn.gelu, jnp.cos):
        with pytest.raises(ValueError, match="the activation is not odd"):
            data.flipped_signs(KEY, SIREN, axes, roles, activation=activation)
    with pytest.raises(ValueError, match="the activation is not odd"):
        jax.jit(lambda p: data.flipped_signs(KEY, p, axes, roles, activation=jax.nn.relu))(SIREN)
    with pytest.raises(TypeError, match="activation"):
        data.flipped_signs(KEY, SIREN, axes, roles)  # type: ignore
    with pytest.raises(ValueError, match=r"another period: .* with w0=30"):
        data.shifted_phases(KEY, SIREN, axes, roles, activation=jnp.sin)
    with pytest.raises(ValueError, match=r"no axis is named 'w0'; the nearest: 'w0:1'"):
        data.flipped_signs(KEY, SIREN, axes, roles, activation=jnp.sin, names=["w0"])
    with pytest.raises(TypeError, match="typed key"):
        data.permuted_units(jax.random.PRNGKey(0), SIREN, axes)

    axes, roles = traced(residual, RESIDUAL)
    with pytest.raises(ValueError, match=r"one kernel and one bias were due .*'into': 'kernel'"):
        data.shifted_phases(KEY, RESIDUAL, axes, roles, activation=jnp.sin, w0=1.0)

    normed = lambda p, z: (z @ p["up"] / jnp.linalg.norm(z @ p["up"]) * p["gain"]) @ p["down"]
    params = draw(up=(2, 4), gain=(4,), down=(4, 1))
    axes, roles = traced(normed, params)
    with pytest.raises(ValueError, match=r"'gain', dimension 0, .* leaf of kind 'gain'"):
        data.flipped_signs(KEY, params, axes, roles, activation=jnp.tanh)


# --------------------------------------------------------------------------------- of the input


def test_inputs_are_rotated_translated_and_scaled():
    keys = jax.random.split(KEY, 20)

    def compare(augment, move):
        """Compare f_new(z) with f(what move makes of z and of the new params)."""
        run = jax.jit(jax.vmap(lambda key: [p := augment(key), siren(p, Z)]))
        new, got = run(keys)
        moved = jax.vmap(move)(new)
        want = jax.vmap(lambda z: siren(SIREN, z))(moved)
        np.testing.assert_allclose(got, want, atol=2e-4)
        assert np.abs(got - siren(SIREN, Z)).max() > 0.05
        return new

    pseudo = jnp.linalg.pinv(SIREN["w0"])
    rotation = lambda p: p["w0"] @ pseudo
    rotated = compare(lambda key: data.rotated_inputs(key, SIREN, "w0"), lambda p: Z @ rotation(p))
    turns = np.asarray(jax.vmap(rotation)(rotated))
    np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.stack([np.eye(2)] * 20), atol=1e-5)
    angles = np.rad2deg(np.arctan2(turns[:, 1, 0], turns[:, 0, 0]))
    assert np.abs(angles).max() <= 30.001 and angles.min() < -15 and angles.max() > 15

    shift = lambda p: (p["b0"] - SIREN["b0"]) @ pseudo
    moved = compare(
        lambda key: data.translated_inputs(key, SIREN, "w0", "b0"), lambda p: Z + shift(p)
    )
    shifts = np.asarray(jax.vmap(shift)(moved))
    assert (
        0.2 < np.abs(shifts).max() <= 0.25 + 1e-5
        and np.abs(shifts[:, 0] - shifts[:, 1]).max() > 0.1
    )

    factor = lambda p: (p["w0"] / SIREN["w0"])[0, 0]
    scaled = compare(lambda key: data.scaled_inputs(key, SIREN, "w0"), lambda p: Z * factor(p))
    factors = np.asarray(jax.vmap(factor)(scaled))
    assert 0.8 <= factors.min() < 0.9 and 1.1 < factors.max() <= 1.2 + 1e-6


def test_kernels_may_have_their_inputs_along_another_dimension():
    turned = {**SIREN, "w0": SIREN["w0"].T}
    for augment in (
        lambda p, **how: data.rotated_inputs(KEY, p, "w0", **how),
        lambda p, **how: data.translated_inputs(KEY, p, "w0", "b0", **how),
    ):
        a, b = augment(SIREN), augment(turned, axis=1)
        np.testing.assert_allclose(b["w0"].T, a["w0"], atol=1e-6)
        np.testing.assert_allclose(b["b0"], a["b0"], atol=1e-6)


def test_inputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"'w1' is \(6, 5\), and 2 inputs were due along dim"):
        data.rotated_inputs(KEY, SIREN, "w1")
    with pytest.raises(ValueError, match=r"'b1' is \(5,\), and \(6,\) was due for 'w0'"):
        data.translated_inputs(KEY, SIREN, "w0", "b1")
    with pytest.raises(ValueError, match="matches no leaf; the nearest paths: 'w0'"):
        data.scaled_inputs(KEY, SIREN, "w9")


# ------------------------------------------------------------------------------- of the numbers


def test_noise_is_of_the_leafs_own_scale():
    params = {"wide": 5 * jax.random.normal(KEY, (200, 50)), "flat": jnp.full(4, 3.0)}
    noisy = data.noisy_weights(KEY, params)
    noise = np.asarray(noisy["wide"] - params["wide"])
    np.testing.assert_allclose(noise.std(), 0.32 * np.std(params["wide"]), rtol=0.03)
    assert abs(np.corrcoef(noise.ravel(), np.ravel(params["wide"]))[0, 1]) < 0.04
    np.testing.assert_array_equal(noisy["flat"], params["flat"])


def test_dropout_keeps_the_mean_and_trimming_takes_the_smallest():
    params = {"w": jax.random.normal(KEY, (100, 50)), "b": jax.random.normal(KEY, (501,))}
    dropped = np.asarray(data.dropped_weights(KEY, params, rate=0.25)["w"])
    kept = dropped != 0
    np.testing.assert_allclose(kept.mean(), 0.75, atol=4 * np.sqrt(0.25 * 0.75 / 5000))
    np.testing.assert_allclose(dropped[kept], np.asarray(params["w"])[kept] / 0.75, rtol=1e-6)
    with pytest.raises(ValueError, match="rate=1"):
        data.dropped_weights(KEY, params, rate=1.0)

    sizes = np.concatenate([np.abs(np.ravel(w)) for w in jax.tree.leaves(params)])
    trim = jax.jit(jax.vmap(lambda key: data.trimmed_weights(key, params)))
    trimmed = trim(jax.random.split(KEY, 8))
    fractions = []
    for i in range(8):
        left = np.concatenate([np.ravel(w[i]) for w in trimmed.values()])
        gone = left == 0
        assert sizes[gone].max(initial=0) < sizes[~gone].min()
        np.testing.assert_array_equal(np.abs(left[~gone]), sizes[~gone])
        fractions.append(gone.mean())
    assert min(fractions) > 0 and 0.05 < max(fractions) <= 0.1


# ------------------------------------------------------------------------------ of two networks

ONE, TWO = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.25, 0.75])


@pytest.mark.parametrize("net", ["siren", "one hidden layer"])
def test_mixup_with_a_permuted_copy_is_the_network_itself_if_matched(net):
    params = SIREN if net == "siren" else draw(w=(3, 40), b=(40,), v=(40, 2))
    two = {"w": (None, "a"), "b": ("a",), "v": ("a", None)}
    axes = traced(siren, SIREN)[0] if net == "siren" else two
    copy = data.permuted_units(jax.random.key(5), params, axes)
    assert differs(copy, params)
    for share in (0.0, 0.3, 0.9):
        mix = lambda order: data.weight_mixup(
            KEY, params, copy, ONE, TWO, order=order, axes=axes, share=share
        )
        matched, labels = mix("matched")
        assert differs(matched, params) == set()
        np.testing.assert_allclose(labels, share * ONE + (1 - share) * TWO, rtol=1e-6)
        assert differs(mix("same")[0], params) and differs(mix("random")[0], params)


def test_mixup_at_its_ends_and_on_the_simplex():
    axes, _ = traced(siren, SIREN)
    other = {name: 2 * w + 1 for name, w in SIREN.items()}
    for order in ("same", "random", "matched"):
        mixed, labels = data.weight_mixup(
            KEY, SIREN, other, ONE, TWO, order=order, axes=axes, share=1.0
        )
        jax.tree.map(np.testing.assert_array_equal, mixed, SIREN)
        np.testing.assert_array_equal(labels, ONE)
    mixed, _ = data.weight_mixup(KEY, SIREN, other, ONE, TWO, share=0.0)
    jax.tree.map(np.testing.assert_array_equal, mixed, other)

    @jax.jit
    @jax.vmap
    def run(key):
        mix = lambda **how: data.weight_mixup(key, SIREN, other, ONE, TWO, **how)
        return mix(), mix(hard=True), mix(smoothing=0.1), mix(order="random", axes=axes)

    plain, hard, smooth, random = run(jax.random.split(KEY, 200))
    share = np.asarray(plain[1][:, 0])
    assert share.min() < 0.05 and share.max() > 0.95 and abs(share.mean() - 0.5) < 0.09
    for params, labels in (plain, hard, smooth, random):
        np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
        assert np.min(labels) >= 0
        np.testing.assert_allclose(
            params["b2"], other["b2"] + share[:, None] * (SIREN["b2"] - other["b2"]), atol=1e-5
        )
    np.testing.assert_array_equal(hard[1], np.where((share >= 0.5)[:, None], ONE, TWO))
    np.testing.assert_allclose(smooth[1], 0.9 * plain[1] + 0.1 / 3, atol=1e-6)
    assert np.abs(random[0]["w1"] - plain[0]["w1"]).max() > 0.1


def test_bad_pairs():
    axes, _ = traced(siren, SIREN)
    mix = lambda one=ONE, two=TWO, other=SIREN, **how: data.weight_mixup(
        KEY, SIREN, other, one, two, **how
    )
    with pytest.raises(TypeError, match="labels are int32, and one-hot floats were due"):
        mix(jnp.array(1), jnp.array(2))
    with pytest.raises(ValueError, match=r"labels are \(3,\) and \(2,\)"):
        mix(two=ONE[:2])
    with pytest.raises(ValueError, match="order='sorted'"):
        mix(order="sorted", axes=axes)
    with pytest.raises(ValueError, match="give the axes tree"):
        mix(order="matched")
    with pytest.raises(ValueError, match="runs on the host: align before"):
        jax.jit(lambda p: mix(other=p, order="matched", axes=axes))(SIREN)
    with pytest.raises(ValueError, match="'b0'"):
        mix(other={name: w for name, w in SIREN.items() if name != "b0"})
