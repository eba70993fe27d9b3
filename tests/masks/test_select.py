"""Scores, allocations and selection: exact counts, ties by position, closed forms."""

import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks

KEY = jax.random.key(0)
LENET = {
    "fc1": {"kernel": (784, 300), "bias": (300,)},
    "fc2": {"kernel": (300, 100), "bias": (100,)},
    "out": {"kernel": (100, 10), "bias": (10,)},
}


def build(shapes, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def kept(mask):
    return {k: int(v["kernel"].sum()) for k, v in mask.items()}


@pytest.mark.parametrize("n", [1, 2, 3, 10, 20, 99, 1000])
@pytest.mark.parametrize("sparsity", [0, 0.05, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.95, 0.999])
def test_exactly_round_half_even_survive(n, sparsity):
    scores = [jnp.arange(float(n)).reshape(n, 1)]
    due = round((1 - Fraction(str(sparsity))) * n)
    assert int(masks.topk(scores, sparsity=sparsity)[0].sum()) == due
    assert int(masks.topk(scores, sparsity=[sparsity])[0].sum()) == due
    assert int(masks.topk(scores, keep=due)[0].sum()) == due


def test_floats_that_round_the_wrong_way():
    """In floats (1 - .95) * 10 is above a half, and .05 * 10 below: exactly it is a half."""
    assert round((1 - 0.95) * 10) == 1
    assert int(masks.topk([jnp.ones((10, 1))], sparsity=0.95)[0].sum()) == 0
    assert int(masks.topk([jnp.ones((10, 1))], sparsity=0.85)[0].sum()) == 2


def test_global_threshold_against_numpy():
    params = build(LENET)
    mask = masks.topk(masks.magnitude(params), sparsity=0.9)
    flat = np.concatenate([np.abs(params[k]["kernel"]).ravel() for k in params])
    cut = np.sort(flat)[::-1][26620 - 1]
    for name, layer in params.items():
        np.testing.assert_array_equal(mask[name]["kernel"], np.abs(layer["kernel"]) >= cut)
        assert mask[name]["bias"].all()
    assert sum(kept(mask).values()) == 26620


def test_tree_of_sparsities_is_per_leaf_and_chooses_its_leaves():
    params = build(LENET)
    sparsity = {
        "fc1": {"kernel": 0.9, "bias": 0.5},
        "fc2": {"kernel": 0.25, "bias": 0.0},
        "out": {"kernel": 0.0, "bias": 0.0},
    }
    mask = masks.topk(masks.magnitude(params), sparsity=sparsity)
    assert kept(mask) == {"fc1": 23520, "fc2": 22500, "out": 1000}
    assert int(mask["fc1"]["bias"].sum()) == 150
    assert int(mask["fc2"]["bias"].sum()) == 100


def test_traced_sparsity_sweeps_under_vmap_and_keeps_exempt_leaves_whole():
    params = build(LENET)
    scores = masks.magnitude(params)
    sweep = jnp.array([0.0, 0.5, 0.9])
    total = jax.vmap(lambda s: masks.topk(scores, sparsity=s)["fc1"]["kernel"])(sweep)
    for got, s in zip(total, [0.0, 0.5, 0.9], strict=True):
        np.testing.assert_array_equal(got, masks.topk(scores, sparsity=s)["fc1"]["kernel"])
    # 2**24 + 1 entries are not a float32 number
    whole = jax.jit(lambda s: masks.topk([jnp.ones((2**24 + 1, 1), jnp.bfloat16)], sparsity=s))(0.0)
    assert bool(whole[0].all())


def test_within_nests():
    scores = masks.magnitude(build(LENET))
    other = masks.random(KEY, scores)
    outer = masks.topk(other, sparsity=0.5)
    inner = masks.topk(scores, sparsity=0.9, within=outer)
    assert sum(kept(inner).values()) == 26620
    assert all(
        bool((~i | o).all()) for i, o in zip(*map(jax.tree.leaves, (inner, outer)), strict=True)
    )


@pytest.mark.parametrize("bad", [-0.1, 1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(bad):
    scores = [jnp.ones((2, 2))]
    message = re.escape(f"{bad}, and a number in [0, 1) is due")
    for call in (
        lambda: masks.topk(scores, sparsity=bad),
        lambda: masks.uniform(scores, bad),
        lambda: masks.erk(scores, bad),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="at '0' is"):
        masks.topk(scores, sparsity=[bad])


@pytest.mark.parametrize("bad", [-0.5, 1.0, 1.5, float("nan")])
def test_known_arrays_are_checked_and_traced_ones_clipped(bad):
    scores = {"w": jnp.ones((3, 3))}
    known = jnp.float32(bad)
    for fn in (lambda s: masks.topk(scores, sparsity=s), lambda s: masks.erk(scores, s)):
        for call in (fn, jax.jit(lambda _, fn=fn: fn(known))):  # closed over, it is known under jit
            with pytest.raises(ValueError, match=r"a number in \[0, 1\) is due"):
                call(known)
    with pytest.raises(ValueError, match="sparsity at 'w' is"):
        masks.topk(scores, sparsity={"w": known})
    if not np.isnan(bad):
        traced = jax.jit(lambda s: masks.topk(scores, sparsity=s)["w"])
        assert int(traced(known).sum()) == (9 if bad < 0 else 0)
    if not 0 <= bad <= 1:
        with pytest.raises(ValueError, match="fraction is"):
            masks.prune({"w": jnp.ones((3, 3), bool)}, scores, known)


def test_other_bad_input():
    scores = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match="either sparsity"):
        masks.topk(scores)
    with pytest.raises(ValueError, match="either sparsity"):
        masks.topk(scores, sparsity=0.5, keep=1)
    with pytest.raises(ValueError, match="'kernel'"):
        masks.topk(scores, sparsity=0.5, where="**/weight")
    with pytest.raises(ValueError, match="'kernel' is only in the first"):
        masks.topk(scores, sparsity={"bias": 0.5})
    with pytest.raises(ValueError, match="'kernel' holds NaN"):
        masks.topk({"kernel": jnp.full((2, 2), jnp.nan)}, sparsity=0.5)
    with pytest.raises(ValueError, match="'bias' is only in the first"):
        masks.apply(scores, {"kernel": jnp.ones((2, 2), bool)})
    with pytest.raises(ValueError, match=r"'kernel' has shape \(2,\)"):
        masks.apply(scores, {"kernel": jnp.ones(2, bool), "bias": jnp.ones(2, bool)})
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.random(jax.random.PRNGKey(0), scores)


# ------------------------------------------------------------------------------------ allocations


def erk_by_iteration(shapes, density):
    """The published loop: dense layers leave one round at a time, epsilon is solved anew."""
    raw = [Fraction(sum(s), int(np.prod(s))) for s in shapes]
    sizes = [int(np.prod(s)) for s in shapes]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        budget = density * sum(sizes) - sum(sizes[i] for i in dense)
        epsilon = budget / sum(raw[i] * sizes[i] for i in rest)
        worst = max(raw[i] for i in rest)
        if worst * epsilon <= 1:
            return [Fraction(1) if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense |= {i for i in rest if raw[i] == worst}


CONVNET = [(3, 3, 3, 16), (3, 3, 16, 32), (1, 1, 32, 64), (3, 3, 64, 64), (576, 64), (64, 10)]


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("shapes", [[(784, 300), (300, 100), (100, 10)], CONVNET, [(5, 5)] * 3])
def test_erk_equals_the_published_loop_and_meets_the_budget(shapes, sparsity):
    params = [jnp.zeros(s) for s in shapes]
    want = erk_by_iteration(shapes, 1 - Fraction(str(sparsity)))
    got = masks.erk(params, sparsity)
    np.testing.assert_allclose([1 - s for s in got], [float(d) for d in want], atol=1e-12)
    sizes = [p.size for p in params]
    budget = sum((1 - s) * n for s, n in zip(got, sizes, strict=True))
    np.testing.assert_allclose(budget, (1 - sparsity) * sum(sizes), rtol=1e-9)
    traced = jax.jit(lambda s: masks.erk(params, s))(sparsity)
    np.testing.assert_allclose(traced, got, atol=2e-6)


def test_erk_of_lenet():
    """Densities of 784-300-100-10 computed with the authors' loop."""
    for sparsity, want in [
        (0.9, (0.0795678, 0.2301887, 1.0)),
        (0.95, (0.0384841, 0.1113342, 0.9185069)),
    ]:
        got = masks.erk(build(LENET), sparsity)
        np.testing.assert_allclose([1 - got[k]["kernel"] for k in LENET], want, atol=5e-8)
        assert all(got[k]["bias"] == 0.0 for k in LENET)


# ----------------------------------------------------------------------------------------- scores


def test_random_scores_are_uniform_and_depend_on_the_path_alone():
    params = build(LENET)
    scores = masks.random(KEY, params)
    x = np.sort(np.asarray(scores["fc1"]["kernel"]).ravel())
    distance = np.abs(x - np.arange(x.size) / x.size).max()
    assert distance < 1.95 / np.sqrt(x.size)  # Kolmogorov-Smirnov at 0.1 %
    alone = masks.random(KEY, {"fc1": params["fc1"]})
    np.testing.assert_array_equal(alone["fc1"]["kernel"], scores["fc1"]["kernel"])


def test_snip_is_the_derivative_with_respect_to_the_mask():
    params = build({"a": (4, 5), "b": (5, 3)})
    batch = build({"x": (8, 4), "y": (8, 3)}, seed=1)

    def loss_fn(params, batch):
        return jnp.mean((jnp.tanh(batch["x"] @ params["a"]) @ params["b"] - batch["y"]) ** 2)

    gates = jax.tree.map(jnp.ones_like, params)
    at = lambda gates: loss_fn(jax.tree.map(jnp.multiply, params, gates), batch)
    want = jax.tree.map(jnp.abs, jax.grad(at)(gates))
    got = masks.snip(loss_fn, params, batch)
    for name in params:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-8)
    with_aux = masks.snip(lambda p, b: (loss_fn(p, b), 1), params, batch, has_aux=True)
    np.testing.assert_array_equal(with_aux["a"], got["a"])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert masks.snip(loss_fn, {**half, "n": jnp.array(3)}, batch)["a"].dtype == jnp.float32


def test_apply_zeroes_nan_and_passes_other_leaves():
    params = {"w": jnp.array([jnp.nan, 2.0, jnp.inf]), "n": jnp.arange(3), "f": jax.nn.relu}
    mask = {"w": jnp.array([False, True, False]), "n": jnp.ones(3, bool), "f": jax.nn.relu}
    out = masks.apply(params, mask)
    assert out["w"].tolist() == [0.0, 2.0, 0.0]
    assert out["n"] is params["n"] and out["f"] is jax.nn.relu


def test_report_counts():
    params = build(LENET)
    mask = masks.topk(masks.magnitude(params), sparsity=masks.uniform(params, 0.8))
    got = masks.report(params, mask)
    assert (got.chosen.total, got.chosen.kept) == (266200, 53240)
    assert (got.all.total, got.all.kept) == (266610, 53650)
    assert got.chosen.sparsity == pytest.approx(0.8)
    for row in got.rows:
        layer, name = row.path.split("/")
        assert row.kept == np.count_nonzero(mask[layer][name]) and row.chosen == (name == "kernel")
    assert "fc1/kernel  784x300  235,200  47,040   80.00 %" in str(got)


# ------------------------------------------------------------------------------------- prune


def test_share_rounds_exactly():
    from jaxkit import _rank as rank

    def by_hand(n, p):
        pair = rank.share(rank.as_pair(n), p)
        return int(pair.hi) * 2**32 + int(pair.lo)

    rng = np.random.default_rng(0)
    for n in [
        0,
        1,
        5,
        25,
        2**24 + 1,
        2**32 - 1,
        2**32,
        7 * 2**40 + 3,
        *rng.integers(2**50, size=9),
    ]:
        for p in (0.0, 0.1, 0.2, 0.25, 0.5, 0.1234, 1.0):
            assert by_hand(int(n), p) == round(Fraction(repr(p)) * int(n)), (n, p)


def test_prune_takes_a_share_of_the_live_entries():
    rng = np.random.default_rng(1)
    params = {
        "a": jnp.asarray(rng.normal(size=(40, 50))),
        "c": jnp.asarray(rng.normal(size=(7, 11))),
    }
    params["bias"] = jnp.ones(3)
    mask, live = jax.tree.map(lambda w: jnp.ones_like(w, bool), params), 2077
    fractions = {"a": 0.2, "c": 0.1, "bias": 0.0}
    own, counts = mask, {"a": 2000, "c": 77, "bias": 3}
    each = jax.jit(lambda mask, scores: masks.prune(mask, scores, fractions))
    for _ in range(8):
        scores = jax.tree.map(lambda w: jnp.asarray(rng.random(w.shape)), params)
        new = masks.prune(mask, scores, 0.2)
        live -= round(Fraction("0.2") * live)
        assert int(new["a"].sum() + new["c"].sum()) == live and new["bias"].all()
        assert not any((n & ~m).any() for n, m in zip(new.values(), mask.values(), strict=True))
        flat = lambda t: np.concatenate([np.ravel(t["a"]), np.ravel(t["c"])])
        assert flat(scores)[flat(new)].min() > flat(scores)[flat(mask) & ~flat(new)].max()
        mask = new
        same = each(own, scores)
        counts = {k: n - round(Fraction(repr(fractions[k])) * n) for k, n in counts.items()}
        assert {k: int(m.sum()) for k, m in same.items()} == counts
        assert not any((same[k] & ~own[k]).any() for k in own)
        own = same


def test_prune_names_a_wrong_fraction():
    mask, scores = {"w": jnp.ones((2, 2), bool)}, {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="fraction at 'w' is 20"):
        masks.prune(mask, scores, {"w": 20})
    with pytest.raises(ValueError, match=r"fraction is -0\.1"):
        masks.prune(mask, scores, -0.1)
    with pytest.raises(ValueError, match="'w' is only in the first"):
        masks.prune(mask, scores, {"v": 0.1})
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
        masks.prune({"w": jnp.ones(3, bool)}, scores, 0.1)
