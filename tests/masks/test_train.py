"""Sparse training: exact zeros whatever the optimizer, and the same numbers as the live entries."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks
from jaxkit.masks.train import _renew

KEY = jax.random.key(0)


def problem(dtype=jnp.float32):
    """A small regression: params, mask, and a loss whose gradient is dense everywhere."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"a": {"kernel": draw(5, 7), "bias": draw(7)}, "c": {"kernel": draw(7, 3)}}
    x, y = draw(16, 5), draw(16, 3)

    def loss_fn(params, batch=(x, y)):
        hidden = jnp.tanh(batch[0] @ params["a"]["kernel"] + params["a"]["bias"])
        return jnp.mean((hidden @ params["c"]["kernel"] - batch[1]) ** 2).astype(jnp.float32)

    mask = masks.topk(masks.magnitude(params), sparsity=0.6)
    return params, mask, loss_fn


def train(tx, params, loss_fn, steps=20):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), None, steps)


OPTIMIZERS = {
    "momentum": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "lion": optax.lion(0.01),
    "noisy_sgd": optax.noisy_sgd(0.05, key=0),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.01)),
    "lamb": optax.lamb(0.01, weight_decay=0.1),
    "adafactor": optax.adafactor(0.01, min_dim_size_to_factor=2),
    "adagrad": optax.adagrad(0.05),
    "schedule_free": optax.contrib.schedule_free_adamw(0.01, warmup_steps=2),
    "frozen_part": optax.partition(
        {"train": optax.adam(0.01), "freeze": optax.set_to_zero()},
        {"a": {"kernel": "train", "bias": "freeze"}, "c": {"kernel": "train"}},
    ),
    "every_third": optax.MultiSteps(optax.adamw(0.01, weight_decay=0.1), 3),
}


def dead(params, mask):
    leaves = zip(*map(jax.tree.leaves, (params, mask)), strict=True)
    return np.concatenate(
        [np.asarray(w, np.float32)[..., ~np.asarray(m)].ravel() for w, m in leaves]
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_entries_are_zero_after_every_update(name, dtype):
    """Also from params that were not masked; and live entries do move."""
    params, mask, loss_fn = problem(dtype)
    (final, _), history = train(masks.sparse(OPTIMIZERS[name], mask), params, loss_fn)
    for t in range(20):
        assert not dead(jax.tree.map(lambda w: w[t], history), mask).any()
    moved = np.asarray((final["a"]["kernel"] != params["a"]["kernel"]) & mask["a"]["kernel"])
    assert moved.sum() > 0.8 * np.asarray(mask["a"]["kernel"]).sum()
    assert final["a"]["kernel"].dtype == dtype


@pytest.mark.parametrize("name", ["momentum", "adamw", "lion", "noisy_sgd", "adagrad"])
def test_hold_as_the_last_link_of_a_chain(name):
    params, mask, loss_fn = problem()
    tx = optax.chain(OPTIMIZERS[name], masks.hold(mask))
    (final, _), _ = train(tx, params, loss_fn)
    assert not dead(final, mask).any()
    same, _ = train(masks.sparse(OPTIMIZERS[name], mask), params, loss_fn)
    for a, b in zip(jax.tree.leaves(same[0]), jax.tree.leaves(final), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)  # element-wise optimizers: hold is sparse


@pytest.mark.parametrize("name", ["momentum", "adamw", "clipped"])
def test_sparse_training_is_training_of_the_live_entries(name):
    """The wrapped optimizer on where(mask, w, 0) and the bare one on the vector of live entries."""
    params, mask, loss_fn = problem()
    index = [np.nonzero(np.asarray(m)) for m in jax.tree.leaves(mask)]
    structure = jax.tree.structure(params)

    def scatter(live):
        leaves = zip(live, index, jax.tree.leaves(params), strict=True)
        full = [jnp.zeros_like(w).at[i].set(v) for v, i, w in leaves]
        return jax.tree.unflatten(structure, full)

    live = [w[i] for w, i in zip(jax.tree.leaves(params), index, strict=True)]
    (want, _), _ = train(OPTIMIZERS[name], live, lambda live: loss_fn(scatter(live)))
    tx = masks.sparse(OPTIMIZERS[name], mask)
    (got, _), _ = train(tx, masks.apply(params, mask), loss_fn)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(scatter(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_masking_gradients_alone_is_not_enough():
    """The failures that the wrapper exists for: momentum and decay move masked entries."""
    params, mask, loss_fn = problem()
    for tx in (optax.sgd(0.1, momentum=0.9), optax.adamw(0.1, weight_decay=0.1)):
        state = tx.init(params)
        _, state = tx.update(jax.grad(loss_fn)(params), state, params)  # one dense step
        grads = masks.apply(jax.grad(loss_fn)(params), mask)
        updates, _ = tx.update(grads, state, params)
        assert np.abs(dead(updates, mask)).min() > 0


@pytest.mark.parametrize("inside", [True, False])
def test_multisteps_either_way(inside):
    params, mask, loss_fn = problem()
    adam = optax.adamw(0.05)
    if inside:
        tx = masks.sparse(optax.MultiSteps(adam, 2), mask)
    else:
        tx = optax.MultiSteps(masks.sparse(adam, mask), 2).gradient_transformation()
    start = masks.apply(params, mask)
    (final, state), history = train(tx, start, loss_fn, 6)
    for t in range(6):
        assert not dead(jax.tree.map(lambda w: w[t], history), mask).any()
    # the same gradient twice is that gradient: three steps of the bare wrapper
    (want, _), _ = train(masks.sparse(adam, mask), start, loss_fn, 3)
    for a, b in zip(jax.tree.leaves(final), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    current = masks.current(state)
    np.testing.assert_array_equal(current["a"]["kernel"], mask["a"]["kernel"])


def test_donation_leaves_the_callers_mask():
    params, mask, loss_fn = problem()
    tx = masks.sparse(optax.adam(0.1), mask)

    @jax.jit
    def init(params):
        return tx.init(params)

    step = jax.jit(
        lambda params, state: tx.update(jax.grad(loss_fn)(params), state, params),
        donate_argnums=1,
    )
    state = tx.init(params)
    mine = masks.current(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CPU may say that it did not use a donated buffer
        _, state = step(params, state)
    for m, c in zip(jax.tree.leaves(mask), jax.tree.leaves(mine), strict=True):
        np.testing.assert_array_equal(m, c)  # both are still alive


# ------------------------------------------------------------------------------------ constrain


def outside(params, mask):
    """The bits of what the mask leaves out."""
    leaves = zip(*map(jax.tree.leaves, (params, mask)), strict=True)
    return [np.asarray(w)[~np.asarray(m)].tobytes() for w, m in leaves]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_entries_keep_their_bits(name, dtype):
    """Negative zeros and tiny numbers too; and trained entries do move."""
    params, mask, loss_fn = problem(dtype)
    w = params["a"]["kernel"]
    w = jnp.where(mask["a"]["kernel"], w, jnp.where(jnp.arange(7) % 2 == 0, -0.0, 1e-30))
    params["a"]["kernel"] = w.astype(dtype)
    (final, state), history = train(masks.constrain(OPTIMIZERS[name], mask), params, loss_fn)
    for t in range(20):
        assert outside(jax.tree.map(lambda w: w[t], history), mask) == outside(params, mask)
    moved = np.asarray((final["a"]["kernel"] != params["a"]["kernel"]) & mask["a"]["kernel"])
    assert moved.sum() > 0.8 * np.asarray(mask["a"]["kernel"]).sum()
    np.testing.assert_array_equal(masks.current(state)["a"]["kernel"], mask["a"]["kernel"])


@pytest.mark.parametrize("name", ["momentum", "adamw", "clipped"])
def test_constrained_training_is_training_of_the_entries_in_the_mask(name):
    """The wrapped optimizer on all of w, and the bare one on the vector of trainable entries."""
    params, mask, loss_fn = problem()
    index = [np.nonzero(np.asarray(m)) for m in jax.tree.leaves(mask)]
    structure = jax.tree.structure(params)

    def scatter(live):
        leaves = zip(live, index, jax.tree.leaves(params), strict=True)
        return jax.tree.unflatten(structure, [w.at[i].set(v) for v, i, w in leaves])

    live = [w[i] for w, i in zip(jax.tree.leaves(params), index, strict=True)]
    (want, _), _ = train(OPTIMIZERS[name], live, lambda live: loss_fn(scatter(live)))
    (got, _), _ = train(masks.constrain(OPTIMIZERS[name], mask), params, loss_fn)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(scatter(want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("outer", ["sparse", "constrain"])
def test_sparse_and_constrain_nest(outer):
    """Outside the mask zero, inside and used frozen, inside and free trained; either way around."""
    params, mask, loss_fn = problem()
    used = masks.topk(masks.random(KEY, params), sparsity=0.5)
    free = jax.tree.map(jnp.logical_not, used)
    adam = OPTIMIZERS["adamw"]
    if outer == "sparse":
        tx = masks.sparse(masks.constrain(adam, free), mask)
    else:  # the frozen entries first, so that only free ones are zeroed
        tx = masks.constrain(masks.sparse(adam, mask), free)
    (final, state), _ = train(tx, params, loss_fn)
    for w, w0, m, u in zip(*map(jax.tree.leaves, (final, params, mask, used)), strict=True):
        w, w0, m, u = map(np.asarray, (w, w0, m, u))
        gone = ~m if outer == "sparse" else ~m & ~u
        frozen = m & u if outer == "sparse" else u
        assert not w[gone].any()
        assert w[frozen].tobytes() == w0[frozen].tobytes()
        assert (w != w0)[m & ~u].all()
    read = lambda kind: masks.current(state, kind)["a"]["kernel"]
    np.testing.assert_array_equal(read(None), mask["a"]["kernel"])
    np.testing.assert_array_equal(read(masks.SparseState), mask["a"]["kernel"])
    np.testing.assert_array_equal(read(masks.ConstrainState), free["a"]["kernel"])


def test_a_mask_inside_survives_a_change_of_the_mask_around_it():
    """The outer rule renews moments, not the frozen mask that its own rule had narrowed."""
    params, mask, loss_fn = problem()
    narrow = lambda key, m, w, g, t: jax.tree.map(lambda m: m & (jnp.arange(m.shape[-1]) > 0), m)
    every = lambda params: jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    inner = masks.constrain(optax.adam(0.01), every, update=narrow, begin=0, end=0)
    tx = masks.rigl(inner, mask, every=2, drop_rate=0.5)
    start = masks.apply(params, mask)
    (final, state), _ = train(tx, start, loss_fn, 9)
    for m in jax.tree.leaves(masks.current(state, masks.ConstrainState)):
        assert not m[..., 0].any() and m[..., 1:].all()
    held, now = start["c"]["kernel"][:, 0], final["c"]["kernel"][:, 0]
    assert ((now == held) | (now == 0)).all()  # out of the free columns: held, or dropped
    free = masks.current(state)["c"]["kernel"][:, 1:]
    assert (final["c"]["kernel"] != start["c"]["kernel"])[:, 1:][free].all()


def test_constrain_changes_its_mask_by_a_rule():
    """A rule that freezes what has grown: values stay, moments of what changed sides start anew."""
    params, _, loss_fn = problem()
    small = lambda params: jax.tree.map(lambda w: jnp.abs(w) < 0.5, params)
    rule = lambda key, mask, params, grads, step: jax.tree.map(jnp.logical_and, mask, small(params))
    tx = masks.constrain(optax.adam(0.1), small, update=rule, begin=5, end=5)
    (final, state), history = train(tx, params, loss_fn, 10)
    before = jax.tree.map(lambda w: w[4], history)
    mask = masks.current(state)
    for m, w0, w5, w10, mu in zip(
        *map(jax.tree.leaves, (mask, params, before, final, state.inner[0].mu)), strict=True
    ):
        due = (np.abs(w0) < 0.5) & (np.abs(w5) < 0.5)
        np.testing.assert_array_equal(m, due)
        assert np.asarray(w10)[~due].tobytes() == np.asarray(w5)[~due].tobytes()
        assert not np.asarray(mu)[~due].any()
        assert (np.asarray(w10) != np.asarray(w5))[due].all()
    assert sum(counts(small(params))) > sum(counts(mask)) > 0  # some had grown


def test_a_mask_that_is_a_callable_tree():
    """A module of Equinox is a tree and can be called; as a mask it is a tree."""
    model = eqx.filter(eqx.nn.MLP(2, 3, 4, 1, key=KEY), eqx.is_array)
    mask = masks.topk(masks.magnitude(model), sparsity=0.5)
    assert callable(mask)
    for tx in (masks.sparse(optax.adam(0.1), mask), masks.constrain(optax.adam(0.1), mask)):
        _, state = tx.update(model, tx.init(model), model)
        got = jax.tree.leaves(masks.current(state))
        for a, b in zip(got, jax.tree.leaves(mask), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_rule_that_remembers():
    """Memory is updated at every step, the rule asked at its own; both see the dense gradient."""
    params, mask, loss_fn = problem()
    count = lambda seen, mask, grads: (seen[0] + 1, jax.tree.map(jnp.add, seen[1], grads))
    start = lambda params, mask: (jnp.int32(0), jax.tree.map(jnp.zeros_like, params))
    asked = []

    def rule(key, mask, params, grads, step, seen):
        asked.append(seen)
        growth = masks.magnitude(seen[1])
        return masks.regrow(mask, masks.magnitude(params), growth, drop_rate=0.5)

    tx = masks.sparse(
        optax.sgd(0.1), mask, update=rule, begin=2, every=3, memory=masks.Memory(start, count)
    )
    begin = masks.apply(params, mask)
    (_, state), history = train(tx, begin, loss_fn, 3)
    grads = [jax.grad(loss_fn)(begin)]
    grads += [jax.grad(loss_fn)(jax.tree.map(lambda w, t=t: w[t], history)) for t in (0, 1)]
    total = jax.tree.map(lambda *g: sum(g), *grads)
    assert state.memory[0] == 3 and len(asked) == 1  # traced once
    for a, b in zip(*map(jax.tree.leaves, (state.memory[1], total)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    before = jax.tree.map(lambda w: w[1], history)
    want = masks.regrow(
        mask, masks.magnitude(before), masks.magnitude(state.memory[1]), drop_rate=0.5
    )
    np.testing.assert_array_equal(state.mask["a"]["kernel"], want["a"]["kernel"])
    assert (want["a"]["kernel"] != mask["a"]["kernel"]).any()


def test_bad_input():
    params, mask, _ = problem()
    tx = masks.sparse(optax.sgd(0.1), mask)
    with pytest.raises(ValueError, match="needs the params"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="'c/kernel' is only in the first"):
        masks.sparse(optax.sgd(0.1), {"a": mask["a"]}).init(params)
    with pytest.raises(ValueError, match="holds 0 masks"):
        masks.current(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="holds 2 masks"):
        masks.current((tx.init(params), tx.init(params)))
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.sparse(optax.sgd(0.1), mask, key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        masks.gradual(optax.sgd(0.1), 1.0, end=10)
    with pytest.raises(ValueError, match="begin=10 is due before end=10"):
        masks.gradual(optax.sgd(0.1), 0.5, begin=10, end=10)
    with pytest.raises(ValueError, match="growth needs"):
        masks.update_mask(None, mask, params, None, drop_rate=0.3)
    with pytest.raises(ValueError, match=r"drop_rate is 1\.5"):
        masks.regrow(mask, masks.magnitude(params), masks.magnitude(params), drop_rate=1.5)


# --------------------------------------------------------------------------- masks that change


def counts(mask):
    return [int(m.sum()) for m in jax.tree.leaves(mask)]


def test_gradual_follows_the_cubic_with_nested_masks():
    params, _, loss_fn = problem()
    tx = masks.gradual(optax.adam(0.02), 0.9, begin=3, end=20, every=4)
    step = jax.jit(lambda params, state: tx.update(jax.grad(loss_fn)(params), state, params))
    state, n, before = tx.init(params), 5 * 7 + 7 * 3, None
    cubic = optax.polynomial_schedule(0.0, 0.9, 3, 17, 3)
    for t in range(30):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        mask = masks.current(state)
        last = max([3, *range(3, min(t, 20) + 1, 4)] + ([20] if t >= 20 else []))
        due = n if t < 3 else round(n * (1 - float(cubic(last))))
        assert counts({"a": mask["a"]["kernel"], "c": mask["c"]["kernel"]}) == counts(
            {"a": params["a"]["kernel"] != 0, "c": params["c"]["kernel"] != 0}
        )
        assert sum(counts([mask["a"]["kernel"], mask["c"]["kernel"]])) == due
        assert mask["a"]["bias"].all()
        if before is not None:
            nested = jax.tree.map(lambda new, old: bool((~new | old).all()), mask, before)
            assert all(jax.tree.leaves(nested))
        before = mask
    assert due == round(n * (1 - 0.9))


def test_gradual_per_leaf_keeps_exempt_leaves():
    params, _, loss_fn = problem()
    sparsity = masks.uniform(params, 0.8)
    tx = masks.gradual(optax.sgd(0.1), sparsity, end=2, every=1)
    (_, state), _ = train(tx, params, loss_fn, 4)
    mask = masks.current(state)
    assert counts(mask) == [7, 7, 4]


def regrow_by_numpy(mask, scores, growth, drop):
    """Sort the live by score, drop the tail; sort all that is out by growth, take the head."""
    flat, s, g = (np.asarray(x).ravel() for x in (mask, scores, growth))
    live = np.flatnonzero(flat)
    kept = live[np.argsort(-s[live], kind="stable")][: live.size - drop]
    out = np.setdiff1d(np.arange(flat.size), kept)
    grown = out[np.argsort(-g[out], kind="stable")][:drop]
    new = np.zeros(flat.size, bool)
    new[kept] = new[grown] = True
    return new.reshape(mask.shape)


@pytest.mark.parametrize("drop_rate", [0.0, 0.1, 0.3, 1.0])
def test_regrow_equals_numpy(drop_rate):
    rng = np.random.default_rng(1)
    draw = lambda: {
        "a": jnp.asarray(rng.integers(0, 6, (5, 7)) / 4),
        "c": jnp.asarray(rng.normal(size=(9, 4))),
    }
    scores, growth = draw(), draw()  # with ties in a, without in c
    mask = {"a": jnp.asarray(rng.random((5, 7)) < 0.3), "c": jnp.asarray(rng.random((9, 4)) < 0.5)}
    got = masks.regrow(mask, scores, growth, drop_rate=drop_rate)
    for name in mask:
        live = int(mask[name].sum())
        drop = round(float(np.float32(drop_rate) * np.float32(live)))
        want = regrow_by_numpy(mask[name], scores[name], growth[name], drop)
        np.testing.assert_array_equal(got[name], want)
        assert int(got[name].sum()) == live


def test_update_mask_is_pruning_then_moving():
    params, _, loss_fn = problem()
    full = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    pruned = masks.update_mask(None, full, params, None, sparsity=0.5)
    for a, b in zip(
        *map(jax.tree.leaves, (pruned, masks.topk(masks.magnitude(params), sparsity=0.5))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    grads = jax.grad(loss_fn)(masks.apply(params, pruned))
    both = masks.update_mask(None, full, params, grads, sparsity=0.5, drop_rate=0.2)
    only = masks.regrow(pruned, masks.magnitude(params), masks.magnitude(grads), drop_rate=0.2)
    for a, b in zip(*map(jax.tree.leaves, (both, only)), strict=True):
        np.testing.assert_array_equal(a, b)
    drawn = masks.update_mask(KEY, pruned, params, None, drop_rate=0.5)
    again = masks.update_mask(KEY, pruned, params, None, drop_rate=0.5)
    other = masks.update_mask(jax.random.key(1), pruned, params, None, drop_rate=0.5)
    assert counts(drawn) == counts(pruned)
    np.testing.assert_array_equal(drawn["a"]["kernel"], again["a"]["kernel"])
    assert (drawn["a"]["kernel"] != other["a"]["kernel"]).any()


def test_rigl_moves_on_schedule_and_reads_the_dense_gradient():
    params, mask, loss_fn = problem()
    params = masks.apply(params, mask)
    tx = masks.rigl(optax.sgd(0.05, momentum=0.9), mask, every=4, end=12, drop_rate=0.4)
    state, step = tx.init(params), jax.jit(tx.update)
    update_mask = jax.jit(lambda *args, rate: masks.update_mask(None, *args, drop_rate=rate))
    for t in range(20):
        grads = jax.grad(loss_fn)(params)
        rate = 0.4 / 2 * (1 + np.cos(np.pi * t / 12)) if t in (0, 4, 8, 12) else 0.0
        want = update_mask(mask, params, grads, rate=float(rate))
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        for a, b in zip(*map(jax.tree.leaves, (masks.current(state), want)), strict=True):
            np.testing.assert_array_equal(a, b)
        assert counts(want) == counts(mask)
        if t in (0, 4, 8):
            assert (want["a"]["kernel"] != mask["a"]["kernel"]).any()
        mask = want
        assert not dead(params, mask).any()


def test_growth_finds_a_planted_gradient():
    """A weight that is off but matters comes in; a loss that multiplies by the mask hides it."""
    params = {"w": jnp.full((5, 7), 1.0)}
    mask = {"w": jnp.zeros((5, 7), bool).at[0].set(True)}
    loss = lambda p: 100.0 * p["w"][3, 4] + p["w"].sum()
    new = masks.update_mask(None, mask, params, jax.grad(loss)(params), drop_rate=1 / 7)
    assert bool(new["w"][3, 4]) and int(new["w"].sum()) == 7
    hidden = jax.grad(lambda p: loss(jax.tree.map(jnp.multiply, p, mask)))(params)
    assert not masks.update_mask(None, mask, params, hidden, drop_rate=1 / 7)["w"][3, 4]


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "schedule_free", "frozen_part"])
def test_moments_start_anew_where_the_mask_changes(name):
    params, mask, loss_fn = problem()
    tx = masks.rigl(OPTIMIZERS[name], mask, every=5, drop_rate=0.5)
    (params, state), _ = train(tx, masks.apply(params, mask), loss_fn, 5)
    old = masks.current(state)
    grads = jax.grad(loss_fn)(params)
    new = masks.update_mask(None, old, params, grads, drop_rate=0.5)
    moved = jax.tree.map(jnp.not_equal, old, new)
    renewed = _renew(OPTIMIZERS[name], state.inner, moved, masks.apply(params, new))
    first = OPTIMIZERS[name].init(masks.apply(params, new))
    changed = np.asarray(old["a"]["kernel"] != new["a"]["kernel"])
    assert changed.any()
    seen = 0
    for before, after, fresh in zip(
        *map(jax.tree.leaves, (state.inner, renewed, first)), strict=True
    ):
        if jnp.shape(before) == changed.shape:
            seen += 1
            np.testing.assert_array_equal(np.asarray(after)[changed], np.asarray(fresh)[changed])
            np.testing.assert_array_equal(np.asarray(after)[~changed], np.asarray(before)[~changed])
        elif jnp.ndim(before) == 0:
            np.testing.assert_array_equal(after, before)
    assert seen >= 1


@pytest.mark.parametrize("name", ["momentum", "adamw", "adagrad", "schedule_free"])
def test_entries_that_come_in_start_from_zero_without_a_past(name):
    """One entry is out at first, with a value; one leaves and returns, and a rule says so or not.

    They are then where an entry is that lay at 0 until now without a gradient, up to the rounding
    of w + (u - w).
    """
    mask = {"w": jnp.array([[True, True, True, False]])}
    new = {"w": jnp.array([[False, True, True, True]])}
    params, grads = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}, {"w": jnp.full((1, 4), 0.5)}
    rest = {"w": jnp.zeros((1, 4))}
    _, past = OPTIMIZERS[name].update(rest, OPTIMIZERS[name].init(rest), rest)
    anew, _ = OPTIMIZERS[name].update(grads, past, rest)

    def after(change):
        tx = masks.sparse(OPTIMIZERS[name], mask, update=lambda *_: change, every=9, begin=1)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates)["w"][0]

    stayed = {"w": jnp.array([[False, True, False, True]])}
    said, unsaid = after(masks.Change(new, stayed)), after(new)
    np.testing.assert_allclose(said[2:], anew["w"][0, 2:], rtol=1e-5, atol=1e-6)
    assert said[0] == unsaid[0] == 0
    np.testing.assert_array_equal(said[jnp.array([1, 3])], unsaid[jnp.array([1, 3])])
    assert unsaid[2] > 2


def test_a_rule_of_the_user_with_a_key():
    params, mask, loss_fn = problem()
    rule = lambda key, mask, params, grads, step: masks.update_mask(
        key, mask, params, None, drop_rate=0.3
    )
    tx = masks.sparse(optax.adam(0.01), mask, update=rule, every=2, key=KEY)
    (_, state), _ = train(tx, params, loss_fn, 1)
    want = masks.update_mask(jax.random.fold_in(KEY, 0), mask, params, None, drop_rate=0.3)
    np.testing.assert_array_equal(masks.current(state)["a"]["kernel"], want["a"]["kernel"])
