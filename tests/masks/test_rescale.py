"""Rescaling to the edge of chaos, and the sketch of a linear model: closed forms."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import init, masks

KEY = jax.random.key(0)


def normal(*shape, seed=0, scale=1.0):
    draw = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(draw.astype(np.float32))


# ----------------------------------------------------------------------------------------- rescale


def test_every_kernel_has_the_variance_of_the_edge():
    params = {
        "conv": normal(3, 3, 4, 8),
        "dense": normal(16, 12, seed=1, scale=0.01),
        "heads": normal(16, 2, 6, seed=2, scale=30),
        "stack": normal(3, 16, 12, seed=3),
        "bias": jnp.ones(8),
    }
    mask = masks.topk(masks.random(KEY, params), sparsity=0.8)
    got = masks.rescale(params, mask, where=["conv", "dense"])
    for name, fan_in in (("conv", 36), ("dense", 16)):
        np.testing.assert_allclose(fan_in * np.mean(np.square(got[name])), 2, rtol=1e-5)
    np.testing.assert_array_equal(got["bias"], params["bias"])
    np.testing.assert_array_equal(got["heads"], masks.apply(params, mask)["heads"])  # masked alone
    got = masks.rescale(params, mask, where="heads", out_axis=(-2, -1), sigma_w2=1.5)
    np.testing.assert_allclose(16 * np.mean(np.square(got["heads"])), 1.5, rtol=1e-5)
    got = masks.rescale(params, mask, where="stack", batch_axis=0)["stack"]
    np.testing.assert_allclose(16 * np.mean(np.square(got), (1, 2)), [2, 2, 2], rtol=1e-5)
    twice = masks.rescale({"stack": got}, {"stack": mask["stack"]}, batch_axis=0)["stack"]
    np.testing.assert_allclose(twice, got, rtol=1e-5)  # once and for all
    # a constant per kernel: the pattern and the ratios stay
    ratio = (got / masks.apply(params, mask)["stack"])[mask["stack"]]
    assert np.unique(np.round(ratio, 4)).size == 3


def relu_chain(weights, x):
    """The mean square of the last pre-activation."""

    def layer(h, w):
        z = jax.nn.relu(h) @ w
        return z, jnp.mean(jnp.square(z))

    return jax.lax.scan(layer, x, weights)[1][-1]


@pytest.fixture(scope="module")
def energies():
    """Last pre-activation energies over their dense value: width 200, 20 layers, density 1/2."""
    depth, width = 20, 200

    def one(key):
        wkey, mkey, xkey = jax.random.split(key, 3)
        w = jax.random.normal(wkey, (depth, width, width)) * math.sqrt(2 / width)
        mask = {"w": jax.random.bernoulli(mkey, 0.5, w.shape)}
        x = jax.random.normal(xkey, (8, width))
        rescaled = masks.rescale({"w": w}, mask, batch_axis=0)["w"]
        chain = lambda w: relu_chain(w, x)
        return chain(w), chain(jnp.where(mask["w"], w, 0)), chain(rescaled)

    return np.stack(jax.jit(jax.vmap(one))(jax.random.split(KEY, 40)))


def test_a_random_mask_costs_a_factor_a_layer_and_rescaling_gives_it_back(energies):
    dense, masked, rescaled = energies
    assert abs(np.log2(masked.mean() / dense.mean()) + 20) < 1  # d^L = 2^-20
    # in typical nets too: the logarithms fluctuate by order sqrt(depth / width)
    assert np.all(np.abs(np.log2(masked / dense) + 20) < 4)
    assert 0.5 < rescaled.mean() / dense.mean() < 2
    assert np.all(np.abs(np.log2(rescaled / dense)) < 4)


@pytest.mark.parametrize(("density", "share"), [(0.5, 0.92867), (0.1, 0.43929)])
def test_the_energy_that_magnitude_pruning_leaves(density, share):
    """Of a Gaussian, d + 2 t phi(t) with t = Phi^-1(1 - d / 2)."""
    gauss = NormalDist()
    t = gauss.inv_cdf(1 - density / 2)
    np.testing.assert_allclose(density + 2 * t * gauss.pdf(t), share, atol=5e-6)
    params = {"w": normal(500, 400, scale=math.sqrt(2 / 500))}
    mask = masks.topk(masks.magnitude(params), sparsity=1 - density)
    left = np.square(masks.apply(params, mask)["w"]).sum() / np.square(params["w"]).sum()
    assert abs(left - share) < 0.004
    rho = masks.rescale(params, mask)["w"][mask["w"]] / params["w"][mask["w"]]
    np.testing.assert_allclose(rho, 1 / math.sqrt(share), rtol=0.01)


def chi(sigma_w2, sigma_b2):
    """sigma_w^2 E tanh'(sqrt(q) Z)^2 at the fixed point q, by quadrature."""
    z, weight = np.polynomial.hermite_e.hermegauss(80)
    mean = lambda f: np.sum(weight * f) / np.sqrt(2 * np.pi)
    q = 1.0
    for _ in range(2000):
        q = sigma_b2 + sigma_w2 * mean(np.tanh(np.sqrt(q) * z) ** 2)
    return sigma_w2 * mean(np.cosh(np.sqrt(q) * z) ** -4)


def test_scores_fall_or_grow_exponentially_with_depth_but_on_the_edge_of_chaos():
    """E[score^2] of SNIP follows chi^(L - l); one threshold then empties layers at an end."""
    assert init.edge_of_chaos(jax.nn.relu).sigma_w ** 2 == pytest.approx(2)  # the default
    depth, width, sigma_b = 24, 200, 0.3
    edge = init.edge_of_chaos(jnp.tanh, sigma_b).sigma_w ** 2
    keys = jax.random.split(KEY, 4)
    w = jax.random.normal(keys[0], (depth, width, width)) / math.sqrt(width)
    b = sigma_b * jax.random.normal(keys[1], (depth, width))
    x, v = jax.random.normal(keys[2], (width,)), jax.random.normal(keys[3], (width,))

    def loss(params, x):
        layer = lambda h, wb: (jnp.tanh(h) @ wb[0] + wb[1], None)
        return v @ jax.lax.scan(layer, x, (params["w"], b))[0]

    def scored(sigma_w2):
        scores = masks.snip(loss, {"w": w * jnp.sqrt(sigma_w2)}, x)
        left = masks.topk(scores, sparsity=0.9)["w"].sum((1, 2))
        return jnp.log(jnp.mean(jnp.square(scores["w"]), (1, 2))), left

    logs, left = jax.jit(jax.vmap(scored))(edge * jnp.array([0.4, 1.0, 3.0]))
    inner = slice(4, depth)  # past the way to the fixed point
    slopes = [np.polyfit(np.arange(depth)[inner], line[inner], 1)[0] for line in np.float64(logs)]
    rates = [-math.log(chi(edge * c, sigma_b**2)) for c in (0.4, 1.0, 3.0)]
    assert abs(rates[1]) < 1e-3 and rates[0] > 0.4 and rates[2] < -0.2
    np.testing.assert_allclose(slopes, rates, atol=0.06)
    assert int(left[0].min()) == 0 and int(left[1].min()) > 2000


def test_stable_residual_branches_keep_scores_of_one_order_without_rescaling():
    """y + F(y) doubles the variance in every block; y + F(y) / sqrt(L) keeps it below e."""
    depth, width = 32, 64
    w = jax.random.normal(KEY, (depth, width, width)) * math.sqrt(2 / width)
    x = jax.random.normal(jax.random.key(1), (16, width))

    def loss(branch):
        def fn(params, x):
            wire = init.Wire(1.0, branch, 1.0)
            block = lambda y, w: (init.residual(lambda z: jax.nn.relu(z) @ w, y, wire), None)
            return jnp.mean(jnp.square(jax.lax.scan(block, x, params["w"])[0]))

        return fn

    def energy(branch):
        scores = masks.snip(loss(branch), {"w": w}, x)["w"]
        return np.mean(np.square(scores), (1, 2)), float(loss(branch)({"w": w}, x))

    stable, size = energy(depth**-0.5)
    assert stable.max() / stable.min() < 20 and 1 < size < 2 * math.e
    _, size = energy(1.0)
    assert size > 1e6


def test_rescale_bad_input():
    params = {"w0": normal(4, 3), "w1": normal(3, 2)}
    mask = {"w0": jnp.zeros((4, 3), bool), "w1": jnp.ones((3, 2), bool)}
    with pytest.raises(ValueError, match="'w0': nothing of this kernel is left"):
        masks.rescale(params, mask)
    out = jax.jit(masks.rescale)(params, mask)
    assert not out["w0"].any() and np.isfinite(out["w1"]).all()
    with pytest.raises(ValueError, match=r"'w0' of shape \(4, 3\) lacks some of the dimensions"):
        masks.rescale(params, params, batch_axis=2)
    with pytest.raises(ValueError, match="the mask does not fit params: 'w1' is only in the first"):
        masks.rescale(params, {"w0": mask["w0"]})
    half = masks.rescale(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), params)
    assert half["w0"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------ sketch

FEATURES = normal(50, 20, seed=5) * jnp.linspace(0.3, 3, 50)[:, None]  # D x N
WEIGHTS = normal(50, seed=6)
NORMS = jnp.linalg.norm(FEATURES, axis=1)


def sketched(scores, draws=10, runs=4000):
    one = lambda k: masks.sketch(k, WEIGHTS, scores, draws)
    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, runs)))


@pytest.mark.parametrize("kind", ["best", "uniform", "magnitude"])
def test_the_sketch_is_unbiased_and_has_the_error_of_the_formula(kind):
    scores = {
        "best": NORMS * jnp.abs(WEIGHTS),
        "uniform": jnp.full(50, 3.0),
        "magnitude": jnp.abs(WEIGHTS),
    }[kind]
    drawn = sketched(scores)
    assert ((drawn != 0).sum(1) <= 10).all()
    p = np.float64(scores / scores.sum())
    x, w = np.float64(FEATURES), np.float64(WEIGHTS)
    z = (drawn.mean(0) - w) / (np.abs(w) * np.sqrt((1 / p - 1) / 10 / 4000))
    assert np.abs(z).max() < 4.5
    squares = np.sum(x**2, 1) * w**2
    exact = (np.sum(squares / p) - np.sum((x.T @ w) ** 2)) / 10
    measured = np.mean(np.sum(((drawn - w) @ x) ** 2, 1))
    np.testing.assert_allclose(measured, exact, rtol=0.05)
    if kind == "best":
        least = (np.sum(np.sqrt(squares)) ** 2 - np.sum((x.T @ w) ** 2)) / 10
        np.testing.assert_allclose(exact, least, rtol=1e-5)


def test_the_smallest_probabilities_are_as_right_as_others():
    """Of 2^14 of 2^-26 each, all are reached: steps of 2^-23 and sums near 1 would skip most."""
    n, draws = 2**14, 2**20
    scores = jnp.ones(n + 1).at[0].set(2.0**26 - n)
    sketch = jax.jit(masks.sketch, static_argnames="draws")
    drawn = np.asarray(sketch(KEY, jnp.ones(n + 1), scores, draws=draws))
    places = np.flatnonzero(drawn[1:])
    due = draws * n / 2**26  # 256
    assert abs(places.size - due) < 4 * math.sqrt(due)
    counts = np.bincount(places % 8, minlength=8)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 24.3  # 99.9 % of 7 degrees


def test_the_sketch_of_bfloat16_is_unbiased():
    """With equal scores the sum of the weights is what it was, but for their rounding."""
    ones = jnp.ones(2000, jnp.bfloat16)
    drawn = jax.jit(masks.sketch, static_argnames="draws")(KEY, ones, ones, draws=200_000)
    assert drawn.dtype == jnp.bfloat16
    assert float(drawn.astype(jnp.float32).mean()) == pytest.approx(1, abs=1e-3)


def test_magnitude_is_the_best_score_where_features_are_of_one_size():
    x = FEATURES / NORMS[:, None]
    squares = jnp.linalg.norm(x, axis=1) ** 2 * WEIGHTS**2
    error = lambda logits: jnp.sum(squares / jax.nn.softmax(logits))
    slope = jax.grad(error)(jnp.log(jnp.abs(WEIGHTS)))
    np.testing.assert_allclose(slope, 0, atol=1e-3 * float(error(jnp.zeros(50))))
    assert float(error(jnp.log(jnp.abs(WEIGHTS)))) < 0.9 * float(error(jnp.zeros(50)))


def test_sketch_bad_input():
    with pytest.raises(ValueError, match="none may be negative, and one must be positive"):
        masks.sketch(KEY, WEIGHTS, WEIGHTS, 3)
    with pytest.raises(ValueError, match="one must be positive"):
        masks.sketch(KEY, WEIGHTS, jnp.zeros(50), 3)
    with pytest.raises(ValueError, match="scores are probabilities: finite"):
        masks.sketch(KEY, WEIGHTS, jnp.ones(50).at[3].set(jnp.nan), 3)
    with pytest.raises(ValueError, match=r"\(50,\) and \(3,\)"):
        masks.sketch(KEY, WEIGHTS, jnp.ones(3), 3)
    with pytest.raises(ValueError, match="draws is 0"):
        masks.sketch(KEY, WEIGHTS, jnp.ones(50), 0)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.sketch(jax.random.PRNGKey(0), WEIGHTS, jnp.ones(50), 3)
