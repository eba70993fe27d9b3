"""Partial fine-tuning: what is frozen keeps its bits, what trains is exactly what was chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks, reparam, tree
from jaxkit.masks.finetune import _nuclear
from tests.masks import digits
from tests.masks.test_train import counts, outside, problem, train

KEY = jax.random.key(0)
ADAMW = optax.adamw(0.02, weight_decay=0.1)
N = 5 * 7 + 7 * 3


def leaves(*trees):
    return zip(*map(jax.tree.leaves, trees), strict=True)


def tune(tx, params, loss_fn, steps=20):
    return train(tx, params, loss_fn, steps)[0][0]


@pytest.fixture(scope="module")
def tuned():
    """A small regression before and after full fine-tuning."""
    params, _, loss_fn = problem()
    return params, tune(ADAMW, params, loss_fn), loss_fn


# --------------------------------------------------------------------------------------- LT-SFT


def test_sparse_fine_tuning_changes_exactly_k_entries(tuned):
    before, after, loss_fn = tuned
    mask = masks.lt_sft(after, before, 11)
    assert counts(mask) == [0, int(mask["a"]["kernel"].sum()), 11 - int(mask["a"]["kernel"].sum())]
    final = tune(masks.constrain(ADAMW, mask), before, loss_fn)
    assert outside(final, mask) == outside(before, mask)
    phi = masks.difference(final, before)
    assert sum(len(e.value) for e in phi.entries.values()) == 11
    for path, e in phi.entries.items():
        assert all(tree.flatten(mask)[path][tuple(i)] for i in e.index)
    chosen = np.concatenate([np.abs(a - b)[m] for a, b, m in leaves(after, before, mask)])
    rest = [np.abs(after[n]["kernel"] - before[n]["kernel"])[~mask[n]["kernel"]] for n in "ac"]
    assert chosen.min() >= np.concatenate(rest).max()


def test_all_entries_are_plain_fine_tuning_and_none_is_nothing(tuned):
    before, after, loss_fn = tuned
    full = masks.lt_sft(after, before, N, dense="**/bias")
    assert counts(full) == [7, 35, 21]
    got = tune(masks.constrain(ADAMW, full), before, loss_fn)
    for a, b in leaves(got, after):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    nothing = masks.lt_sft(after, before, 0)
    assert counts(nothing) == [0, 0, 0]
    phi = masks.difference(tune(masks.constrain(ADAMW, nothing), before, loss_fn), before)
    assert not phi.entries and not phi.whole


def test_two_rounds_choose_from_what_is_left(tuned):
    before, after, _ = tuned
    first = masks.lt_sft(after, before, 6)
    again = masks.lt_sft(after, before, 6, selected=first)
    assert sum(counts(again)) == 12
    for a, b in leaves(first, again):
        assert (~a | b).all()
    for a, b in leaves(again, masks.lt_sft(after, before, 12)):
        np.testing.assert_array_equal(a, b)  # the same movement ranked twice
    with pytest.raises(ValueError, match=f"keep={N - 11} entries are to be chosen, and {N - 12}"):
        masks.lt_sft(after, before, N - 11, selected=again)
    with pytest.raises(ValueError, match=f"and {N} are left"):
        masks.lt_sft(after, before, N + 1)


def test_a_strong_penalty_on_the_drift_leaves_no_difference(tuned):
    before, _, loss_fn = tuned
    decay = optax.adam(optax.linear_schedule(0.02, 0.0, 60))

    def size(strength):
        drift = lambda p: masks.lt_sft_penalty(p, before)
        final = tune(decay, before, lambda p: loss_fn(p) + strength * drift(p), 60)
        return max(float(jnp.abs(w - w0).max()) for w, w0 in leaves(final, before))

    free, some, strong = map(size, (0.0, 10.0, 1e4))
    assert free > 0.1 and free > some > strong and strong < 0.01 * free


def test_the_penalty_on_the_drift_is_the_mean_of_what_moved(tuned):
    before, after, _ = tuned
    value, grads = jax.value_and_grad(masks.lt_sft_penalty)(after, before)
    moved = [
        np.asarray(w, np.float64) - np.asarray(w0, np.float64) for w, w0 in leaves(after, before)
    ]
    np.testing.assert_allclose(
        value, np.concatenate([np.abs(m).ravel() for m in moved]).mean(), 1e-5
    )
    for g, m in zip(jax.tree.leaves(grads), moved, strict=True):
        np.testing.assert_allclose(g, np.sign(m) / (N + 7), rtol=1e-6)
    only = masks.lt_sft_penalty(after, before, where="**/bias")
    np.testing.assert_allclose(only, np.abs(moved[0]).mean(), rtol=1e-5)
    for g in jax.tree.leaves(jax.grad(masks.lt_sft_penalty)(before, before)):
        assert not g.any()
    assert masks.lt_sft_penalty({}, {}) == 0
    with pytest.raises(ValueError, match="other params does not fit"):
        masks.lt_sft_penalty(before, {"a": before["a"]})


def test_selected_masks_that_are_known_do_not_stop_jit(tuned):
    before, after, _ = tuned
    first = masks.lt_sft(after, before, 6)
    inside = jax.jit(lambda a: masks.lt_sft(a, before, 6, selected=first))(after)
    for a, b in leaves(inside, masks.lt_sft(after, before, 6, selected=first)):
        np.testing.assert_array_equal(a, b)


def patches():
    rng = np.random.default_rng(2)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "head": jnp.ones(3)}
    marks = rng.permutation(30).reshape(6, 5)
    move = lambda where: base | {"w": base["w"] + jnp.where(where, 0.3 + marks / 30, 0.0)}
    return base, move, marks


def test_differences_add():
    base, move, marks = patches()
    a = masks.difference(move(marks < 8), base)
    b = masks.difference(move((marks >= 8) & (marks < 12)), base)
    c = masks.difference(move(marks < 20), base)
    assert len(a.entries["w"].value) == 8 and "head" not in a.entries
    np.testing.assert_allclose(masks.compose(base, a)["w"], move(marks < 8)["w"], rtol=1e-6)
    for other, exact in ((b, True), (c, False)):  # disjoint supports, and overlapping ones
        x, y = masks.compose(base, a, other)["w"], masks.compose(base, other, a)["w"]
        np.testing.assert_allclose(x, y, rtol=0 if exact else 1e-6)
    disjoint = masks.compose(base, a, b)["w"]
    alone = jnp.where(marks < 8, masks.compose(base, a)["w"], masks.compose(base, b)["w"])
    np.testing.assert_array_equal(disjoint, alone)
    back = masks.revert(masks.compose(base, a, c), a, c)
    np.testing.assert_allclose(back["w"], base["w"], atol=1e-6)
    jitted = jax.jit(masks.compose)(base, a, c)
    np.testing.assert_array_equal(jitted["w"], masks.compose(base, a, c)["w"])


def test_a_patch_on_a_patch_is_made_for_the_base_of_both():
    base, move, marks = patches()
    source = masks.difference(move(marks < 8), base)
    start = masks.compose(base, source)
    task = masks.difference(start | {"w": start["w"].at[0, 0].add(1.0)}, start, base=base)
    target = masks.difference(move((marks > 20) & (marks < 25)), base)
    moved = masks.compose(base, target, task)["w"] - masks.compose(base, target)["w"]
    np.testing.assert_allclose(moved, jnp.zeros((6, 5)).at[0, 0].set(1.0), atol=1e-6)
    with pytest.raises(ValueError, match="patch 1 was made for other params"):
        masks.compose(base, target, masks.difference(move(marks < 2), start))


def test_heads_are_kept_by_value():
    base, move, marks = patches()
    after = move(marks < 3) | {"head": jnp.arange(3.0)}
    phi = masks.difference(after, base, whole="head")
    assert list(phi.entries) == ["w"]
    np.testing.assert_array_equal(masks.compose(base, phi)["head"], jnp.arange(3.0))
    other = masks.difference(base | {"head": jnp.zeros(3)}, base, whole="head")
    with pytest.raises(ValueError, match=r"two patches replace \['head'\]"):
        masks.compose(base, other, phi)
    both = masks.compose(base, other._replace(whole={}), phi)
    np.testing.assert_array_equal(both["head"], jnp.arange(3.0))


def test_patches_that_do_not_fit():
    base, move, marks = patches()
    phi = masks.difference(move(marks < 3), base)
    with pytest.raises(ValueError, match="patch 0 was made for other params"):
        masks.compose(base | {"w": base["w"].at[0, 0].add(1e-6)}, phi)
    with pytest.raises(ValueError, match="'tied' is only in the second"):
        masks.difference(base | {"tied": jnp.ones(2)}, base)
    with pytest.raises(ValueError, match="has 'w', which is no leaf"):
        masks.revert({"v": base["w"]}, phi)
    with pytest.raises(ValueError, match="2-d indices at 'w'"):
        masks.revert({"w": jnp.ones(3)}, phi)
    wide = masks.difference(base | {"head": jnp.zeros(3)}, base, whole="head")
    with pytest.raises(ValueError, match=r"'head' of shape \(3,\), and \(2,\) is due"):
        jax.jit(masks.compose)({"head": jnp.ones(2)}, wide)


def test_a_fingerprint_sees_every_bit_and_the_layout():
    params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(2)}
    same = lambda other: bool((masks.fingerprint(params) == masks.fingerprint(other)).all())
    assert same({"b": jnp.zeros(2), "a": jnp.ones((2, 3))})
    assert not same({"a": jnp.ones((3, 2)), "b": jnp.zeros(2)})
    assert not same({"a": jnp.ones((2, 3)), "c": jnp.zeros(2)})
    assert not same({"a": jnp.ones((2, 3)), "b": jnp.zeros(2).at[1].set(-0.0)})
    assert not same({"a": jnp.ones((2, 3)), "b": jnp.zeros(2, jnp.int32)})


def test_differences_of_scalars_and_bfloat16():
    base = {"scale": jnp.array(1.0), "w": jnp.arange(4.0, dtype=jnp.bfloat16), "n": jnp.arange(2)}
    after = {"scale": jnp.array(1.5), "w": base["w"].at[2].set(7.0), "n": jnp.arange(2)}
    phi = masks.difference(after, base)
    got = masks.compose(base, phi)
    for a, b in leaves(got, after):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert a.dtype == b.dtype


# ----------------------------------------------------------------------------------------- SaRA


def test_compact_starts_at_the_params_and_trains_like_constrain():
    """20 AdamW steps on the vectors, and on the params inside the mask."""
    params, _, loss_fn = problem()
    mask = masks.small(params, 0.6)
    r = reparam.compact(mask)
    theta = r.init(KEY, params)
    assert sum(v.size for v in theta.values()) == sum(counts(mask)) > 20
    for a, b in leaves(r.apply(theta, params), params):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    vectors = tune(ADAMW, theta, lambda theta: loss_fn(r.apply(theta, params)))
    dense = tune(masks.sara(ADAMW, 0.6), params, loss_fn)
    for a, b in leaves(r.apply(vectors, params), dense):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert outside(dense, mask) == outside(params, mask)
    moved = [np.asarray(a != b)[np.asarray(m)] for a, b, m in leaves(dense, params, mask)]
    assert np.concatenate(moved).all()


def test_compact_needs_a_known_mask_and_leaves_empty_ones_alone():
    params = {"a": jnp.ones(3), "b": jnp.ones((2, 2)), "scale": jnp.array(2.0)}
    mask = {"a": jnp.zeros(3, bool), "b": jnp.eye(2, dtype=bool), "scale": jnp.array(True)}
    r = reparam.compact(mask)
    theta = r.init(KEY, params)
    assert {path: v.shape for path, v in theta.items()} == {"b": (2,), "scale": (1,)}
    out = r.apply(jax.tree.map(lambda v: v + 1, theta), params)
    assert out["a"] is params["a"] and float(out["scale"]) == 3.0
    np.testing.assert_array_equal(out["b"], [[2.0, 1.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="make it outside jit"):
        jax.jit(lambda m: reparam.compact(m).init(KEY, params))(mask)
    with pytest.raises(ValueError, match="'b' is only in the second"):
        r.init(KEY, {"a": jnp.ones(3)})


def test_sara_narrows_midway():
    """What has grown by then stays where it is; what is still small trains on."""
    params, _, loss_fn = problem()
    tx = masks.sara(optax.adam(0.05), 0.5, reselect=6)
    (final, state), history = train(tx, params, loss_fn, 12)
    midway = jax.tree.map(lambda w: w[5], history)
    grown = 0
    for m, w0, w6, w in leaves(masks.current(state), params, midway, final):
        np.testing.assert_array_equal(m, (np.abs(w0) < 0.5) & (np.abs(w6) < 0.5))
        assert np.asarray(w)[~m].tobytes() == np.asarray(w6)[~m].tobytes()
        assert (np.asarray(w) != np.asarray(w6))[m].all()
        grown += int(((np.abs(w0) < 0.5) & (np.abs(w6) >= 0.5)).sum())
    assert grown > 0


def test_sara_of_everything_is_the_optimizer_and_says_so():
    params, _, loss_fn = problem()
    with pytest.warns(UserWarning, match="density 1 of 63 entries would train"):
        got = tune(masks.sara(ADAMW, 1e9), params, loss_fn)
    for a, b in leaves(got, tune(ADAMW, params, loss_fn)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_small_compares_in_float32():
    """0.002 in bfloat16 is 0.00199890: below the threshold, which bfloat16 could not tell."""
    w = {"w": jnp.array([[0.002, 0.0022]], jnp.bfloat16)}
    assert not (jnp.abs(w["w"]) < jnp.bfloat16(0.002)).any()
    np.testing.assert_array_equal(masks.small(w, 0.002)["w"], [[True, False]])


def test_nuclear_norm_and_its_gradient():
    """The sum of singular values; U V^T masked, against finite differences."""
    rng = np.random.default_rng(0)
    w, mask = rng.normal(size=(8, 6)), rng.random((8, 6)) < 0.5
    params, marks = {"w": jnp.asarray(w, jnp.float32)}, {"w": jnp.asarray(mask)}
    value = lambda p: masks.sara_penalty(KEY, p, marks, min_size=5, min_count=10)
    got, grad = jax.value_and_grad(value)(params)
    u, s, vt = np.linalg.svd(w * mask, full_matrices=False)
    np.testing.assert_allclose(got, s.sum(), rtol=1e-5)
    np.testing.assert_allclose(grad["w"], (u @ vt) * mask, atol=1e-5)
    total = lambda w: np.linalg.svd(w * mask, compute_uv=False).sum()
    for i, j in ((0, 0), (3, 2), (7, 5), (5, 1)):
        step = np.zeros_like(w)
        step[i, j] = 1e-5
        slope = (total(w + step) - total(w - step)) / 2e-5
        np.testing.assert_allclose(grad["w"][i, j], slope, atol=2e-5)
    tangent = jax.jvp(value, (params,), ({"w": jnp.ones((8, 6))},))[1]
    np.testing.assert_allclose(tangent, ((u @ vt) * mask).sum(), rtol=1e-4)


@pytest.mark.parametrize("kind", ["zero", "equal", "low rank"])
def test_nuclear_norm_where_singular_values_are_equal_or_zero(kind):
    """Never NaN, and directions without a singular value are not pushed."""
    rng = np.random.default_rng(0)
    low = np.outer(rng.normal(size=5), rng.normal(size=4))
    w = {"zero": np.zeros((5, 4)), "equal": np.eye(5, 4), "low rank": low}[kind]
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    rank = s > 1e-6
    grad = jax.grad(_nuclear)(jnp.asarray(w, jnp.float32))
    np.testing.assert_allclose(grad, (u[:, rank]) @ vt[rank], atol=1e-5)
    naive = jax.grad(lambda w: jnp.linalg.svd(w, compute_uv=False).sum())(jnp.zeros((5, 4)))
    assert jnp.abs(naive).max() > 0.5  # what the plain gradient does to an empty leaf


def test_the_penalty_takes_one_large_matrix_at_random():
    params = {
        "a": 2 * jnp.eye(9), "c": 3 * jnp.eye(12), "thin": jnp.ones((20, 4)),
        "conv": jnp.ones((3, 3, 9, 9)), "bias": jnp.ones(30),
    }  # fmt: skip
    every = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    penalty = jax.jit(
        jax.vmap(lambda k: masks.sara_penalty(k, params, every, min_size=8, min_count=90))
    )
    values = np.asarray(penalty(jax.random.split(KEY, 200)))
    # a has 81 entries, too few; c has 144
    assert set(values.round(3).tolist()) == {0.0, 36.0}
    assert 70 < (values == 0).sum() < 130
    with pytest.raises(ValueError, match="no chosen leaf is a matrix of more than 64"):
        masks.sara_penalty(KEY, params, every)


@pytest.mark.slow
def test_the_smallest_weights_hardly_count():
    """A trained perceptron without the smallest 20 % of each leaf loses at most 1 %."""
    x, x_test, y, y_test = digits.data()

    @jax.jit
    def run(key):
        params, _ = digits.fit(key, optax.adam(1e-3), digits.init(key), x, y, 800)
        without = lambda s: masks.apply(
            params, masks.topk(masks.magnitude(params), sparsity=masks.uniform(params, s))
        )
        return [digits.accuracy(p, x_test, y_test) for p in (params, without(0.2), without(0.9))]

    whole, fifth, most = map(float, run(KEY))
    assert whole > 0.96 and whole - fifth <= 0.01, (whole, fifth)
    assert most < whole - 0.1  # and the largest do


# ------------------------------------------------------------------------------------------ HFT

ATTENTION = [f"layers/*/{name}" for name in ("query", "key", "value", "out")]
MLP = [f"layers/*/{name}" for name in ("up", "gate", "down")]


def transformer(layers):
    names = [path.rpartition("/")[2] for path in ATTENTION + MLP]
    layer = lambda: {name: jnp.ones((3, 4)) for name in names} | {"norm": jnp.ones(4)}
    return {"embed": jnp.ones((5, 4)), "layers": [layer() for _ in range(layers)]}


@pytest.mark.parametrize(("layers", "mlp"), [(4, 6), (2, 3), (3, 4)])
def test_half_of_the_matrices_in_every_layer_and_category(layers, mlp):
    """L = 4 with 7 matrices: 8 of 16 and 6 of 12; three layers of three: round(4.5) = 4."""
    params = transformer(layers)
    draw = lambda key: masks.hft(key, params, {"attention": ATTENTION, "mlp": MLP})
    drawn = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 50))
    bit = lambda name: np.stack(
        [np.asarray(layer[name].all((1, 2))) for layer in drawn["layers"]], 1
    )
    both = {name: bit(name) for name in drawn["layers"][0] if name != "norm"}
    for name, layer in ((n, lay) for lay in drawn["layers"] for n in both):
        assert (layer[name].any((1, 2)) == layer[name].all((1, 2))).all()
    attention = sum(both[path.rpartition("/")[2]].astype(int) for path in ATTENTION)
    assert (attention == 2).all()
    ffn = sum(both[path.rpartition("/")[2]].astype(int) for path in MLP)
    assert set(np.unique(ffn)) == {1, 2} and (ffn.sum(1) == mlp).all()
    assert drawn["embed"].all() and all(layer["norm"].all() for layer in drawn["layers"])
    for name in both:  # every matrix of every layer trains in some stage, and in some not
        assert both[name].any(0).all() and not both[name].all(0).any()


def test_frozen_halves_keep_their_bits_and_have_no_moments():
    params = jax.tree.map(lambda w: w + 0.1, transformer(2))
    mask = masks.hft(KEY, params, {"attention": ATTENTION, "mlp": MLP})
    labels = jax.tree.map(lambda m: "train" if m.all() else "freeze", mask)
    tx = optax.partition({"train": ADAMW, "freeze": optax.set_to_zero()}, labels)
    loss_fn = lambda p: sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
    (final, state), _ = train(tx, params, loss_fn, 50)
    constrained = tune(masks.constrain(ADAMW, mask), params, loss_fn, 50)
    is_masked = lambda s: isinstance(s, optax.MaskedNode)
    moments = jax.tree.leaves(state.inner_states["train"].inner_state[0].mu, is_leaf=is_masked)
    for m, w0, w, c, mu in zip(
        *map(jax.tree.leaves, (mask, params, final, constrained)), moments, strict=True
    ):
        assert is_masked(mu) == (not m.all())
        if m.all():
            assert (w != w0).all()
            np.testing.assert_allclose(w, c, rtol=1e-6)
        else:
            assert np.asarray(w).tobytes() == np.asarray(w0).tobytes() == np.asarray(c).tobytes()


def test_all_and_none_of_the_matrices():
    params = transformer(2)
    every = masks.hft(KEY, params, {"attention": ATTENTION, "mlp": MLP}, share=1.0)
    assert all(m.all() for m in jax.tree.leaves(every))
    nothing = masks.hft(KEY, params, {"attention": ATTENTION, "mlp": MLP}, share=0.0)
    frozen = [p for p, m in tree.flatten(nothing).items() if not m.any()]
    assert len(frozen) == 14 and not any("norm" in p or "embed" in p for p in frozen)
    tx = masks.constrain(ADAMW, nothing)
    final = tune(tx, params, lambda p: sum(jnp.sum(w) for w in jax.tree.leaves(p)), 3)
    for path in frozen:
        np.testing.assert_array_equal(tree.flatten(final)[path], tree.flatten(params)[path])


def test_layers_stacked_in_one_leaf_are_drawn_by_row():
    """The same draw as for leaves of their own, in the rows of axis 0."""
    single = transformer(4)
    stacked = jax.tree.map(lambda *w: jnp.stack(w), *single["layers"])
    names = [[path.rpartition("/")[2] for path in group] for group in (ATTENTION, MLP)]
    groups = dict(zip(("attention", "mlp"), names, strict=True))
    got = masks.hft(KEY, stacked, groups, stacked=True)
    want = masks.hft(KEY, single, {"attention": ATTENTION, "mlp": MLP})
    for name in names[0] + names[1]:
        expected = jnp.stack([layer[name] for layer in want["layers"]])
        np.testing.assert_array_equal(got[name], expected)
        assert got[name].shape == (4, 3, 4)


@pytest.mark.parametrize(
    ("groups", "options", "match"),
    [
        ({"qkv": ["layers/*/query", "**/query"]}, {}, "'layers/0/query' holds two matrices"),
        ({"a": ATTENTION, "b": ATTENTION[:2]}, {}, "'layers/0/query' holds two matrices"),
        ({"one": ["layers/*/query"]}, {}, "category 'one' has 1 matrix a layer"),
        ({"mlp": ["layers/0/up", "layers/*/down"]}, {}, r"have \[1, 2\] layers"),
        ({"mlp": MLP}, {"stacked": True}, "are to hold all layers of 'mlp'; 1 leaf is due"),
        ({"mlp": MLP}, {"share": 1.5}, "share is 1.5"),
        ({"mlp": ["layers/*/upp", "layers/*/down"]}, {}, "matches no leaf"),
    ],
)
def test_categories_that_cannot_be_halved(groups, options, match):
    with pytest.raises(ValueError, match=match):
        masks.hft(KEY, transformer(2), groups, **options)


@pytest.mark.slow
def test_half_fine_tuning_forgets_less():
    """Pretrained on the digits 0-4 and tuned on 5-9: a frozen half remembers, all forgets."""
    x, x_test, y, y_test = digits.data()
    old, new = np.flatnonzero(y < 5), np.flatnonzero(y >= 5)
    old_test, new_test = np.flatnonzero(y_test < 5), np.flatnonzero(y_test >= 5)
    adam = optax.adam(1e-3)

    @jax.jit
    def run(key):
        params, _ = digits.fit(key, adam, digits.init(key), x[old], y[old], 600)
        half = masks.topk(masks.random(key, params), sparsity=0.5, where="*")
        tune = lambda tx: digits.fit(key, tx, params, x[new], y[new], 100)[0]
        full = tune(adam)
        found = (full, tune(masks.constrain(adam, half)), masks.graft(params, full, half))
        on = lambda p, rows: digits.accuracy(p, x_test[rows], y_test[rows])
        return jnp.array([[on(p, old_test), on(p, new_test)] for p in found])

    full, half, reset = np.moveaxis(np.array([run(jax.random.key(i)) for i in range(3)]), 1, 0)
    assert full[:, 0].max() <= 0.05, full
    assert half[:, 0].min() >= 0.2, half
    assert (half[:, 1] >= full[:, 1] - 0.03).all(), (half, full)
    assert reset[:, 0].min() > half[:, 0].max() and reset[:, 1].max() < half[:, 1].min(), reset
