"""Permute, take, check, and axes trees written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import trace
from jaxkit.trace import Axis, Concat, Prod

PARAMS = {
    "qkv": jnp.arange(2 * 18.0).reshape(2, 18),
    "out": jnp.arange(6 * 2.0).reshape(6, 2),
    "bias": jnp.arange(6.0),
}
BLOCK = Prod((Axis("heads", 2), "size"))
HAND = {"qkv": (None, Concat((BLOCK, BLOCK, BLOCK))), "out": (BLOCK, None), "bias": (BLOCK,)}


def test_resolve_learns_sizes_and_is_idempotent():
    axes = {"a": ("x", Prod(("x", "y"))), "b": (Concat(("y", "z", 2)),)}
    params = {"a": jnp.ones((2, 6)), "b": jnp.ones(9)}
    done = trace.resolve(params, axes)
    assert {n: a.size for n, a in trace.named(done).items()} == {"x": 2, "y": 3, "z": 4}
    assert trace.resolve(params, done) == done


def test_take_by_hand_on_products_and_blocks():
    axes = {
        "qkv": (None, Concat((Prod((Axis("h", 2), 3)), 6, Prod((2, "s"))))),
        "bias": ("b",),
        "out": (None, None),
    }
    taken = trace.take(
        PARAMS, axes, {"h": np.array([1]), "s": np.array([2, 2]), "b": np.array([5, 0])}
    )
    q, k, v = np.split(np.asarray(PARAMS["qkv"]), 3, axis=1)
    v = v.reshape(2, 2, 3)[:, :, [2, 2]].reshape(2, 4)
    np.testing.assert_array_equal(taken["qkv"], np.concatenate([q[:, 3:], k, v], axis=1))
    np.testing.assert_array_equal(taken["bias"], [5, 0])
    assert taken["out"] is PARAMS["out"]


def test_permutations_compose_and_invert():
    rng = np.random.default_rng(0)
    first = {"heads": rng.permutation(2), "size": rng.permutation(3)}
    second = {"heads": rng.permutation(2), "size": rng.permutation(3)}
    twice = trace.permute(trace.permute(PARAMS, HAND, first), HAND, second)
    once = trace.permute(PARAMS, HAND, {k: first[k][second[k]] for k in first})
    back = trace.permute(once, HAND, {k: np.argsort(first[k][second[k]]) for k in first})
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_traced_permutations_equal_concrete_ones_under_jit_and_vmap():
    perms = jnp.stack([jax.random.permutation(jax.random.key(i), 3) for i in range(4)])
    move = lambda p: trace.permute(PARAMS, HAND, {"size": p})
    batched = jax.jit(jax.vmap(move))(perms)
    for i in range(4):
        one = move(np.asarray(perms[i]))
        jax.tree.map(lambda b, o, i=i: np.testing.assert_array_equal(b[i], o), batched, one)


def test_dtypes_and_integer_leaves_survive():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "n": jnp.arange(3), "s": jnp.array(1)}
    axes = {"w": ("x", None), "n": (None,), "s": ()}
    out = trace.take(params, axes, {"x": np.array([0, 1])})
    assert jax.tree.map(lambda x: (x.shape, x.dtype.name), out) == {
        "w": ((2, 3), "bfloat16"),
        "n": ((3,), "int32"),
        "s": ((), "int32"),
    }


def _mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


MLP = {"w": jnp.ones((3, 5)), "b": jnp.zeros(5), "v": jnp.ones((5, 2))}
X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def test_check_accepts_what_is_true_even_written_by_hand():
    axes = {"w": (None, "mlp"), "b": ("mlp",), "v": ("mlp", None)}
    assert trace.check(_mlp, MLP, axes, (X,)) < 1e-6
    assert trace.check(_mlp, MLP, jax.tree.map(lambda x: (None,) * x.ndim, MLP), (X,)) == 0


@pytest.mark.parametrize("forgotten", ["w", "b", "v"])
def test_check_names_the_axis_that_breaks(forgotten):
    # all biases are zero and all weights one: only the jitter shows the error
    axes = {"w": (None, "mlp"), "b": ("mlp",), "v": ("mlp", None)}
    axes[forgotten] = (None,) * MLP[forgotten].ndim
    with pytest.raises(ValueError, match="not an axis of this function: 'mlp' of size 5"):
        trace.check(_mlp, MLP, axes, (X,))


def test_check_names_only_the_axes_that_break():
    axes = {"w": ("input", "mlp"), "b": ("mlp",), "v": ("mlp", None)}
    with pytest.raises(ValueError, match="'input' of size 3") as error:
        trace.check(_mlp, MLP, axes, (X,))
    assert "'mlp'" not in str(error.value)


def test_check_sees_positive_leaves_and_refuses_infinities():
    params = {"w": jnp.ones((3, 5)), "var": jnp.ones(5), "v": jnp.ones((5, 2))}
    fn = lambda p, x: (x @ p["w"] / jnp.sqrt(p["var"])) @ p["v"]
    assert trace.check(fn, params, trace.axes(fn, params, X), (X,)) < 1e-6
    with pytest.raises(ValueError, match="output 0 is not finite"):
        trace.check(lambda p, x: jnp.log(-p["var"]), params, trace.axes(fn, params, X), (X,))


def test_other_keys_draw_other_permutations():
    fn = lambda p, x: x @ p["w"]
    axes = {"w": (None, "out")}
    messages = set()
    for seed in range(3):
        with pytest.raises(ValueError) as error:
            trace.check(fn, {"w": MLP["w"]}, axes, (X,), key=jax.random.key(seed))
        messages.add(str(error.value))
    assert len(messages) > 1


@pytest.mark.parametrize(
    ("axes", "kind", "message"),
    [
        ({"w": (None, "x"), "b": ("x",), "v": ("x",)}, ValueError, r"'v': axes has 1 entries"),
        ({"w": (None, "x"), "b": "x", "v": ("x", None)}, TypeError, "'b': axes has a str"),
        ({"w": (None, "x"), "b": ("x",)}, ValueError, "not the structure of params"),
        (
            {"w": ("x", None), "b": ("x",), "v": (None, None)},
            ValueError,
            r"'w', dimension 0: axis 'x' has size 5, the dimension 3|"
            r"'b', dimension 0: axis 'x' has size 3, the dimension 5",
        ),
        (
            {"w": (None, Axis("x", 4)), "b": ("x",), "v": (None, None)},
            ValueError,
            "'w', dimension 1: axis 'x' has size 4, and elsewhere in the axes tree 5",
        ),
        (
            {"w": (Axis("x", 3), None), "b": (Axis("x", 5),), "v": (None, None)},
            ValueError,
            "axis 'x' has size 3, and elsewhere in the axes tree 5|"
            "axis 'x' has size 5, and elsewhere in the axes tree 3",
        ),
        (
            {"w": (None, Prod(("x", 2))), "b": (None,), "v": (None, None)},
            ValueError,
            "'w', dimension 1: .* does not make up the dimension's size 5",
        ),
        (
            {"w": (None, Prod(("x", "y"))), "b": (None,), "v": (None, None)},
            ValueError,
            "'w', dimension 1: the sizes of the axes in .* do not follow from size 5",
        ),
        ({"w": (None, 5), "b": (None,), "v": (None, 3)}, ValueError, "has size 3, the dimension 2"),
        ({"w": (None, 1.5), "b": (None,), "v": (None, None)}, TypeError, "1.5 in an axes tree"),
    ],
)
def test_a_contradictory_axes_tree_is_explained(axes, kind, message):
    with pytest.raises(kind, match=message):
        trace.permute(MLP, axes, {})


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        ({"head": [0]}, ValueError, "no axis is named 'head'; the nearest: 'heads'"),
        ({"heads": np.array([2])}, ValueError, "axis 'heads' of size 2 has no unit 2"),
        ({"heads": np.array([-1])}, ValueError, "axis 'heads' of size 2 has no unit -1"),
        ({"heads": np.array([True, False])}, TypeError, "integer vector"),
        ({"heads": np.array([[0]])}, TypeError, "integer vector"),
    ],
)
def test_bad_indices_are_explained(indices, kind, message):
    with pytest.raises(kind, match=message):
        trace.take(PARAMS, HAND, indices)


def test_what_is_no_permutation_is_refused():
    with pytest.raises(ValueError, match="axis 'heads': not a permutation"):
        trace.permute(PARAMS, HAND, {"heads": np.array([0, 0])})
    with pytest.raises(ValueError, match=r"axis 'heads' has size 2, and its permutation the shape"):
        trace.permute(PARAMS, HAND, {"heads": np.array([0])})
    with pytest.raises(ValueError, match="no axis is named 'head'"):
        trace.permute(PARAMS, HAND, {"head": np.array([0])})
