"""Entries on a way from data to output: hand counts, brute force over ways, nothing lost."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkit import masks, tree
from tests import zoo

KEY = jax.random.key(0)
FAST = ("mlp", "low_rank", "vgg", "squeeze_excite", "grouped_convolution")


def some(params, density, seed=0):
    """A random mask of all leaves with two or more dimensions."""
    rng = np.random.default_rng(seed)
    draw = lambda w: rng.random(w.shape) < density if w.ndim > 1 else np.ones(w.shape, bool)
    return jax.tree.map(lambda w: jnp.asarray(draw(w)), params)


def find(apply_fn, mask, *args, **options):
    params = jax.tree.map(lambda m: jnp.zeros(m.shape), mask)  # values are not looked at
    return masks.effective(apply_fn, params, mask, *args, **options)


# --------------------------------------------------------------------- dense layers, by all paths


def dense(params, x):
    for w in params[:-1]:
        x = jax.nn.relu(x @ w)
    return x @ params[-1]


def by_paths(mask):
    """Walk all paths from the inputs to the outputs and mark the entries they use."""
    found = [np.zeros(m.shape, bool) for m in mask]
    sizes = [mask[0].shape[0], *(m.shape[1] for m in mask)]
    for path in itertools.product(*map(range, sizes)):
        steps = list(itertools.pairwise(path))
        if all(m[step] for m, step in zip(mask, steps, strict=True)):
            for f, step in zip(found, steps, strict=True):
                f[step] = True
    return found


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5])
def test_a_network_against_all_its_paths(density):
    shapes = [(3, 5), (5, 4), (4, 5), (5, 3)]
    params = [jnp.ones(s) for s in shapes]
    run = jax.jit(lambda mask: masks.effective(dense, params, mask, jnp.ones((1, 3))).mask)
    lost = 0
    for seed in range(10):
        mask = some(params, density, seed)
        found = run(mask)
        for f, due in zip(found, by_paths(list(map(np.asarray, mask))), strict=True):
            np.testing.assert_array_equal(f, due)
        lost += sum(int((m & ~f).sum()) for m, f in zip(mask, found, strict=True))
    assert lost > 10


def test_the_network_of_two_units():
    """2-2-1 with the output edge of unit 2 cut: what is left is unit 1's."""
    params = [jnp.ones((2, 2)), jnp.ones((2, 1))]
    mask = [jnp.ones((2, 2), bool), jnp.array([[True], [False]])]
    found = masks.effective(dense, params, mask, jnp.ones((1, 2))).mask
    assert found[0].tolist() == [[True, False], [True, False]]
    assert found[1].tolist() == [[True], [False]]
    counts = masks.report(params, found)
    assert (counts.chosen.kept, counts.chosen.total) == (3, 6)


# -------------------------------------------------- a convolutional network, position by position


def conv(x, w, stride):
    return lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


STRIDES = {"a": 1, "c": 2, "e": 1}
KERNELS = {"a": (3, 3, 1, 3), "c": (3, 3, 3, 3), "e": (3, 3, 3, 2), "head": (2, 3)}


def convnet(params, x):
    for name, stride in STRIDES.items():
        x = jax.nn.relu(conv(x, params[name], stride))
    return x.max((1, 2)) @ params["head"]


def edges(mask, size):
    """Every product of the network: (from node, to node, entry)."""
    out = []
    for layer, (name, stride) in enumerate(STRIDES.items()):
        k, after = mask[name].shape, -(-size // stride)
        before = max((after - 1) * stride + 3 - size, 0) // 2
        for y, x, h, w, i, o in itertools.product(range(after), range(after), *map(range, k)):
            at = (y * stride + h - before, x * stride + w - before)
            if mask[name][h, w, i, o] and all(0 <= p < size for p in at):
                out.append(((layer, *at, i), (layer + 1, y, x, o), (name, (h, w, i, o))))
        size = after
    last = len(STRIDES)
    for y, x in itertools.product(range(size), repeat=2):
        for i, o in zip(*np.nonzero(mask["head"]), strict=True):
            out.append(((last, y, x, int(i)), ("out", int(o)), ("head", (int(i), int(o)))))
    return out


def closure(start, pairs):
    """The nodes that can be reached, by sweeps over all edges."""
    reached, grown = set(start), True
    while grown:
        grown = {b for a, b in pairs if a in reached and b not in reached}
        reached |= grown
    return reached


@pytest.mark.parametrize("size", [1, 4])
def test_a_convolutional_network_against_all_its_products(size):
    params = {name: jnp.ones(shape) for name, shape in KERNELS.items()}
    image = jnp.ones((1, size, size, 1))
    run = jax.jit(lambda mask: masks.effective(convnet, params, mask, image).mask)
    lost = 0
    for seed in range(4):
        mask = jax.tree.map(np.asarray, some(params, 0.12 if size > 1 else 0.5, seed))
        products = edges(mask, size)
        inputs = {(0, y, x, 0) for y in range(size) for x in range(size)}
        forward = closure(inputs, [(a, b) for a, b, _ in products])
        backward = closure({("out", o) for o in range(3)}, [(b, a) for a, b, _ in products])
        due = {name: np.zeros(shape, bool) for name, shape in KERNELS.items()}
        for a, b, (name, entry) in products:
            due[name][entry] |= a in forward and b in backward
        found = run(mask)
        for name in KERNELS:
            np.testing.assert_array_equal(found[name], due[name])
        lost += sum(int((mask[n] & ~due[n]).sum()) for n in KERNELS)
    assert lost > 10


def test_only_the_central_tap_meets_an_image_of_one_pixel():
    params = {"w": jnp.ones((3, 3, 2, 2))}
    found = masks.effective(
        lambda p, x: conv(x, p["w"], 1),
        params,
        {"w": jnp.ones((3, 3, 2, 2), bool)},
        jnp.ones((1, 1, 1, 2)),
    ).mask["w"]
    assert found[1, 1].all()
    assert int(found.sum()) == 4


# -------------------------------------------------------------- streams, attention, gates, biases


def test_a_residual_stream_goes_past_a_dead_branch():
    apply_fn = lambda p, x: (x + jax.nn.relu(x @ p["up"]) @ p["down"]) @ p["head"]
    mask = {"up": jnp.zeros((3, 4), bool), "down": jnp.ones((4, 3), bool)}
    mask["head"] = jnp.ones((3, 2), bool)
    found = find(apply_fn, mask, jnp.ones((1, 3))).mask
    assert not found["down"].any()
    assert found["head"].all()
    mask["up"] = mask["up"].at[0, 1].set(True)
    found = find(apply_fn, mask, jnp.ones((1, 3))).mask
    assert int(found["up"].sum()) == 1
    assert found["down"].any(1).tolist() == [False, True, False, False]


def attend(p, x):
    q, k, v = (x @ p[n] for n in "qkv")
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def test_attention_without_queries_does_without_keys_too():
    full = {n: jnp.ones((4, 4), bool) for n in "qkvo"}
    count = lambda mask: {n: int(m.sum()) for n, m in find(attend, mask, x).mask.items()}
    x = jnp.ones((3, 4))
    assert count(full) == dict.fromkeys("qkvo", 16)
    assert count({**full, "q": ~full["q"]}) == {"q": 0, "k": 0, "v": 16, "o": 16}
    assert count({**full, "v": ~full["v"]}) == dict.fromkeys("qkvo", 0)
    one = {**full, "q": jnp.zeros((4, 4), bool).at[:, 2].set(True)}  # one coordinate of the scores
    assert count(one) == {"q": 4, "k": 4, "v": 16, "o": 16}


def test_an_embedding_may_be_looked_up_at_every_row():
    apply_fn = lambda p, tokens: p["table"][tokens] @ p["w"]
    mask = {"table": jnp.ones((5, 3), bool).at[2].set(False), "w": jnp.ones((3, 2), bool)}
    mask["w"] = mask["w"].at[1].set(False)
    found = find(apply_fn, mask, jnp.array([0, 1]), where="**").mask
    assert found["table"].tolist() == [[r != 2 and c != 1 for c in range(3)] for r in range(5)]
    known = lambda p, x: x * p["table"][jnp.array([0, 4])] @ p["w"]  # positions, say
    found = find(known, mask, jnp.ones((2, 3)), where="**").mask
    assert found["table"].any(1).tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("add", [False, True])
def test_what_is_written_into_a_buffer_leads_on_from_there(add):
    def apply_fn(p, x):
        at = jnp.zeros((2, 5)).at[:, jnp.array([0, 3])]
        both = (at.add if add else at.set)(x @ p["w"])
        return both @ p["v"]

    mask = {"w": jnp.ones((3, 2), bool), "v": jnp.zeros((5, 1), bool).at[2:4].set(True)}
    found = find(apply_fn, mask, jnp.ones((2, 3)))
    assert found.unfollowed == ()
    assert found.mask["w"].tolist() == [[False, True]] * 3
    assert found.mask["v"][:, 0].tolist() == [False, False, False, True, False]


def test_biases_start_ways_if_asked():
    apply_fn = lambda p, x: jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]
    mask = {"up": jnp.ones((2, 3), bool).at[:, 1].set(False), "bias": jnp.ones(3, bool)}
    mask["down"] = jnp.ones((3, 1), bool).at[2].set(False)
    data = find(apply_fn, mask, jnp.ones((1, 2))).mask
    assert data["down"][:, 0].tolist() == [True, False, False]
    assert data["bias"].all()  # not looked at
    both = find(apply_fn, mask, jnp.ones((1, 2)), where="**", constants=True).mask
    assert both["down"][:, 0].tolist() == [True, True, False]
    assert both["bias"].tolist() == [True, True, False]
    gate = lambda p, x: (x @ p["w"]) * p["gain"]
    mask = {"w": jnp.ones((2, 2), bool), "gain": jnp.array([True, False])}
    found = find(gate, mask, jnp.ones((1, 2)), where="**").mask
    assert found["w"].tolist() == [[True, False], [True, False]]
    assert found["gain"].tolist() == [True, False]


def test_a_recurrent_unit_is_reached_over_time():
    """A ring of three units, the input into the first, the output from the last."""

    def apply_fn(p, xs):
        step = lambda h, x: (jnp.tanh(x @ p["in"] + h @ p["ring"]), None)
        return lax.scan(step, jnp.zeros(3), xs)[0] @ p["out"]

    ring = jnp.zeros((3, 3), bool).at[(0, 1, 2), (1, 2, 0)].set(True)
    mask = {"in": jnp.array([[True, False, False]]), "ring": ring}
    mask["out"] = jnp.array([[False], [False], [True]])
    count = lambda steps: int(find(apply_fn, mask, jnp.ones((steps, 1))).mask["ring"].sum())
    assert [count(steps) for steps in (2, 3, 5, 6)] == [0, 2, 2, 3]


@pytest.mark.parametrize(
    "name",
    [m.name if m.name in FAST else pytest.param(m.name, marks=pytest.mark.slow) for m in zoo.PLAIN],
)
def test_what_is_not_found_can_go_without_a_change(name):
    """Bit by bit, in networks of all kinds: what constants feed is looked at too."""
    (model,) = (m for m in zoo.PLAIN if m.name == name)
    apply_fn, params, args = model.build()
    mask = some(params, 0.35)
    found = masks.effective(
        apply_fn, params, mask, *args, where=lambda path, leaf: True, constants=True
    ).mask
    assert all(
        tree.concrete(m) and not (f & ~m).any()
        for f, m in zip(*map(jax.tree.leaves, (found, mask)), strict=True)
    )
    run = jax.jit(apply_fn)
    np.testing.assert_array_equal(
        run(masks.apply(params, found), *args), run(masks.apply(params, mask), *args)
    )


def test_what_is_found_matters():
    """With positive weights no two ways cancel: dropping any entry found moves the output."""
    params = {"up": (4, 6), "mid": (6, 5), "down": (5, 3)}
    params = {n: jax.random.uniform(KEY, s) + 0.5 for n, s in params.items()}
    apply_fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["up"]) @ p["mid"]) @ p["down"]
    mask = some(params, 0.3, 1)
    found = masks.effective(apply_fn, params, mask, jnp.ones((1, 4))).mask
    grads = jax.grad(lambda p: apply_fn(p, jnp.ones((1, 4))).sum())(masks.apply(params, mask))
    for name in params:
        np.testing.assert_array_equal(found[name], mask[name] & (grads[name] > 0))


def test_what_has_no_rule_is_named_and_overcounted():
    apply_fn = lambda p, x: jnp.sort(x @ p["w"]) @ p["v"]
    mask = {"w": jnp.ones((2, 3), bool).at[:, 0].set(False), "v": jnp.zeros((3, 1), bool)}
    mask["v"] = mask["v"].at[0].set(True)
    found = find(apply_fn, mask, jnp.ones(2))
    assert int(found.mask["w"].sum()) == 4
    (note,) = found.unfollowed
    assert note.startswith("`sort` at ")
    assert find(lambda p, x: x @ p["w"], mask, jnp.ones(2)).unfollowed == ()


def test_shapes_do_and_bad_input_does_not():
    shape = jax.ShapeDtypeStruct
    params = {"w": shape((2, 3), jnp.bfloat16), "step": shape((), jnp.int32)}
    mask = {"w": jnp.ones((2, 3), bool), "step": jnp.ones((), bool)}
    apply_fn = lambda p, x: x @ p["w"] * p["step"]
    assert masks.effective(apply_fn, params, mask, shape((1, 2), jnp.bfloat16)).mask["w"].all()
    with pytest.raises(ValueError, match="mask does not fit"):
        masks.effective(apply_fn, params, {"w": mask["w"]}, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="matches no leaf"):
        masks.effective(apply_fn, params, mask, jnp.ones((1, 2)), where="kernel")
    constant = lambda p, x: p["w"] + 0 * p["step"]
    assert not masks.effective(constant, params, mask, jnp.ones(2)).mask["w"].any()
