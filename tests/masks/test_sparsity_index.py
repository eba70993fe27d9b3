"""The PQ index and its pruning fraction: closed forms, limits, and the published code."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks


def index(w, mask=None, **options):
    mask = None if mask is None else {"w": jnp.asarray(mask)}
    return np.asarray(masks.pq_index({"w": jnp.asarray(w, jnp.float32)}, mask, **options)["w"])


def pruned(w, mask=None, **options):
    """How many entries the fraction is."""
    mask = None if mask is None else {"w": jnp.asarray(mask)}
    fraction = masks.sap_fraction({"w": jnp.asarray(w, jnp.float32)}, mask, **options)["w"]
    live = np.size(w) if mask is None else int(mask["w"].sum())
    count = float(fraction) * live
    assert abs(count - round(count)) < 1e-7 * live + 1e-5  # a whole number of entries
    return round(count)


def few(k, d):
    """d entries of which k are of one size."""
    return np.where(np.arange(d) % (d // k) == 0, -3.0, 0.0).reshape(1, d)


# ------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.2, 1.7)])
def test_k_equal_entries_of_d(p, q):
    """I = 1 - (k / d)^(1/p - 1/q), from none of one size to one alone, and r = k."""
    for k, d in [(100, 100), (1, 100), (10, 100), (25, 100), (1, 10)]:
        want = 1 - (k / d) ** (1 / p - 1 / q)
        np.testing.assert_allclose(index(few(k, d), p=p, q=q), want, atol=2e-6)
        got = pruned(few(k, d), p=p, q=q, beta=0.999)
        assert got == d - k, (k, d)


def test_the_checked_value():
    np.testing.assert_allclose(index(few(10, 100)), 0.9, atol=1e-6)
    assert pruned(few(10, 100)) == 90 and pruned(few(1, 100)) == 90  # beta


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_equal_magnitudes_of_large_leaves_prune_nothing(scope):
    params = jax.eval_shape(lambda: {"w": jnp.zeros((1000, 1000)), "v": jnp.zeros((1024, 2048))})
    fill = lambda: jax.tree.map(lambda w: jnp.full(w.shape, -0.3), params)
    found = jax.jit(lambda: masks.sap_fraction(fill(), scope=scope))()
    assert [float(f) for f in jax.tree.leaves(found)] in ([0.0], [0.0, 0.0])
    half = jax.jit(lambda: masks.sap_fraction({"w": fill()["w"].at[:500].set(0)}))()
    assert float(half["w"]) == 0.5


def test_scale_and_cloning_change_nothing():
    w = np.random.default_rng(0).normal(size=(8, 20))
    base = index(w)
    np.testing.assert_allclose(index(1e12 * w), base, rtol=1e-5)
    np.testing.assert_allclose(index(1e-12 * w), base, rtol=1e-5)
    np.testing.assert_allclose(index(np.concatenate([w, w])), base, rtol=1e-5)


@pytest.mark.parametrize(
    ("p", "q", "limit", "kept"),
    [(1.0, 2.0, 1 - math.sqrt(2 / math.pi), 2 / math.pi), (0.5, 1.0, 0.152787, 0.847213)],
)
def test_the_gaussian_limit(p, q, limit, kept):
    w = np.random.default_rng(1).normal(size=(1000, 400))
    np.testing.assert_allclose(index(w, p=p, q=q), limit, atol=1e-3)
    np.testing.assert_allclose(1 - pruned(w, p=p, q=q) / w.size, kept, atol=2e-3)
    # E|Z|^r = 2^(r/2) Gamma((r + 1) / 2) / sqrt(pi)
    moment = lambda r: 2 ** (r / 2) * math.gamma((r + 1) / 2) / math.sqrt(math.pi)
    ratio = moment(p) ** (1 / p) / moment(q) ** (1 / q)
    np.testing.assert_allclose(limit, 1 - ratio, atol=5e-7)
    np.testing.assert_allclose(kept, ratio ** (p * q / (q - p)), atol=5e-7)


def gini(w):
    """The Gini index of |w|: another measure that orders by sparsity."""
    x = np.sort(np.abs(np.ravel(w)))
    n = x.size
    return np.sum((2 * np.arange(1, n + 1) - n - 1) * x) / (n * x.sum())


def test_robin_hood_and_gini_agree():
    """Mass from a large entry to a smaller one lowers both; so both order a family of powers."""
    rng = np.random.default_rng(2)
    w = np.abs(rng.normal(size=(1, 30)))
    for _ in range(10):
        i, j = rng.permutation(30)[:2]
        i, j = (i, j) if w[0, i] > w[0, j] else (j, i)
        fairer = w.copy()
        gift = 0.4 * (w[0, i] - w[0, j])
        fairer[0, i] -= gift
        fairer[0, j] += gift
        assert gini(fairer) < gini(w) and index(fairer) < index(w)
        w = fairer
    base = np.abs(rng.normal(size=(20, 20)))
    sharpened = [base**power for power in (0.25, 0.5, 1, 2, 4)]
    assert (np.diff([gini(x) for x in sharpened]) > 0).all()
    assert (np.diff([index(x) for x in sharpened]) > 0).all()


# ---------------------------------------------------------------------------------- published code


def waves(*shape, a):
    """Numbers that any program can make."""
    return np.sin(a * np.arange(1, np.prod(shape) + 1)).astype(np.float32).reshape(shape)


# The authors' sparsity_index.py and compression.py on a torch layer (12, 25) with 228 live weights,
# by (p, q, eta, gamma): the index of the layer, the entries to retain in it, and in its units
PUBLISHED = {
    (0.5, 1.0, 0.0, 1.0): (0.106364, 204, [18, 18, 17, 18, 18, 17, 18, 18, 17, 18, 17, 17]),
    (0.5, 1.0, 0.5, 1.0): (0.106364, 91, [8] * 12),
    (1.0, 2.0, 0.0, 1.0): (0.134834, 171, [15, 15, 14, 15, 15, 14, 15, 15, 14, 15, 15, 15]),
    (0.3, 1.5, 0.0, 0.7): (0.221692, 208, [18, 19, 17] + [18] * 9),
}
LAYER = (waves(12, 25, a=1.3) ** 3).T
LIVE = np.abs(LAYER) > 0.05


@pytest.mark.parametrize("setting", PUBLISHED)
def test_the_bounds_of_the_published_code(setting):
    """And the counts in exact arithmetic: in their floats 19 (1 - 18 / 19) is below 1."""
    p, q, eta, gamma = setting
    layer, bound, bounds = PUBLISHED[setting]
    count = lambda d, r: math.floor(
        d * min(Fraction(str(gamma)) * (1 - Fraction(r, d)), Fraction(9, 10))
    )
    np.testing.assert_allclose(index(LAYER, LIVE, p=p, q=q), layer, atol=2e-6)
    options = {"p": p, "q": q, "eta": eta, "gamma": gamma}
    assert pruned(LAYER, LIVE, **options) == count(228, bound)
    params, mask = {"w": jnp.asarray(LAYER)}, {"w": jnp.asarray(LIVE)}
    units = masks.sap_fraction(params, mask, scope="unit", **options)["w"]
    want = [count(int(d), r) for d, r in zip(LIVE.sum(0), bounds, strict=True)]
    np.testing.assert_allclose(units * LIVE.sum(0), want, atol=1e-4)


# -------------------------------------------------------------------------------- with the pruning


def network():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) ** 3, jnp.float32)
    return {"w0": draw(30, 40), "w1": draw(40, 10), "bias": jnp.ones(10)}


def test_fractions_prune_what_they_say_in_every_scope():
    params = network()
    mask = masks.topk(masks.random(jax.random.key(0), params), sparsity=0.5)
    scores = masks.magnitude(params)
    live = {k: int(m.sum()) for k, m in mask.items()}

    fraction = masks.sap_fraction(params, mask)
    assert fraction["bias"] == 0.0
    new = masks.prune(mask, scores, fraction)
    for name in ("w0", "w1"):
        gone = live[name] - int(new[name].sum())
        assert gone == round(float(fraction[name]) * live[name]) > 0
        assert not bool((new[name] & ~mask[name]).any())
    assert new["bias"].all()

    fraction = masks.sap_fraction(params, mask, scope="global")
    new = masks.prune(mask, scores, fraction)
    both = live["w0"] + live["w1"]
    assert both - int(new["w0"].sum() + new["w1"].sum()) == round(float(fraction) * both) > 0
    together = {"w": jnp.concatenate([params[k].ravel() for k in ("w0", "w1")])[None]}
    inside = {"w": jnp.concatenate([mask[k].ravel() for k in ("w0", "w1")])[None]}
    np.testing.assert_allclose(
        masks.pq_index(params, mask, scope="global"),
        masks.pq_index(together, inside)["w"],
        rtol=1e-5,
    )

    fraction = masks.sap_fraction(params, mask, scope="unit")["w0"]
    of_unit = jax.vmap(
        lambda m, s, f: masks.prune([m], [s], [f])[0], in_axes=(-1, -1, 0), out_axes=-1
    )
    new = of_unit(mask["w0"], scores["w0"], fraction)
    gone = mask["w0"].sum(0) - new.sum(0)
    np.testing.assert_array_equal(gone, np.rint(fraction * mask["w0"].sum(0)))
    assert int(gone.min()) > 0


def test_the_adaptive_rule_in_the_loop_of_tickets():
    """Without training nothing else moves: the counts fall by the rule and never to nothing."""
    params = network()
    train = lambda params, mask, start, stop: params
    rule = lambda mask, trained: masks.prune(
        mask, masks.magnitude(trained), masks.sap_fraction(trained, mask)
    )
    found = list(masks.tickets(train, params, steps=1, rounds=4, rule=rule))
    counts = np.array([int(t.mask["w0"].sum()) for t in found])
    for before, after, ticket in zip(counts, counts[1:], found, strict=False):
        fraction = float(masks.sap_fraction(ticket.trained, ticket.mask)["w0"])
        assert before - after == round(fraction * before) > 0
    # a uniform magnitude is the fixed point: as the tail goes, so does the fraction
    shares = 1 - counts[1:] / counts[:-1]
    assert (np.diff(shares) < 0).all()
    even = {"w": jnp.full((4, 5), -2.0)}
    assert float(masks.sap_fraction(even)["w"]) == 0.0


def test_edges():
    params = {"w": jnp.array([[1.0, 2.0, 3.0]]), "v": jnp.zeros((2, 2))}
    none = {"w": jnp.zeros((1, 3), bool), "v": jnp.ones((2, 2), bool)}
    for fn in (masks.pq_index, masks.sap_fraction):
        got = fn(params, none)
        assert float(got["w"]) == 0 and float(got["v"]) == 0
        assert float(fn(params, none, scope="global")) == 0
        np.testing.assert_array_equal(fn({}, scope="global"), 0)
    # masked entries do not count, whatever they hold
    w = np.array([[1.0, -1.0, 1.0, 500.0, np.nan]])
    live = np.array([[True, True, True, False, False]])
    assert index(w, live) == 0 and pruned(w, live) == 0
    half = masks.pq_index({"w": jnp.ones((2, 3), jnp.bfloat16)})["w"]
    assert half.dtype == jnp.float32
    # a norm, (1e6)^20, would overflow
    heavy = np.random.default_rng(4).normal(size=(1000, 1000))
    moment = lambda r: 2 ** (r / 2) * math.gamma((r + 1) / 2) / math.sqrt(math.pi)
    want = 1 - moment(0.05) ** 20 / moment(1)
    np.testing.assert_allclose(index(heavy, p=0.05, q=1.0), want, atol=2e-3)


def test_bad_input():
    params = {"w": jnp.ones((2, 3))}
    for fn in (masks.pq_index, masks.sap_fraction):
        for p, q in ((1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (jnp.float32(1.5), 1.0)):
            with pytest.raises(ValueError, match="0 < p < q is due"):
                fn(params, p=p, q=q)
        with pytest.raises(ValueError, match="scope='layer', and one of"):
            fn(params, scope="layer")
        with pytest.raises(ValueError, match="the mask does not fit params"):
            fn(params, {"w": jnp.ones((3, 2), bool)})
    for beta in (1.0, 1.5, -0.1, jnp.float32(1)):
        with pytest.raises(ValueError, match="beta"):
            masks.sap_fraction(params, beta=beta)
