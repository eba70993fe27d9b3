"""Class priors and priors over functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from sklearn.datasets import load_breast_cancer

from jaxkit.init.functional_prior import (
    _critic,
    _gap,
    _penalty,
    functional_prior,
    gaussian_process,
    sample_prior,
)
from jaxkit.init.prior import (
    class_prior,
    count_foreground,
    guided_loss,
    prior_bias,
    sampling_free_loss,
)

KEY = jax.random.key(0)


# ------------------------------------------------------------------------------- class priors


def test_zero_kernel_with_the_rule_has_no_gradient_in_the_bias():
    n, classes, positives = 2000, 5, 137
    labels = jnp.zeros(n, int).at[:positives].set(jnp.arange(positives) % classes + 1)
    found, total = count_foreground(labels)
    assert (int(found), int(total)) == (positives, n)
    pi = class_prior(int(found), int(total), classes)
    targets = jax.nn.one_hot(labels - 1, classes)

    def loss(bias):
        return sampling_free_loss(jnp.broadcast_to(bias, (n, classes)), targets, 0)

    with jax.enable_x64(True):
        bias = prior_bias(pi)(KEY, (classes,))
        value, grad = jax.value_and_grad(loss)(bias)
        assert abs(grad.sum()) < 1e-12
        entropy = -pi * np.log(pi) - (1 - pi) * np.log(1 - pi)
        np.testing.assert_allclose(value, n * classes / positives * entropy, rtol=1e-12)
        flat = loss(jnp.zeros(classes))
        np.testing.assert_allclose(flat, n * classes / positives * np.log(2), rtol=1e-12)
        each = np.bincount(labels, minlength=6)[1:]
        own = prior_bias(class_prior(each, n))(KEY, (classes,))
        assert jnp.abs(jax.grad(loss)(own)).max() < 1e-12  # one prior per class: each entry


def test_the_loss_at_the_start_in_figures():
    n, classes, positives = 20_000, 5, 137
    pi = class_prior(positives, n, classes)
    per_positive = n * classes / positives * scipy.stats.entropy([pi, 1 - pi])
    np.testing.assert_allclose(per_positive, 7.592, atol=5e-4)
    np.testing.assert_allclose(n * classes / positives * np.log(2), 505.9, atol=0.05)


def test_ignored_labels_and_devices():
    labels = jnp.array([[0, 2, -1], [1, -1, 0]])
    assert [int(n) for n in count_foreground(labels)] == [2, 4]
    split = jax.pmap(lambda x: count_foreground(x, axis_name="data"), "data")(labels)
    assert [n.tolist() for n in split] == [[2, 2], [4, 4]]


def test_guided_loss():
    w, guide = jnp.array([0.3, -2.0]), jnp.array(0.7)
    loss = lambda w: jnp.sum(jnp.cosh(w))
    both = lambda w, guide: guided_loss(loss(w), guide)
    np.testing.assert_allclose(both(w, guide), guide, rtol=1e-6)
    grad, other = jax.grad(both, (0, 1))(w, guide)
    np.testing.assert_allclose(grad, jax.grad(loss)(w) * guide / loss(w), rtol=1e-6)
    assert other == 0
    assert (jax.grad(both)(w, jnp.array(0.0)) == 0).all()  # no positives in the batch
    assert jnp.isfinite(jax.grad(lambda w: guided_loss(0 * w, guide))(1.0))


def test_breast_cancer_with_four_positives():
    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.min(0)) / (x.max(0) - x.min(0))
    rare = np.flatnonzero(y == 0)[:4]
    keep = np.r_[rare, np.flatnonzero(y == 1)]
    x, y = jnp.asarray(x[keep], jnp.float32), jnp.asarray(y[keep] == 0, jnp.float32)
    assert len(y) == 361
    pi = class_prior(4, 361)
    np.testing.assert_allclose(pi, 0.0111, atol=5e-5)

    def loss(params):
        logits = x @ params["kernel"] + params["bias"]
        return optax.sigmoid_binary_cross_entropy(logits, y).mean()

    def grads(bias):
        grad = jax.grad(loss)({"kernel": jnp.zeros(30), "bias": bias})
        return float(jnp.linalg.norm(grad["kernel"])), float(jnp.abs(grad["bias"]))

    kernel, bias = grads(jnp.zeros(()))
    np.testing.assert_allclose((kernel, bias), (0.542, 0.489), atol=2e-3)
    kernel, bias = grads(prior_bias(pi)(KEY, ()))
    assert bias < 1e-6
    np.testing.assert_allclose(kernel, 0.0152, atol=5e-4)


def test_bad_priors():
    for counts in ((0, 10), (10, 10), (3, 0)):
        with pytest.raises(ValueError, match=f"{counts[0]} positives of {counts[1]}"):
            class_prior(*counts)
    with pytest.raises(ValueError, match="strictly between"):
        prior_bias(1.0)
    with pytest.raises(ValueError, match=r"shape \(2,\) does not broadcast .* \(3,\)"):
        prior_bias(jnp.array([0.1, 0.2]))(KEY, (3,))
    with pytest.raises(ValueError, match="classes=0"):
        class_prior(1, 2, 0)
    for counts in ([10, 20], np.array([10, 20])):
        with pytest.raises(ValueError, match=r"one count per class.*shape \(2,\).*classes=2"):
            class_prior(counts, 1000, 2)
        np.testing.assert_allclose(class_prior(counts, 1000), [0.01, 0.02])
    with pytest.raises(ValueError, match="one count per class"):
        jax.jit(lambda n: class_prior(n, 1000, 2))(jnp.array([10, 20]))
    assert prior_bias(0.1)(KEY, (2,), jnp.bfloat16).dtype == jnp.bfloat16
    assert jax.jit(lambda n: prior_bias(class_prior(n, 10))(KEY, (2,)))(1).shape == (2,)


# -------------------------------------------------------------------------- functional priors


def affine(params, x):
    return x @ params["kernel"] + params["bias"]


AFFINE = {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros(1)}
PROCESS = gaussian_process(lambda x, y: 4 * x @ y.T + 0.25, jitter=1e-6)


def points(key):
    return jax.random.uniform(key, (8, 1), minval=-1, maxval=1)


def test_the_process_has_its_covariance():
    x = jnp.array([[-1.0], [0.5], [2.0]])
    f = PROCESS(x)(KEY, 40_000)
    np.testing.assert_allclose(f.T @ f / 40_000, 4 * x @ x.T + 0.25, rtol=0.05, atol=0.06)


def test_the_prior_of_a_linear_layer_is_the_linear_process():
    """std (2, 0.5) gives 4 x x' + 0.25: the same law, by a test on a fixed direction."""
    x = points(KEY)
    draw = lambda key: affine(sample_prior(key, {"kernel": 2.0, "bias": 0.5}, AFFINE), x)[:, 0]
    f = jax.vmap(draw)(jax.random.split(KEY, 20_000))
    np.testing.assert_allclose(f.T @ f / 20_000, 4 * x @ x.T + 0.25, atol=0.12)
    deep = {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros(5), "n": jnp.array(1)}
    ones = jax.tree.map(lambda _: 1.0, deep)
    many = jax.vmap(lambda key: sample_prior(key, ones, deep))(jax.random.split(KEY, 2000))
    np.testing.assert_allclose(many["kernel"].std() * 12**0.5, 1, rtol=0.02)  # fan_in 3 x 4
    np.testing.assert_allclose(many["bias"].std(), 1, rtol=0.03)
    assert (many["n"] == 1).all()


def test_penalty_of_linear_critics():
    a = jnp.array([0.6, 0.8])
    slope = lambda scale: jnp.broadcast_to(scale * a, (5, 1, 2))
    np.testing.assert_allclose(_penalty(slope(1.0), False), 0, atol=1e-12)
    np.testing.assert_allclose(_penalty(slope(3.0), False), 4, rtol=1e-5)
    np.testing.assert_allclose(_penalty(slope(0.5), False), 0.25, rtol=1e-5)
    np.testing.assert_allclose(_penalty(slope(0.5), True), 0, atol=1e-12)
    net, target = jax.random.normal(KEY, (2, 5, 1, 2))
    linear = [(a[:, None], jnp.zeros(1))]
    np.testing.assert_allclose(_critic(linear, net[0, 0]), a @ net[0, 0], rtol=1e-5)
    np.testing.assert_allclose(_gap(linear, net, target), (net - target).mean(0) @ a, rtol=1e-4)


def fit(steps, **options):
    run = lambda key: functional_prior(
        key, affine, AFFINE, points, lambda x: lambda k, n: PROCESS(x)(k, n)[..., None],
        steps=steps, critic_steps=100, critic_width=32, **options,
    )  # fmt: skip
    return jax.jit(run)(jax.random.key(3))


def test_it_finds_the_deviations_of_a_linear_process():
    found = fit(120, rate=0.05)
    history = jax.tree.map(np.asarray, found.history)
    start = np.log1p(np.e)  # softplus(1) = 1.3133
    assert abs(history["kernel"][0] - start) < 0.5 and abs(history["bias"][0] - start) < 0.5
    np.testing.assert_allclose(history["kernel"][-40:].mean(), 2.0, rtol=0.1)
    np.testing.assert_allclose(history["bias"][-40:].mean(), 0.5, rtol=0.1)
    # The marginal at a point comes closer, in the exact distance of one dimension.
    x0, rng = 0.1, np.random.default_rng(0)
    size = np.sqrt(4 * x0**2 + 0.25)
    noise = rng.normal(size=4000)
    windows = []
    for i in range(0, 60, 20):
        w, b = (history[name][i : i + 20].mean() for name in ("kernel", "bias"))
        ours = np.hypot(x0 * w, b) * noise
        windows.append(scipy.stats.wasserstein_distance(ours, size * noise))
    assert windows[0] > windows[1] > windows[2]
    # At the matched prior, the critic sees next to nothing; at the start it did.
    distance = np.abs(np.asarray(found.distance))
    assert distance[-40:].mean() < 0.3 * distance[:5].mean()


def test_shapes_and_outputs():
    found = fit(2, functions=4)
    assert found.history["bias"].shape == (2,) and found.distance.shape == (2,)
    np.testing.assert_array_equal(found.std["bias"], found.history["bias"][-1])
    with pytest.raises(ValueError, match="the process"):
        functional_prior(
            KEY, affine, AFFINE, points, lambda x: lambda key, n: jnp.zeros((n, 8, 2)), steps=1
        )
    with pytest.raises(ValueError, match="a tree like params"):
        sample_prior(KEY, {"kernel": 1.0}, AFFINE)
    singular = gaussian_process(lambda x, y: -x @ y.T, jitter=0.0)
    run = lambda key: functional_prior(
        key, affine, AFFINE, points, lambda x: lambda k, n: singular(x)(k, n)[..., None],
        steps=2, functions=2, critic_steps=1, critic_width=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"not finite from step 0 on.*jitter"):
        run(KEY)
    assert jnp.isnan(jax.jit(run)(KEY).distance).all()
    with pytest.raises(TypeError, match="typed key"):
        functional_prior(jnp.zeros(2, jnp.uint32), affine, AFFINE, points, PROCESS)
