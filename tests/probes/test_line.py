"""The line between networks, barriers, coordinates along it, and pushes off it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import probes

KEY = jax.random.key(0)


def tree(seed):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    return {
        "w": jax.random.normal(a, (4, 3)),
        "bias": jax.random.normal(b, (3,)),
        "steps": jnp.arange(2),
        "v": 10 * jax.random.normal(c, (3, 5)),
    }


A, B = tree(1), tree(2)
T = jnp.linspace(-0.5, 2, 11)
flat = lambda p: jnp.concatenate([p[k].ravel() for k in ("w", "bias", "v")])


def test_a_quadratic_loss_is_a_parabola_on_the_line():
    h = jax.random.normal(KEY, (30, 30)) / 30
    loss = lambda p: flat(p) @ h @ flat(p)
    d, x = np.asarray(flat(B) - flat(A), float), np.asarray(flat(A), float)
    slope, curve = d @ (np.asarray(h) + np.asarray(h).T) @ x, d @ np.asarray(h, float) @ d
    t = np.asarray(T, float)
    want = float(x @ np.asarray(h, float) @ x) + slope * t + curve * t**2
    got = probes.line(loss, A, B, T)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_ends_are_exact_and_batches_of_points_agree():
    loss = lambda p: (p["w"].sum() + jnp.exp(p["bias"]).sum()) * p["v"].sum() + p["steps"].sum()
    one = probes.line(loss, A, B, T)
    ends = probes.line(flat, A, B, jnp.array([0.0, 1.0]))
    np.testing.assert_array_equal(ends, [flat(A), flat(B)])
    for size in (4, 11):
        many = probes.line(loss, A, B, T, batch_size=size)
        np.testing.assert_allclose(many, one, rtol=1e-5)
    values = probes.line(lambda p: jnp.stack([loss(p), -loss(p)]), A, B, T)
    np.testing.assert_allclose(values, np.stack([one, -one], 1), rtol=1e-6)


def test_barriers_at_the_gap_and_at_the_peak():
    t = np.linspace(0, 1, 21)
    bump = 3 * t * (1 - t)
    for slope in (0.0, 1.0, -2.0):
        curve = 1 + slope * t + bump
        assert probes.barrier(curve) == pytest.approx(0.75, abs=1e-6)
        peak = t[curve.argmax()]
        want = 3 * peak * (1 - peak)
        assert probes.barrier(curve, t, at="peak") == pytest.approx(want, abs=1e-6)
    assert probes.barrier(1 - bump) == 0
    uneven = np.array([0, 0.1, 0.9, 1.0])
    assert probes.barrier(uneven + [0, 0.2, 0.1, 0], uneven) == pytest.approx(0.2, abs=1e-6)


def test_coordinates_along_a_line():
    d = flat(B) - flat(A)
    length = float(jnp.linalg.norm(d))
    off = jnp.linspace(-1, 1, 30)
    off = off - (off @ d) / (d @ d) * d
    shift = [np.asarray(off[:12]).reshape(4, 3), off[12:15], np.asarray(off[15:]).reshape(3, 5)]
    for t in (0.0, 0.3, 1.0, 1.7):
        on = A | {k: A[k] + t * (B[k] - A[k]) for k in ("w", "bias", "v")}
        found = probes.along(on, A, B)
        assert found.alpha == pytest.approx(t * length, rel=1e-5, abs=1e-5)
        assert found.beta == pytest.approx(0, abs=1e-4)
        moved = on | {k: on[k] + s for k, s in zip(("w", "bias", "v"), shift, strict=True)}
        found = probes.along(moved, A, B)
        assert found.alpha == pytest.approx(t * length, rel=1e-4, abs=1e-4)
        assert found.beta == pytest.approx(float(jnp.linalg.norm(off)), rel=1e-4)


# ---------------------------------------------------------------------------------- pushes

STD = jax.tree.map(lambda x: {4: 0.5, 3: 2.0}.get(x.shape[0], 1.0), A)
SIZE = np.sqrt(0.5**2 * 12 + 2.0**2 * 15)


def pushed(**options):
    return probes.perturb(KEY, A, std=STD, **options)


def test_a_push_has_its_length_and_spares_what_is_no_weight():
    found = pushed(sigma=0.1)
    step = jax.tree.map(lambda x, y: x - y, found.params, A)
    norm = np.sqrt(float(jnp.sum(step["w"] ** 2) + jnp.sum(step["v"] ** 2)))
    assert norm == pytest.approx(0.1 * SIZE, rel=1e-4)
    assert not step["bias"].any() and not step["steps"].any()
    assert found.changed == 1
    large = {"w": jnp.zeros((300, 300)), "v": jnp.zeros((200, 200))}
    found = probes.perturb(KEY, large, 0.1, std={"w": 0.5, "v": 2.0}).params
    assert found["w"].std() == pytest.approx(0.05, rel=0.02)
    assert found["v"].std() == pytest.approx(0.2, rel=0.02)


def test_no_push_gives_the_same_bits():
    found = pushed(sigma=0.0)
    jax.tree.map(np.testing.assert_array_equal, found.params, A)
    assert found.changed == 0


def test_a_fraction_is_exact_and_only_shortens():
    whole, some = pushed(sigma=0.1), pushed(sigma=0.1, fraction=0.37)
    count = sum(int((some.params[k] != A[k]).sum()) for k in ("w", "v"))
    assert count == round(0.37 * 27) == round(float(some.changed) * 27)
    for k in ("w", "v"):
        kept = some.params[k] != A[k]
        np.testing.assert_array_equal(some.params[k], np.where(kept, whole.params[k], A[k]))
    single = pushed(sigma=0.1, fraction=1 / 27)
    assert round(float(single.changed) * 27) == 1


def test_a_gradient_is_rescaled():
    grads = jax.tree.map(lambda x: 7.0 * x, B)
    found = pushed(sigma=0.2, direction=grads)
    norm = np.sqrt(float(jnp.sum(grads["w"] ** 2) + jnp.sum(grads["v"] ** 2)))
    for k in ("w", "v"):
        want = A[k] + 0.2 * SIZE / norm * grads[k]
        np.testing.assert_allclose(found.params[k], want, rtol=1e-5, atol=1e-6)


def test_a_push_below_the_precision_is_reported():
    low = A | {k: A[k].astype(jnp.bfloat16) for k in ("w", "v")}
    some = probes.perturb(KEY, low, 2e-3, std=STD).changed
    assert 0 < some < 1
    with pytest.raises(ValueError, match="sigma=1e-09 is lost in rounding"):
        probes.perturb(KEY, low, 1e-9, std=STD)


def test_training_on_from_a_push_repeats_without_one_and_departs_with_one():
    x = jax.random.normal(KEY, (64, 4))
    y = jnp.sin(x @ jnp.arange(4.0))
    tx = optax.sgd(0.05, momentum=0.9)
    loss = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - y) ** 2)
    start = {"w": jax.random.normal(KEY, (4, 8)), "v": jax.random.normal(KEY, (8,)) / 3}
    std = jax.tree.map(jnp.std, start)

    @jax.jit
    def run(sigma):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return (optax.apply_updates(params, updates), state), None

        params = probes.perturb(KEY, start, sigma, std=std, where="**").params
        return jax.lax.scan(step, (params, tx.init(params)), None, 50)[0][0]

    base, same, other = run(0.0), run(0.0), run(0.01)
    jax.tree.map(np.testing.assert_array_equal, base, same)
    assert optax.tree.norm(optax.tree.sub(base, other)) > 1e-3


def test_bad_input_is_named():
    loss = lambda p: p["w"].sum()
    with pytest.raises(ValueError, match="second tree does not fit params"):
        probes.line(loss, A, {"w": A["w"]}, T)
    with pytest.raises(ValueError, match=r"t has shape \(\)"):
        probes.line(loss, A, B, 0.5)
    with pytest.raises(ValueError, match="at='top'"):
        probes.barrier(T, at="top")
    with pytest.raises(ValueError, match="3 or more points"):
        probes.barrier(T[:2])
    with pytest.raises(ValueError, match="from 0 to 1 was due"):
        probes.barrier(T, T)
    with pytest.raises(ValueError, match="no length"):
        probes.along(B, A, A)
    with pytest.raises(ValueError, match="sigma=-1"):
        pushed(sigma=-1.0)
    with pytest.raises(ValueError, match="fraction=2"):
        pushed(sigma=1.0, fraction=2.0)
    with pytest.raises(ValueError, match="zero everywhere, infinite or NaN: no push"):
        pushed(sigma=1.0, direction=jax.tree.map(jnp.zeros_like, A))
    with pytest.raises(ValueError, match="zero everywhere, infinite or NaN: no push"):
        probes.perturb(KEY, A, 1.0, std=jax.tree.map(lambda _: jnp.nan, A))
    with pytest.raises(ValueError, match="std has not the structure"):
        probes.perturb(KEY, A, 1.0, std=1.0)
