"""Masks that change in training: GraNet and SET against their parts, numpy and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks
from jaxkit.masks.dynamic import cosine
from jaxkit.masks.exchange import drop_by_sign
from tests.masks import digits
from tests.masks.test_train import counts, problem, train

KEY = jax.random.key(0)
MOMENTUM = optax.sgd(0.05, momentum=0.9)
N = 5 * 7 + 7 * 3


def same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def weights(mask):
    return [int(mask[name]["kernel"].sum()) for name in "ac"]


def masks_over_time(tx, params, loss_fn, steps):
    """Return the masks in force after every update, stacked."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), (masks.current(state), params)

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps)[1])(params)


def test_granet_counts_and_growth_at_every_change():
    """After a pruning exactly N(1 - s_t) live; after an exchange as many in each leaf."""
    params, mask, loss_fn = problem()
    sparsities = masks.erk(params, 0.4)
    mask = masks.topk(masks.random(KEY, params), sparsity=sparsities)
    params = masks.apply(params, mask)
    tx = masks.granet(
        MOMENTUM, 0.9, end=12, steps=24, every=3, mask=mask, initial_sparsity=0.4, drop_rate=0.5
    )
    seen, before = masks_over_time(tx, params, loss_fn, 24)
    cubic = optax.polynomial_schedule(0.4, 0.9, 3, 12)
    rates = lambda t: 0.005 + 0.495 * (1 + np.cos(np.pi * t / 24)) / 2
    grads = jax.jit(jax.vmap(jax.grad(loss_fn)))(before)
    both = jax.jit(masks.update_mask)
    topk = jax.jit(lambda w, k, now: masks.topk(masks.magnitude(w), keep=k, within=now))
    now = mask
    for t in range(24):
        new = jax.tree.map(lambda m, t=t: m[t], seen)
        if t % 3:
            same(new, now)
            continue
        here = lambda tree, t=t: jax.tree.map(lambda w: w[t], tree)
        live = round(N * (1 - float(cubic(t))))
        due = min(live, sum(weights(now)))
        pruned = topk(here(before), due, now)
        nested = jax.tree.map(lambda a, b: bool((~a | b).all()), pruned, now)
        assert all(jax.tree.leaves(nested))
        assert weights(new) == weights(pruned) and sum(weights(new)) == due
        want = both(None, pruned, here(before), here(grads), drop_rate=np.float32(rates(t)))
        same(new, want)
        now = new
    assert sum(weights(now)) == round(N * 0.1)


def test_what_granet_prunes_and_regrows_at_once_starts_from_zero():
    """Entry 3 leaves by magnitude and returns by gradient; entry 2 was the exchange's to return."""
    w, grads = jnp.array([[4.0, 3.0, 2.0, 1.0]]), {"w": jnp.array([[0.0, 0.0, 0.0, 9.0]])}
    tx = masks.granet(
        optax.sgd(0.1, momentum=0.9), 0.5, end=1, steps=10, every=1, last_drop_rate=0.5
    )
    params, state = {"w": w}, tx.init({"w": w})
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[4.0, 0.0, 0.0, -0.9]], rtol=1e-6)
    np.testing.assert_allclose(state.inner[0].trace["w"], [[0.0, 0.0, 0.0, 9.0]], rtol=1e-6)
    # dropped by the exchange alone, it keeps both
    tx = masks.rigl(optax.sgd(0.1, momentum=0.9), {"w": w > 0}, every=1, drop_rate=0.5)
    params, state = {"w": w}, tx.init({"w": w})
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], [[4.0, 3.0, 2.0, 1 - 0.9 - 1.71]], rtol=1e-6)
    np.testing.assert_allclose(state.inner[0].trace["w"][0, 3], 17.1, rtol=1e-6)


def test_granet_without_growth_is_gradual_bit_for_bit():
    params, _, loss_fn = problem()
    adam = optax.adamw(0.02, weight_decay=0.1)
    options = {"end": 12, "begin": 3, "every": 3}
    quiet = masks.granet(adam, 0.9, steps=20, drop_rate=0.0, last_drop_rate=0.0, **options)
    (a, s), _ = train(quiet, params, loss_fn)
    (b, t), _ = train(masks.gradual(adam, 0.9, **options), params, loss_fn)
    same(a, b)
    same(masks.current(s), masks.current(t))
    assert sum(weights(masks.current(s))) == round(N * 0.1)


def test_granet_at_constant_sparsity_is_rigl_bit_for_bit():
    params, mask, loss_fn = problem()
    tx = masks.granet(
        MOMENTUM, 0.6, end=9, steps=18, every=3, mask=mask, initial_sparsity=0.6,
        drop_rate=0.4, last_drop_rate=0.0,
    )  # fmt: skip
    (a, s), _ = train(tx, params, loss_fn, 18)
    rigl = masks.rigl(MOMENTUM, mask, every=3, end=18, drop_rate=0.4)
    (b, t), _ = train(rigl, params, loss_fn, 18)
    same(a, b)
    same(masks.current(s), masks.current(t))
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (mask, s.mask)), strict=True))


def test_the_cubic_is_that_of_optax_and_the_cosine_that_of_the_paper():
    params = {"w": jnp.arange(1000.0).reshape(10, 100)}
    tx = masks.gradual(optax.sgd(0.0), 0.95, begin=4, end=44, every=1, initial_sparsity=0.5)
    seen, _ = masks_over_time(tx, params, lambda p: jnp.sum(p["w"]), 50)
    cubic = jax.vmap(optax.polynomial_schedule(0.5, 0.95, 3, 40, 4))(jnp.arange(50))
    got = 1 - seen["w"].reshape(50, -1).mean(1)
    np.testing.assert_allclose(got[4:], cubic[4:], atol=0.51e-3)  # a count of 1000
    t = np.linspace(0, 120, 13)
    want = 0.005 + 0.495 * (1 + np.cos(np.pi * np.minimum(t, 100) / 100)) / 2
    np.testing.assert_allclose([cosine(s, 0.5, 100, 0.005) for s in t], want, rtol=1e-6)


def test_granet_per_leaf_prunes_each_leaf_for_itself():
    params, _, loss_fn = problem()
    tx = masks.granet(MOMENTUM, masks.uniform(params, 0.8), end=6, steps=12, every=2)
    (_, state), _ = train(tx, params, loss_fn, 12)
    assert counts(masks.current(state)) == [7, 7, 4]


def test_grow_fills_up_from_what_is_open():
    mask = {"w": jnp.zeros((1, 6), bool).at[0, 0].set(True)}
    like = {"w": jnp.zeros((1, 6), bool).at[0, :4].set(True)}
    growth = {"w": jnp.array([[9.0, 1.0, 5.0, 2.0, 4.0, 3.0]])}
    grown = masks.grow(mask, growth, like)
    np.testing.assert_array_equal(grown["w"][0], [1, 0, 1, 0, 1, 1])
    room = {"w": jnp.array([[True, True, False, True, False, False]])}
    np.testing.assert_array_equal(
        masks.grow(mask, growth, like, into=room)["w"][0], [1, 1, 0, 1, 0, 0]
    )


# ------------------------------------------------------------------------------------------ SET


@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 1.0])
def test_set_drops_on_both_sides_of_zero_as_numpy_does(drop_rate):
    rng = np.random.default_rng(0)
    w, live = rng.normal(size=(8, 9)), rng.random((8, 9)) < 0.6
    kept = drop_by_sign({"w": jnp.asarray(live)}, {"w": jnp.asarray(w)}, drop_rate)["w"]
    want = live.copy().ravel()
    for side in (w > 0, w < 0):
        index = np.flatnonzero((live & side).ravel())
        index = index[np.argsort(np.abs(w.ravel()[index]))]
        want[index[: round(np.float32(drop_rate) * np.float32(index.size))]] = False
    np.testing.assert_array_equal(kept.ravel(), want)


def test_set_moves_on_schedule_and_needs_no_gradient():
    params, mask, loss_fn = problem()
    start = masks.apply(params, mask)
    make = lambda key: masks.set(MOMENTUM, mask, key=key, every=4, end=12, drop_rate=0.4)
    seen, before = masks_over_time(make(KEY), start, loss_fn, 20)
    old, drop = mask, jax.jit(lambda mask, w: drop_by_sign(mask, w, 0.4))
    for t in range(20):
        new = jax.tree.map(lambda m, t=t: m[t], seen)
        if t in (4, 8, 12):
            kept = drop(old, jax.tree.map(lambda w, t=t: w[t], before))
            inside = jax.tree.map(lambda k, n: bool((~k | n).all()), kept, new)
            assert all(jax.tree.leaves(inside))
            assert counts(new) == counts(mask)
            assert (new["a"]["kernel"] != old["a"]["kernel"]).any()
        else:
            same(new, old)
        old = new
    other, _ = masks_over_time(make(jax.random.key(1)), start, loss_fn, 20)
    assert (other["a"]["kernel"] != seen["a"]["kernel"]).any()
    blind, _ = masks_over_time(make(KEY), start, lambda p: 0.0 * p["c"]["kernel"].sum(), 5)
    kept = drop(mask, start)  # nothing has moved: the draw alone decides
    want = masks.grow(kept, masks.random(jax.random.fold_in(KEY, 4), params), mask)
    same(jax.tree.map(lambda m: m[4], blind), want)


def test_set_reaches_every_entry_in_time():
    """Random growth is uniform over what is out: chi-square over many keys."""
    mask = {"w": jnp.zeros((1, 10), bool).at[0, :4].set(True)}
    kept = {"w": mask["w"].at[0, :2].set(False)}
    draw = lambda key: masks.grow(kept, masks.random(key, {"w": jnp.zeros((1, 10))}), mask)["w"]
    times = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000)).sum((0, 1))
    assert (times[2:4] == 4000).all()
    out = np.delete(np.asarray(times), [2, 3])
    assert out.sum() == 8000
    # two of eight without replacement: variance n p (1 - p), and the counts sum to a constant
    chi = ((out - 1000) ** 2 / (4000 * 0.25 * 0.75)).sum() * 7 / 8
    assert chi < 24.3  # 99.9 % of 7 degrees


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda tx: masks.granet(tx, 0.5, end=500, steps=900, initial_sparsity=0.6),
            "below init",
        ),
        (lambda tx: masks.gradual(tx, 0.5, end=10, initial_sparsity=0.6), "below init"),
        (lambda tx: masks.granet(tx, 0.0, end=5, steps=9, every=1, initial_sparsity=0.5), "below"),
        (lambda tx: masks.gradual(tx, np.float32(0.3), end=10, initial_sparsity=0.5), "below init"),
        (lambda tx: masks.gradual(tx, 0.3, end=10, initial_sparsity=jnp.array(0.5)), "below init"),
        (lambda tx: masks.gradual(tx, {"a": 0.3}, end=10, initial_sparsity=0.5), "at 'a' is 0.3"),
        (lambda tx: masks.granet(tx, 0.5, end=10, steps=20, every=11), "every=11 is due within"),
        (lambda tx: masks.granet(tx, 0.5, end=5, begin=5, steps=20), "begin=5 is due before"),
        (lambda tx: masks.granet(tx, 1.0, end=500, steps=900), r"in \[0, 1\)"),
        (lambda tx: masks.granet(tx, 0.5, end=500, steps=900, drop_rate=1.5), "drop_rate is 1.5"),
        (lambda tx: masks.rigl(tx, None, drop_rate=-0.1), "drop_rate is -0.1"),
        (lambda tx: masks.set(tx, None, key=KEY, drop_rate=2), "drop_rate is 2"),
    ],
)
def test_options_that_cannot_be(make, match):
    with pytest.raises(ValueError, match=match):
        make(MOMENTUM)


@pytest.mark.parametrize(
    "make", [masks.gradual, lambda tx, s, end: masks.granet(tx, s, end=end, steps=9)]
)
def test_a_leaf_that_would_lose_all_its_entries(make):
    params, _, _ = problem()
    sparsity = {"a": {"kernel": 0.5, "bias": 0.0}, "c": {"kernel": 0.98}}
    with pytest.raises(
        ValueError, match=r"at 'c/kernel' is 0.98, .* of its 21 entries; at most 0.95"
    ):
        make(MOMENTUM, sparsity, end=500).init(params)
    with pytest.raises(ValueError, match=r"keeps 1 entries for 2 leaves; at most 0.964286"):
        make(MOMENTUM, 0.99, end=500).init(params)


def test_sparsities_that_are_equal_in_float32_are_equal():
    """And a leaf of a tree that is 0 is exempt, not below."""
    for pair in ((0.3, np.float32(0.3)), (np.float32(0.3), 0.3), (jnp.array(0.3), 0.3)):
        masks.gradual(MOMENTUM, pair[0], end=10, initial_sparsity=pair[1])
    masks.granet(MOMENTUM, {"a": 0.0, "b": 0.5}, end=500, steps=900, initial_sparsity=0.3)


def test_a_first_mask_that_is_sparser_than_the_first_sparsity():
    """Pruning would stall until the cubic has caught up; traced masks are not looked at."""
    params, mask, _ = problem()
    options = {"end": 500, "steps": 900}
    with pytest.raises(ValueError, match=r"keeps 22 of 56 entries, .* initial_sparsity=0.0 .* 56"):
        masks.granet(MOMENTUM, 0.9, mask=mask, **options).init(params)
    half = masks.topk(masks.random(KEY, params), sparsity=masks.erk(params, 0.5))
    masks.granet(MOMENTUM, 0.9, mask=half, initial_sparsity=0.5, **options).init(params)
    jax.jit(lambda m: masks.granet(MOMENTUM, 0.9, mask=m, **options).init(params))(mask)


def test_set_needs_a_typed_key():
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.set(MOMENTUM, None, key=jax.random.PRNGKey(0))


# ---------------------------------------------------------------------------------- in training


def static(key, p):
    return masks.topk(masks.random(key, p), sparsity=masks.uniform(p, 0.98))


def erk(key, p, sparsity=0.98):
    return masks.topk(masks.random(key, p), sparsity=masks.erk(p, sparsity))


SGD = optax.sgd(0.1, momentum=0.9)
TRAINED = {
    "static": lambda key, p: masks.sparse(SGD, static(key, p)),
    "rigl": lambda key, p: masks.rigl(SGD, erk(key, p), every=50, end=900),
    "gradual": lambda key, p: masks.gradual(SGD, 0.98, end=900, every=50, initial_sparsity=0.5),
    "granet": lambda key, p: masks.granet(
        SGD, 0.98, end=900, steps=1200, every=50, mask=erk(key, p, 0.5), initial_sparsity=0.5
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_moving_masks_train_where_a_static_random_one_does_not(name):
    """Digits, 64-256-256-10 at sparsity 0.98 and 1200 steps of SGD, three seeds."""
    x, x_test, y, y_test = digits.data()

    @jax.jit
    def run(key):
        params = digits.init(key)
        params, state = digits.fit(key, TRAINED[name](key, params), params, x, y, 1200)
        alive = sum(masks.current(state)[f"w{i}"].sum() for i in range(3))
        return digits.accuracy(params, x_test, y_test), alive

    found = [run(jax.random.key(seed)) for seed in range(3)]
    accuracy = np.array([a for a, _ in found])
    assert all(abs(int(alive) - 0.02 * 84_480) <= 2 for _, alive in found)
    if name == "static":
        assert accuracy.mean() <= 0.75, accuracy
    else:
        assert accuracy.min() >= 0.93, accuracy
