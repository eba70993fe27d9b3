"""Leaves cut into blocks of one axis a dimension, and put together again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import trace
from jaxkit.trace import Axis, Concat, Prod
from jaxkit.trace.blocks import unit_rows

HEADS = Prod((Axis("heads", 2), "size"))
PARAMS = {
    "qkv": jnp.arange(2 * 18.0).reshape(2, 18),
    "gates": jnp.arange(2 * 20.0).reshape(20, 2),
    "bias": jnp.arange(6.0),
}
AXES = {
    "qkv": ("embed", Concat((HEADS, HEADS, HEADS))),
    "gates": (Concat((Prod((2, HEADS)), 8)), None),
    "bias": (HEADS,),
}


def test_blocks_are_slices_with_one_axis_a_dimension():
    cut = trace.blocks(PARAMS, AXES)
    q, k, v = np.split(np.asarray(PARAMS["qkv"]), 3, axis=1)
    for name, x in (("qkv[0]", q), ("qkv[1]", k), ("qkv[2]", v)):
        np.testing.assert_array_equal(cut[name].array, x.reshape(2, 2, 3))
        assert cut[name].axes == ("embed", "heads", "size")
    assert cut["gates[0]"].axes == (None, "heads", "size", None)
    np.testing.assert_array_equal(cut["gates[1]"].array, PARAMS["gates"][12:])
    assert cut["bias"].axes == ("heads", "size")


def test_assemble_is_the_inverse_also_with_channels():
    parts = {name: block.array for name, block in trace.blocks(PARAMS, AXES).items()}
    jax.tree.map(np.testing.assert_array_equal, trace.assemble(PARAMS, AXES, parts), PARAMS)
    double = {name: jnp.stack([x, -x], -1) for name, x in parts.items()}
    two = trace.assemble(PARAMS, AXES, double)
    jax.tree.map(lambda y, x: np.testing.assert_array_equal(y, np.stack([x, -x], -1)), two, PARAMS)


def test_permuting_leaves_is_permuting_each_dimension_of_the_blocks():
    rng = np.random.default_rng(0)
    perms = {name: rng.permutation(n) for name, n in (("embed", 2), ("heads", 2), ("size", 3))}
    moved = trace.blocks(trace.permute(PARAMS, AXES, perms), AXES)
    for name, block in trace.blocks(PARAMS, AXES).items():
        x = block.array
        for d, axis in enumerate(block.axes):
            x = x if axis is None else jnp.take(x, perms[axis], d)
        np.testing.assert_array_equal(moved[name].array, x)


def test_rows_hold_what_belongs_to_a_unit():
    entry = trace.resolve(PARAMS, AXES)["qkv"][1]
    found = unit_rows(PARAMS["qkv"], 1, entry)
    assert [name for name, _ in found] == ["heads", "size"] * 3
    want = np.asarray(PARAMS["qkv"]).reshape(2, 3, 2, 3)
    got = np.concatenate([np.sort(x, 1) for name, x in found if name == "size"], 1)
    np.testing.assert_array_equal(
        np.sort(got, 1), np.sort(want.transpose(3, 0, 1, 2).reshape(3, -1), 1)
    )


def test_parts_that_do_not_fit_are_named():
    parts = {name: block.array for name, block in trace.blocks(PARAMS, AXES).items()}
    with pytest.raises(ValueError, match=r"'gates\[1\]' is missing"):
        trace.assemble(PARAMS, AXES, {k: x for k, x in parts.items() if k != "gates[1]"})
    with pytest.raises(ValueError, match="'other' is none of these params"):
        trace.assemble(PARAMS, AXES, {**parts, "other": parts["bias"]})
    with pytest.raises(ValueError, match=r"block 'bias' is \(3, 2\), and \(2, 3\) was due"):
        trace.assemble(PARAMS, AXES, {**parts, "bias": parts["bias"].T})


def test_reads_are_the_activations_of_units_wherever_the_consumer_keeps_them():
    def net(params, x):
        h = jax.nn.relu(jnp.einsum("bi,ihs->bhs", x, params["up"]))
        return jnp.einsum("bhs,hso->bo", h, params["down"])

    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params, x = {"up": draw(4, 2, 3), "down": draw(2, 3, 5)}, draw(7, 4)
    axes, roles = trace.axes(net, params, x), trace.roles(net, params, x)
    h = np.maximum(np.einsum("bi,ihs->bhs", x, params["up"]), 0)
    found = trace.reads(net, params, (x,), axes, roles)
    assert {read.path for read in found} == {"down"}
    for read in found:
        (_, rows), *_ = unit_rows(read.tap.input, read.axis, read.entry)
        d = {"up:1": 1, "up:2": 2}[read.entry.name]
        np.testing.assert_allclose(rows, np.moveaxis(h, d, 0).reshape(len(rows), -1), rtol=1e-5)
    with pytest.raises(ValueError, match="no kernel consumes an axis"):
        trace.reads(net, params, (x,), jax.tree.map(lambda w: (None,) * w.ndim, params), roles)
