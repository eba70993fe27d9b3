"""The contract that every public function of jaxkit keeps.

One table, kept in tests/rows/, and the same checks over all of it. A row calls the function through
the one signature ``fn(key, params, batch, number)`` and ignores what it does not need; a row of an
optimizer returns the optax transformation instead. A public name that is neither in the table nor
in `EXEMPT` (with its reason) fails `test_every_public_name_is_in_the_table`.
"""

import warnings
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxkit
from jaxkit import masks, tree
from tests.counting import counting
from tests.rows import EXEMPT, OPTIMIZERS, ROWS
from tests.rows.base import KEY


def by_name(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


# --------------------------------------------------------------------------------------- material


def dict_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "layer": {"bias": draw(8), "kernel": draw(16, 8)},
        "out": {"kernel": draw(8, 4)},
        "steps": jnp.arange(4),
    }


class Linen(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, param_dtype=self.dtype)
        return nn.LayerNorm(param_dtype=self.dtype)(dense(x))


class Nnx(nnx.Module):
    def __init__(self, dtype, rngs):
        self.dense = nnx.Linear(3, 4, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, param_dtype=dtype, rngs=rngs)


def front_ends(dtype):
    key = jax.random.key(1)
    mlp = eqx.nn.MLP(2, 3, 4, 1, key=key, dtype=dtype)
    return {
        "dict": dict_params(dtype),
        "linen": Linen(dtype).init(key, jnp.ones((1, 3))),
        "nnx": nnx.state(Nnx(dtype, nnx.Rngs(0))),
        "equinox": eqx.filter(mlp, eqx.is_array),
    }


def batch(n=16):
    return jnp.linspace(0.0, 3.0, 2 * n).reshape(n, 2)


def raw(x):
    """Turn typed keys into words so that numpy can compare them."""
    is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same(got, want, exact=False, tol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = raw(a), raw(b)
        if exact or a.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=tol, atol=tol / 20)


def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def spread(params):
    """Shard every matrix over the whole mesh, and the rest as far as it goes."""
    spec = {2: PartitionSpec("x", "y"), 1: PartitionSpec("y"), 0: PartitionSpec()}
    place = lambda w: jax.device_put(w, NamedSharding(mesh(), spec[jnp.ndim(w)]))
    return jax.tree.map(place, params)


MOVES_LEAVES = ("all-gather", "all-to-all", "collective-permute")


# ----------------------------------------------------------------------------------------- checks


def public_names(module=jaxkit, prefix=""):
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield from public_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_public_name_is_in_the_table():
    table = {row.name for row in [*ROWS, *OPTIMIZERS]}
    names = set(public_names())
    assert names - table - set(EXEMPT) == set(), "give these public names a row in the table"
    assert (table | set(EXEMPT)) - names == set(), "these names are no longer public"
    assert not table & set(EXEMPT)


@by_name(ROWS)
def test_jit_equals_eager_and_a_changed_number_compiles_nothing(row):
    params, number = dict_params(), row.number
    jitted, traces = counting(row.fn)
    want = row.fn(KEY, params, batch(), number)
    assert_same(jitted(KEY, params, batch(), number), want, tol=row.tol)
    if number is not None:
        other = jitted(KEY, params, batch(), number * 0.9)
        assert len(traces) == 1
        assert_same(other, row.fn(KEY, params, batch(), number * 0.9), tol=row.tol)


@by_name([row for row in ROWS if row.number is not None or row.random])
def test_vmap_equals_a_loop(row):
    params, number = dict_params(), row.number
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    if number is not None:
        values = jnp.array([number, number * 0.9, number * 0.5])
        swept = jax.jit(jax.vmap(lambda n: row.fn(KEY, params, batch(), n)))(values)
        for i in range(3):
            assert_same(at(swept, i), row.fn(KEY, params, batch(), values[i]), tol=row.tol)
    if row.random:
        keys = jax.random.split(KEY, 2)
        drawn = jax.jit(jax.vmap(lambda k: row.fn(k, params, batch(), number)))(keys)
        for i in range(2):
            assert_same(at(drawn, i), row.fn(keys[i], params, batch(), number), tol=row.tol)


@by_name([row for row in ROWS if row.random])
def test_a_key_gives_its_bits_and_another_key_others(row):
    call = lambda key: [raw(x) for x in jax.tree.leaves(row.fn(key, params, batch(), row.number))]
    params = dict_params()
    one, same, other = call(KEY), call(jax.random.key(0)), call(jax.random.key(1))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


@by_name(ROWS)
def test_shard_map_and_pmap_equal_one_device(row):
    params, data = dict_params(), batch()
    call = lambda params, data: jax.tree.map(jnp.asarray, row.fn(KEY, params, data, row.number))
    want = call(params, data)
    line = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("data") if row.shards else PartitionSpec()
    inside = lambda params, data: jax.tree.map(lambda x: x[None], call(params, data))
    mapped = jax.shard_map(
        inside,
        mesh=line,
        in_specs=(PartitionSpec(), split),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    over = jax.jit(mapped)(params, data)
    parts = data.reshape(8, 2, 2) if row.shards else jnp.stack([data] * 8)
    pmapped = jax.pmap(call, "data", in_axes=(None, 0))(params, parts)
    for device in (0, 7):
        assert_same(jax.tree.map(lambda x: x[device], over), want, tol=row.tol)
        assert_same(jax.tree.map(lambda x: x[device], pmapped), want, tol=row.tol)


@by_name(ROWS)
def test_sharded_inputs_give_the_same_values(row):
    params = dict_params()
    jitted = jax.jit(row.fn)
    placed = spread(params)
    want = row.fn(KEY, params, batch(), row.number)
    assert_same(jitted(KEY, placed, batch(), row.number), want, tol=row.tol)
    if row.local:
        program = jitted.lower(KEY, placed, batch(), row.number).compile().as_text()
        assert [move for move in MOVES_LEAVES if move in program] == []


@by_name(ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_and_structures_of_every_front_end_survive(row, dtype):
    for params in front_ends(dtype).values():
        out = jax.eval_shape(row.fn, KEY, params, batch(), row.number)
        if row.like_params:
            assert jax.tree.structure(out) == jax.tree.structure(params)
            for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
                assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@by_name([row for row in ROWS if row.keeps])
def test_empty_zero_size_scalar_and_integer_leaves(row):
    row.fn(KEY, {}, batch(), row.number)
    odd = {
        "empty": {"kernel": jnp.zeros((0, 3))},
        "kernel": jnp.arange(6.0).reshape(2, 3),
        "scalar": jnp.array(2.0),
        "steps": jnp.arange(3),
    }
    out = row.fn(KEY, odd, batch(), row.number)
    if row.like_params:
        np.testing.assert_array_equal(out["steps"], odd["steps"])
        assert out["empty"]["kernel"].shape == (0, 3)


@by_name([row for row in ROWS if row.smooth])
def test_gradients_are_finite(row):
    params = {k: v for k, v in dict_params().items() if k != "steps"}
    total = lambda params: sum(
        x.sum() for x in jax.tree.leaves(row.fn(KEY, params, batch(), row.number))
    )
    grads = jax.tree.leaves(jax.grad(total)(params))
    assert all(np.isfinite(g).all() for g in grads) and any((g != 0).any() for g in grads)


# ------------------------------------------------------------------------------------- optimizers


def steps(row, params, number, n=4):
    tx = row.fn(params, number)

    def step(carry, i):
        params, state = carry
        grads = jax.tree.map(lambda w: jnp.cos(w + i) if tree.is_inexact(w) else w, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(n))[0]


def floats(dtype=jnp.float32):
    return {k: v for k, v in dict_params(dtype).items() if k != "steps"}


@by_name(OPTIMIZERS)
def test_optimizers_jit_vmap_and_sweep(row):
    params = floats()
    run, traces = counting(lambda n: steps(row, params, n)[0])
    values = jnp.array([row.number, row.number * 0.9])
    swept = jax.jit(jax.vmap(run))(values)
    for i in range(2):
        assert_same(jax.tree.map(lambda x: x[i], swept), run(values[i]), tol=row.tol)
    assert len(traces) == 1


@by_name(OPTIMIZERS)
def test_optimizers_with_injected_hyperparams(row):
    params = floats()
    tx = optax.inject_hyperparams(lambda number: row.fn(params, number))(number=row.number)
    state = tx.init(params)
    step, traces = counting(lambda state: tx.update(params, state, params))
    first, _ = step(state)
    state.hyperparams["number"] *= 0.5
    second, _ = step(state)
    assert len(traces) == 1
    again = row.fn(params, row.number)
    assert_same(first, again.update(params, again.init(params), params)[0], tol=row.tol)
    half_way = row.fn(params, row.number * 0.5)
    assert_same(second, half_way.update(params, half_way.init(params), params)[0], tol=row.tol)


@by_name(OPTIMIZERS)
def test_optimizers_over_eight_devices(row):
    params = floats()
    want, _ = steps(row, params, row.number)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    got, _ = jax.pmap(lambda params: steps(row, params, row.number))(copies)
    if row.shards:
        assert_same(jax.tree.map(lambda x: x[5], got), want, tol=row.tol)
    run = jax.jit(lambda params: steps(row, params, row.number)[0])
    placed = spread(params)
    out = run(placed)
    if row.shards:
        assert_same(out, want, tol=row.tol)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    program = run.lower(placed).compile().as_text()
    assert not row.local or [move for move in MOVES_LEAVES if move in program] == []


@by_name(OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_optimizers_keep_dtypes_and_structures(row, dtype):
    for name, params in front_ends(dtype).items():
        if name == "dict":
            params = {k: v for k, v in params.items() if k != "steps"}
        params = jax.tree.map(lambda x: x if tree.is_inexact(x) else None, params)
        out, _ = jax.eval_shape(lambda params: steps(row, params, row.number), params)
        assert jax.tree.structure(out) == jax.tree.structure(params)
        for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
            assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@by_name(OPTIMIZERS)
def test_optimizer_states_map_donate_and_checkpoint(row, tmp_path):
    params = floats()
    tx = row.fn(params, row.number)
    params, state = steps(row, params, row.number)
    if row.name.startswith("masks."):
        assert masks.current(state)["out"]["kernel"].dtype == bool

    specs = jax.tree.map(lambda w: f"spec of {w.shape}", params)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda s, spec: spec, state, specs, transform_non_params=lambda s: "other"
    )
    assert "other" in jax.tree.leaves(mapped)
    assert "spec of (16, 8)" in jax.tree.leaves(mapped) or row.name == "optim.langevin"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax warns of what it will change one day
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "state", state)
            saver.wait_until_finished()
            restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_same(restored, state, exact=True)

    step = lambda state: tx.update(params, state, params)
    want = jax.jit(step)(state)
    assert_same(jax.jit(step, donate_argnums=0)(restored), want, tol=row.tol)


@by_name(OPTIMIZERS)
def test_optimizers_take_empty_and_odd_trees(row):
    for params in (
        {},
        {"empty": {"kernel": jnp.zeros((0, 3))}, "kernel": jnp.ones((2, 3)), "s": jnp.array(1.0)},
    ):
        out, _ = steps(row, params, row.number, n=2)
        assert jax.tree.structure(out) == jax.tree.structure(params)
