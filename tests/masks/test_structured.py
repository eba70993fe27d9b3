"""Structured masks: `shrink` computes what the masked model computes, or refuses."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxkit import trace, tree
from jaxkit.masks.structured import shrink, units
from jaxkit.trace import Axis, Concat, Prod
from tests import zoo
from tests.zoo import model as hand

X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def _masked(params, unit_mask, axes):
    mask = units(params, unit_mask, axes)
    return jax.tree.map(lambda p, m: p * np.asarray(m, p.dtype), params, mask)


def _jit(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


def _difference(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(a).max())


def _drop(axis, *removed):
    return ~np.isin(np.arange(axis.size), removed)


def _random(params):
    """Leaves without equal entries; variances stay positive."""
    return hand.randomize(params)


# ------------------------------------------------------------------- the masked model, smaller


LIBRARIES = ("linen", "nnx", "equinox", "haiku")
SOME = [
    m
    for m in zoo.MODELS
    if not m.name.startswith(LIBRARIES) or m.name.endswith(("_vit", "_unet", "_gru"))
]


@pytest.mark.parametrize("model", SOME, ids=lambda m: m.name)
def test_zoo_shrinks_to_what_its_masked_model_computes(model):
    apply_fn, params, args = model.build()
    axes = trace.axes(apply_fn, params, *args)
    arguments = inspect.signature(model.build).parameters
    plain = not model.name.startswith(LIBRARIES)
    unit_mask, smaller = {}, {}
    for argument, p in arguments.items():
        of_size = [a for a in trace.named(axes).values() if a.size == p.default]
        # a module of a library computes the attention scale from its new size
        if len(of_size) == 1 and not of_size[0].pinned and (plain or not of_size[0].scaled):
            unit_mask[of_size[0].name] = _drop(of_size[0], p.default // 2)
            smaller[argument] = p.default - 1
    if not unit_mask:
        pytest.skip("no axis of this model is removable, or the model is of one size")
    small, sizes, report = shrink(params, unit_mask, axes, same_constants=plain)
    assert sorted(sizes.values()) == sorted(smaller.values())

    rebuilt, due, _ = model.build(**smaller)
    assert list(map(np.shape, jax.tree.leaves(small))) == list(map(np.shape, jax.tree.leaves(due)))
    small = jax.tree.unflatten(jax.tree.structure(due), jax.tree.leaves(small))
    masked = _jit(apply_fn)(_masked(params, unit_mask, axes), *args)
    assert _difference(masked, _jit(rebuilt)(small, *args)) <= 1e-5
    before, after = report.entries
    assert before == sum(map(np.size, jax.tree.leaves(params))) > after
    assert after == sum(map(np.size, jax.tree.leaves(small)))


class _Linen(nn.Module):
    heads: int = 4
    size: int = 3
    mlp: int = 10

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7)(x)[None]
        attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=self.heads * self.size)
        x = x + attention(nn.LayerNorm()(x))
        return nn.Dense(2)(x + nn.Dense(7)(nn.gelu(nn.Dense(self.mlp)(nn.LayerNorm()(x)))))


def test_flax_linen_rebuilt_with_sizes():
    params = _random(jax.eval_shape(_Linen().init, jax.random.key(0), X))
    axes = trace.axes(_Linen().apply, params, X)
    attention = "params/MultiHeadDotProductAttention_0"
    axes = trace.rename(
        axes, {f"{attention}/key/kernel:1": "heads", "params/Dense_3/kernel:1": "mlp"}
    )
    named = trace.named(axes)
    unit_mask = {"heads": _drop(named["heads"], 0, 2), "mlp": _drop(named["mlp"], 1, 2, 5)}
    small, sizes, report = shrink(params, unit_mask, axes)
    assert sizes == {"heads": 2, "mlp": 7}
    assert report.axes == {"heads": (4, 2), "mlp": (10, 7)}
    assert report.leaves[f"{attention}/out/kernel"] == ((4, 3, 7), (2, 3, 7))
    expected = _jit(_Linen().apply)(_masked(params, unit_mask, axes), X)
    assert _difference(expected, _jit(_Linen(**sizes).apply)(small, X)) <= 1e-5
    with pytest.raises(
        ValueError, match="'params/Dense_0/kernel:1' is not removable: mean: div at"
    ):
        shrink(params, {"params/Dense_0/kernel:1": np.arange(7) > 0}, axes)
    with pytest.raises(ValueError, match=r"another constant: scaled by 0\.5774"):
        shrink(params, {f"{attention}/key/kernel:2": np.arange(3) > 0}, axes)


class _Conv(nnx.Module):
    def __init__(self, first, second, rngs):
        self.conv1 = nnx.Conv(2, first, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(first, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(second * 4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv1(x)))
        return self.head(nnx.relu(self.conv2(x)).reshape(len(x), -1))


def test_flax_nnx_rebuilt_with_sizes():
    graph, params = nnx.split(nnx.eval_shape(lambda: _Conv(5, 7, nnx.Rngs(0))))
    params = _random(params)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 2)), jnp.float32)
    run = lambda p, x: nnx.merge(graph, p)(x)
    axes = trace.rename(
        trace.axes(run, params, images), {"conv1/kernel:3": "first", "conv2/kernel:3": "second"}
    )
    unit_mask = {"first": np.arange(5) != 3, "second": np.arange(7) % 3 > 0}
    small, sizes, _ = shrink(params, unit_mask, axes)
    assert sizes == {"first": 4, "second": 4}
    rebuilt, _ = nnx.split(nnx.eval_shape(lambda: _Conv(**sizes, rngs=nnx.Rngs(1))))
    expected = _jit(run)(_masked(params, unit_mask, axes), images)
    got = _jit(lambda p, x: nnx.merge(rebuilt, p)(x))(small, images)
    assert _difference(expected, got) <= 1e-5


class _Equinox(eqx.Module):
    cell: eqx.nn.GRUCell
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, state, mlp):
        keys = jax.random.split(jax.random.key(0), 3)
        self.cell = eqx.nn.GRUCell(3, state, key=keys[0])
        self.up = eqx.nn.Linear(state, mlp, key=keys[1])
        self.down = eqx.nn.Linear(mlp, 2, key=keys[2])

    def __call__(self, x):
        first = jnp.zeros(self.cell.hidden_size)
        h, _ = jax.lax.scan(lambda h, row: (self.cell(row, h), None), first, x)
        return self.down(jax.nn.silu(self.up(h)))


def test_equinox_rebuilt_with_sizes():
    params, static = eqx.partition(_Equinox(6, 5), eqx.is_array)
    run = lambda p, x: eqx.combine(p, static)(x)
    axes = trace.axes(run, params, X)
    assert isinstance(axes.cell.weight_hh[0], Concat)
    axes = trace.rename(axes, {axes.cell.weight_hh[1].name: "state", "up/weight:0": "mlp"})
    unit_mask = {"state": np.arange(6) != 2, "mlp": np.arange(5) > 1}
    small, sizes, _ = shrink(params, unit_mask, axes)
    assert sizes == {"state": 5, "mlp": 3}
    leaves = iter(jax.tree.leaves(small))
    rebuilt = _Equinox(**sizes)
    rebuilt = jax.tree.map(lambda x: next(leaves) if eqx.is_array(x) else x, rebuilt)
    expected = _jit(run)(_masked(params, unit_mask, axes), X)
    assert _difference(expected, _jit(lambda x: rebuilt(x))(X)) <= 1e-5


# ------------------------------------------------------------------------------ random programs

WIDTHS = (3, 5, 7)
ACTIVATIONS = (jnp.tanh, jax.nn.sigmoid, jnp.cos, jax.nn.gelu, jax.nn.softplus, jnp.square)


def _program(steps):
    """A function of hidden vectors (batch, width), each made from those before it.

    The choices depend on no size, so that the same function runs on smaller params.
    """

    def apply_fn(params, x):
        pool = [x @ params[f"in{w}"] for w in WIDTHS]
        logits = []
        for kind, a, b, c in steps:
            x, f = pool[a % len(pool)], ACTIVATIONS[c % len(ACTIVATIONS)]
            same = [
                y for y, origin in zip(pool, kinds, strict=False) if origin == kinds[a % len(pool)]
            ]
            y = same[b % len(same)]
            pool.append(
                (
                    lambda: f(x),
                    lambda: f(x + y),
                    lambda: x * f(y),
                    lambda: x / (1 + y * y),
                    lambda: jnp.maximum(x, y) - 0.5 * x,
                    lambda: jnp.where(y > 0, x, f(y)),
                    lambda: x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1),
                    lambda: x - f(x).mean(-1, keepdims=True),
                    lambda: jax.nn.softmax(x) * f(y),
                    lambda: f(x @ jnp.swapaxes(y, 0, 1)) @ y,
                    lambda: x + f(y).sum(-1, keepdims=True),
                    lambda: x * f(y).max(-1, keepdims=True),
                )[kind]()
            )
        for i, (x, width) in enumerate(zip(pool, kinds, strict=False)):
            sums = (lambda: x @ params[f"out{width}"], lambda: jnp.tanh(x).sum(-1)[:, None])
            logits.append(sums[i % 2]())
        return sum(logits)

    kinds = list(WIDTHS)
    for _, a, _, _ in steps:
        kinds.append(kinds[a % len(kinds)])
    return apply_fn


@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)),
        min_size=1,
        max_size=5,
    )
)
def test_random_programs_lose_nothing_with_units_that_may_be_cut(steps):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {f"in{w}": rng.standard_normal((3, w)) for w in WIDTHS}
        params |= {f"out{w}": rng.standard_normal((w, 2)) for w in WIDTHS}
        x = rng.standard_normal((4, 3))
        apply_fn = _program(steps)
        axes = trace.axes(apply_fn, params, x)
        free = [a for a in trace.named(axes).values() if not a.pinned]
        unit_mask = {a.name: np.arange(a.size) != 1 for a in free}
        small, _, _ = shrink(params, unit_mask, axes, same_constants=True)
        masked = apply_fn(_masked(params, unit_mask, axes), x)
        assert _difference(masked, apply_fn(small, x)) <= 1e-9


# ------------------------------------------------------------------------------------ the masks


def test_units_by_hand_on_products_and_blocks():
    params = {"w": jnp.ones((2, 12)), "b": jnp.ones((3,)), "n": jnp.arange(2)}
    block = Prod((Axis("h", 2), "s"))
    axes = {"w": ("x", Concat((block, 3, "s"))), "b": ("s",), "n": (None,)}
    mask = units(params, {"h": np.array([True, False]), "s": np.array([True, True, False])}, axes)
    row = [1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(mask["w"], np.array([row, row], bool))
    np.testing.assert_array_equal(mask["b"], [True, True, False])
    np.testing.assert_array_equal(mask["n"], [True, True])


def test_units_of_a_kernel_between_two_axes():
    axes = {"w": ("x", "y")}
    mask = units({"w": jnp.ones((2, 3))}, {"x": np.arange(2) > 0, "y": np.arange(3) > 0}, axes)
    np.testing.assert_array_equal(mask["w"], [[False] * 3, [False, True, True]])


def test_units_may_be_traced():
    params, axes = {"w": jnp.ones((2, 6))}, {"w": (None, Prod((2, "s")))}
    masks = jnp.array([[True, False, True], [False, False, True]])
    batched = jax.jit(jax.vmap(lambda m: units(params, {"s": m}, axes)))(masks)
    for i in range(2):
        np.testing.assert_array_equal(batched["w"][i], units(params, {"s": masks[i]}, axes)["w"])


def test_nothing_removed_is_nothing_changed():
    params, axes = {"w": jnp.ones((2, 3))}, {"w": (None, Axis("pinned", 3, pinned=("mean",)))}
    small, sizes, report = shrink(params, {"pinned": np.ones(3, bool)}, axes)
    assert small["w"] is params["w"] and sizes == {"pinned": 3}
    assert report == ({}, {}, (6, 6))


def test_dtypes_and_other_leaves_survive():
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "n": jnp.arange(3), "s": jnp.array(1.0)}
    axes = {"w": (None, "x"), "n": (None,), "s": ()}
    small, _, _ = shrink(params, {"x": np.arange(3) > 0}, axes)
    assert small["w"].shape == (2, 2) and small["w"].dtype == jnp.bfloat16
    assert small["n"] is params["n"] and small["s"] is params["s"]


@pytest.mark.parametrize(
    ("unit_mask", "kind", "message"),
    [
        ({"x": np.zeros(3, bool)}, ValueError, "axis 'x': all of its 3 units are masked"),
        ({"y": np.ones(3, bool)}, ValueError, "no axis is named 'y'; the nearest: 'x'"),
        (
            {"x": np.ones(2, bool)},
            ValueError,
            r"axis 'x' has size 3, and its mask the shape \(2,\)",
        ),
        ({"x": np.ones(3)}, TypeError, "axis 'x': the mask is float.*, and bool was due"),
    ],
)
def test_bad_masks_are_explained(unit_mask, kind, message):
    with pytest.raises(kind, match=message):
        shrink({"w": jnp.ones((2, 3))}, unit_mask, {"w": (None, "x")})


def test_the_operation_that_forbids_it_is_named():
    params = {"w": jnp.ones((3, 5)), "v": jnp.ones((5, 2))}
    fn = lambda p, x: jax.nn.softmax(x @ p["w"]) @ p["v"]
    axes = trace.axes(fn, params, X)
    with pytest.raises(
        ValueError, match=r"is not removable: maximum: reduce_max at .*test_structured"
    ):
        shrink(params, {"w:1": np.arange(5) > 0}, axes)
    assert tree.flatten(params).keys() == {"w", "v"}
