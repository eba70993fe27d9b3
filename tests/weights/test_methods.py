import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import weights
from tests.counting import counting

KEY = jax.random.key(0)
ZERO = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(6)}


def trees(n, seed=0, spread=False):
    """Models as float32 deltas to ZERO; with `spread`, "b" is ten times larger than "w"."""
    rng = np.random.default_rng(seed)
    size = {"w": 1.0, "b": 10.0 if spread else 1.0}
    draw = lambda k, w: jnp.asarray(size[k] * rng.normal(size=w.shape), jnp.float32)
    return [{k: draw(k, w) for k, w in ZERO.items()} for _ in range(n)]


def merge(models, method, **options):
    return weights.merge(ZERO, models, method, **options)


def flat(tree):
    """All entries in leaf order: b, then w."""
    return np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)])


def same(got, want, tol=1e-6):
    np.testing.assert_allclose(flat(got), flat(want), rtol=tol, atol=tol)


def windowed(x, sparsity, outliers=0.0, axis=None):
    """Zero the ranks outside the window, in numpy, ties by position."""
    x = np.asarray(x, float)
    if axis is not None:
        rows = np.moveaxis(x, axis, -1)
        out = np.stack([windowed(r, sparsity, outliers) for r in rows.reshape(-1, rows.shape[-1])])
        return np.moveaxis(out.reshape(rows.shape), -1, axis)
    n = x.size
    order = np.argsort(-np.abs(x).ravel(), kind="stable")
    top = round(outliers * n)
    kept = order[top : n - round(sparsity * n) + top]
    out = np.zeros(n)
    out[kept] = x.ravel()[kept]
    return out.reshape(x.shape)


# ------------------------------------------------------------------------------- sparsification


def test_breadcrumbs_that_keep_all_is_task_arithmetic():
    models = trees(2)
    got = merge(models, weights.breadcrumbs(sparsity=0.0, outliers=0.0), scale=0.3)
    same(got, merge(models, weights.task_arithmetic(), scale=0.3), 0)


@pytest.mark.parametrize("scope", ["leaf", "tree", -1, 0])
def test_breadcrumbs_keep_the_window_of_each_scope(scope):
    """The scopes differ where lines and leaves are of different sizes, and each is numpy's."""
    (model,) = trees(1, spread=True)
    model["w"] = model["w"] * jnp.array([1.0, 2.0, 4.0, 8.0])[:, None]
    method = weights.breadcrumbs(sparsity=0.5, outliers=0.2, scope=scope)
    got = merge([model], method)
    if scope == "tree":
        want = windowed(flat(model), 0.5, 0.2)
    else:
        axis = None if scope == "leaf" else scope
        want = flat({k: windowed(x, 0.5, 0.2, axis) for k, x in model.items()})
    np.testing.assert_allclose(flat(got), want)
    others = [s for s in ("leaf", "tree", -1, 0) if s != scope]
    for other in others:
        different = merge([model], weights.breadcrumbs(sparsity=0.5, outliers=0.2, scope=other))
        assert (flat(different) != flat(got)).any()


def test_the_kept_lie_between_the_removed():
    (model,) = trees(1)
    w, kept = np.abs(model["w"]), np.asarray(merge([model], weights.breadcrumbs(
        sparsity=0.6, outliers=0.15))["w"]) != 0  # fmt: skip
    assert kept.sum() == 8
    assert (w[~kept] > w[kept].max()).sum() == 3
    assert (w[~kept] < w[kept].min()).sum() == 9


def test_permuting_inside_the_scope_commutes():
    (model,) = trees(1)
    order = np.random.default_rng(1).permutation(20)
    shuffled = model | {"w": model["w"].ravel()[order].reshape(4, 5)}
    method = weights.breadcrumbs(sparsity=0.5, outliers=0.1)
    got = merge([shuffled], method)["w"].ravel()
    np.testing.assert_array_equal(got, merge([model], method)["w"].ravel()[order])


def test_ties_of_magnitude_rank_by_position():
    model = {"w": jnp.array([1.0, -1.0, 1.0, -1.0, 1.0])}
    got = weights.merge(
        {"w": jnp.zeros(5)}, [model], weights.breadcrumbs(sparsity=0.6, outliers=0.2)
    )
    assert got["w"].tolist() == [0.0, -1.0, 1.0, 0.0, 0.0]
    half = {"a": jnp.ones(2), "b": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, half)
    trimmed = weights.merge(zero, [half], weights.ties(sparsity=0.25, scope="tree"))
    assert trimmed["a"].tolist() + trimmed["b"].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_window_of_models_of_a_traced_sparsity():
    models = trees(2)
    sweep = jax.jit(jax.vmap(lambda s: merge(models, weights.ties(sparsity=s, scope="leaf"))))
    swept = sweep(jnp.array([0.0, 0.5, 0.9]))
    for i, s in enumerate((0.0, 0.5, 0.9)):
        want = merge(models, weights.ties(sparsity=s, scope="leaf"))
        same(jax.tree.map(lambda x, i=i: x[i], swept), want)


def test_scalars_are_left_alone():
    base, model = {"s": jnp.array(1.0)}, {"s": jnp.array(3.0)}
    for scope in ("leaf", 0):
        assert weights.merge(base, [model], weights.ties(scope=scope))["s"] == 3.0


def test_short_lines_warn():
    method = weights.breadcrumbs(sparsity=0.5, outliers=0.1, scope=0)
    with pytest.warns(UserWarning, match="'w': no outlier is removed from lines of 4"):
        weights.merge(ZERO, trees(1), method, where="w")
    weights.merge(ZERO, trees(1), method, where="b")


# ---------------------------------------------------------------------------------------- TIES


def ties_by_hand(deltas, sparsity, weight=None):
    """The paper's three steps on flat vectors."""
    trimmed = np.stack([windowed(d, sparsity) for d in deltas])
    c = np.ones(len(deltas)) if weight is None else np.asarray(weight)
    sign = np.where((c[:, None] * trimmed).sum(0) >= 0, 1, -1)
    agree = np.sign(trimmed) == sign
    total = (c[:, None] * agree).sum(0)
    return (c[:, None] * agree * trimmed).sum(0) / np.where(total == 0, 1, total)


def test_ties_is_the_papers_algorithm_on_the_flat_vector():
    models = trees(3, spread=True)
    for weight in (None, [1.0, 0.5, 2.0]):
        got = merge(models, weights.ties(sparsity=0.6, weights=weight))
        want = ties_by_hand([flat(m) for m in models], 0.6, weight)
        np.testing.assert_allclose(flat(got), want, atol=1e-5)


def test_ties_of_one_model_trims_and_of_copies_is_one():
    models = trees(1)
    one = merge(models, weights.ties(sparsity=0.5))
    np.testing.assert_allclose(flat(one), windowed(flat(models[0]), 0.5), rtol=1e-6)
    same(merge(models * 3, weights.ties(sparsity=0.5)), one)


def test_opposite_deltas():
    """The larger wins; of equal ones the positive; a sum instead of a mean where that is asked."""
    base = {"w": jnp.zeros(3)}
    models = [{"w": jnp.array(x)} for x in ([1.0, -2.0, 1.0], [-1.0, 1.0, 2.0])]
    method = lambda **options: weights.ties(sparsity=0.0, **options)
    assert weights.merge(base, models, method())["w"].tolist() == [1.0, -2.0, 1.5]
    assert weights.merge(base, models, method(reduce="sum"))["w"].tolist() == [1.0, -2.0, 3.0]


def test_equal_to_mergekit():
    """mergekit 0.1.5 on one tensor: ties (density .4, weights) and breadcrumbs (gamma .1).

    Its counts are floors, the same here.
    """
    rng = np.random.default_rng(7)
    base = rng.normal(size=(4, 5)).astype(np.float32)
    models = [{"w": (base + rng.normal(size=(4, 5))).astype(np.float32)} for _ in range(3)]
    ties = [
        [-1.8405049, 0.2987455, -1.5274541, -2.0777864, 0.9041526],
        [-2.5387912, -2.4566162, 2.4854372, -1.8157344, -1.4151173],
        [-1.0402937, -1.4769067, -0.8731048, -1.7393053, 1.1623911],
        [0.6953032, -1.3442146, 0.4267741, -0.4627001, 0.2339916],
    ]
    crumbs = [
        [0.0012302, 0.1597533, -1.0218885, -1.2467502, -0.2208142],
        [-0.9916465, 0.5875876, 1.5221739, -1.081706, -0.8588676],
        [0.4535503, -0.1462257, -0.1881415, -1.1731192, 0.6661223],
        [0.864737, -1.3442146, 0.0078755, -1.6447461, -1.4922365],
    ]
    method = weights.ties(sparsity=0.6, scope="leaf", weights=[1.0, 0.5, 2.0])
    got = weights.merge({"w": base}, models, method)
    np.testing.assert_allclose(got["w"], ties, atol=2e-6)
    method = weights.breadcrumbs(sparsity=0.5, outliers=0.1)
    got = weights.merge({"w": base}, models, method, scale=0.3)
    np.testing.assert_allclose(got["w"], crumbs, atol=2e-6)


# ---------------------------------------------------------------------------------------- DARE


def test_dare_has_the_mean_and_the_variance_of_the_formulas():
    """Over 2000 masks: E = tau (1 - p) / q and Var = tau^2 p (1 - p) / q^2, within 4 errors."""
    base, tau = {"w": jnp.zeros(3)}, jnp.array([1.0, -2.0, 0.5])
    keys, p = jax.random.split(KEY, 2000), 0.75

    @jax.jit
    def draws(q):
        method = lambda key: weights.dare(key, drop_rate=p, q=q)
        return jax.vmap(lambda key: weights.merge(base, [{"w": tau}], method(key))["w"])(keys)

    for q in (1 - p, 0.6):
        out = np.asarray(draws(q), float)
        mean, variance = tau * (1 - p) / q, np.square(tau) * p * (1 - p) / q**2
        error = np.sqrt(variance / 2000)
        assert (np.abs(out.mean(0) - mean) < 4 * error).all()
        np.testing.assert_allclose(out.var(0), variance, rtol=0.1)
        assert ((out == 0) | np.isclose(out, tau / q)).all()
    whole = merge(trees(2), weights.dare(KEY, drop_rate=0.0))
    same(whole, merge(trees(2), weights.task_arithmetic()), 0)


def test_the_draws_of_a_leaf_are_its_own():
    """Neither another leaf nor another model changes them, and models draw for themselves."""
    ones = jax.tree.map(lambda w: w + 1, ZERO)
    method = weights.dare(KEY, drop_rate=0.5, then=weights.average([1.0, 0.0]))
    both = merge([ones, ones], method)
    alone = merge([ones], weights.dare(KEY, drop_rate=0.5))
    same(both, alone, 0)
    only = weights.merge({"w": ZERO["w"]}, [{"w": ones["w"]}], weights.dare(KEY, drop_rate=0.5))
    np.testing.assert_array_equal(only["w"], alone["w"])
    second = merge([ones, ones], weights.dare(KEY, drop_rate=0.5, then=weights.average([0.0, 1.0])))
    assert (flat(second) != flat(alone)).any()


def test_a_factor_for_each_leaf():
    ones = jax.tree.map(lambda w: w + 1, ZERO)
    got = merge([ones], weights.dare(KEY, drop_rate=0.5, q={"w": 0.25, "b": 1.0}))
    assert set(np.unique(got["w"])) == {0.0, 4.0} and set(np.unique(got["b"])) == {0.0, 1.0}
    with pytest.raises(ValueError, match="q has no number for 'b'"):
        merge([ones], weights.dare(KEY, q={"w": 0.25}))


def test_dare_before_an_election_and_before_a_threshold_of_the_whole_tree():
    models = trees(3)
    left = [
        merge(models, weights.dare(KEY, drop_rate=0.3, then=weights.average(list(np.eye(3)[i]))))
        for i in range(3)
    ]
    for then in (weights.ties(sparsity=0.0), weights.ties(sparsity=0.5, scope="tree")):
        same(merge(models, weights.dare(KEY, drop_rate=0.3, then=then)), merge(left, then), 1e-5)


# ----------------------------------------------------------------------------------------- PCB


def pcb_by_hand(t, keep, clip, inter):
    """The published lines, in numpy, of (models, entries); returns tau and the coefficients."""

    def clamp(x, low, high):
        s, d = np.sort(x, 1), x.shape[1]
        return np.clip(x, s[:, [int(d * low)]], s[:, [int(d * (1 - high) - 1)]])

    unit = lambda x: (x - x.min(1, keepdims=True)) / np.ptp(x, axis=1)[:, None]
    size = clamp(np.abs(t), clip, clip)
    own = np.exp(len(t) * unit(size) ** 2)
    u = np.sign(t) * unit(size)
    cross = {
        "raw": lambda: np.tanh(t * t.sum(0)),
        "mixed": lambda: np.tanh(t * u.sum(0)),
        "normalized": lambda: np.stack([np.tanh(x * u).sum(0) for x in u]),
    }[inter]()
    c = unit(clamp(own * cross, 1 - keep, 0))
    return (c * np.sign(t) * size).sum(0) / np.maximum(c.sum(0), 1e-12), c


@pytest.mark.parametrize("inter", ["raw", "mixed", "normalized"])
def test_pcb_is_the_published_code(inter):
    models = trees(3)
    t = np.stack([flat(m) for m in models])
    want, c = pcb_by_hand(t, 0.3, 0.05, inter)
    assert ((c > 0).sum(1) == 26 - int(26 * 0.7) - 1).all() and (c.max(1) == 1).all()
    method = weights.pcb(keep=0.3, clip=0.05, inter=inter)
    got = merge(models, method)
    np.testing.assert_allclose(flat(got), want, atol=1e-5)
    alone = flat(merge(models[:1], method))  # its winners, which agree with themselves
    assert (alone != 0).sum() == 26 - int(26 * 0.7) - 1
    same(merge(models[::-1], method), got, 1e-5)
    larger = merge([jax.tree.map(lambda w: 3 * w, m) for m in models], method)
    if inter == "normalized":
        same(larger, jax.tree.map(lambda w: 3 * w, got), 1e-5)
    else:
        assert np.abs(flat(larger) - 3 * flat(got)).max() > 0.05


def test_pcb_of_copies_is_the_clamped_task_on_its_winners():
    (model,) = trees(1)
    t = flat(model)
    _, c = pcb_by_hand(np.stack([t, t]), 0.4, 0.05, "raw")
    got = flat(merge([model, model], weights.pcb(keep=0.4, clip=0.05)))
    size = np.sort(np.abs(t))
    clamped = np.sign(t) * np.clip(np.abs(t), size[1], size[int(26 * 0.95 - 1)])
    np.testing.assert_allclose(got, np.where(c[0] > 0, clamped, 0), rtol=1e-5)


def test_pcb_by_leaf_is_pcb_of_each_leaf():
    models = trees(2)
    got = merge(models, weights.pcb(keep=0.5, scope="leaf"))
    for name in ZERO:
        t = np.stack([np.asarray(m[name], float).ravel() for m in models])
        np.testing.assert_allclose(
            got[name].ravel(), pcb_by_hand(t, 0.5, 1e-4, "raw")[0], atol=1e-5
        )
    whole = merge(models, weights.pcb(keep=0.5))
    assert (flat(whole) != flat(got)).any()


def test_pcb_of_a_traced_ratio_and_weights():
    models = trees(2)
    run, traces = counting(lambda r, c: merge(models, weights.pcb(keep=r, weights=c)))
    for r in (0.3, 0.7):
        want = jax.tree.map(lambda w: 1.2 * w, merge(models, weights.pcb(keep=r)))
        same(run(jnp.float32(r), jnp.array([1.2, 1.2])), want, 1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("method", [weights.pcb(), weights.model_stock(scope="tree")])
def test_methods_of_the_whole_tree_take_a_tree_without_floats(method):
    steps = {"steps": jnp.arange(3)}
    np.testing.assert_array_equal(weights.merge(steps, [steps] * 2, method)["steps"], jnp.arange(3))


def test_pcb_without_anything_to_rank():
    with pytest.raises(ValueError, match="magnitudes of model 1 are all equal"):
        merge([*trees(1), jax.tree.map(jnp.ones_like, ZERO)], weights.pcb())


# --------------------------------------------------------------------------------- model stock


def test_stock_of_copies_is_the_model_and_of_orthogonal_deltas_the_base():
    models = trees(1)
    same(merge(models * 3, weights.model_stock()), models[0], 1e-5)
    base = {"w": jnp.ones(4)}
    e = [{"w": base["w"].at[i].add(2.0)} for i in range(3)]
    np.testing.assert_allclose(weights.merge(base, e, weights.model_stock())["w"], base["w"])
    apart = [{"w": base["w"] + s * jnp.arange(4.0)} for s in (1, -1)]
    np.testing.assert_allclose(weights.merge(base, apart, weights.model_stock())["w"], base["w"])


def scattered(n, size=20_000, seed=0):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=size) / np.sqrt(2)
    models = centre + rng.normal(size=(n, size))
    return centre, jnp.asarray(models, jnp.float32)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_stock_finds_the_factor_of_an_oracle_that_knows_the_centre(n):
    centre, models = scattered(n)
    out = weights.merge({"w": jnp.zeros(20_000)}, {"w": models}, weights.model_stock())["w"]
    mean = np.asarray(models.mean(0), float)
    t = (out @ mean) / (mean @ mean)
    assert t == pytest.approx(centre @ mean / (mean @ mean), abs=0.015)
    assert t == pytest.approx({2: 1 / 2, 3: 3 / 5, 5: 5 / 7}[n], abs=0.015)
    assert np.linalg.norm(out - centre) < 0.85 * np.linalg.norm(mean - centre)


def test_stock_is_a_projection():
    """Equally long deltas with <d_i, m> = |m|^2: t a is the projection of m on the line of a."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(9, 4)))
    m, e = 1.5 * q[:, 0], 2.0 * q[:, 1:].T
    deltas = jnp.asarray(m + e, jnp.float32)
    got = weights.merge({"w": jnp.zeros(9)}, {"w": deltas}, weights.model_stock())["w"]
    a = np.asarray(deltas.mean(0), float)
    assert abs((np.asarray(got) - m) @ a) < 1e-5


def test_stock_equals_mergekit():
    """mergekit 0.1.5, model_stock of one tensor, whole and filter_wise (by torch's rows)."""
    base = np.random.default_rng(7).normal(size=(4, 5)).astype(np.float32)
    rng = np.random.default_rng(8)
    c = rng.normal(size=(4, 5))
    models = [{"w": (base + c + rng.normal(size=(4, 5))).astype(np.float32)} for _ in range(3)]
    whole = [
        [-0.94018865, -1.0866361, -1.8749048, -1.5066559, -1.8348987],
        [-1.2986282, -0.59396327, 2.24487, -0.2972728, 0.8812887],
        [0.9275008, -0.39457023, 0.5322705, 0.819585, -0.18474811],
        [1.7245663, -0.39404947, 1.2499945, -3.1592, -2.4150136],
    ]
    rows = [
        [-1.0513623, -1.2502381, -2.063942, -1.5794079, -1.9978921],
        [-1.3167509, -0.63257843, 2.2982762, -0.28576487, 0.96994543],
        [0.6646843, 0.05668397, 0.27594098, -0.23133147, -0.09137174],
        [1.7622528, -0.3592592, 1.3125187, -3.2052608, -2.4562228],
    ]
    for scope, want in (("leaf", whole), (-1, rows), ("tree", whole)):
        got = weights.merge({"w": base}, models, weights.model_stock(scope=scope))
        np.testing.assert_allclose(got["w"], want, atol=2e-6)
    across = weights.merge({"w": base}, models, weights.model_stock(scope=0))
    back = weights.merge(
        {"w": base.T}, [{"w": m["w"].T} for m in models], weights.model_stock(scope=-1)
    )
    np.testing.assert_allclose(across["w"], back["w"].T, rtol=1e-6)


def test_stock_of_the_whole_tree_has_one_factor():
    _, models = scattered(3, 26)
    models = [{"b": m[:6], "w": m[6:].reshape(4, 5)} for m in models]
    got = merge(models, weights.model_stock(scope="tree"))
    mean = merge(models, weights.average())
    ratio = flat(got) / flat(mean)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    vector = weights.merge(
        {"v": jnp.zeros(26)}, {"v": jnp.stack([jnp.asarray(flat(m)) for m in models])},
        weights.model_stock(),
    )  # fmt: skip
    np.testing.assert_allclose(flat(got), vector["v"], rtol=1e-4)
    shared = [m | {"b": models[0]["b"]} for m in models]
    np.testing.assert_allclose(merge(shared, weights.model_stock())["b"], models[0]["b"], rtol=1e-5)
    whole = merge(shared, weights.model_stock(scope="tree"))["b"]
    assert (jnp.abs(whole) < 0.99 * jnp.abs(models[0]["b"])).all()


def test_angles_differ_from_cosines_for_three_models_only():
    _, models = scattered(3, 50)
    models = models.at[2].multiply(0.2).at[2].add(models[0])
    run = lambda m, angles: weights.merge(
        {"w": jnp.zeros(50)}, {"w": m}, weights.model_stock(angles=angles)
    )["w"]
    np.testing.assert_allclose(run(models[:2], "angle"), run(models[:2], "cosine"), rtol=1e-4)
    d = np.asarray(models, float)
    norm = np.linalg.norm(d, axis=1)
    pairs = [d[i] @ d[j] / norm[i] / norm[j] for i, j in ((0, 1), (0, 2), (1, 2))]
    c = np.cos(np.mean(np.arccos(pairs)))
    np.testing.assert_allclose(run(models, "angle"), 3 * c / (1 + 2 * c) * d.mean(0), rtol=1e-3)
    assert c != pytest.approx(np.mean(pairs), abs=1e-3)


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: weights.ties(sparsity=1.0), r"sparsity is 1.0, and a number in \[0, 1\)"),
        (lambda: weights.ties(scope="layer"), "scope='layer'"),
        (lambda: weights.ties(reduce="max"), "reduce='max'"),
        (lambda: weights.breadcrumbs(outliers=1.0), "outliers is 1.0"),
        (lambda: weights.breadcrumbs(sparsity=0.1, outliers=0.2), "outliers=0.2 is more than"),
        (lambda: weights.dare(KEY, drop_rate=1.0), "drop_rate is 1.0"),
        (lambda: weights.dare(KEY, q=0.0), "q is 0.0"),
        (lambda: weights.dare(KEY, q={"w": 1.5}), "q of 'w' is 1.5"),
        (lambda: weights.pcb(keep=0.0), "keep is 0.0"),
        (lambda: weights.pcb(clip=0.5), "clip is 0.5"),
        (lambda: weights.pcb(inter="softmax"), "inter='softmax'"),
        (lambda: weights.pcb(scope=0), "scope=0; 'tree' or 'leaf'"),
        (lambda: weights.model_stock(angles="mean"), "angles='mean'"),
        (lambda: weights.model_stock(scope="layer"), "scope='layer'"),
        (lambda: merge(trees(1), weights.model_stock()), "at least two"),
        (lambda: merge(trees(1), weights.breadcrumbs(scope=1)), "'b' has 1 dim.* no axis 1"),
        (lambda: merge(trees(2), weights.ties(weights=[1.0])), r"shape \(1,\) for 2 models"),
    ],
)  # fmt: skip
def test_bad_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_types_are_named():
    with pytest.raises(TypeError, match="typed key"):
        weights.dare(jax.random.PRNGKey(0))
    z = {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match="'w' is complex"):
        weights.merge(z, [z], weights.ties())
    mean = weights.merge(z, [{"w": 3j * z["w"]}, z], weights.average())
    np.testing.assert_allclose(mean["w"], (1 + 3j) / 2)
