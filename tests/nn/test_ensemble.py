from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import load
from jaxkit import nn, trace
from tests.counting import counting

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)


# ---------------------------------------------------------------- one task after another (LAE)


def test_experts_that_agree_predict_as_one():
    z = draw(20, 6)
    np.testing.assert_allclose(nn.max_probability(z, z), jax.nn.softmax(z), rtol=1e-6)
    np.testing.assert_array_equal(nn.max_probability(z, z).argmax(-1), z.argmax(-1))
    np.testing.assert_array_equal(nn.max_probability(z), jax.nn.softmax(z))  # the first task


def test_the_surer_expert_decides():
    online, offline = draw(50, 6), 3 * draw(50, 6)
    p = np.stack([jax.nn.softmax(online), jax.nn.softmax(offline)])
    surer = p.max(-1).argmax(0)
    want = p.argmax(-1)[surer, np.arange(50)]
    got = nn.max_probability(online, offline)
    np.testing.assert_array_equal(got.argmax(-1), want)
    np.testing.assert_array_equal(nn.max_probability(offline, online), got)
    mean = p.mean(0).argmax(-1)
    assert (mean != want).any()  # two close calls for one class against one sure call for another


def test_averages_accumulate_slowly():
    """offline_n = c + decay^n (offline_0 - c) for an online module that stays c."""
    online, start = {"a": draw(3), "b": draw(2, 2)}, {"a": draw(3), "b": draw(2, 2)}
    follow = lambda offline, _: (optax.incremental_update(online, offline, 1e-4), None)
    for n in (1, 1000):
        end, _ = jax.jit(lambda s, n=n: jax.lax.scan(follow, s, None, n))(start)
        want = jax.tree.map(lambda c, s, n=n: c + 0.9999**n * (s - c), online, start)
        for x, y in zip(jax.tree.leaves(end), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)
    stuck = optax.incremental_update(jnp.bfloat16([2.0]), jnp.bfloat16([1.0]), 1e-4)
    assert stuck.tolist() == [1.0]  # and so the offline module is float32


def test_only_the_adapter_accumulates():
    """Averaged with itself, a frozen leaf would be rounded away from where it was."""
    backbone = draw(1000)
    assert (optax.incremental_update(backbone, backbone, 1e-4) != backbone).any()
    online, offline = ({"adapter": draw(3), "backbone": backbone} for _ in range(2))
    adapter = optax.incremental_update(online["adapter"], offline["adapter"], 1e-4)
    end = offline | {"adapter": adapter}
    np.testing.assert_array_equal(end["backbone"], backbone)


def test_classes_that_are_ruled_out_have_no_probability_and_no_gradient():
    z, labels = draw(8, 6), jnp.asarray(RNG.integers(0, 2, 8))
    classes = jnp.array([True, False, False, True, False, True])  # in no order
    own = np.flatnonzero(classes)
    masked = nn.mask_classes(z, classes)
    p = jax.nn.softmax(masked)
    assert not p[:, ~classes].any()
    np.testing.assert_allclose(p[:, own], jax.nn.softmax(z[:, own]), rtol=1e-6)
    loss = lambda z: cross_entropy(nn.mask_classes(z, classes), own[labels]).mean()
    sliced = lambda z: cross_entropy(z[:, own], labels).mean()
    np.testing.assert_allclose(loss(z), sliced(z), rtol=1e-6)
    grad = jax.grad(loss)(z)
    np.testing.assert_allclose(grad, jax.grad(sliced)(z), atol=1e-7)
    assert not grad[:, ~classes].any() and grad[:, own].all()
    one_hot = lambda z: optax.softmax_cross_entropy(
        nn.mask_classes(z, classes), jax.nn.one_hot(own[labels], 6)
    ).mean()
    np.testing.assert_allclose(one_hot(z), loss(z), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(one_hot)(z), grad, atol=1e-7)


def test_one_program_for_all_tasks():
    task = jnp.array([0, 1, 1, 2])
    current, traces = counting(lambda z, i: nn.mask_classes(z, task == i))
    z = draw(3, 4)
    kept = [(current(z, i) == z).all(0) for i in range(3)]
    assert len(traces) == 1
    np.testing.assert_array_equal(kept, task == jnp.arange(3)[:, None])


def test_half_precision_classes():
    for dtype in (jnp.bfloat16, jnp.float16):
        z = nn.mask_classes(draw(5, 3).astype(dtype), jnp.array([True, True, False]))
        assert z.dtype == dtype
        assert not jax.nn.softmax(z)[:, 2].any() and jnp.isfinite(jax.nn.log_softmax(z)).all()


def test_bad_classes_and_members_are_named():
    z = draw(2, 3)
    with pytest.raises(ValueError, match=r"classes is \(2,\), and \(3,\) was due"):
        nn.mask_classes(z, jnp.ones(2, bool))
    with pytest.raises(TypeError, match="classes is int32, and a boolean mask"):
        nn.mask_classes(z, jnp.arange(3))
    with pytest.raises(ValueError, match="marks no class"):
        nn.mask_classes(z, jnp.zeros(3, bool))
    with pytest.raises(ValueError, match=r"one shape were due, .* \[\(2, 3\), \(2, 2\)\]"):
        nn.max_probability(z, z[:, :2])
    with pytest.raises(ValueError, match=r"of one member or more, and \[\]"):
        nn.max_probability()


FROZEN = {
    "query": draw(6, 6) / 2,
    "key": draw(6, 6) / 2,
    "value": draw(6, 6) / 2,
}


def attend(params, x):
    q, k, v = (x @ params[name] for name in ("query", "key", "value"))
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 6**0.5) @ v


def lora(op, x, w, theta):
    return op.run(x, w) + theta["scale"] * op.low_rank(x, theta["a"], theta["b"])


def adapter(op, x, w, theta):
    hidden = jax.nn.gelu(x @ theta["a"])
    return op.run(x, w) + (theta["scale"] * (hidden @ theta["b"])).astype(x.dtype)


@pytest.mark.parametrize("module", [lora, adapter])
def test_modules_start_as_nothing_under_a_learnable_scale(module):
    """Zero in the second matrix: the backbone's output exactly, and every module learns."""
    x = draw(2, 4, 6)
    theta = {
        name: {"a": draw(6, 5), "b": jnp.zeros((5, 6)), "scale": jnp.ones(())}
        for name in ("key", "value")
    }

    def apply_fn(theta):
        return trace.replay(attend, {name: (module, t) for name, t in theta.items()})(FROZEN, x)

    out = attend(FROZEN, x)
    np.testing.assert_array_equal(apply_fn(theta), out)
    grads = jax.jit(jax.grad(lambda t: jnp.square(apply_fn(t) - 1).sum()))(theta)
    assert all(g["b"].any() and not g["a"].any() and g["scale"] == 0 for g in grads.values())
    moved = jax.tree.map(lambda w, g: w - 0.1 * g, theta, grads)
    assert jnp.abs(apply_fn(moved) - out).max() > 1e-3
    off = {name: t | {"scale": jnp.zeros(())} for name, t in moved.items()}
    np.testing.assert_array_equal(apply_fn(off), out)


class Task(NamedTuple):
    x: jax.Array
    y: jax.Array
    number: jax.Array


FEATURES, CLASSES, STEPS = 1024, jnp.arange(10) // 2, 60


def predict(backbone, adapter, head, x):
    h = x @ backbone["kernel"] + adapter["scale"] * (jax.nn.gelu(x @ adapter["a"]) @ adapter["b"])
    return jax.nn.relu(h) @ head["kernel"] + head["bias"]


def learner(frozen, number, lr=0.0028125):
    adapt = optax.conditionally_mask(optax.adam(lr), lambda step: (step >= frozen) | (number == 0))
    return optax.partition(
        {"adapter": adapt, "head": optax.adam(lr), "backbone": optax.set_to_zero()},
        {"adapter": "adapter", "head": "head", "backbone": "backbone"},
    )


def learn_tasks(key, tasks, decay, frozen, steps=STEPS):
    """Learn task after task; return the end of each: (params, the offline adapter)."""
    keys = jax.random.split(key, 4)
    params = {
        "backbone": {"kernel": jax.random.normal(keys[0], (64, FEATURES)) / 8},
        "adapter": {
            "a": jax.random.normal(keys[1], (64, 5)) / 8,
            "b": jnp.zeros((5, FEATURES)),
            "scale": jnp.ones(()),
        },
        "head": {
            "kernel": jax.random.normal(keys[2], (FEATURES, 10)) / FEATURES**0.5,
            "bias": jnp.zeros(10),
        },
    }

    def loss(params, x, y, number):
        z = predict(params["backbone"], params["adapter"], params["head"], x)
        return cross_entropy(nn.mask_classes(z, number == CLASSES), y).mean()

    def learn(carry, task):
        params, offline = carry
        tx = learner(frozen, task.number)

        def step(carry, key):
            params, offline, state = carry
            rows = jax.random.randint(key, (24,), 0, len(task.x))
            grads = jax.grad(loss)(params, task.x[rows], task.y[rows], task.number)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            rate = jnp.where(task.number == 0, 1, 1 - decay)  # until the second task: a copy
            offline = optax.incremental_update(params["adapter"], offline, rate)
            return (params, offline, state), (params["adapter"], grads["head"])

        keys_ = jax.random.split(jax.random.fold_in(keys[3], task.number), steps)
        (params, offline, _), seen = jax.lax.scan(step, (params, offline, tx.init(params)), keys_)
        return (params, offline), ((params, offline), seen)

    return jax.lax.scan(learn, (params, params["adapter"]), tasks)[1]


@pytest.fixture(scope="module")
def digits():
    data = load(train=1300, test=497)
    x = data.x.reshape(-1, 64) - data.x.mean()
    x_test = data.x_test.reshape(-1, 64) - data.x.mean()
    rows = [np.flatnonzero(data.y // 2 == t) for t in range(5)]
    rows = np.stack([r[: min(map(len, rows))] for r in rows])
    tasks = Task(jnp.asarray(x[rows]), jnp.asarray(data.y[rows]), jnp.arange(5))
    return tasks, jnp.asarray(x_test), jnp.asarray(data.y_test)


def test_a_new_task_first_trains_the_head_alone_and_only_its_classes(digits):
    tasks, _, _ = digits
    run = jax.jit(partial(learn_tasks, frozen=6, steps=10))
    ends, (adapters, grads) = run(jax.random.key(0), jax.tree.map(lambda x: x[:3], tasks), 0.9999)
    for t in range(3):
        seen = at(adapters, t)
        moved = [
            any((a != b).any() for a, b in zip(*map(jax.tree.leaves, pair), strict=True))
            for pair in ((at(seen, i), at(seen, i + 1)) for i in range(9))
        ]
        assert moved == ([True] * 9 if t == 0 else [False] * 5 + [True] * 4)
        others = np.asarray(t != CLASSES)
        kernel, bias = grads["kernel"][t], grads["bias"][t]
        assert not kernel[..., others].any() and not bias[..., others].any()
        assert bias[..., ~others].all()
    for t in (1, 2):
        first = at(adapters, (t, 0))
        for a, b in zip(*map(jax.tree.leaves, (first, at(adapters, (t - 1, -1)))), strict=True):
            np.testing.assert_array_equal(a, b)
    frozen = [at(ends[0]["backbone"], t)["kernel"] for t in range(3)]
    np.testing.assert_array_equal(frozen[0], frozen[2])


@pytest.mark.slow
def test_two_experts_on_split_digits(digits):
    """The ensemble is not below the worse expert; at decay 1 no logit of task 1 has moved."""
    tasks, x, y = digits

    def run(key, decay):
        ends, _ = learn_tasks(key, tasks, decay, frozen=STEPS * 3 // 5)
        (first, first_offline), (last, offline) = at(ends, 0), at(ends, -1)
        online = predict(last["backbone"], last["adapter"], last["head"], x)
        slow = predict(last["backbone"], offline, last["head"], x)
        before = predict(first["backbone"], first_offline, first["head"], x)
        accuracy = lambda z: (z.argmax(-1) == y).mean()
        out = [accuracy(z) for z in (online, slow, nn.max_probability(online, slow))]
        return jnp.stack(out), slow[:, :2], before[:, :2]

    both = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0)))
    seeds = jax.random.split(jax.random.key(0), 5)
    accuracy, slow, before = both(seeds, jnp.array([0.99, 1.0]))
    online, offline, ensemble = accuracy.mean(1).T
    assert (ensemble >= jnp.minimum(online, offline)).all()
    np.testing.assert_array_equal(slow[1], before[1])
    assert jnp.abs(slow[0] - before[0]).max() > 0.1
