"""`trace.axes`: the zoo's hand counts, the rules one by one, what is listed, bad input."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxkit import trace, tree
from jaxkit.trace.names import members
from tests import zoo
from tests.zoo import model as hand


def _groups(params, axes):
    """The (path, dimension) pairs of every axis."""
    out = {}
    for (path, _), entries in zip(
        tree.flatten(params).items(),
        jax.tree.structure(params).flatten_up_to(axes),
        strict=True,
    ):
        for d, entry in enumerate(entries):
            for a in members(entry):
                out.setdefault(a.name, set()).add((path, d))
    return out


# ---------------------------------------------------------------------------------- the zoo


@pytest.mark.parametrize("model", zoo.MODELS, ids=lambda m: m.name)
def test_axes_of_the_zoo_are_those_counted_by_hand(model):
    apply_fn, params, args = model.build()
    axes = trace.axes(apply_fn, params, *args)
    named = trace.named(axes)
    assert tuple(sorted(a.size for a in named.values())) == model.free
    assert tuple(sorted(a.size for a in named.values() if not a.pinned)) == model.removable
    assert trace.unfollowed(apply_fn, params, *args) == ()

    # the same entries move: on numbered leaves, a permutation by hand is one of ours
    count = iter(range(1, 10**6))
    numbered = jax.tree.map(
        lambda x: np.arange(np.size(x)).reshape(np.shape(x)) + 10**4 * next(count), params
    )
    groups = hand.groups(params, model)
    ours = _groups(params, axes)
    for axis, where in model.layout.items():
        size = len(next(iter(where.values())))
        candidates = [n for n in named if ours[n] == set(groups[axis])]
        permutation = np.roll(np.arange(size), 1)
        expected = jax.tree.leaves(hand.permute(numbered, groups[axis], where, permutation))
        same = []
        for name in candidates:
            if named[name].size == size:
                moved = trace.permute(numbered, axes, {name: permutation})
                pairs = zip(expected, jax.tree.leaves(moved), strict=True)
                same.append(all(np.array_equal(x, y) for x, y in pairs))
        assert same.count(True) == 1, axis

    assert trace.check(apply_fn, params, axes, args) <= 1e-5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vgg", zoo.VGG_GROUPS), ("resnet_batch_norm", zoo.RESNET_GROUPS)],
)
def test_vgg_and_resnet_have_the_groups_of_git_re_basin(name, expected):
    model = next(m for m in zoo.MODELS if m.name == name)
    apply_fn, params, args = model.build()
    found = _groups(params, trace.axes(apply_fn, params, *args))
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected.values()))


# --------------------------------------------------------------------------- the rules one by one


def _spell(entry, names):
    if entry is None or isinstance(entry, int):
        return "." if entry is None else str(entry)
    if isinstance(entry, trace.Axis):
        name = names.setdefault(entry.name, "abcdefgh"[len(names)])
        return name + ("!" if entry.pinned else "")
    joint = "*" if isinstance(entry, trace.Prod) else "|"
    return "(" + joint.join(_spell(p, names) for p in entry.parts) + ")"


def _axes(apply_fn, params, *args):
    """Axes in letters: `.` fixed, `!` pinned, `(a*b)` a product, `(a|b)` a concatenation."""
    names = {}
    found = trace.axes(apply_fn, params, *args)
    trace.check(apply_fn, params, found, args)
    entries = jax.tree.structure(params).flatten_up_to(found)
    return " ".join("".join(_spell(e, names) for e in leaf) for leaf in entries)


def _leaves(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def _rope(x):
    angle = jnp.arange(x.shape[0])[:, None] * 0.3 ** jnp.arange(x.shape[1] // 2)
    a, b = jnp.split(x, 2, axis=1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle)], 1)


X = jnp.linspace(-1, 1, 12).reshape(4, 3)


def _even_times_odd(y):
    """Strided slices; ``y[:, ::2]`` is a gather in older JAX."""
    even, odd = (lax.slice(y, (0, start), y.shape, (1, 2)) for start in (0, 1))
    return even * jnp.sin(odd)


RULES = {
    # contraction, element-wise, broadcasting
    "dense": (lambda p, x: jnp.tanh(x @ p[0] + p[1]) @ p[2], [(3, 5), (5,), (5, 2)], ".a a a."),
    "batch": (
        lambda p, x: jnp.einsum("bi,eij,ejk->bk", x, p[0], p[1]),
        [(3, 3, 5), (3, 5, 2)],
        "a.b ab.",
    ),
    "add transposed": (lambda p, x: jnp.sum((p[0] + p[0].T) ** 2), [(5, 5)], "aa"),
    "power": (lambda p, x: jnp.trace(p[0] @ p[0]), [(5, 5)], "aa"),
    "gram": (lambda p, x: jnp.sum((p[0] @ p[0].T) ** 2), [(5, 4)], "ab"),
    "size one": (lambda p, x: x @ p[0] * p[1] @ p[2], [(3, 5), (1,), (5, 1)], ".a . a."),
    "scalar leaf": (lambda p, x: p[0] * jnp.sum(x @ p[1]), [(), (3, 5)], " .a"),
    "gate": (
        lambda p, x: (jax.nn.sigmoid(x @ p[0]) * (x @ p[1])) @ p[2],
        [(3, 5), (3, 5), (5, 2)],
        ".a .a a.",
    ),
    # reductions, and what they pin
    "sum": (lambda p, x: jnp.tanh(x @ p[0]).sum(1), [(3, 5)], ".a"),
    "sum of ones": (lambda p, x: jnp.cos(x @ p[0]).sum(1), [(3, 5)], ".a!"),
    "mean": (lambda p, x: jnp.tanh(x @ p[0]).mean(1), [(3, 5)], ".a!"),
    "mean by weights": (lambda p, x: jnp.sum(x @ p[0] * (1 / 5), axis=1), [(3, 5)], ".a!"),
    "max": (lambda p, x: jnp.max(x @ p[0], axis=1), [(3, 5)], ".a!"),
    "softmax": (lambda p, x: jax.nn.softmax(x @ p[0]) @ p[1], [(3, 5), (5, 2)], ".a! a!."),
    "norm": (
        lambda p, x: (y := x @ p[0]) / jnp.sqrt((y * y).sum(1, keepdims=True) + 1) @ p[1],
        [(3, 5), (5, 2)],
        ".a a.",
    ),
    "divided by zero": (
        lambda p, x: (1 / (x @ p[0] + p[1])) @ p[2],
        [(3, 5), (5,), (5, 2)],
        ".a! a! a!.",
    ),
    "weight norm": (
        lambda p, x: jnp.tanh(x @ (p[0] / jnp.linalg.norm(p[0], axis=0))) @ p[1],
        [(3, 5), (5, 2)],
        ".a! a!.",
    ),
    "sigmoid is consumed by zeros": (
        lambda p, x: jax.nn.sigmoid(x @ p[0]) @ p[1],
        [(3, 5), (5, 2)],
        ".a a.",
    ),
    "argmax": (lambda p, x: jnp.argmax(x @ p[0], 1), [(3, 5)], ".."),
    "cumsum": (lambda p, x: jnp.cumsum(x @ p[0], 1).max(), [(3, 5)], ".."),
    "sort": (lambda p, x: jnp.sort(x @ p[0], 1), [(3, 5)], ".a!"),
    "argsort": (lambda p, x: jnp.argsort(x @ p[0], 1), [(3, 5)], ".."),
    "top_k": (lambda p, x: lax.top_k(x @ p[0], 2)[0], [(3, 5)], ".."),
    # reshapes
    "merge": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p[0]).reshape(4, 10) @ p[1],
        [(3, 2, 5), (10, 2)],
        ".ab (a*b).",
    ),
    "split": (
        lambda p, x: (x @ p[0]).reshape(4, 2, 5).sum(1) @ p[1],
        [(3, 10), (5, 2)],
        ".(a*b) b.",
    ),
    "split twice": (
        lambda p, x: ((y := x @ p[0]).reshape(4, 2, 6).sum(1), y.reshape(4, 4, 3).max(1)),
        [(3, 12)],
        ".(a!*6)",
    ),
    "cut across": (
        lambda p, x: ((y := x @ p[0]).reshape(4, 2, 3).max(2), y.reshape(4, 3, 2).max(2)),
        [(3, 6)],
        "..",
    ),
    "repeat": (
        lambda p, x: jnp.tanh(jnp.repeat(x @ p[0], 2, axis=1) + p[1]) @ p[2],
        [(3, 5), (10,), (10, 2)],
        ".a (a*b) (a*b).",
    ),
    "tile": (
        lambda p, x: jnp.tanh(jnp.tile(x @ p[0], (1, 2)) + p[1]) @ p[2],
        [(3, 5), (10,), (10, 2)],
        ".a (b*a) (b*a).",
    ),
    "stacked and indexed": (
        lambda p, x: jnp.stack([(y := (x @ p[0]).reshape(4, 2, 3))[:, 0].sum(1), y[:, 1].max(1)]),
        [(3, 6)],
        ".(a|b!)",
    ),
    # blocks
    "halves": (
        lambda p, x: jnp.prod(jnp.stack(jnp.split(x @ p[0], 2, axis=1)), 0) @ p[1],
        [(3, 10), (5, 2)],
        ".(a|a) a.",
    ),
    "slices": (
        lambda p, x: (y := x @ p[0])[:, :2].sum(1) + y[:, 2:5].max(1),
        [(3, 7)],
        ".(a|b!|c)",
    ),
    "columns": (
        lambda p, x: _even_times_odd(x @ p[0]) @ p[1],
        [(3, 10), (5, 2)],
        ".(a*2) a.",
    ),
    "concatenate": (
        lambda p, x: jnp.concatenate([x @ p[0], x, x @ p[1]], 1) @ p[2],
        [(3, 4), (3, 5), (12, 2)],
        ".a .b (a|3|b).",
    ),
    "pad": (
        lambda p, x: (jnp.pad(x @ p[0], ((0, 0), (2, 3))) + x @ p[1]) @ p[2],
        [(3, 2), (3, 7), (7, 2)],
        ".a .(b|a|c) (b|a|c).",
    ),
    "update": (
        lambda p, x: (jnp.zeros((4, 5)).at[:, 1:4].set(x @ p[0]) + p[1]).max(1),
        [(3, 3), (5,)],
        ".a! (1|a!|1)",
    ),
    # lookups
    "embedding": (lambda p, x: p[0][jnp.array([0, 2])] @ p[1], [(6, 5), (5, 2)], ".a a."),
    "tied": (lambda p, x: p[0][jnp.array([0, 2])] @ p[0].T, [(6, 5)], ".a"),
    "one of an axis": (lambda p, x: (x @ p[0])[:, 0] * 2, [(3, 5)], ".(1|a)"),
    "by a vector": (
        lambda p, x: jnp.take_along_axis(x @ p[0], jnp.zeros((4, 1), int), 1),
        [(3, 5)],
        "..",
    ),
    # constants
    "uniform": (
        lambda p, x: ((x @ p[0]) * jnp.full((4, 5), 0.3) + np.ones(5)) @ p[1],
        [(3, 5), (5, 2)],
        ".a a.",
    ),
    "zeros of two layers": (
        lambda p, x: (
            jnp.tanh((z := jnp.zeros((4, 5))) + x @ p[0]).sum() + jnp.sin(z + x @ p[1]).sum()
        ),
        [(3, 5), (3, 5)],
        ".a .b",
    ),
    "positions": (lambda p, x: ((x @ p[0]) * jnp.arange(5.0)) @ p[1], [(3, 5), (5, 2)], ".. .."),
    "rope": (lambda p, x: (_rope(x @ p[0]) ** 2).sum(1), [(3, 6)], ".."),
    "block mask": (
        lambda p, x: jnp.where(jnp.arange(6) < 3, jnp.tanh(x @ p[0]), 0.0).sum(1),
        [(3, 6)],
        "..",
    ),
    "identity": (
        lambda p, x: jnp.tanh(x @ p[0] @ (p[1] + jnp.eye(5))) @ p[2],
        [(3, 5), (5, 5), (5, 2)],
        ".a aa a.",
    ),
    "mask of ones": (
        lambda p, x: jnp.where(jnp.arange(5) >= 0, x @ p[0], 0.0) @ p[1],
        [(3, 5), (5, 2)],
        ".a a.",
    ),
    # convolutions
    "convolution": (
        lambda p, x: lax.conv(x.reshape(1, 3, 4, 1), p[0], (1, 1), "SAME").sum((2, 3)) @ p[1],
        [(5, 3, 3, 3), (5, 2)],
        "a... a.",
    ),
    "pointwise": (
        lambda p, x: jnp.einsum(
            "bctw,td->bcd",
            lax.conv(jnp.einsum("bi,to->bito", x, p[0]), p[1], (1, 1), "VALID"),
            p[2],
        ).sum((1, 2)),
        [(5, 2), (7, 3, 1, 1), (5, 2)],
        "ab c... ad",
    ),
    # loops and branches
    "carry": (
        lambda p, x: (
            lax.scan(lambda h, r: (jnp.tanh(h @ p[0] + r @ p[1]), h), jnp.zeros(5), x)[0] @ p[2]
        ),
        [(5, 5), (3, 5), (5, 2)],
        "aa .a a.",
    ),
    "layers of a scan": (
        lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p[0], p[1])[0] @ p[2],
        [(3, 5), (4, 5, 5), (5, 2)],
        ".a .aa a.",
    ),
    "map": (
        lambda p, x: lax.map(lambda w: jnp.tanh(x @ w), p[0]).sum(0).sum(1),
        [(6, 3, 5)],
        "a!.b",
    ),
    "vmap": (
        lambda p, x: jax.vmap(lambda w, v: jnp.tanh(x @ w) @ v)(p[0], p[1]).max(0),
        [(6, 3, 5), (6, 5, 2)],
        "a!.b a!b.",
    ),
    "while": (
        lambda p, x: (
            lax.while_loop(
                lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sin(s[1] @ p[1])), (0, x @ p[0])
            )[1]
            @ p[2]
        ),
        [(3, 5), (5, 5), (5, 2)],
        ".a aa a.",
    ),
    "cond": (
        lambda p, x: lax.cond(x[0, 0] > 0, lambda: x @ p[0], lambda: jnp.cos(x @ p[1])) @ p[2],
        [(3, 5), (3, 5), (5, 2)],
        ".a .a a.",
    ),
    "gradient": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p[0]) @ p[1]))(x),
        [(3, 5), (5, 2)],
        ".a ab",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    apply_fn, shapes, expected = RULES[name]
    assert _axes(apply_fn, _leaves(*shapes), X) == expected


def test_the_tree_fits_params_leaf_by_leaf():
    params = {"w": jnp.ones((3, 5)), "scalar": jnp.ones(()), "steps": jnp.arange(5)}
    axes = trace.axes(lambda p, x: (x @ p["w"] * p["steps"]).sum() * p["scalar"], params, X)
    assert axes == {"w": (None, None), "scalar": (), "steps": (None,)}  # integers never move
    assert jax.tree.map(lambda x, a: x.ndim == len(a), params, axes) == dict.fromkeys(params, True)


def test_shapes_are_enough_and_a_jit_around_is_fine():
    params = _leaves((3, 5), (5, 2))
    fn = lambda p, x: jnp.tanh(x @ p[0]) @ p[1]
    expected = trace.axes(fn, params, X)
    assert trace.axes(fn, jax.eval_shape(lambda: params), jax.eval_shape(lambda: X)) == expected
    inside = []
    jax.jit(lambda p, x: inside.append(trace.axes(fn, p, x)))(params, X)
    assert inside == [expected]


# --------------------------------------------------------------------------------------- names


def test_an_axis_bears_the_name_of_the_kernel_that_produces_it():
    params = {
        "a": {"bias": jnp.ones(6), "kernel": jnp.ones((3, 6))},
        "b": {"kernel": jnp.ones((2, 3, 2))},
    }

    def fn(p, x):
        y = (x @ p["a"]["kernel"] + p["a"]["bias"]).reshape(4, 2, 3)
        return jnp.einsum("bhk,hko->bo", y, p["b"]["kernel"])

    axes = trace.axes(fn, params, X)
    assert list(trace.named(axes)) == ["a/kernel:1.0", "a/kernel:1.1"]
    axes = trace.rename(axes, {"a/kernel:1.0": "heads", "a/kernel:1.1": "size"})
    assert axes["b"]["kernel"] == (trace.Axis("heads", 2), trace.Axis("size", 3), None)
    with pytest.raises(ValueError, match="no axis is named 'head'; the nearest: 'heads'"):
        trace.rename(axes, {"head": "h"})
    with pytest.raises(ValueError, match="axes 'heads' and 'size' would both be 'size'"):
        trace.rename(axes, {"heads": "size"})
    swapped = trace.rename(axes, {"heads": "size", "size": "heads"})
    assert trace.named(swapped)["size"].size == 2


# ------------------------------------------------------------------------- reasons and listings


def test_a_pin_names_the_operation_and_the_line():
    (w,) = _leaves((3, 5))
    axis = trace.axes(lambda w, x: jnp.tanh(x @ w).max(1), w, X)[1]
    (reason,) = axis.pinned
    assert reason.startswith("maximum: reduce_max at ") and "test_axes.py" in reason


def test_a_constant_that_looks_computed_from_the_size_is_noted():
    params = _leaves((3, 6), (3, 6))

    def attend(p, x, scale):
        q, k = x @ p[0], x @ p[1]
        return jnp.einsum("ik,jk->ij", q, k) * scale

    noted = lambda fn: trace.axes(fn, params, X)[0][1].scaled
    for fn in (
        lambda p, x: attend(p, x, 6**-0.5),
        lambda p, x: (y := x @ p[0]) / (jnp.linalg.norm(y, axis=1)[:, None] * 6**-0.5) @ p[1].T,
        lambda p, x: jnp.einsum("ik,jk->ij", x @ p[0] / jnp.sqrt(6), x @ p[1]),
        lambda p, x: jnp.einsum("ik,jk->ij", x @ p[0] * 6**-0.25, x @ p[1] * 6**-0.25),
    ):
        assert len(noted(fn)) == 1 and "a power of its size 6" in noted(fn)[0]
    assert noted(lambda p, x: attend(p, x, 0.3)) == ()
    assert trace.axes(lambda p, x: attend(p, x, 1 / 6), params, X)[0][1].pinned[0][:4] == "mean"


def test_what_cannot_be_followed_is_fixed_and_listed():
    params = dict(zip("uvw", _leaves((3, 5), (5, 5), (5, 2)), strict=True)) | {"z": jnp.ones(4)}

    def fn(p, x):
        y = jax.pure_callback(np.sin, jax.ShapeDtypeStruct((5, 5), jnp.float32), p["v"])
        return x @ p["u"] @ y @ p["w"]

    axes = trace.axes(fn, params, X)
    assert axes == {"u": (None, None), "v": (None, None), "w": (None, None), "z": (None,)}
    first, unread = trace.unfollowed(fn, params, X)
    assert (first.primitive, first.leaves) == ("pure_callback", ("u", "v", "w"))
    assert "test_axes.py" in first.source
    assert (unread.primitive, unread.leaves) == ("unread", ("z",))


def test_a_print_does_not_fix_what_it_prints():
    fn = lambda w, x: jax.debug.print("{}", y := x @ w) or jnp.tanh(y).sum(1)
    assert _axes(fn, *_leaves((3, 5)), X) == ".a"
    assert trace.unfollowed(fn, *_leaves((3, 5)), X) == ()


def test_a_learned_first_state_is_read_and_carried():
    fn = lambda p, x: lax.scan(lambda h, r: (jnp.tanh(h + r @ p[1]), h), p[0], x)[0] @ p[2]
    params = _leaves((5,), (3, 5), (5, 2))
    assert _axes(fn, params, X) == "a .a a."
    assert trace.unfollowed(fn, params, X) == ()


def test_dropout_fixes_what_it_is_laid_on_and_says_so():
    params = _leaves((3, 5), (5, 7), (7, 2))

    def fn(p, x, key):
        y = jnp.tanh(x @ p[0])
        y = jnp.where(jax.random.bernoulli(key, 0.5, y.shape), y, 0.0)
        return jnp.tanh(y @ p[1]) @ p[2]

    axes = trace.axes(fn, params, X, jax.random.key(0))
    assert [[e and e.size for e in leaf] for leaf in axes] == [[None, None], [None, 7], [7, None]]
    (listed,) = trace.unfollowed(fn, params, X, jax.random.key(0))
    assert listed.primitive == "random_bits" and "draw" in listed.why
    assert listed.leaves == ("0", "1")


def test_a_reshape_across_axes_is_listed():
    params = _leaves((3, 6))
    fn = lambda p, x: ((y := x @ p[0]).reshape(4, 2, 3).max(2), y.reshape(4, 3, 2).max(2))
    (listed,) = trace.unfollowed(fn, params, X)
    assert (listed.primitive, listed.leaves) == ("reshape", ("0",))


# ----------------------------------------------------------------------------------- bad input


def test_static_arguments_and_values_are_to_be_closed_over():
    w = jnp.ones((3, 5))
    with pytest.raises(TypeError, match=r"'0' of args is a str.*Close over what is static"):
        trace.axes(lambda w, mode: w, w, "train")
    with pytest.raises(TypeError, match=r"needs the value of an argument.*train=False"):
        trace.axes(lambda w, x, train: w if train else x, w, X, True)
    with pytest.raises(TypeError, match="'w' of params is a str"):
        trace.axes(lambda p, x: x, {"w": "kernel"}, X)
    with pytest.raises(TypeError, match="value of an argument"):
        trace.axes(lambda p, x: p * np.asarray(x).sum(), w, X)


def test_a_missing_rng_is_explained():
    nn = pytest.importorskip("flax.linen")
    model = nn.Dropout(0.5, deterministic=False)
    with pytest.raises(Exception) as error:
        trace.axes(lambda p, x: model.apply({"params": p}, x), {}, X)
    assert "random keys" in "".join(error.value.__notes__)


# --------------------------------------------------------------------------------------- speed


def test_48_layers_unrolled_take_less_than_five_seconds():
    layers, d, h, k, m = 48, 64, 4, 16, 128
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    block = {
        "qkv": shape(d, 3 * h * k),
        "out": shape(h * k, d),
        "up": shape(d, 2 * m),
        "up_bias": shape(2 * m),
        "down": shape(m, d),
        "norms": [shape(d) for _ in range(4)],
    }
    params = {"table": shape(100, d), "blocks": [block] * layers}

    def norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale + bias

    def apply_fn(params, ids):
        x = params["table"][ids]
        for p in params["blocks"]:
            y = norm(x, *p["norms"][:2]) @ p["qkv"]
            q, key, v = (a.reshape(*ids.shape, h, k) for a in jnp.split(y, 3, -1))
            a = jnp.einsum("bthk,bshk->bhts", q, key) / jnp.sqrt(k)
            a = jnp.where(jnp.tril(jnp.ones(a.shape[-2:], bool)), a, -jnp.inf)
            y = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(a), v)
            x = x + y.reshape(*ids.shape, -1) @ p["out"]
            gate, y = jnp.split(norm(x, *p["norms"][2:]) @ p["up"] + p["up_bias"], 2, -1)
            x = x + (jax.nn.silu(gate) * y) @ p["down"]
        return x @ params["table"].T

    start = time.process_time()
    axes = trace.axes(apply_fn, params, jax.ShapeDtypeStruct((2, 16), jnp.int32))
    assert time.process_time() - start < 5
    assert len(trace.named(axes)) == 1 + layers * 4  # embed; heads, q/k size, v size, mlp a layer
