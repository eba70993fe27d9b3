"""Sub-networks of Transformers: what is skipped, what it costs, and which are efficient."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkit import masks, trace
from jaxkit.masks import subnets
from jaxkit.masks.nested import draw, prefix, sandwich, subnet
from tests.counting import counting

D, HEADS, SIZE, UNITS, DEPTH = 6, 3, 2, 5, 2


def init(key, depth=DEPTH):
    def block(key):
        shapes = {
            "attention": {
                "norm": (D,), "q": (D, HEADS, SIZE), "k": (D, HEADS, SIZE), "v": (D, HEADS, SIZE),
                "q_bias": (HEADS, SIZE), "out": (HEADS, SIZE, D), "out_bias": (D,),
            },
            "mlp": {"norm": (D,), "up": (D, UNITS), "up_bias": (UNITS,),
                    "down": (UNITS, D), "down_bias": (D,)},
        }  # fmt: skip
        leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
        keys = jax.random.split(key, len(leaves))
        drawn = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
        return jax.tree.unflatten(structure, drawn)

    *keys, last = jax.random.split(key, depth + 1)
    return {"layers": [block(k) for k in keys], "head": jax.random.normal(last, (D, 4))}


def norm(x, gain, xp):
    x = x - x.mean(-1, keepdims=True)
    return gain * x / xp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def attend(p, x, xp):
    q, k, v = (xp.einsum("nd,dhs->hns", x, p[name]) for name in "qkv")
    q = q + p["q_bias"][:, None]
    scores = xp.einsum("hns,hms->hnm", q, k) * SIZE**-0.5
    seen = xp.tri(len(x)) > 0
    weights = xp.where(seen, xp.exp(scores - scores.max(-1, keepdims=True)), 0)
    mixed = xp.einsum("hnm,hms->nhs", weights / weights.sum(-1, keepdims=True), v)
    return xp.einsum("nhs,hsd->nd", mixed, p["out"]) + p["out_bias"]


def feed(p, x, xp):
    return xp.maximum(x @ p["up"] + p["up_bias"], 0) @ p["down"] + p["down_bias"]


def apply_fn(params, x, *, post=False, live=None, xp=jnp):
    """Pre-norm or post-norm; `live` tells a model which branches to skip, as pairs by layer.

    In jax, or in numpy, which compiles nothing for new shapes.
    """
    for i, layer in enumerate(params["layers"]):
        for j, (name, branch) in enumerate((("attention", attend), ("mlp", feed))):
            if name not in layer:
                continue
            p = layer[name]
            if post:
                y = norm(x + branch(p, x, xp), p["norm"], xp)
            else:
                y = x + branch(p, norm(x, p["norm"], xp), xp)
            x = y if live is None else xp.where(live[i][j], y, x)
    return x @ params["head"]


PARAMS = jax.tree.map(np.asarray, init(jax.random.key(0)))
X = np.asarray(jax.random.normal(jax.random.key(1), (4, D)))
LAYERS = [(f"{i}/heads", f"{i}/mlp") for i in range(DEPTH)]
BRANCHES = {f"{i}/heads": f"layers/{i}/attention/*" for i in range(DEPTH)}
BRANCHES |= {f"{i}/mlp": f"layers/{i}/mlp/*" for i in range(DEPTH)}


@cache
def axes():
    found = trace.axes(apply_fn, PARAMS, X)
    names = {f"layers/{i}/attention/k:1": f"{i}/heads" for i in range(DEPTH)}
    names |= {f"layers/{i}/mlp/up:1": f"{i}/mlp" for i in range(DEPTH)}
    return trace.rename(found, names)


def removed(unit_mask):
    """The sub-network as a model: smaller arrays, and no branch where no unit is left."""
    keep = {name: np.asarray(mask) for name, mask in unit_mask.items() if mask.any()}
    small, _, _ = masks.shrink(PARAMS, keep, axes())
    layers = [dict(layer) for layer in small["layers"]]
    for name, mask in unit_mask.items():
        if not mask.any():
            layer, kind = name.split("/")
            del layers[int(layer)][{"heads": "attention", "mlp": "mlp"}[kind]]
    return small | {"layers": layers}


def zeroed(mask):
    return jax.tree.map(lambda w, m: w * np.asarray(m), PARAMS, mask)


def as_numpy(unit_mask):
    return {name: np.asarray(mask) for name, mask in unit_mask.items()}


@cache
def spaces():
    make = (subnets.small, subnets.medium, subnets.layerwise, subnets.large)
    return {fn.__name__: fn(PARAMS, LAYERS, axes()) for fn in make}


def some_networks():
    """Random ones of every space, the smallest and the full ones."""
    for name, space in spaces().items():
        drawn = as_numpy(sandwich(jax.random.key(len(name)), space))
        yield from ({axis: mask[i] for axis, mask in drawn.items()} for i in range(4))
    yield {"0/heads": np.zeros(3, bool), "1/mlp": np.arange(5) == 2}


@jax.jit
def masked_logits(unit_mask):
    mask = subnet(PARAMS, unit_mask, axes(), branches=BRANCHES)
    return apply_fn(masks.apply(PARAMS, mask), X)


FULL = {name: np.ones(3 if "heads" in name else 5, bool) for layer in LAYERS for name in layer}


def test_masked_networks_are_the_removed_ones_and_cost_their_entries():
    dead = 0
    run, traces = counting(masked_logits)
    for unit_mask in some_networks():
        unit_mask = FULL | unit_mask
        small = removed(unit_mask)
        got = run(unit_mask)
        np.testing.assert_allclose(got, apply_fn(small, X, xp=np), rtol=2e-4, atol=2e-4)
        count = subnets.entries(PARAMS, unit_mask, axes(), branches=BRANCHES)
        assert count == sum(x.size for x in jax.tree.leaves(small))
        dead += sum(not mask.any() for mask in unit_mask.values())
    assert dead > 5
    assert len(traces) == 1


def test_without_the_branch_its_output_bias_stays():
    """The classic miss: units alone are masked, and the layer still adds its bias."""
    unit_mask = FULL | {"0/mlp": np.zeros(5, bool)}
    due = apply_fn(removed(unit_mask), X, xp=np)
    kept = apply_fn(zeroed(subnet(PARAMS, unit_mask, axes())), X, xp=np)
    assert np.abs(kept - due).max() > 0.1
    counts = [subnets.entries(PARAMS, unit_mask, axes(), branches=b) for b in (None, BRANCHES)]
    assert counts[0] - counts[1] == 2 * D  # the norm's gain and the output bias


def test_post_norm_blocks_are_skipped_by_the_model_alone():
    post = partial(apply_fn, post=True, xp=np)
    unit_mask = FULL | {"0/mlp": np.zeros(5, bool)}
    due = post(removed(unit_mask), X)
    for branches in (None, BRANCHES, {"0/mlp": "layers/0/mlp/down_bias"}):
        mask = subnet(PARAMS, unit_mask, axes(), branches=branches)
        assert np.abs(post(zeroed(mask), X) - due).max() > 0.1
    live = [[unit_mask[name].any() for name in layer] for layer in LAYERS]
    got = post(zeroed(subnet(PARAMS, unit_mask, axes())), X, live=live)
    np.testing.assert_allclose(got, due, rtol=2e-4, atol=2e-4)


def test_the_cost_in_closed_form():
    """attention 3 d h s + h s + h s d + 2 d with h heads, MLP 2 d u + u + 2 d with u units."""
    for h, u in ((1, 1), (2, 5), (3, 2)):
        unit_mask = {"0/heads": np.arange(3) < h, "0/mlp": np.arange(5) < u}
        unit_mask |= {"1/heads": np.zeros(3, bool), "1/mlp": np.zeros(5, bool)}
        attention = 3 * D * h * SIZE + h * SIZE + h * SIZE * D + 2 * D
        due = attention + 2 * D * u + u + 2 * D + D * 4
        assert subnets.entries(PARAMS, unit_mask, axes(), branches=BRANCHES) == due


def test_spaces_hold_what_they_say():
    drawn = {
        name: as_numpy(jax.jit(lambda k, s=space: draw(k, s, 300))(jax.random.key(0)))
        for name, space in spaces().items()
    }
    is_prefix = lambda mask: (mask[:, 1:] <= mask[:, :-1]).all()
    for name in ("small", "medium"):
        assert all(is_prefix(mask) for mask in drawn[name].values())
    few = drawn["small"]
    first, second = few["0/heads"].sum(1), few["1/heads"].sum(1)
    assert set(zip(first, second, strict=True)) == {
        (0, 0), (1, 0), (2, 0), (3, 0), (1, 1), (2, 2), (3, 3)
    }  # fmt: skip
    np.testing.assert_array_equal(first > 0, few["0/mlp"].any(1))
    assert set(drawn["medium"]["0/mlp"].sum(1)) == set(range(6))
    whole = drawn["layerwise"]
    assert all((mask.all(1) == mask.any(1)).all() for mask in whole.values())
    bits = np.stack([whole["0/heads"][:, 0], whole["1/mlp"][:, 0]])
    assert {tuple(b) for b in bits.T} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    any_ = drawn["large"]
    heads = np.concatenate([any_["0/heads"], any_["1/heads"]], 1)
    assert set(heads.sum(1)) == {1, 2, 3, 4, 5}  # of 6, 1 ... 5 go
    assert abs(heads.mean() - 0.5) < 0.07
    assert not is_prefix(any_["0/mlp"])
    for space in spaces().values():
        assert all(mask.all() for mask in space.masks(space.high).values())
        low = space.masks(space.low)
        assert not any(mask.any() for mask in low.values())


@pytest.mark.parametrize("name", ["small", "large"])
def test_mutation_changes_one_number_to_any_other(name):
    space = spaces()[name]
    start = space.low + (space.high - space.low) // 2
    change = jax.jit(jax.vmap(lambda k: subnets.mutate(k, space, start)))
    changed = np.asarray(change(jax.random.split(jax.random.key(0), 600)))
    differ = changed != start
    assert (differ.sum(1) == 1).all()
    for i in range(len(start)):
        others = set(range(space.low[i], space.high[i] + 1)) - {start[i]}
        assert set(changed[differ[:, i], i]) == others


# -------------------------------------------------------------------------------- efficiency


def brute_force_front(points):
    """The definition, point by point."""
    out = []
    for i, p in enumerate(points):
        beaten = any((q <= p).all() and (q < p).any() for q in points)
        out.append(not beaten and not any((q == p).all() for q in points[:i]))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_front_is_that_of_the_definition(objectives, seed):
    points = np.random.default_rng(seed).integers(0, 4, (12, objectives)).astype(np.float32)
    assert masks.subnets.pareto(points).tolist() == brute_force_front(points)


def test_equal_points_do_not_eliminate_each_other_and_nan_is_worst():
    points = jnp.array([[1.0, 1.0], [1.0, 1.0], [jnp.nan, 0.0], [jnp.nan, 2.0]])
    assert subnets.pareto(points).tolist() == [True, False, True, False]


# pymoo 0.6.1.5, indicators.hv.HV(ref_point=[0.9, 0.8]) on default_rng(seed).random((50, 2))
PYMOO = {0: 0.68273423102486, 1: 0.6047626789358814, 2: 0.6648219782590932}


def test_hypervolume_against_a_grid():
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.integers(0, 14, (10, 2))
        cells = np.stack(np.meshgrid(np.arange(12), np.arange(9), indexing="ij"), -1)
        covered = (points <= cells[:, :, None]).all(-1).any(-1)  # unit squares up to (12, 9)
        got = subnets.hypervolume(points.astype(np.float32), jnp.array([12.0, 9.0]))
        assert float(got) == covered.sum()
    assert float(subnets.hypervolume(jnp.zeros((0, 2)), jnp.ones(2))) == 0


@pytest.mark.parametrize("seed", PYMOO)
def test_hypervolume_against_pymoo(seed):
    points = np.random.default_rng(seed).random((50, 2))
    got = subnets.hypervolume(points.astype(np.float32), jnp.array([0.9, 0.8]))
    np.testing.assert_allclose(got, PYMOO[seed], rtol=1e-6)


# ------------------------------------------------------------------------------------ search


def objective(unit_mask):
    """The cost, and an error that only some units lower: its front is known."""
    unit_mask = as_numpy(unit_mask)
    useful = unit_mask["0/heads"][:2].sum() + unit_mask["1/mlp"][:1].sum()
    count = sum(mask.sum() for mask in unit_mask.values())
    return 3 - useful, count


def test_local_search_finds_the_front_that_random_search_misses():
    space = spaces()["large"]
    local = subnets.local_search(jax.random.key(0), space, objective, 150)
    random = subnets.random_search(jax.random.key(0), space, objective, 150)
    reference = jnp.array([4.0, 17.0])
    volume = lambda found: float(subnets.hypervolume(jnp.asarray(found.points), reference))
    true = jnp.array([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0], [0.0, 3.0]])
    assert volume(local) > volume(random)
    assert volume(local) >= 0.9 * float(subnets.hypervolume(true, reference))
    for found in (local, random):
        assert found.vectors.shape == (150, 16)
        assert found.front.tolist() == brute_force_front(found.points)
        again = [list(map(float, objective(space.masks(v)))) for v in found.vectors[:5]]
        assert again == found.points[:5].tolist()
    steps = (local.vectors[:, None] != local.vectors[None]).sum(-1)
    assert all(1 in steps[i, :i] for i in range(1, 150))  # each differs from one before in one bit


def test_local_search_starts_where_it_is_told():
    space = spaces()["layerwise"]
    found = subnets.local_search(
        jax.random.key(0), space, lambda u: (u["0/mlp"].sum(), 0), 3, start=space.high
    )
    assert found.vectors[0].tolist() == [1, 1]


def test_bad_input():
    for layers in ([], [[]], [["0/heads"], ["1/heads", "1/mlp"]]):
        with pytest.raises(ValueError, match="layers: as many axes in each"):
            subnets.medium(PARAMS, layers, axes())
    with pytest.raises(ValueError, match="named twice"):
        subnets.large(PARAMS, [["0/heads"], ["0/heads"]], axes())
    with pytest.raises(ValueError, match="no axis is named"):
        subnets.layerwise(PARAMS, [["2/heads"]], axes())
    with pytest.raises(ValueError, match="differ in size"):
        subnets.small(PARAMS, [["0/heads"], ["1/mlp"]], axes())
    with pytest.raises(ValueError, match="'0/heads' has size 3, and its mask the shape"):
        subnets.entries(PARAMS, {"0/heads": np.ones(4, bool)}, axes())
    with pytest.raises(ValueError, match=r"points \(n, 2\)"):
        subnets.hypervolume(jnp.ones((4, 3)), jnp.ones(3))
    with pytest.raises(ValueError, match="at least one evaluation"):
        subnets.random_search(jax.random.key(0), spaces()["small"], objective, 0)
    one = spaces()["small"]._replace(high=spaces()["small"].low)
    with pytest.raises(ValueError, match="a single sub-network"):
        subnets.mutate(jax.random.key(0), one, one.low)
    assert prefix(PARAMS, {"0/heads": 2}, axes())["0/heads"].sum() == 2


def test_the_front_sees_differences_below_those_of_float32():
    """Whole numbers of parameters beyond 2^24, and quantities to be large, negated."""
    points = [[0.4, 110_000_001], [0.4, 110_000_000]]
    for known in (points, np.array(points)):
        assert subnets.pareto(known).tolist() == [False, True]
    loss_and_gain = np.array([[0.4, 7.0], [0.4, 8.0], [0.3, 7.0]])
    assert subnets.pareto(loss_and_gain * [1, -1]).tolist() == [False, True, True]
    inside = jax.jit(lambda: subnets.pareto(jnp.array(points)))()
    assert inside.tolist() == [True, False]  # in float32 they are equal
