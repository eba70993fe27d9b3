"""Scores that ask a loss or the network: finite differences, closed forms, and published codes."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkit import masks

KEY = jax.random.key(0)


def waves(*shape, a):
    """Numbers that any program can make."""
    return jnp.asarray(np.sin(a * np.arange(1, np.prod(shape) + 1)).astype(np.float32)).reshape(
        shape
    )


PARAMS = {"in": waves(6, 5, a=1.3), "out": waves(5, 4, a=2.1) * 3}
INPUTS, LABELS = waves(8, 6, a=0.7), jnp.array([0, 1, 2, 3] * 2)
BATCH = (INPUTS, LABELS)
HALVES = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), BATCH)


def net(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def cross_entropy(params, batch):
    logits = net(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def close(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


# ---------------------------------------------------------------------------- snip, several batches


def test_snip_adds_gradients_before_the_absolute_value():
    """The first entries of torch's |w (g1 + g2)|, as in the code of Synaptic-Flow."""
    got = masks.snip(cross_entropy, PARAMS, HALVES, stacked=True)
    first = np.concatenate([got["in"].ravel()[:3], got["out"].ravel()[:3]])
    want = [0.63607055, 0.00606155, 0.01531861, 0.87272620, 0.34929249, 0.04223431]
    np.testing.assert_allclose(2 * first, want, rtol=2e-5, atol=1e-6)  # the mean, not the sum
    whole = masks.snip(cross_entropy, PARAMS, BATCH)  # halves of one size: the mean of means
    close(got, whole, rtol=1e-5, atol=1e-6)
    each = [
        masks.snip(cross_entropy, PARAMS, jax.tree.map(lambda x, i=i: x[i], HALVES)) for i in (0, 1)
    ]
    apart = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    assert float(jnp.max(apart["in"] - got["in"])) > 0.01  # absolute values first is another score


def test_snip_of_gradients_that_a_loader_adds_up():
    grads = jax.grad(cross_entropy)(PARAMS, BATCH)
    products = jax.tree.map(jnp.multiply, PARAMS, grads)
    close(masks.magnitude(products), masks.snip(cross_entropy, PARAMS, BATCH), rtol=1e-6)


def test_the_signed_sensitivity_of_a_relu_net_is_the_same_in_every_layer():
    """Euler's identity: the output is homogeneous of degree one in each layer."""
    deep = {f"w{i}": waves(6, 6, a=1.1 + i) for i in range(5)}

    def loss(params, x):
        for name in ("w0", "w1", "w2", "w3"):
            x = jax.nn.relu(x @ params[name])
        return jnp.mean(jnp.square(x @ params["w4"] - 1))

    grads = jax.grad(loss)(deep, INPUTS)
    sums = np.array([np.sum(np.float64(deep[k] * grads[k])) for k in deep])
    assert abs(sums[0]) > 1e-3
    np.testing.assert_allclose(sums, sums[0], rtol=1e-5)
    scores = masks.snip(loss, deep, INPUTS)
    close(scores, jax.tree.map(lambda w, g: jnp.abs(w * g), deep, grads), rtol=1e-6)


@pytest.mark.parametrize(
    "batches", [(INPUTS, LABELS[:3]), (jnp.zeros((0, 2)),), (jnp.float32(1),), ()]
)
def test_stacks_that_are_none(batches):
    with pytest.raises(ValueError, match="one leading axis"):
        masks.snip(cross_entropy, PARAMS, batches, stacked=True)


# ------------------------------------------------------------------------------------------ grasp


def test_grasp_is_the_change_of_the_gradient_norm():
    """Against the finite difference of ||g||^2 / 2 as one entry at a time fades, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(jnp.float64), PARAMS)
        batch = (INPUTS.astype(jnp.float64), LABELS)
        loss = masks.tempered(net, 2.0)
        grad = lambda params: jax.grad(loss)(params, batch)
        norm = jax.jit(lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(p))) / 2)
        scores = masks.grasp(loss, params, batch)
        vector, unravel = jax.flatten_util.ravel_pytree(params)
        step = 1e-5
        fade = lambda i, c: norm(unravel(vector.at[i].multiply(c)))
        index = jnp.arange(0, vector.size, 3)
        slope = jax.vmap(lambda i: (fade(i, 1 + step) - fade(i, 1 - step)) / (2 * step))(index)
        got = jax.flatten_util.ravel_pytree(scores)[0][index]
        np.testing.assert_allclose(got, slope, rtol=1e-6, atol=1e-9)
        assert bool((slope < 0).any()) and bool((slope > 0).any())


@pytest.mark.parametrize(
    ("temperature", "want"),
    [
        # w * (H g) of torch autograd, the first four entries of both leaves
        (200.0, [-2.0932684e-07, -2.7628237e-06, 2.6119097e-07, 2.5241346e-07]),
        (1.0, [-0.34185359, -0.39578289, 0.11339981, -0.05930796]),
    ],
)
def test_grasp_of_the_published_code(temperature, want):
    loss = masks.tempered(net, temperature)
    got = masks.grasp(loss, PARAMS, BATCH)["in"].ravel()[:4]
    np.testing.assert_allclose(got, want, rtol=5e-4, atol=1e-4 * abs(want[1]))
    default = masks.tempered(net)(PARAMS, BATCH)
    assert abs(float(default - masks.tempered(net, 200.0)(PARAMS, BATCH))) == 0


def test_grasp_removes_what_raises_the_gradient_norm():
    loss = masks.tempered(net, 20.0)
    scores = masks.grasp(loss, PARAMS, BATCH)
    mask = masks.topk(scores, sparsity=0.2)
    worst = masks.topk(jax.tree.map(jnp.negative, scores), sparsity=0.2)
    grad = jax.jit(jax.grad(loss))

    def norm(mask):
        grads = grad(masks.apply(PARAMS, mask), BATCH)
        return float(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))

    assert norm(mask) > 2 * norm(worst)


def test_grasp_counts_the_chosen_gradient_and_averages_batches():
    got = masks.grasp(cross_entropy, PARAMS, BATCH, where="in")
    grad = jax.grad(cross_entropy)
    g = grad(PARAMS, BATCH)
    half = {"in": g["in"], "out": jnp.zeros_like(g["out"])}
    hg = jax.jvp(lambda p: grad(p, BATCH), (PARAMS,), (half,))[1]
    close(got, jax.tree.map(jnp.multiply, PARAMS, hg), rtol=1e-5, atol=1e-6)
    stacked = masks.grasp(cross_entropy, PARAMS, HALVES, where="in", stacked=True)
    close(stacked, got, rtol=1e-4, atol=1e-5)
    with_aux = masks.grasp(
        lambda p, b: (cross_entropy(p, b), 1), PARAMS, BATCH, where="in", has_aux=True
    )
    close(with_aux, got, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------- obd


def quadratic(params, curvature):
    parts = jax.tree.map(lambda w, h: jnp.sum(h * w**2) / 2, params, curvature)
    return sum(jax.tree.leaves(parts))


def test_obd_of_a_diagonal_quadratic_is_what_each_removal_costs():
    curvature = jax.tree.map(lambda w: jnp.abs(w) + 0.1, PARAMS)
    # around the minimum at params: the loss of the displacement
    loss = lambda p, h: quadratic(jax.tree.map(jnp.subtract, p, PARAMS), h)
    want = jax.tree.map(lambda w, h: h * w**2 / 2, PARAMS, curvature)
    exact = masks.obd(loss, PARAMS, curvature)
    close(exact, want, rtol=1e-5)
    drawn = masks.obd(loss, PARAMS, curvature, key=KEY, samples=1)
    close(drawn, want, rtol=1e-5)  # of a diagonal Hessian, any draw is exact
    vector, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    rises = jax.vmap(lambda i: loss(unravel(vector.at[i].set(0)), curvature))
    got = jax.flatten_util.ravel_pytree(exact)[0]
    np.testing.assert_allclose(rises(jnp.arange(vector.size)), got, rtol=1e-4, atol=1e-7)


def test_obd_of_a_network_against_the_whole_hessian():
    vector, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    hessian = jax.hessian(lambda v: cross_entropy(unravel(v), BATCH))(vector)
    want = unravel(jnp.diag(hessian) * vector**2 / 2)
    exact = masks.obd(cross_entropy, PARAMS, BATCH)
    close(exact, want, rtol=1e-4, atol=1e-6)
    assert bool((exact["in"] < 0).any())  # a loss may curve down: the sign stays
    close(masks.obd(cross_entropy, PARAMS, HALVES, stacked=True), want, rtol=1e-4, atol=1e-5)

    # Hutchinson: unbiased, with the variance of the docstring
    samples, runs = 64, 200
    keys = jax.random.split(KEY, runs)
    draw = lambda k: masks.obd(cross_entropy, PARAMS, BATCH, key=k, samples=samples)
    drawn = jax.vmap(lambda k: jax.flatten_util.ravel_pytree(draw(k))[0])(keys)
    diagonal = np.asarray(drawn / (vector**2 / 2))
    variance = (np.square(hessian).sum(1) - np.square(np.diag(hessian))) / samples
    z = (diagonal.mean(0) - np.diag(hessian)) / np.sqrt(variance / runs)
    assert np.abs(z).max() < 4.5
    # the mean of 50 sample variances, each uncertain by sqrt(2 / 200) = 10 %
    np.testing.assert_allclose(np.mean(diagonal.var(0, ddof=1) / variance), 1, atol=0.06)


def test_obd_chooses_and_refuses():
    got = masks.obd(cross_entropy, PARAMS, BATCH, where="out")
    whole = masks.obd(cross_entropy, PARAMS, BATCH)
    np.testing.assert_allclose(got["out"], whole["out"], rtol=1e-5, atol=1e-7)
    assert not got["in"].any()
    loss = lambda params, batch: jnp.sum(params["kernel"] ** 2)
    large = {"kernel": jnp.ones((101, 100))}
    with pytest.raises(ValueError, match=r"10100 entries .* at most 10000 .* give a key"):
        masks.obd(loss, large, None)
    close(masks.obd(loss, large, None, key=KEY, samples=1), {"kernel": jnp.ones((101, 100))})
    with pytest.raises(ValueError, match="samples is 0"):
        masks.obd(loss, large, None, key=KEY, samples=0)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        masks.obd(loss, large, None, key=jax.random.PRNGKey(0))
