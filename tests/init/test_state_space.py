"""State spaces that start as causal linear attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit.init.state_space import last_tap, mimetic_ssm

KEY = jax.random.key(0)


def ssm(d=64, state=16):
    return {
        "a_log": jnp.ones((d, state)),
        "dt": {"kernel": jnp.ones((3, d)), "bias": jnp.ones(d)},
        "b": jnp.ones((d, state)),
        "c": jnp.ones((d, state)),
        "conv": {"kernel": jnp.ones((4, 1, d)), "bias": jnp.ones(d)},
        "skip": jnp.ones(d),
    }


WHERE = {"a_log": "a_log", "dt": "dt/kernel", "dt_bias": "dt/bias", "conv": "conv/kernel"}
APART = {**WHERE, "b": "b", "c": "c", "conv_bias": "conv/bias"}


def test_ssm_starts_as_linear_attention():
    h, d, tokens = 256, 64, 32
    new = jax.jit(mimetic_ssm(h, **APART))(KEY, ssm(d))
    a = -np.exp(np.asarray(new["a_log"], np.float64))
    np.testing.assert_allclose(a, -1 / h, rtol=1e-6)
    np.testing.assert_allclose(np.exp(h * a), math.exp(-1), rtol=1e-5)
    np.testing.assert_array_equal(new["dt"]["kernel"], 0)
    np.testing.assert_allclose(jax.nn.softplus(new["dt"]["bias"]), 1, atol=1e-6)
    assert new["skip"] is not None and bool((new["skip"] == 1).all())
    np.testing.assert_array_equal(new["conv"]["bias"], 0)

    # tokens are most like themselves: the diagonal is the maximum of its row
    def diagonal(c, horizon_a):
        hits = []
        for seed in range(8):
            x = np.random.default_rng(seed).normal(size=(tokens, d))
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            kernel = (x @ np.asarray(c)) @ (x @ np.asarray(new["b"])).T
            lag = np.arange(tokens)[:, None] - np.arange(tokens)
            kernel = np.where(lag >= 0, kernel * np.exp(np.maximum(lag, 0) * horizon_a), -np.inf)
            hits.append(kernel.argmax(1) == np.arange(tokens))
        return np.mean(hits)

    assert diagonal(new["c"], a[0, 0]) > 0.9
    untied = jax.random.normal(KEY, (d, 16)) / math.sqrt(d)
    chance = np.mean(1 / np.arange(1, tokens + 1))
    assert diagonal(untied, a[0, 0]) < 3 * chance

    ratio = float((new["c"] - new["b"]).std() / new["b"].std())
    assert abs(ratio - 0.1) < 0.01
    assert abs(float(new["b"].std()) * math.sqrt(d) - 1) < 4 / math.sqrt(2 * d * 16)


def run(params, x):
    """A selective state space as Mamba computes it, step by step, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    taps = len(params["conv"]["kernel"])
    before = np.pad(x, ((taps - 1, 0), (0, 0)))
    x = sum(before[i : i + len(x)] * params["conv"]["kernel"][i, 0] for i in range(taps))
    x = x + params["conv"]["bias"]
    delta = np.log1p(np.exp(x[:, :3] @ params["dt"]["kernel"] + params["dt"]["bias"]))
    b, c = x @ params["b"], x @ params["c"]
    h, out = np.zeros((x.shape[1], b.shape[1])), []
    for t in range(len(x)):
        decay = np.exp(-delta[t][:, None] * np.exp(params["a_log"]))
        h = decay * h + (delta[t] * x[t])[:, None] * b[t]
        out.append(h @ c[t])
    return np.stack(out)


def test_the_state_space_is_causal_linear_attention():
    """With a horizon that never ends; and at the horizon, a token counts for 1/e of that."""
    x = np.random.default_rng(0).normal(size=(20, 64))
    start = ssm() | {"skip": jnp.zeros(64)}
    new = mimetic_ssm(1e9, **APART)(KEY, start)
    b, c = (x @ np.asarray(new[name], np.float64) for name in "bc")
    np.testing.assert_allclose(run(new, x), np.tril(c @ b.T) @ x, rtol=1e-5, atol=1e-4)
    assert np.abs(run(start, x) - np.tril(c @ b.T) @ x).max() > 10  # as it was before

    x[1:-1] = x[-1] = 0
    x[-1] = x[0]  # one token, and itself 19 steps later
    near, far = (run(mimetic_ssm(h, **APART)(KEY, start), x)[-1] for h in (19, 1e9))
    np.testing.assert_allclose(near, far * (1 + math.exp(-1)) / 2, rtol=1e-5)


def test_last_tap_is_the_identity_of_a_causal_convolution():
    x = jax.random.normal(KEY, (2, 9, 5))
    kernel = last_tap(KEY, (4, 1, 5), jnp.float32)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=5
    )
    np.testing.assert_array_equal(y, x)
    with pytest.raises(ValueError, match="depthwise"):
        last_tap(KEY, (4, 2, 5))


def test_last_taps_of_other_layouts():
    kernel = last_tap(KEY, (4, 1, 5))
    np.testing.assert_array_equal(last_tap(KEY, (5, 1, 4), layout="c1t"), kernel.T)
    stacked = last_tap(KEY, (2, 4, 1, 5), layout="lt1c")
    np.testing.assert_array_equal(stacked, jnp.stack([kernel, kernel]))
    with pytest.raises(ValueError, match="'t1c', and the shape"):
        last_tap(KEY, (4, 5))
    np.testing.assert_array_equal(last_tap(KEY, (4, 5), layout="tc"), kernel[:, 0])


def test_ssm_with_one_kernel_for_all():
    params = ssm()
    del params["b"], params["c"]
    params["x"] = jnp.full((64, 3 + 32), 7.0, jnp.bfloat16)
    new = mimetic_ssm(64, **WHERE, dt_b_c="x", state=16)(KEY, params)
    assert new["x"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(new["x"][:, :3], 7)
    b, c = np.asarray(new["x"][:, 3:19], np.float32), np.asarray(new["x"][:, 19:], np.float32)
    assert abs(np.std(c - b) / np.std(b) - 0.1) < 0.02
    exact = mimetic_ssm(64, **WHERE, dt_b_c="x", state=16, noise=0.0)(KEY, params)["x"]
    np.testing.assert_array_equal(exact[:, 3:19], exact[:, 19:])


def packed():
    """The leaves of a Mamba-1 block: x_proj holds Delta's low rank, B and C."""
    params = ssm()
    del params["b"], params["c"]
    return params | {"x": jnp.full((64, 3 + 32), 7.0)}


@pytest.mark.parametrize("kind", ["apart", "packed"])
def test_layouts_hold_the_same_kernels(kind):
    params = ssm() if kind == "apart" else packed()
    kernels = {"b", "c", "x"} & set(params)
    options = APART if kind == "apart" else {**WHERE, "dt_b_c": "x", "state": 16}
    new = mimetic_ssm(64, **options)(KEY, params)
    turned = dict(params) | {name: params[name].T for name in kernels}
    turned["dt"] = params["dt"] | {"kernel": params["dt"]["kernel"].T}
    turned["conv"] = params["conv"] | {"kernel": params["conv"]["kernel"].T}
    torch = mimetic_ssm(64, **options, layout="oi", conv_layout="c1t")(KEY, turned)
    for name in kernels:
        np.testing.assert_array_equal(torch[name].T, new[name])
    np.testing.assert_array_equal(torch["conv"]["kernel"].T, new["conv"]["kernel"])
    # the transposed tree is not taken for the other one
    bad = {"b", "x"} & kernels
    with pytest.raises(ValueError, match=f"'{bad.pop()}' has shape .*layout 'io'"):
        mimetic_ssm(64, **options)(KEY, turned | {"conv": params["conv"]})
    biased = {**options, "conv_bias": "conv/bias"}
    with pytest.raises(ValueError, match=r"'conv/kernel' has shape \(64, 1, 4\).*its bias"):
        mimetic_ssm(64, **biased)(KEY, params | {"conv": turned["conv"]})


def test_stacked_layers_are_drawn_on_their_own():
    for params, options in (
        (ssm(), APART),
        (packed(), {**WHERE, "dt_b_c": "x", "state": 16}),
    ):
        stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
        init = mimetic_ssm(64, **options, layout="lio", conv_layout="lt1c")
        new = jax.jit(init)(KEY, stack)
        for name in {"b", "x"} & set(params):
            kernels = np.asarray(new[name])[..., -16:]
            assert np.abs(kernels[0] - kernels[1]).max() > 0.1
            np.testing.assert_allclose(kernels.std((1, 2)) * 8, 1, rtol=0.1)  # fan_in 64
        np.testing.assert_array_equal(new["conv"]["kernel"][:, -1], 1)


def test_ssm_bad_input():
    with pytest.raises(ValueError, match="horizon"):
        mimetic_ssm(0, **APART)
    with pytest.raises(ValueError, match="either b and c"):
        mimetic_ssm(8, **WHERE)
    with pytest.raises(ValueError, match="either b and c"):
        mimetic_ssm(8, **APART, dt_b_c="x", state=2)
    with pytest.raises(ValueError, match=r"\(64, 16\) and 'c' \(64, 8\)"):
        mimetic_ssm(8, **APART)(KEY, ssm() | {"c": jnp.ones((64, 8))})
    with pytest.raises(ValueError, match="depthwise"):
        mimetic_ssm(8, **APART)(
            KEY, ssm() | {"conv": {"kernel": jnp.ones((4, 2, 3)), "bias": jnp.ones(3)}}
        )
    with pytest.raises(ValueError, match=r"'b' has .*3 \+ 2 \* 100 outputs"):
        mimetic_ssm(8, **WHERE, dt_b_c="b", state=100)(KEY, ssm())
    with pytest.raises(ValueError, match="the letters 'io' are due"):
        mimetic_ssm(8, **APART, layout="dh")
    with pytest.raises(ValueError, match=r"'b' has shape .* dimensions"):
        mimetic_ssm(8, **APART)(
            KEY, ssm() | {"b": jnp.ones((2, 64, 16))} | {"c": jnp.ones((2, 64, 16))}
        )
