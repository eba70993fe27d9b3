"""Allocations: check values, exact budgets, the loop of the published code, what cannot be met."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.sparse import BCOO

from experiments.data import load
from jaxkit import masks, trace

SHAPES = {"w0": (784, 300), "w1": (300, 100), "w2": (100, 10)}
CONV = {"c0": (3, 3, 3, 16), "c1": (3, 3, 16, 32), "c2": (1, 1, 32, 64), "c3": (64, 10)}
POURED = {
    "uniform": masks.uniform,
    "er": masks.er,
    "erk": masks.erk,
    "balanced": masks.balanced,
    "pyramidal": masks.pyramidal,
}


def abstract(shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def densities(allocation):
    return [1 - s for s in allocation.values()]


def budget(shapes, allocation):
    """The kept entries of an allocation, before they are rounded."""
    sizes = map(math.prod, shapes.values())
    return sum(d * n for d, n in zip(densities(allocation), sizes, strict=True))


@pytest.mark.parametrize(
    ("fn", "sparsity", "due"),
    [
        (masks.erk, 0.9, (0.0795678, 0.2301887, 1.0)),
        (masks.erk, 0.95, (0.0384841, 0.1113342, 0.9185069)),
        (masks.pyramidal, 0.9, (0.111586, 0.012451, 0.001389)),
        (masks.balanced, 0.9, (0.0544643, 0.427, 1.0)),
    ],
)
def test_check_values_of_a_lenet(fn, sparsity, due):
    np.testing.assert_allclose(densities(fn(abstract(SHAPES), sparsity)), due, atol=6e-7)


@pytest.mark.parametrize("shapes", [SHAPES, CONV], ids=["dense", "conv"])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.8, 0.9])
@pytest.mark.parametrize("name", POURED)
def test_the_budget_is_exact(name, sparsity, shapes):
    allocation = POURED[name](abstract(shapes), sparsity)
    total = sum(map(math.prod, shapes.values()))
    assert abs(budget(shapes, allocation) - (1 - sparsity) * total) < 1e-9 * total
    assert all(0 <= s < 1 for s in allocation.values())


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7, 0.75, 0.9])
def test_the_plus_budgets_are_exact_and_their_leaves_have_their_own(sparsity):
    total = sum(map(math.prod, CONV.values()))
    plus = masks.uniform_plus(abstract(CONV), sparsity, first="c0", last="c3")
    assert abs(budget(CONV, plus) - (1 - sparsity) * total) < 1e-9 * total
    assert plus["c0"] == 0
    assert 1 - plus["c3"] >= 0.2 - 1e-12
    assert plus["c1"] == plus["c2"] >= plus["c3"] - 1e-12
    erk_plus = masks.erk_plus(abstract(CONV), sparsity, last="c3", density=0.9)
    due = (1 - sparsity) * total if sparsity else total - 64  # nothing fills the missing tenth
    assert abs(budget(CONV, erk_plus) - due) < 1e-9 * total
    assert erk_plus["c3"] == pytest.approx(0.1)


def published_loop(ratios, sizes, density):
    """Erdős-Rényi as the references write it: make the largest dense until none exceeds 1."""
    dense = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in dense]
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        eps = left / sum(ratios[i] * sizes[i] for i in free)
        largest = max(ratios[i] for i in free)
        if largest * eps <= 1:
            return [1.0 if i in dense else eps * ratios[i] for i in range(len(sizes))]
        dense |= {i for i in free if ratios[i] == largest}


@pytest.mark.parametrize("shapes", [SHAPES, CONV], ids=["dense", "conv"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.4, 0.9])
def test_poured_allocations_equal_the_published_loop(shapes, density):
    sizes = [math.prod(shape) for shape in shapes.values()]
    for fn, ratio in [
        (masks.erk, lambda shape: sum(shape) / math.prod(shape)),
        (masks.er, lambda shape: sum(shape[-2:]) / math.prod(shape[-2:])),
        (masks.balanced, lambda shape: 1 / math.prod(shape)),
    ]:
        due = published_loop([ratio(shape) for shape in shapes.values()], sizes, density)
        found = densities(fn(abstract(shapes), round(1 - density, 10)))
        np.testing.assert_allclose(found, due, rtol=1e-9)


def test_er_reads_in_and_out_alone_wherever_they_are():
    hwio, oihw = {"w": (3, 3, 8, 16), "v": (16, 4)}, {"w": (16, 8, 3, 3), "v": (4, 16)}
    same = masks.er(abstract(oihw), 0.9, axes=(1, 0))
    assert masks.er(abstract(hwio), 0.9) == same
    assert masks.er(abstract(oihw), 0.9) != same
    assert masks.erk(abstract(hwio), 0.9) == masks.erk(abstract(oihw), 0.9)


def test_pyramidal_has_one_root_and_follows_the_order():
    found = masks.pyramidal(abstract(SHAPES), 0.9)
    n = np.array([235200, 30000, 1000])
    roots = np.roots([*n[::-1], -0.1 * n.sum()])  # n3 r^3 + n2 r^2 + n1 r = d sum n
    real = [r.real for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    assert len(real) == 1
    assert 1 - found["w0"] == pytest.approx(real[0], abs=1e-12)
    residual = (n * real[0] ** np.arange(1, 4)).sum() / n.sum() - 0.1
    assert abs(residual) < 1e-9
    turned = masks.pyramidal(abstract(SHAPES), 0.5, order=["w2", "w1", "w0"])
    assert turned["w2"] < turned["w1"] < turned["w0"]
    apply_fn = lambda p, x: jax.nn.relu(x @ p["z"]) @ p["a"]
    params = {"a": jnp.ones((8, 2)), "z": jnp.ones((4, 8))}
    order = list(trace.taps(apply_fn)(params, jnp.ones((1, 4)))[1])
    assert order == ["z", "a"]
    forward = masks.pyramidal(params, 0.5, order=order)
    assert forward["z"] < forward["a"]


@pytest.mark.parametrize("name", POURED)
def test_traced_numbers_give_what_python_numbers_give(name):
    sweep = [0.0, 0.3, 0.5, 0.9]
    fn = POURED[name]
    found = jax.vmap(lambda s: fn(abstract(CONV), s))(jnp.array(sweep))
    for i, s in enumerate(sweep):
        due = fn(abstract(CONV), s)
        for path, value in due.items():
            assert float(jnp.asarray(found[path])[i]) == pytest.approx(value, abs=2e-6)


def test_counts_are_those_of_the_allocation():
    params = {path: jnp.ones(shape) for path, shape in CONV.items()}
    for fn in POURED.values():
        allocation = fn(params, 0.9)
        mask = masks.topk(masks.random(jax.random.key(0), params), sparsity=allocation)
        for path, m in mask.items():
            assert int(m.sum()) == round((1 - allocation[path]) * m.size)
    plus = masks.uniform_plus(params, 0.7, first="c0", last="c3")
    assert masks.topk(masks.random(jax.random.key(0), params), sparsity=plus)["c0"].all()


def test_ratios_of_another_mask_give_the_same_counts():
    key = jax.random.key(1)
    params = {path: jax.random.normal(key, shape) for path, shape in CONV.items()}
    params["bias"] = jnp.zeros(10)
    like = masks.topk(masks.magnitude(params), sparsity=0.83)
    allocation = masks.ratios(like)
    assert allocation["bias"] == 0
    mask = masks.topk(masks.random(key, params), sparsity=allocation)
    assert jax.tree.map(lambda m: int(m.sum()), mask) == jax.tree.map(lambda m: int(m.sum()), like)
    assert any(bool((a != b).any()) for a, b in zip(mask.values(), like.values(), strict=True))
    assert masks.ratios({"f": jax.nn.relu, "none": jnp.ones((0, 3), bool)})["none"] == 0
    empty = {"w": jnp.zeros((2, 2), bool)}
    with pytest.raises(ValueError, match=r"sparsity at 'w' is 1\.0.*masks\.connect it first$"):
        masks.topk({"w": jnp.ones((2, 2))}, sparsity=masks.ratios(empty))
    connected = masks.ratios(masks.connect(key, empty))
    assert masks.topk({"w": jnp.ones((2, 2))}, sparsity=connected)["w"].any()


def test_bernoulli_densities_lie_where_they_should():
    params = {path: jnp.ones(shape) for path, shape in SHAPES.items()}
    draws = masks.random(jax.random.key(0), params)  # uniform: below d with probability d
    for path, s in masks.erk(params, 0.9).items():
        d, n = 1 - s, params[path].size
        assert abs(float((draws[path] < d).mean()) - d) <= 4 * math.sqrt(d * (1 - d) / n) + 1e-12


def test_pointwise_convolutions_of_a_mobile_network():
    shapes = {
        "stem/kernel": (3, 3, 3, 8),
        "depthwise/kernel": (3, 3, 1, 8),
        "expand/kernel": (1, 1, 8, 16),
        "expand1d/kernel": (1, 8, 16),
        "norm/scale": (1, 1, 8, 8),
        "classifier/kernel": (16, 10),
    }
    allocation = masks.uniform(abstract(shapes), 0.9, where=masks.pointwise)
    assert {path for path, s in allocation.items() if s} == {"expand/kernel", "expand1d/kernel"}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    mask = masks.topk(masks.magnitude(params), sparsity=allocation)
    assert mask["depthwise/kernel"].all()
    assert int(mask["expand/kernel"].sum()) == round(12.8)


def test_a_sparse_matrix_is_the_masked_pointwise_convolution():
    """What is exported for inference: (H W, in) times a stored sparse (in, out)."""
    key = jax.random.key(0)
    kernel, x = jax.random.normal(key, (1, 1, 8, 16)), jax.random.normal(key, (2, 5, 5, 8))
    mask = masks.topk({"kernel": jnp.abs(kernel)}, sparsity=0.9)
    kept = masks.apply({"kernel": kernel}, mask)["kernel"]

    @jax.jit
    def both(x, kept):
        numbers = ("NHWC", "HWIO", "NHWC")
        dense = jax.lax.conv_general_dilated(x, kept, (1, 1), "SAME", dimension_numbers=numbers)
        stored = BCOO.fromdense(kept[0, 0].T, nse=13)
        return dense, (stored @ x.reshape(-1, 8).T).T.reshape(dense.shape)

    assert int(mask["kernel"].sum()) == 13
    dense, sparse = both(x, kept)
    np.testing.assert_allclose(sparse, dense, atol=1e-5)


def test_a_chosen_leaf_of_size_zero_and_none_chosen():
    params = abstract({"w": (0, 3), "v": (2, 3)})
    assert masks.erk(params, 0.5) == {"w": 0.0, "v": 0.5}
    assert masks.balanced({"bias": jnp.ones(3)}, 0.5) == {"bias": 0.0}
    assert masks.pyramidal({}, 0.5) == {}


def test_what_cannot_be_met_is_said_with_the_largest_feasible_sparsity():
    shapes = {"w0": (1, 10), "w1": (10, 10), "w2": (10, 1)}
    params = abstract(shapes)
    with pytest.raises(ValueError, match=r"\['w0', 'w2'\].*largest feasible sparsity is 0\.9$"):
        masks.uniform_plus(params, 0.91, first="w0", last="w2")
    most = masks.uniform_plus(params, 0.9, first="w0", last="w2")
    assert budget(shapes, most) == pytest.approx(12)
    assert most["w0"] == 0 and most["w1"] == pytest.approx(1) and most["w2"] == 0.8
    with pytest.raises(ValueError, match=r"\['w2'\].*largest feasible sparsity is 0\.916667$"):
        masks.erk_plus(params, 0.95, last="w2")


def test_bad_input():
    params = abstract(SHAPES)
    for fn in POURED.values():
        for sparsity in (1.0, -0.1, 2):
            with pytest.raises(ValueError, match="sparsity is"):
                fn(params, sparsity)
    with pytest.raises(ValueError, match=r"'bias' has shape \(4,\), without the axes \(-2, -1\)"):
        masks.er({"w": jnp.ones((4, 4)), "bias": jnp.ones(4)}, 0.5, where="**")
    for minimum in (1.5, -0.1, jnp.float32(2)):
        with pytest.raises(ValueError, match="minimum is"):
            masks.uniform_plus(params, 0.5, first="w0", last="w2", minimum=minimum)
    with pytest.raises(ValueError, match=r"order is \['w0'\]"):
        masks.pyramidal(params, 0.5, order=["w0"])
    deep = {f"w{i}": jnp.ones((4, 4)) for i in range(9)}
    with pytest.raises(ValueError, match="'w4' would keep no entry"):
        masks.pyramidal(deep, 0.9)
    with pytest.raises(ValueError, match="density is 0"):
        masks.erk_plus(params, 0.5, last="w2", density=0)
    with pytest.raises(ValueError, match="matches no leaf"):
        masks.erk_plus(params, 0.5, last="head")
    with pytest.raises(ValueError, match=r"choose one leaf to sparsify, not \['w0', 'w1', 'w2'\]"):
        masks.erk_plus(params, 0.5, last="*")
    with pytest.raises(ValueError, match="the same leaf, 'w0'"):
        masks.uniform_plus(params, 0.5, first="w0", last="w0")


# ------------------------------------------------------------------- random pruning, trained


def train(key, params, mask, x, y, steps=400, batch=64):
    """Train an MLP with a static mask; Adam, learning rate 2e-3."""
    tx = masks.sparse(optax.adam(2e-3), mask)

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y).mean()

    def step(carry, key):
        params, state = carry
        i = jax.random.randint(key, (batch,), 0, len(y))
        updates, state = tx.update(jax.grad(loss)(params, x[i], y[i]), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]


def predict(params, x):
    x = jax.nn.relu(x @ params["w0"] + params["bias0"])
    x = jax.nn.relu(x @ params["w1"] + params["bias1"])
    return x @ params["w2"] + params["bias2"]


def he(key, width):
    sizes = (64, width, width, 10)
    keys = jax.random.split(key, 3)
    pairs = list(itertools.pairwise(sizes))
    draw = lambda k, i, o: jax.random.normal(k, (i, o)) * math.sqrt(2 / i)
    kernels = {f"w{n}": draw(k, *pair) for n, (k, pair) in enumerate(zip(keys, pairs, strict=True))}
    return kernels | {f"bias{n}": jnp.zeros(o) for n, (_, o) in enumerate(pairs)}


@pytest.fixture(scope="module")
def digits():
    data = load(train=1297, test=500)
    sets = data.x.reshape(-1, 64), data.y, data.x_test.reshape(-1, 64), data.y_test
    return tuple(map(jnp.asarray, sets))


def test_sparsity_zero_trains_as_the_dense_network_bit_by_bit():
    key = jax.random.key(0)
    x, y = jax.random.normal(key, (40, 64)), jnp.arange(40) % 10
    params = he(key, 8)
    assert set(masks.erk(params, 0.0).values()) == {0.0}
    whole = jax.tree.map(lambda w: jnp.ones_like(w, bool), params)
    masked = jax.jit(lambda p: train(key, p, whole, x, y, 20))(params)

    def dense(params):
        tx = optax.adam(2e-3)

        def step(carry, key):
            i = jax.random.randint(key, (64,), 0, 40)
            loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(
                predict(p, x[i]), y[i]
            ).mean()
            updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1])
            return (optax.apply_updates(carry[0], updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, 20))[0][0]

    for path, w in jax.jit(dense)(params).items():
        np.testing.assert_array_equal(masked[path], w)


@pytest.mark.slow
def test_width_closes_the_gap_of_random_pruning(digits):
    """Digits, 64-w-w-10 at sparsity 0.9, three seeds: dense, ERK and uniform masks."""
    x, y, x_test, y_test = digits
    accuracy = {}
    for width in (16, 256):
        allocations = {
            "dense": masks.uniform(he(jax.random.key(0), width), 0.0),
            "erk": masks.erk(he(jax.random.key(0), width), 0.9),
            "uniform": masks.uniform(he(jax.random.key(0), width), 0.9),
        }

        @jax.jit
        def run(seed, sparsity, width=width):
            key = jax.random.key(seed)
            params = he(key, width)
            scores = masks.random(key, params)
            mask = {
                p: s < 1 - sparsity[p] if s.ndim > 1 else jnp.ones_like(s, bool)
                for p, s in scores.items()
            }  # Bernoulli, as in the paper
            trained = train(key, masks.apply(params, mask), mask, x, y)
            return jnp.mean(predict(trained, x_test).argmax(1) == y_test)

        both = jax.vmap(run, (0, None))
        for name, allocation in allocations.items():
            sparsity = {p: jnp.float32(s) for p, s in allocation.items()}
            accuracy[name, width] = float(both(jnp.arange(3), sparsity).mean())
    gap = {w: accuracy["dense", w] - accuracy["uniform", w] for w in (16, 256)}
    assert gap[256] < 0.03 < 0.3 < gap[16]
    assert accuracy["erk", 256] + accuracy["erk", 16] >= (
        accuracy["uniform", 256] + accuracy["uniform", 16]
    )
