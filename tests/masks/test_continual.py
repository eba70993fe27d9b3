"""Continual learning with masks: what is in use stays; without shared leaves nothing is lost."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks
from jaxkit.masks.exchange import drop_halves, drop_up
from tests.masks import digits
from tests.masks.test_train import counts, outside

KEY = jax.random.key(0)
ADAMW = optax.adamw(0.02, weight_decay=0.1)


def none(params):
    return jax.tree.map(lambda w: jnp.zeros_like(w, bool), params)


def draw(key, params, sparsity):
    return masks.topk(masks.random(key, params), sparsity=sparsity)


# ------------------------------------------------------------------------------------ one change


def by_numpy(w, g, mask, used, drop, promise, rate):
    """Drop a share of the live entries by sorting, and grow as many of the free ones."""
    w, g, mask, used = (np.asarray(a).ravel() for a in (w, g, mask, used))
    kept = mask.copy()
    due = math.ceil(Fraction(str(rate)) * int(mask.sum()))
    groups = [(mask, due)]
    if drop == "set":
        up, down = mask & (w > 0), mask & ~(w > 0)
        fewer = due - min(due // 2, int(up.sum()))
        below = min(fewer, int(down.sum()))
        groups = [(up, due - below), (down, below)]
    worth = {"magnitude": np.abs(w), "set": np.abs(w), "taylor": (w * g) ** 2}[drop]
    for group, n in groups:
        index = np.flatnonzero(group)
        index = index[np.argsort(worth[index], kind="stable")]
        kept[index[:n]] = False
    assert kept.sum() == mask.sum() - due
    room = np.flatnonzero((~used | mask) & ~kept)
    room = room[np.argsort(-promise.ravel()[room], kind="stable")]
    kept[room[: mask.sum() - kept.sum()]] = True
    return kept


@pytest.mark.parametrize("drop", ["magnitude", "set", "taylor"])
@pytest.mark.parametrize("growth", ["random", "unfired", "gradient", "momentum"])
def test_a_change_is_that_of_numpy(drop, growth):
    """Four steps with a change before the third and the fourth; used entries never grow."""
    rng = np.random.default_rng(0)
    shape, rate = (6, 10), 0.4
    params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    mask = {"w": jnp.asarray(rng.permutation(60).reshape(shape) < 24)}
    used = {"w": jnp.asarray(rng.permutation(60).reshape(shape) < 20)}
    grads = [{"w": jnp.asarray(rng.normal(size=shape), jnp.float32)} for _ in range(4)]
    tx = masks.cl_dst(
        optax.sgd(0.05), mask, used, key=KEY, every=2, drop=drop, growth=growth, drop_rate=rate
    )
    params = masks.apply(params, mask)
    state, update = tx.init(params), jax.jit(tx.update)
    now, moments, fired = np.asarray(mask["w"]), np.zeros((2, *shape)), np.asarray(mask["w"])
    for t in range(4):
        g = np.asarray(grads[t]["w"], np.float64)
        moments = np.stack([0.9 * moments[0] + 0.1 * g, 0.999 * moments[1] + 0.001 * g**2])
        fired = fired | now
        if t == 2:
            drawn = np.asarray(masks.random(jax.random.fold_in(KEY, t), params)["w"])
            promise = {
                "random": drawn,
                "unfired": drawn - fired,
                "gradient": np.abs(grads[t]["w"]),
                "momentum": np.abs(moments[0]) / (np.sqrt(moments[1]) + 1e-8),
            }[growth]
            args = (params["w"], grads[t]["w"], now, used["w"], drop, promise, rate)
            now = by_numpy(*args).reshape(shape)
            grown = now & ~np.asarray(mask["w"])
            assert grown.any() and not (grown & np.asarray(used["w"])).any()
        updates, state = update(grads[t], state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(masks.current(state)["w"], now)
        assert now.sum() == 24 and not np.asarray(params["w"])[~now].any()


def test_half_of_what_leaves_is_positive():
    """ceil(r n) leave, rounded as fractions are; what one side lacks the other loses."""
    cases = [  # live positive and negative entries, the share, how many of either are due
        (18, 6, 0.5, 6, 6), (5, 4, 0.5, 2, 3), (20, 2, 0.5, 9, 2), (1, 9, 0.6, 1, 5),
        (6, 4, 0.04, 0, 1), (6, 4, 0.0, 0, 0), (15, 15, 0.1, 1, 2), (3, 4, 1.0, 3, 4),
    ]  # fmt: skip
    w, mask, rate, due = np.zeros((8, 30)), np.zeros((8, 30), bool), np.zeros(8), np.zeros((8, 2))
    for i, (up, down, share, *gone) in enumerate(cases):
        w[i, : up + down] = [*range(1, up + 1), *range(-1, -down - 1, -1)]
        mask[i, : up + down], rate[i], due[i] = True, share, gone
        assert sum(gone) == math.ceil(Fraction(str(share)) * (up + down))
    drops = lambda m, w, r: (drop_halves(m, w, r, where="*"), drop_up(m, w, r, where="*"))
    trees = {"w": jnp.asarray(mask)}, {"w": jnp.asarray(w)}, jnp.asarray(rate)
    halves, lowest = jax.jit(jax.vmap(drops))(*trees)
    gone = mask & ~np.asarray(halves["w"])
    np.testing.assert_array_equal(
        np.stack([(gone & (w > 0)).sum(1), (gone & (w < 0)).sum(1)], 1), due
    )
    assert (np.abs(np.where(gone, w, 0)).max(1) == due.max(1)).all()
    np.testing.assert_array_equal((mask & ~np.asarray(lowest["w"])).sum(1), due.sum(1))


def test_unfired_entries_come_before_those_that_were_once_active():
    """Everything moves each time: no entry returns before all have had their turn."""
    params = {"w": jnp.ones((1, 12))}
    mask = {"w": jnp.arange(12)[None] < 3}
    tx = masks.cl_dst(
        optax.sgd(0.0), mask, none(params), key=KEY, every=1, growth="unfired", drop_rate=1.0
    )
    state, seen = tx.init(params), []
    for _ in range(4):
        _, state = jax.jit(tx.update)(params, state, params)
        seen.append(np.asarray(state.mask["w"][0]))
    assert (np.sum(seen, 0) == 1).all()


# ------------------------------------------------------------------------------------- many tasks


def tasks(n=3, width=12):
    """Random labels over random points; task t has the logits 2t and 2t + 1."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(n, 24, 6)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 2, (n, 24)))
    return x, y, digits.init(KEY, (6, width, 2 * n))


def run(own, tx=ADAMW, steps=60, used_bias=True):
    """Train three tasks one after the other; return the accuracy matrix and the stores."""
    x, y, store = tasks()
    used, done, matrix, history = none(store), [], np.zeros((3, 3)), []

    def logits(params, t):
        return jax.lax.dynamic_slice_in_dim(digits.logits(params, x[t]), 2 * t, 2, 1)

    @jax.jit
    def learn(store, used, mask, t):
        tx_t = masks.cl_dst(
            tx, mask, used, key=jax.random.fold_in(KEY, t), every=10, end=steps, drop_rate=0.5
        )

        def loss(params):
            out = logits(params, t)
            return optax.softmax_cross_entropy_with_integer_labels(out, y[t]).mean()

        def step(carry, _):
            params, state = carry
            updates, state = tx_t.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = masks.apply(store, mask)
        (params, state), _ = jax.lax.scan(step, (start, tx_t.init(start)), None, steps)
        return params, masks.current(state)

    score = jax.jit(lambda params, t: (logits(params, t).argmax(1) == y[t]).mean())
    for t in range(3):
        mask = draw(jax.random.fold_in(KEY, 10 + t), store, 0.7)
        params, mask = learn(store, used, mask, t)
        before, taken = store, used
        store, used, task = masks.remember(store, used, params, mask, own=own)
        if not used_bias:  # leave the biases to everyone, and keep no copies
            used = {k: m & (k[0] == "w") for k, m in used.items()}
        history.append((before, taken, params, mask, store))
        done.append(task)
        for s in range(t + 1):
            matrix[t, s] = score(masks.recall(store, done[s]), s)
    return matrix, history


def bias(path, leaf):
    return path.startswith("bias")


@pytest.fixture(scope="module")
def own_biases():
    return run(bias)


def test_what_is_in_use_keeps_its_bits_under_decay(own_biases):
    _, history = own_biases
    for before, used, params, mask, store in history[1:]:
        free = jax.tree.map(jnp.logical_not, used)
        assert outside(store, free) == outside(before, free)
        held = jax.tree.map(lambda u, m: ~(u & m), used, mask)  # in use, and read by this task
        assert outside(params, held) == outside(before, held)
        assert sum(counts({k: ~m for k, m in held.items() if k[0] == "w"})) > 5
        trained = (np.asarray(params["w0"]) != np.asarray(before["w0"]))[
            np.asarray(mask["w0"] & free["w0"])
        ]
        assert trained.all()


def test_own_biases_forget_nothing_and_shared_ones_do(own_biases):
    matrix, _ = own_biases
    assert (np.diag(matrix) > 0.6).all()
    np.testing.assert_array_equal(masks.transfer(jnp.asarray(matrix)).backward, [0.0, 0.0])
    nobody = lambda path, leaf: False
    shared, _ = run(nobody, used_bias=False)
    assert (masks.transfer(jnp.asarray(shared)).backward != 0).any()
    # or frozen after the first task: nothing is lost either
    frozen, history = run(nobody)
    np.testing.assert_array_equal(masks.transfer(jnp.asarray(frozen)).backward, [0.0, 0.0])
    np.testing.assert_array_equal(history[2][4]["bias0"], history[0][4]["bias0"])


def test_free_capacity_shrinks_geometrically():
    """Independent masks of density d: a share (1 - d)^t is free after t tasks, within 3 sigma."""
    params, n, d = {"w": jnp.zeros((100, 100))}, 10_000, 0.2

    @jax.jit
    def free(key):
        drawn = jax.vmap(lambda k: draw(k, params, 1 - d)["w"])(jax.random.split(key, 6))
        return 1 - jnp.mean(jax.lax.associative_scan(jnp.logical_or, drawn), (1, 2))

    expected = (1 - d) ** np.arange(1, 7)
    sigma = np.sqrt(expected * (1 - expected) / n)  # an upper bound: the counts are exact
    assert (np.abs(free(KEY) - expected) <= 3 * sigma + 1e-6).all()


def test_metrics_by_a_loop():
    a = np.random.default_rng(0).random((5, 5)).astype(np.float32)
    found = masks.transfer(jnp.asarray(a))
    bwt = [np.mean([a[i, t] - a[t, t] for t in range(i)]) for i in range(1, 5)]
    fwt = [np.mean([a[i, t] for t in range(i + 1, 5)]) for i in range(4)]
    acc = [np.mean([a[4, t] for t in range(i + 1)]) for i in range(5)]
    np.testing.assert_allclose(found.backward, bwt, rtol=1e-5)
    np.testing.assert_allclose(found.forward, fwt, rtol=1e-5)
    np.testing.assert_allclose(found.accuracy, acc, rtol=1e-5)


# -------------------------------------------------------------------------------------- bad input


def test_tasks_that_cannot_be():
    _, _, store = tasks()
    dense = draw(KEY, store, 0.0)
    _, used, _ = masks.remember(store, none(store), store, dense, own=bias)
    with pytest.raises(ValueError, match="no entry of the mask is free"):
        masks.cl_dst(ADAMW, draw(KEY, store, 0.5), used, key=KEY).init(store)
    some = draw(KEY, store, 0.5)
    with pytest.raises(ValueError, match="'w1' is only in the first"):
        masks.cl_dst(ADAMW, some, {k: m for k, m in used.items() if k != "w1"}, key=KEY).init(store)
    with pytest.raises(ValueError, match="drop='small' is none of"):
        masks.cl_dst(ADAMW, some, used, key=KEY, drop="small")
    with pytest.raises(ValueError, match="growth='set' is none of"):
        masks.cl_dst(ADAMW, some, used, key=KEY, growth="set")
    with pytest.raises(ValueError, match="'w1' is only in the first"):
        masks.recall(store, masks.Task({k: m for k, m in some.items() if k != "w1"}, {}))
    for shape in ((1, 1), (2, 3), (4,)):
        with pytest.raises(ValueError, match="a square matrix of two or more"):
            masks.transfer(jnp.zeros(shape))
