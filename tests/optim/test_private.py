"""Private gradients: equal sums without per-example gradients, sensitivity, noise, accounts."""

import re
from functools import partial

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec
from scipy.special import gammaln
from scipy.stats import binom

from jaxkit import masks, optim, tree

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
    params = jax.jit(net.init)(KEY, x[0], batch["tokens"][0])

    def loss_fn(params, one):
        logits = net.apply(params, one["x"], one["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, one["y"])

    return loss_fn, params, batch


@partial(jax.jit, static_argnums=0)
def by_example(loss_fn, params, batch):
    return jax.vmap(jax.grad(loss_fn), in_axes=(None, 0))(params, batch)


def summed(loss_fn):
    @partial(jax.jit, static_argnames="chunk")
    def total(params, batch, clip, mask=None, chunk=None):
        return optim.clipped_sum(loss_fn, params, batch, clip=clip, mask=mask, chunk=chunk)

    return total


def norms_of(grads):
    squares = [jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares))


def test_norms_and_sums_equal_those_of_gradients_example_by_example():
    loss_fn, params, batch = material()
    each = by_example(loss_fn, params, batch)
    norms = norms_of(each)
    got = jax.jit(lambda p, b: optim.example_norms(loss_fn, p, b))(params, batch)
    np.testing.assert_allclose(got, norms, rtol=1e-5)
    chunks = jax.jit(lambda p, b: optim.example_norms(loss_fn, p, b, chunk=2))(params, batch)
    np.testing.assert_allclose(chunks, norms, rtol=1e-5)
    clip = float(jnp.median(norms))
    factor = jnp.minimum(1, clip / norms)
    want = jax.tree.map(lambda g: jnp.tensordot(factor, g, 1), each)
    total_of = summed(loss_fn)
    for chunk in (None, 3):
        total = total_of(params, batch, clip, chunk=chunk)
        for path, g in tree.flatten(total).items():
            scale = float(jnp.abs(tree.flatten(want)[path]).max())
            np.testing.assert_allclose(g, tree.flatten(want)[path], atol=1e-5 * scale + 1e-7)
    plain = total_of(params, batch, np.inf)
    mean = jax.jit(jax.grad(lambda p: jax.vmap(loss_fn, (None, 0))(p, batch).sum()))(params)
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


OWN = np.random.default_rng(1)
W = {"w": jnp.asarray(OWN.normal(size=(8, 6)), jnp.float32)}
MASK = {"w": jnp.asarray(OWN.random((8, 6)) < 0.1)}
X = jnp.asarray(OWN.normal(size=(4, 8)), jnp.float32)
HALF = jnp.bfloat16


@jax.custom_vjp
def steep(x, w):
    return x @ w


steep.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T, 3 * kept[0][:, None] * d)
)

AS_IT_IS = {
    "plain": lambda x, w: x @ w,
    "left operand": lambda x, w: w.T @ x,
    "split": lambda x, w: jnp.einsum("i,ihk->hk", x, w.reshape(8, 3, 2)),
    "merged": lambda x, w: x.reshape(2, 4) @ w.reshape(4, 12),
    "left operand at positions": lambda x, w: w.reshape(12, 4) @ x.reshape(2, 4).T,
    "inputs split": lambda x, w: jnp.tensordot(x.reshape(4, 2), w.reshape(4, 2, 6)),
    "squeezed": lambda x, w: jax.jit(lambda w: x @ w[None][:, :, None].squeeze((0, 2)))(w),
    "rematerialized": lambda x, w: jax.checkpoint(lambda x, w: x @ w)(x, w),
    "vmapped": lambda x, w: jax.vmap(lambda x: x @ w)(jnp.stack([x, x**2])),
}
OTHERWISE = {
    "doubled": lambda x, w: x @ (8 * w),
    "exponential": lambda x, w: x @ jnp.exp(w),
    "squashed": lambda x, w: x @ (4 * jnp.tanh(w)),
    "masked": lambda x, w: x @ masks.apply({"w": w}, MASK)["w"],
    "repeated": lambda x, w: x @ jnp.repeat(w, 2, 1),
    "tiled": lambda x, w: jnp.tile(x, 2) @ jnp.broadcast_to(w, (2, 8, 6)).reshape(16, 6),
    "cut": lambda x, w: x @ w[:, :4] + 2,
    "centred": lambda x, w: x @ (w - w.mean(0)),
    "rounded": lambda x, w: x @ (w + jax.lax.stop_gradient(jnp.round(w) - w)),
    "integer": lambda x, w: x @ w.astype(jnp.int8).astype(w.dtype) + x[:6] * w[0],
    "custom": steep,
    "added": lambda x, w: x @ (w + w[::-1]),
    "twice": lambda x, w: x @ w + jnp.sin(x) @ w,
    "tied": lambda x, w: jnp.tanh(x @ w) @ w.T,
    "also elsewhere": lambda x, w: x @ w + w[0] ** 2,
    "by itself": lambda x, w: x @ (w @ w.T),
    "scanned": lambda x, w: jax.lax.scan(lambda h, _: (h @ w @ w.T / 9, 0), x, length=2)[0],
    "stacked": lambda x, w: jax.lax.scan(
        lambda h, w: (jnp.sin(w @ h), 0), x[:4], w.reshape(3, 4, 4)
    )[0],
    "in a loop": lambda x, w: jax.lax.map(lambda x: x @ w, jnp.stack([x, 2 * x])),
    "in a branch": lambda x, w: jax.lax.cond(x[0] > 0, lambda: x @ w, lambda: x[:6]),
    "experts": lambda x, w: jax.vmap(jnp.matmul)(x.reshape(2, 4), w.reshape(2, 4, 6)),
}


@pytest.mark.parametrize("ways", [AS_IT_IS, OTHERWISE], ids=["as it is", "otherwise"])
def test_what_becomes_of_a_kernel_before_its_product(ways):
    """Norms are those of the leaf itself, and what is clipped by them is no longer than C."""
    clip = 1.0

    def clipped(params, x):
        found = {}
        for name, way in ways.items():
            loss = lambda p, x, way=way: 5 * jnp.sum(jnp.sin(way(x, p["w"])))
            one = lambda x, loss=loss: optim.clipped_sum(loss, params, x[None], clip=clip)["w"]
            norms = optim.example_norms(loss, params, x)
            found[name] = norms, jax.lax.map(one, x), by_example(loss, params, x)["w"]
        return found

    for name, (norms, got, grads) in jax.jit(clipped)(W, X).items():
        length = lambda g: np.linalg.norm(np.asarray(g, np.float64), axis=(1, 2))
        np.testing.assert_allclose(norms, length(grads), rtol=1e-5, err_msg=name)
        assert np.all(length(got) <= clip * (1 + 1e-6)), name
        factors = clip / np.maximum(clip, length(grads))[:, None, None]
        np.testing.assert_allclose(got, grads * factors, atol=1e-5, err_msg=name)
        assert np.any(length(grads) > 2 * clip), name


def test_two_leaves_in_one_product():
    params = {"v": W["w"].T, "w": W["w"]}
    for way in (lambda p, x: x @ (p["w"] + p["v"].T), lambda p, x: x @ (p["w"] @ p["v"])):
        loss = lambda p, x, way=way: jnp.sum(jnp.sin(way(p, x)))
        want = norms_of(by_example(loss, params, X))
        np.testing.assert_allclose(optim.example_norms(loss, params, X), want, rtol=1e-5)


def test_kernels_that_enter_their_product_as_they_are_have_no_gradient_per_example():
    def largest(way, w, x):
        loss = lambda p, x: jnp.sum(jnp.sin(way(x, p["w"])))
        program = str(jax.make_jaxpr(lambda p, x: optim.example_norms(loss, p, x))({"w": w}, x))
        shapes = re.findall(r":\w+\[([\d,]+)\]", program)
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)

    x = jnp.zeros((7, 8))
    assert all(largest(way, W["w"], x) < 7 * 48 for way in AS_IT_IS.values())
    assert largest(OTHERWISE["doubled"], W["w"], x) == 7 * 48
    widened = lambda x, w: x @ w.astype(jnp.float32)
    assert largest(widened, W["w"].astype(HALF), x) < 7 * 48
    narrowed = lambda x, w: x.astype(HALF) @ w.astype(HALF)
    assert largest(narrowed, W["w"], x) == 7 * 48
    heads = nn.MultiHeadDotProductAttention(4)
    tokens = jnp.zeros((7, 2, 16))
    params = heads.init(KEY, tokens[0])
    loss = lambda p, x: heads.apply(p, x).sum()
    program = str(jax.make_jaxpr(lambda p, x: optim.example_norms(loss, p, x))(params, tokens))
    assert "7,16,4,4" not in program and "7,4,4,16" not in program


def test_positions_that_cancel_are_not_clipped_by_less_than_their_norm():
    """Where sum_t x_t d_t' is far smaller than its terms, rounding takes the sum of its square."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 1, 30)) + 1e-3 * rng.normal(size=(20, 8, 30)), jnp.float32)
    w = {"w": jnp.asarray(rng.normal(size=(30, 40)) / 5, jnp.float32)}
    loss = lambda p, x: jnp.sum(jax.nn.softmax(x @ p["w"], 0) * jnp.arange(320.0).reshape(8, 40))
    true = norms_of(by_example(loss, w, x))
    clip = float(true.min()) / 2
    one = lambda x: optim.clipped_sum(loss, w, x[None], clip=clip)["w"]
    got = np.asarray(jax.jit(lambda x: jax.lax.map(one, x))(x), np.float64)
    assert np.linalg.norm(got, axis=(1, 2)).max() <= clip * (1 + 1e-6)
    assert np.all(optim.example_norms(loss, w, x) >= true * (1 - 1e-6))


def test_examples_of_other_devices_are_not_in_a_norm():
    loss = lambda p, x: jnp.sum(jnp.sin(x @ p["w"])) + jnp.sum(jnp.exp(p["b"]) * x) ** 2
    params = W | {"b": jnp.ones(8)}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def both(params, x, axis_name=None):
        total = optim.clipped_sum(loss, params, x, clip=1.0, axis_name=axis_name)
        return optim.example_norms(loss, params, x), total

    data = PartitionSpec("data")
    mapped = jax.shard_map(
        lambda p, x: both(p, x, "data"),
        mesh=mesh,
        in_specs=(PartitionSpec(), data),
        out_specs=(data, PartitionSpec()),
    )
    for got, want in zip(
        jax.tree.leaves(jax.jit(mapped)(params, X)), jax.tree.leaves(both(params, X)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_norm_over_the_batch_that_sees_one_example():
    class Small(nn.Module):
        norm: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(self.norm(nn.Dense(4)(x))))

    def norms(norm, x):
        net = Small(norm)
        params, state = [net.init(KEY, x[0]).get(k, {}) for k in ("params", "batch_stats")]
        apply = lambda p, x: net.apply(
            {"params": p, "batch_stats": state}, x, mutable="batch_stats"
        )
        return jax.eval_shape(
            lambda x: optim.example_norms(lambda p, x: apply(p, x)[0].sum(), params, x), x
        )

    vectors, rows = jnp.ones((5, 6)), jnp.ones((5, 1, 6))
    for x in (vectors, rows):
        with pytest.warns(UserWarning, match="its own mean over one entry"):
            norms(nn.BatchNorm(use_running_average=False), x)
        for norm in (nn.BatchNorm(use_running_average=True), nn.LayerNorm(), nn.GroupNorm(2)):
            norms(norm, x)


def test_sensitivity_in_every_dtype():
    """Each summand is at most C long: also in bfloat16, where the norm of a rounded copy is not."""
    loss_fn, params, batch = material()
    clip, total = 0.3, summed(loss_fn)
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = jax.tree.map(lambda w: w.astype(dtype), params)
        alone = lambda i: jax.tree.map(lambda x: x[i : i + 1], batch)
        sums = [total(cast, alone(i), clip) for i in range(3)]
        for g in sums:
            assert float(optax.tree.norm(g)) <= clip * (1 + 1e-6)
    whole = total(params, batch, clip, jnp.ones(6, bool))
    rest = total(params, batch, clip, jnp.arange(6) > 0)
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
    for rate in (1.5, np.float32(1.5), jnp.float32(1.5)):
        with pytest.raises(ValueError, match=r"rate=1\.5"):
            optim.poisson_lot(KEY, 10, rate)
    with pytest.raises(ValueError, match="the rate is traced"):
        jax.jit(lambda q: optim.poisson_lot(KEY, 10, q))(0.5)


def test_lots_exceed_their_size_once_in_a_billion_draws():
    for n, rate in ((1000, 0.001), (1000, 0.005), (500, 0.05), (10_000, 0.01), (60_000, 0.01)):
        size = jax.eval_shape(lambda n=n, rate=rate: optim.poisson_lot(KEY, n, rate)).index.size
        assert binom.sf(size, n, rate) <= 1e-9 < binom.sf(size - 1, n, rate)
    for rate in (0.0, 1.0):
        lot = optim.poisson_lot(KEY, 10, rate)
        assert lot.mask.size == lot.mask.sum() == 10 * rate


def test_accounts():
    """Rényi divergences by their closed form at integer orders; the tighter exact accountant."""

    def by_hand(q, sigma, steps, delta):
        classic, best = np.inf, np.inf
        for a in range(2, 256):
            k = np.arange(a + 1)
            terms = gammaln(a + 1) - gammaln(k + 1) - gammaln(a - k + 1)
            terms += (a - k) * np.log1p(-q) + k * np.log(q) + k * (k - 1) / (2 * sigma**2)
            rdp = np.logaddexp.reduce(terms) / (a - 1)
            eps = steps * rdp + np.log((a - 1) / a) - (np.log(delta) + np.log(a)) / (a - 1)
            best = min(best, eps)
            classic = min(classic, steps * rdp - np.log(delta) / (a - 1))
        return classic, best

    for (q, sigma, steps), old, want in (
        ((0.01, 4.0, 10_000), 1.2586, 1.0355),
        ((256 / 60_000, 1.1, 14_062), 3.009, 2.597),
    ):
        spent = optim.dp_epsilon(rate=q, noise_multiplier=sigma, steps=steps, delta=1e-5)
        np.testing.assert_allclose(by_hand(q, sigma, steps, 1e-5), (old, want), rtol=2e-4)
        assert 0.97 * want < spent <= want * 1.001
    event = dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0))
    exact = pld.PLDAccountant().compose(event, 10_000).get_epsilon(1e-5)
    assert exact <= optim.dp_epsilon(rate=0.01, noise_multiplier=4.0, steps=10_000, delta=1e-5)
    assert optim.dp_epsilon(rate=0.01, noise_multiplier=4.0, steps=0, delta=1e-5) == 0


def test_delta_is_a_probability_below_that_of_one_example():
    setting = {"rate": 0.01, "noise_multiplier": 4.0, "steps": 10}
    budget = {"rate": 0.01, "epsilon": 1.0}
    for delta in (0.0, 1.0, 2.0, -1e-5, float("nan"), np.float32(2)):
        for call in (
            lambda delta: optim.dp_epsilon(delta=delta, **setting),
            lambda delta: optim.dp_steps(delta=delta, noise_multiplier=4.0, **budget),
            lambda delta: optim.dp_noise_multiplier(delta=delta, steps=10, **budget),
        ):
            with pytest.raises(ValueError, match=f"delta={delta}"):
                call(delta)
    with pytest.warns(UserWarning, match=r"delta=0\.0001 is not below 1 / N = 0\.0001"):
        warned = optim.dp_epsilon(delta=1e-4, num_data=10_000, **setting)
    assert warned == optim.dp_epsilon(delta=1e-4, num_data=9_999, **setting) > 0


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
