"""The tree initializer: which rule draws which leaf, and where the draws live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxkit import init, tree

KEY = jax.random.key(0)
ones, zeros = jax.nn.initializers.ones, jax.nn.initializers.zeros
normal = jax.nn.initializers.normal(1.0)

PARAMS = {
    "a": {"kernel": jnp.full((3, 4), 7.0), "bias": jnp.full(4, 7.0)},
    "b": {"kernel": jnp.full((4, 2), 7.0, jnp.bfloat16), "bias": jnp.full(2, 7.0)},
    "steps": jnp.arange(3),
    "activation": jax.nn.relu,
}


def test_the_first_rule_that_matches_draws_and_the_rest_is_the_same_object():
    new = init.rules(("a/*", ones), ("**/kernel", zeros))(KEY, PARAMS)
    np.testing.assert_array_equal(new["a"]["kernel"], 1.0)
    np.testing.assert_array_equal(new["a"]["bias"], 1.0)
    np.testing.assert_array_equal(new["b"]["kernel"], 0.0)
    assert new["b"]["kernel"].dtype == jnp.bfloat16
    for same in (lambda p: p["b"]["bias"], lambda p: p["steps"], lambda p: p["activation"]):
        assert same(new) is same(PARAMS)


def test_a_draw_depends_on_the_key_and_the_path_alone():
    new = init.rules((None, normal))(KEY, PARAMS)
    other_tree = {"a": PARAMS["a"], "z": {"kernel": jnp.ones((2, 2))}}
    again = init.rules(("z/*", zeros), ("a/kernel", normal))(KEY, other_tree)
    np.testing.assert_array_equal(new["a"]["kernel"], again["a"]["kernel"])
    key = tree.keys(KEY, PARAMS, "jaxkit.init.rules")["a"]["kernel"]
    np.testing.assert_array_equal(new["a"]["kernel"], normal(key, (3, 4)))


def test_it_serves_flax_initializers_of_abstract_params():
    model = nn.Dense(5)
    abstract = jax.eval_shape(model.init, KEY, jnp.ones((1, 3)))
    new = init.rules(("**/kernel", nn.initializers.orthogonal()), ("**/bias", zeros))(KEY, abstract)
    kernel = new["params"]["kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(3), atol=1e-6)


def test_sharded_params_are_born_sharded():
    """No device ever holds a whole leaf, and the draws are those of one device."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    abstract = {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    draw = init.rules((None, normal))
    born = jax.jit(lambda key: draw(key, abstract), out_shardings={"kernel": sharding})
    params = born(KEY)
    assert {shard.data.shape for shard in params["kernel"].addressable_shards} == {(256, 64)}
    np.testing.assert_array_equal(params["kernel"], draw(KEY, abstract)["kernel"])
    program = born.lower(KEY).compile().as_text()
    assert "256,64]" in program and "512,256]" not in program


def test_bad_input():
    with pytest.raises(ValueError, match="'a/kernel'"):
        init.rules(("**/kernl", ones))(KEY, PARAMS)
    with pytest.raises(TypeError, match=r"jax\.random\.key"):
        init.rules((None, ones))(jax.random.PRNGKey(0), PARAMS)
    wrong = lambda key, shape, dtype: jnp.zeros(shape[::-1], dtype)
    with pytest.raises(ValueError, match=r"rule 0 returned shape \(4, 3\) for 'a/kernel'"):
        init.rules((None, wrong))(KEY, PARAMS)
