"""Tickets: nested masks of exact counts, rewinding, controls, stability."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks

KEY = jax.random.key(0)
STEPS = 12
X = jax.random.normal(KEY, (STEPS, 16, 6))
Y = jnp.sin(X.sum(-1, keepdims=True))
PART = {"a": {"w": 0.2, "b": 0.0}, "z": {"w": 0.1, "b": 0.0}}


def first():
    keys = jax.random.split(KEY)
    return {
        "a": {"w": jax.random.normal(keys[0], (6, 8)), "b": jnp.full(8, 0.1)},
        "z": {"w": jax.random.normal(keys[1], (8, 1)), "b": jnp.zeros(1)},
    }


def loss_fn(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    return jnp.mean((h @ params["z"]["w"] + params["z"]["b"] - y) ** 2)


SCHEDULE = optax.linear_schedule(0.1, 0.01, STEPS)


def rate_at(step) -> float:
    return np.asarray(SCHEDULE(step)).item()


@jax.jit
def _train(params, mask, start, stop):
    """Adam from step `start` up to `stop`: the rate and the batch are those of the step."""
    tx = masks.sparse(optax.scale_by_adam(), mask)

    def step(state, i):
        params, opt_state = state
        u, new_state = tx.update(jax.grad(loss_fn)(params, (X[i], Y[i])), opt_state, params)
        new = jax.tree.map(lambda w, u: w - SCHEDULE(i) * u, params, u)
        new = masks.apply(new, mask)
        due = (i >= start) & (i < stop)
        return jax.tree.map(lambda a, b: jnp.where(due, a, b), (new, new_state), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))[0][0]


def train(params, mask, start, stop):
    return _train(params, mask, start, stop)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def find(**options):
    return list(masks.tickets(train, first(), steps=STEPS, **{"rounds": 3, **options}))


@pytest.fixture(scope="module")
def found():
    return find(fraction=PART)


def test_masks_nest_and_lose_their_part_of_the_live_weights(found):
    live = [{name: int(t.mask[name]["w"].sum()) for name in "az"} for t in found]
    for old, new in pairwise(live):
        assert new == {"a": old["a"] - round(0.2 * old["a"]), "z": old["z"] - round(0.1 * old["z"])}
    for old, new in pairwise(found):
        assert not (new.mask["a"]["w"] & ~old.mask["a"]["w"]).any()
        assert new.mask["a"]["b"].all() and new.mask["z"]["b"].all()


def test_a_round_drops_the_smallest_trained_weights(found):
    for old, new in pairwise(found):
        w, live = (np.asarray(t["a"]["w"]).ravel() for t in (old.trained, old.mask))
        order = np.argsort(np.where(live, np.abs(w), np.inf), kind="stable")
        gone = order[: round(0.2 * live.sum())]
        expected = live.copy()
        expected[gone] = False
        np.testing.assert_array_equal(np.asarray(new.mask["a"]["w"]).ravel(), expected)


def test_a_round_starts_from_the_first_weights_and_ends_sparse(found):
    for t in found:
        equal(t.start, masks.apply(first(), t.mask))
        equal(t.trained, masks.apply(t.trained, t.mask))
        assert (t.trained["a"]["b"] != first()["a"]["b"]).any()  # a unit may be cut off


def test_without_rounds_it_is_training():
    (dense,) = find(rounds=0)
    every = jax.tree.map(lambda w: jnp.ones_like(w, bool), first())
    equal(dense.trained, train(first(), every, 0, STEPS))


def test_late_rewinding_goes_back_to_step_k():
    late = find(rewind=5, fraction=0.5, rounds=1)
    every = late[0].mask
    rewound = train(first(), every, 0, 5)
    equal(late[0].start, rewound)
    equal(late[1].start, masks.apply(rewound, late[1].mask))
    equal(late[1].trained, train(late[1].start, late[1].mask, 5, STEPS))
    assert (late[1].start["a"]["b"] != first()["a"]["b"]).all()


def test_the_first_step_of_a_rewound_round_has_the_rate_of_step_k():
    k = 5
    calls = []

    def probe(params, mask, start, stop):
        calls.append((start, stop, rate_at(start)))
        return train(params, mask, start, stop)

    list(masks.tickets(probe, first(), steps=STEPS, rounds=2, rewind=k))
    rate = rate_at(k)
    assert calls == [(0, k, rate_at(0))] + 3 * [(k, STEPS, rate)]
    # one step from zero moments is +-rate, whatever the gradient
    every = jax.tree.map(lambda w: jnp.ones_like(w, bool), first())
    moved = jax.tree.map(jnp.subtract, train(first(), every, k, k + 1), first())
    np.testing.assert_allclose(jnp.abs(moved["a"]["w"]), rate, rtol=1e-3)


def test_rewinding_to_the_end_is_pruning_after_training():
    _, late = find(rewind=STEPS, fraction=0.5, rounds=1)
    every = jax.tree.map(lambda w: jnp.ones_like(w, bool), first())
    dense = train(first(), every, 0, STEPS)
    equal(late.trained, masks.apply(dense, late.mask))
    equal(late.mask, masks.topk(masks.magnitude(dense), sparsity=0.5))


@pytest.mark.parametrize("rewind", [0, 3])
def test_tickets_stay_within_a_first_mask(rewind):
    source = masks.connect(KEY, masks.topk(masks.random(KEY, first()), sparsity=0.5))
    found = find(within=source, fraction=0.2, rewind=rewind, rounds=2)
    equal(found[0].mask, source)
    live = [sum(int(m.sum()) for m in jax.tree.leaves(t.mask)) for t in found]
    assert live[0] > live[1] > live[2]
    for t in found:
        inside = jax.tree.map(lambda s, m: s | ~m, source, t.mask)
        assert all(m.all() for m in jax.tree.leaves(inside))
    early = train(masks.apply(first(), source), source, 0, rewind)
    equal(found[-1].start, masks.apply(early, found[-1].mask))
    with pytest.raises(ValueError, match="the mask does not fit"):
        find(within=source["a"])


def test_model_state_is_rewound_with_the_params():
    """All of the tree goes back, running statistics too."""

    def count(variables, mask, start, stop):
        return {"params": variables["params"], "stats": variables["stats"] + (stop - start)}

    variables = {"params": first(), "stats": jnp.zeros(3)}
    found = list(masks.tickets(count, variables, steps=10, rounds=2, rewind=4))
    assert [t.start["stats"].tolist() for t in found] == 3 * [[4.0] * 3]
    assert [t.trained["stats"].tolist() for t in found] == 3 * [[10.0] * 3]
    assert all(t.mask["stats"].all() for t in found)


def test_another_rule_prunes():
    def rule(mask, trained):
        return masks.prune(mask, masks.random(KEY, trained), 0.25)

    _, one = find(rule=rule, rounds=1)
    equal(one.mask, masks.topk(masks.random(KEY, first()), sparsity=0.25))


def test_bad_rounds_are_explained():
    with pytest.raises(ValueError, match="rewind=13, and a step from 0 to steps=12 was due"):
        masks.tickets(train, first(), steps=STEPS, rounds=1, rewind=13)
    with pytest.raises(ValueError, match="round 1 would leave 'z/w' without weights"):
        find(fraction={"a": {"w": 0.2, "b": 0.0}, "z": {"w": 1.0, "b": 0.0}})
    with pytest.raises(ValueError, match="round 1 prunes nothing of 65 weights"):
        find(fraction=0.0)
    with pytest.raises(ValueError, match="fraction is 1"):
        find(fraction=1.5)
    from_all = lambda mask, trained: masks.topk(masks.random(KEY, trained), sparsity=0.25)
    with pytest.raises(ValueError, match="round 2 prunes nothing"):
        find(rule=from_all)
    flip = lambda mask, trained: {
        **mask,
        "a": {**mask["a"], "b": mask["a"]["b"].at[0].apply(jnp.logical_not)},
    }
    with pytest.raises(ValueError, match="round 2 brings back weights of 'a/b'"):
        find(rule=flip)


# ---------------------------------------------------------------------------------- controls


def test_shuffled_masks_keep_the_counts():
    mask = {"a": jnp.arange(60).reshape(6, 10) < 20, "c": jnp.arange(40).reshape(4, 10) < 35}
    mask["bias"] = jnp.arange(4) < 2
    both = lambda k: (masks.shuffle(k, mask), masks.shuffle(k, mask, scope="global"))
    drawn, together = jax.jit(jax.vmap(both))(jax.random.split(KEY, 100))
    assert (drawn["a"].sum((1, 2)) == 20).all() and (drawn["c"].sum((1, 2)) == 35).all()
    assert (drawn["bias"] == mask["bias"]).all()  # not chosen: as it was
    share = np.asarray(drawn["a"].mean(0))  # every place is as likely: 1/3 +- 5 s.e.
    assert np.abs(share - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 100)
    counts = together["a"].sum((1, 2))
    assert (counts + together["c"].sum((1, 2)) == 55).all()
    # hypergeometric: 55 of 100, 60 draws
    spread = np.sqrt(60 * 0.55 * 0.45 * 40 / 99)
    assert abs(counts.mean() - 33) < 4 * spread / 10
    assert 0.7 < counts.std() / spread < 1.3
    with pytest.raises(ValueError, match="scope='even', and 'leaf' or 'global'"):
        masks.shuffle(KEY, mask, scope="even")


def test_new_weights_under_the_mask():
    init = lambda key, params: jax.tree.map(
        lambda w: jax.random.normal(key, w.shape) / np.sqrt(w.shape[0]), params
    )
    params = {"w": jnp.zeros((400, 300))}
    mask = {"w": jax.random.uniform(jax.random.key(1), (400, 300)) < jnp.linspace(0.05, 1, 300)}
    plain = masks.reinit(KEY, init, params, mask)
    equal(plain, masks.apply(init(KEY, params), mask))
    scaled = masks.reinit(KEY, init, params, mask, live=True)
    assert not scaled["w"][~mask["w"]].any()
    # unit inputs: the variance of every unit's sum is that of a dense unit
    sums = np.asarray((scaled["w"] ** 2).sum(0))
    left = np.asarray(mask["w"].sum(0))
    assert np.abs((sums - 1) / np.sqrt(2 / left)).max() < 5
    assert (plain["w"] ** 2).sum(0)[0] < 0.2


# ---------------------------------------------------------------------------------- stability


def test_distances_of_what_is_equal():
    a, half = first(), masks.topk(masks.random(KEY, first()), sparsity=0.5)
    every = jax.tree.map(lambda w: jnp.ones_like(w, bool), a)
    assert masks.stability(a, a, every) == (0.0, 0.0)
    distance, angle = masks.stability(a, jax.tree.map(lambda w: 3 * w, a), half)
    assert angle < 1e-6 and distance > 0
    _, angle = masks.stability(a, jax.tree.map(lambda w: -w, a), half)
    assert angle == pytest.approx(np.pi, abs=1e-6)
    # what lies off the mask does not count
    moved = jax.tree.map(lambda w, m: jnp.where(m, w, w + 1), a, half)
    assert masks.stability(a, moved, half) == (0.0, 0.0)


def test_distance_and_angle_of_vectors():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 8))
    mask = rng.random((5, 8)) < 0.5
    found = masks.stability({"w": jnp.asarray(x)}, {"w": jnp.asarray(y)}, {"w": jnp.asarray(mask)})
    u, v = x[mask], y[mask]
    assert found.distance == pytest.approx(np.linalg.norm(u - v), rel=1e-5)
    cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
    assert found.angle == pytest.approx(np.arccos(cosine), rel=1e-5)
    small = {"w": jnp.asarray(x + 1e-5 * y)}  # arccos in float32 would give 0 or 3.5e-4
    across = y[mask] - (u @ y[mask]) / (u @ u) * u
    _, angle = masks.stability({"w": jnp.asarray(x)}, small, {"w": jnp.asarray(mask)})
    assert angle == pytest.approx(1e-5 * np.linalg.norm(across) / np.linalg.norm(u), rel=0.02)


def test_the_same_data_from_the_same_weights_is_stable(found):
    dense, *_, last = found
    again = find(fraction=PART)[0]
    assert masks.stability(dense.trained, again.trained, dense.mask) == (0.0, 0.0)
    distance, angle = masks.stability(dense.trained, last.trained, last.mask)
    assert distance > 0.01 and 0 < angle < np.pi / 2
