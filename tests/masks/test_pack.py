"""Packed masks: a round trip, an eighth of the size, through a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxkit import masks

SHAPES = {"a": (5, 7), "b": {"bias": (16,), "scalar": (), "none": (0, 3)}}
PARAMS = jax.tree.map(jnp.ones, SHAPES, is_leaf=lambda s: isinstance(s, tuple))
MASK = jax.tree.map(
    lambda w: jnp.asarray(np.random.default_rng(w.size).random(w.shape) < 0.3), PARAMS
)


def test_round_trip_and_size():
    packed = jax.jit(masks.pack)(MASK)
    assert jax.tree.map(lambda p: p.nbytes, packed) == {
        "a": 5,
        "b": {"bias": 2, "none": 0, "scalar": 1},
    }
    for like in (PARAMS, MASK, jax.eval_shape(lambda: PARAMS)):
        jax.tree.map(np.testing.assert_array_equal, masks.unpack(packed, like), MASK)
    back = jax.jit(masks.unpack)(packed, PARAMS)
    assert back["a"].dtype == bool
    np.testing.assert_array_equal(packed["a"], np.packbits(np.asarray(MASK["a"])))


def test_an_eighth_of_the_bytes():
    mask = {"w": jnp.ones((1000, 800), bool)}
    assert masks.pack(mask)["w"].nbytes * 8 == mask["w"].nbytes


def test_through_a_checkpoint(tmp_path):
    packed = masks.pack(MASK)
    packed["b"].pop("none")  # orbax stores no empty arrays
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "mask", packed)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "mask", packed)
    restored["b"]["none"] = jnp.zeros(0, jnp.uint8)
    jax.tree.map(np.testing.assert_array_equal, masks.unpack(restored, PARAMS), MASK)


def test_bad_input():
    packed = masks.pack(MASK)
    with pytest.raises(
        ValueError, match=r"'a' has \(5,\) bytes, and \(10,\) are due for \(10, 8\)"
    ):
        masks.unpack(packed, {**PARAMS, "a": jnp.ones((10, 8))})
    with pytest.raises(TypeError, match="'a' is bool"):
        masks.unpack({**packed, "a": jnp.ones(5, bool)}, PARAMS)
    with pytest.raises(ValueError, match="packed mask does not fit"):
        masks.unpack({"a": packed["a"]}, PARAMS)
