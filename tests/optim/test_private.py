"""Private gradients: equal sums without per-example gradients, sensitivity, noise, accounts."""

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld
from flax import linen as nn
from scipy.special import gammaln

from jaxkit import optim, tree

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


class Net(nn.Module):
    """Dense kernels, an embedding, a convolution, a norm, a kernel that is used twice."""

    @nn.compact
    def __call__(self, x, tokens):
        table = nn.Embed(7, 4)(tokens).sum(0)
        x = nn.Conv(3, (3,))(x[:, None])
        x = nn.relu(nn.Dense(16)(nn.LayerNorm()(x)))
        twice = nn.Dense(16)
        x = jnp.tanh(twice(jnp.tanh(twice(x)))).mean(0)
        return nn.Dense(3)(jnp.concatenate([x, table]))


def material(n=6):
    net = Net()
    x, tokens = jnp.asarray(RNG.normal(size=(n, 5)), jnp.float32), RNG.integers(7, size=(n, 2))
    batch = {"x": x, "tokens": jnp.asarray(tokens), "y": jnp.asarray(RNG.integers(3, size=n))}
    params = net.init(KEY, x[0], batch["tokens"][0])

    def loss_fn(params, one):
        logits = net.apply(params, one["x"], one["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, one["y"])

    return loss_fn, params, batch


def by_example(loss_fn, params, batch):
    return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)


def norms_of(grads):
    squares = [jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares))


def test_norms_and_sums_equal_those_of_gradients_example_by_example():
    loss_fn, params, batch = material()
    each = by_example(loss_fn, params, batch)
    norms = norms_of(each)
    got = jax.jit(lambda p, b: optim.example_norms(loss_fn, p, b))(params, batch)
    np.testing.assert_allclose(got, norms, rtol=1e-5)
    chunks = optim.example_norms(loss_fn, params, batch, chunk=2)
    np.testing.assert_allclose(chunks, norms, rtol=1e-5)
    clip = float(jnp.median(norms))
    factor = jnp.minimum(1, clip / norms)
    want = jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), each)
    for chunk in (None, 3):
        total = optim.clipped_sum(loss_fn, params, batch, clip=clip, chunk=chunk)
        for path, g in tree.flatten(total).items():
            scale = float(jnp.abs(tree.flatten(want)[path]).max())
            np.testing.assert_allclose(g, tree.flatten(want)[path], atol=1e-5 * scale + 1e-7)
    plain = optim.clipped_sum(loss_fn, params, batch, clip=np.inf)
    mean = jax.grad(lambda p: jax.vmap(loss_fn, (None, 0))(p, batch).sum())(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match="chunk=4 does not divide the batch of 6"):
        optim.example_norms(loss_fn, params, batch, chunk=4)


def test_kernels_of_dense_layers_have_no_gradient_per_example():
    w = {"up": jnp.zeros((300, 200)), "down": jnp.zeros((200, 10)), "bias": jnp.zeros(200)}
    loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"])
    x = jnp.zeros((32, 300))
    program = str(jax.make_jaxpr(lambda p, x: optim.example_norms(loss, p, x))(w, x))
    assert "32,300,200" not in program and "32,200,10]" not in program
    direct = str(jax.make_jaxpr(lambda p, x: by_example(loss, p, x))(w, x))
    assert "32,300,200" in direct


def test_sensitivity_in_every_dtype():
    """Each summand is at most C long: also in bfloat16, where the norm of a rounded copy is not."""
    loss_fn, params, batch = material()
    clip = 0.3
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda w: w.astype(dtype), params)
        alone = lambda i: jax.tree.map(lambda x: x[i : i + 1], batch)
        sums = [optim.clipped_sum(loss_fn, cast, alone(i), clip=clip) for i in range(3)]
        for g in sums:
            assert float(optax.tree.norm(g)) <= clip * (1 + 1e-5)
    whole = optim.clipped_sum(loss_fn, params, batch, clip=clip)
    rest = optim.clipped_sum(loss_fn, params, batch, clip=clip, mask=jnp.arange(6) > 0)
    assert float(optax.tree.norm(optax.tree.sub(whole, rest))) <= clip * (1 + 1e-4)


def test_noise_and_the_lot_size():
    loss = lambda p, x: 0.0 * jnp.sum(p["w"]) * x
    params = {"w": jnp.zeros((200, 100)), "v": jnp.zeros((100, 200)), "n": jnp.arange(3)}
    options = {"clip": 0.5, "noise_multiplier": 1.5, "lot_size": 64}
    g = optim.dp_gradient(KEY, loss, params, jnp.ones(10), **options)
    np.testing.assert_allclose(g["w"].std(), 1.5 * 0.5 / 64, rtol=0.02)
    assert abs(float(jnp.corrcoef(g["w"].ravel(), g["v"].ravel())[0, 1])) < 0.03
    assert jnp.array_equal(g["n"], params["n"] * 0)
    again = optim.dp_gradient(KEY, loss, params, jnp.ones(10), **options)
    assert jnp.array_equal(again["w"], g["w"])
    for name, value in (("clip", 0.0), ("lot_size", 0), ("noise_multiplier", -1.0)):
        with pytest.raises(ValueError, match=name):
            optim.dp_gradient(KEY, loss, params, jnp.ones(10), **{**options, name: value})
    with pytest.raises(TypeError, match="typed key"):
        optim.dp_gradient(jax.random.PRNGKey(0), loss, params, jnp.ones(10), **options)


def test_poisson_lots():
    draw = jax.jit(jax.vmap(lambda k: optim.poisson_lot(k, 500, 0.05)))
    lots = draw(jax.random.split(KEY, 4000))
    sizes = np.asarray(lots.mask.sum(1))
    np.testing.assert_allclose([sizes.mean(), sizes.var()], [25, 500 * 0.05 * 0.95], rtol=0.06)
    joined = np.bincount(np.asarray(lots.index)[np.asarray(lots.mask)], minlength=500) / 4000
    assert np.abs(joined - 0.05).max() < 5 * np.sqrt(0.05 * 0.95 / 4000)
    one = jax.tree.map(lambda x: np.asarray(x[0]), lots)
    assert len(set(one.index[one.mask])) == one.mask.sum() and one.mask.size < 100
    with pytest.raises(ValueError, match=r"rate=1\.5"):
        optim.poisson_lot(KEY, 10, 1.5)


def test_accounts():
    """Rényi divergences by their closed form at integer orders; the tighter exact accountant."""

    def by_hand(q, sigma, steps, delta):
        best = np.inf
        for a in range(2, 256):
            k = np.arange(a + 1)
            terms = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
            terms += (a - k) * np.log1p(-q) + k * np.log(q) + k * (k - 1) / (2 * sigma**2)
            rdp = np.logaddexp.reduce(terms) / (a - 1)
            eps = steps * rdp + np.log((a - 1) / a) - (np.log(delta) + np.log(a)) / (a - 1)
            best = min(best, eps)
        return best

    for (q, sigma, steps), want in (
        ((0.01, 4.0, 10_000), 1.0355),
        ((256 / 60_000, 1.1, 14_062), 2.597),
    ):
        spent = optim.dp_epsilon(rate=q, noise_multiplier=sigma, steps=steps, delta=1e-5)
        np.testing.assert_allclose(by_hand(q, sigma, steps, 1e-5), want, rtol=1e-3)
        assert 0.97 * want < spent <= want * 1.001
    event = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0))
    exact = pld.PLDAccountant().compose(event, 10_000).get_epsilon(1e-5)
    assert exact <= optim.dp_epsilon(rate=0.01, noise_multiplier=4.0, steps=10_000, delta=1e-5)
    assert optim.dp_epsilon(rate=0.01, noise_multiplier=4.0, steps=0, delta=1e-5) == 0


def test_budgets():
    setting = {"rate": 0.05, "delta": 1e-5}
    steps = optim.dp_steps(epsilon=2.0, noise_multiplier=1.5, **setting)
    spent = [optim.dp_epsilon(steps=n, noise_multiplier=1.5, **setting) for n in (steps, steps + 1)]
    assert spent[0] <= 2.0 < spent[1]
    sigma = optim.dp_noise_multiplier(epsilon=2.0, steps=steps, **setting)
    assert sigma <= 1.5 + 1e-3 and sigma > 1.4
    with pytest.raises(ValueError, match="already spent by one step"):
        optim.dp_steps(epsilon=0.01, noise_multiplier=0.5, **setting)
    with pytest.raises(ValueError, match="spent before the first step"):
        optim.dp_noise_multiplier(epsilon=0.0, steps=1, **setting)
