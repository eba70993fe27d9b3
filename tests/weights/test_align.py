"""Alignment: known permutations are found, and local optima are the published algorithm's."""

from functools import partial
from itertools import pairwise, permutations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from jaxkit import probes, trace, weights

KEY = jax.random.key(0)
SIZES = (64, 40, 30, 10)


def mlp(key, sizes=SIZES):
    keys = jax.random.split(key, 2 * len(sizes))
    return {
        f"l{i}": {
            "kernel": jax.random.normal(keys[2 * i], (m, n)),
            "bias": jax.random.normal(keys[2 * i + 1], (n,)),
        }
        for i, (m, n) in enumerate(pairwise(sizes))
    }


def mlp_axes(layers=3):
    names = [None, *(f"h{i}" for i in range(layers - 1)), None]
    return {
        f"l{i}": {"kernel": (names[i], names[i + 1]), "bias": (names[i + 1],)}
        for i in range(layers)
    }


def predict(params, x):
    for i in range(len(params)):
        x = x if i == 0 else jax.nn.relu(x)
        x = x @ params[f"l{i}"]["kernel"] + params[f"l{i}"]["bias"]
    return x


def shuffled(key, params, axes):
    sizes = {name: axis.size for name, axis in trace.named(trace.resolve(params, axes)).items()}
    keys = jax.random.split(key, len(sizes))
    return {
        name: np.asarray(jax.random.permutation(k, n))
        for k, (name, n) in zip(keys, sizes.items(), strict=True)
    }


def equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("seed", range(10))
def test_a_permuted_copy_is_found(seed):
    a = mlp(jax.random.key(seed))
    moved = trace.permute(a, mlp_axes(), shuffled(jax.random.key(seed + 100), a, mlp_axes()))
    perms = weights.align(a, moved, mlp_axes())
    equal(trace.permute(moved, mlp_axes(), perms), a)


def test_one_hidden_axis_is_matched_to_the_optimum():
    a, b = mlp(KEY, (5, 6, 3)), mlp(jax.random.key(1), (5, 6, 3))
    got = weights.align(a, b, mlp_axes(2))["h0"]
    score = lambda p: (
        np.sum(a["l0"]["kernel"] * b["l0"]["kernel"][:, p])
        + np.sum(a["l0"]["bias"] * b["l0"]["bias"][p])
        + np.sum(a["l1"]["kernel"] * b["l1"]["kernel"][p])
    )
    best = max(permutations(range(6)), key=lambda p: score(np.array(p)))
    assert got.tolist() == list(best)


# A network with residual streams: the axis of each dimension of each leaf, by hand.
SPEC = {
    "stem": (None, None, None, "s0"),
    **{
        f"b{i}/{k}": v
        for i in range(2)
        for k, v in {
            "conv1": (None, None, "s0", f"m{i}"),
            "scale": (f"m{i}",),
            "conv2": (None, None, f"m{i}", "s0"),
        }.items()
    },
    "down": (None, None, "s0", "s1"),
    "mix": (None, None, "s1", "s1"),
    "head": ("s1", None),
}
WIDTH = {None: 3, "s0": 8, "s1": 12, "m0": 6, "m1": 10}


def resnet(seed):
    rng = np.random.default_rng(seed)
    return {
        path: jnp.asarray(rng.normal(size=[WIDTH[a] for a in axes]), jnp.float32)
        for path, axes in SPEC.items()
    }


def published(a, b, spec, order, rounds=100):
    """Algorithm 1 of arXiv:2209.04836 as it stands: every axis anew, in every round."""
    a, b = ({k: np.asarray(x, np.float64) for k, x in t.items()} for t in (a, b))
    perms = {n: np.arange(WIDTH[n]) for n in order}
    for _ in range(rounds):
        progress = False
        for name in order:
            total = np.zeros((WIDTH[name],) * 2)
            for path, axes in spec.items():
                for d, at in enumerate(axes):
                    if at != name:
                        continue
                    w = b[path]
                    for e, other in enumerate(axes):
                        w = w if e == d or other is None else np.take(w, perms[other], e)
                    flat = lambda x, d=d, n=WIDTH[name]: np.moveaxis(x, d, 0).reshape(n, -1)
                    total += flat(a[path]) @ flat(w).T
            new = linear_sum_assignment(total, maximize=True)[1]
            gain = total[range(len(new)), new].sum() - total[range(len(new)), perms[name]].sum()
            if gain > 1e-6:
                perms[name], progress = new, True
        if not progress:
            break
    return perms


@pytest.mark.parametrize("seed", range(5))
def test_permutations_are_those_of_the_published_algorithm(seed):
    """Also of "mix", whose two dimensions are one axis."""
    a, b = resnet(2 * seed), resnet(2 * seed + 1)
    order = list(trace.named(trace.resolve(a, SPEC)))
    equal(weights.align(a, b, SPEC), published(a, b, SPEC, order))


def test_no_axis_alone_can_be_bettered():
    """Of a model with heads: products and blocks of axes."""
    from jaxkit.trace import Concat, Prod

    heads = Prod(("heads", "size"))
    axes = {
        "up": (None, "embed"),
        "qkv": ("embed", Concat((heads, heads, Prod(("heads", "value"))))),
        "out": (Prod(("heads", "value")), "embed"),
        "scale": ("heads", "size", "value"),
    }
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 7), "qkv": (7, 4 * (5 + 5 + 2)), "out": (8, 7), "scale": (4, 5, 2)}
    draw = lambda: {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    a, b = draw(), draw()
    perms = weights.align(a, b, axes)
    dot = lambda p: optax.tree.vdot(a, trace.permute(b, axes, p))
    assert dot(perms) > dot({}) + 1
    best = dot(perms)
    for name, p in perms.items():
        for i in range(len(p)):
            for j in range(i):
                swapped = p.copy()
                swapped[[i, j]] = p[[j, i]]
                assert dot({**perms, name: swapped}) <= best + 1e-4


def test_start_rounds_and_order():
    a = mlp(KEY)
    perms = shuffled(jax.random.key(5), a, mlp_axes())
    moved = trace.permute(a, mlp_axes(), perms)
    back = {name: np.argsort(p) for name, p in perms.items()}
    equal(weights.align(a, moved, mlp_axes(), start=back, rounds=1), back)
    equal(weights.align(a, moved, mlp_axes(), key=jax.random.key(7)), back)
    b = mlp(jax.random.key(1))
    dot = lambda p: optax.tree.vdot(a, trace.permute(b, mlp_axes(), p))
    short, long = (weights.align(a, b, mlp_axes(), rounds=n) for n in (1, 100))
    assert dot(long) >= dot(short) > dot({})


def test_where_leaves_out_what_is_not_compared():
    a, b = mlp(KEY, (5, 6, 3)), mlp(jax.random.key(1), (5, 6, 3))
    far = jax.tree.map(lambda x: x, b) | {"l0": b["l0"] | {"bias": 1e4 * b["l0"]["bias"]}}
    kernels = "**/kernel"
    equal(
        weights.align(a, far, mlp_axes(2), where=kernels),
        weights.align(a, b, mlp_axes(2), where=kernels),
    )
    assert (
        weights.align(a, far, mlp_axes(2))["h0"] != weights.align(a, b, mlp_axes(2))["h0"]
    ).any()


def test_activations_find_a_permuted_copy_whatever_the_scale_of_the_weights():
    a, x = mlp(KEY), jax.random.normal(jax.random.key(2), (200, 64))
    axes, roles = trace.axes(predict, a, x), trace.roles(predict, a, x)
    moved = trace.permute(a, axes, shuffled(jax.random.key(3), a, axes))
    perms = weights.align_activations(predict, a, moved, (x,), axes, roles)
    equal(trace.permute(moved, axes, perms), a)
    h = jax.nn.relu(x @ a["l0"]["kernel"] + a["l0"]["bias"])
    b = mlp(jax.random.key(4))
    g = jax.nn.relu(x @ b["l0"]["kernel"] + b["l0"]["bias"])
    found = weights.align_activations(predict, a, b, (x,), axes, roles)
    first = next(name for name, axis in trace.named(axes).items() if axis.size == 40)
    want = linear_sum_assignment(-np.asarray(h.T @ g, np.float64))[1]
    np.testing.assert_array_equal(found[first], want)


def test_straight_through_betters_the_middle():
    """On a task in which the sum over weights is a poor guide: some inputs are never there."""
    sizes, n = (8, 12, 4), 64
    a, b = mlp(KEY, sizes), mlp(jax.random.key(1), sizes)
    x = jax.random.normal(jax.random.key(2), (n, 8)).at[:, 4:].set(0)
    loss = lambda p, x: jnp.mean(jnp.square(predict(p, x) - predict(a, x)))
    axes = mlp_axes(2)
    found = weights.align_by_gradient(loss, a, b, axes, [x] * 60, optax.adam(0.05))
    middle = lambda p: loss(weights.interpolate(a, trace.permute(b, axes, p), 0.5), x)
    np.testing.assert_allclose(middle(found.permutations), found.loss.min(), rtol=1e-5)
    np.testing.assert_allclose(middle(weights.align(a, b, axes)), found.loss[0], rtol=1e-5)
    assert found.loss.min() < 0.9 * found.loss[0]


def test_a_permuted_copy_has_no_barrier_after_alignment():
    a, x = mlp(KEY), jax.random.normal(jax.random.key(2), (50, 64))
    moved = trace.permute(a, mlp_axes(), shuffled(jax.random.key(3), a, mlp_axes()))
    np.testing.assert_allclose(predict(moved, x), predict(a, x), rtol=1e-4, atol=1e-3)
    error = lambda p: jnp.mean(jnp.square(predict(p, x) - predict(a, x)))
    back = trace.permute(moved, mlp_axes(), weights.align(a, moved, mlp_axes()))
    assert probes.lmc(error, a, moved).lmc < -10
    assert abs(probes.lmc(error, a, back).lmc) < 1e-6


def test_bad_input_is_named():
    a = mlp(KEY, (5, 6, 3))
    align = partial(weights.align, axes=mlp_axes(2))
    with pytest.raises(ValueError, match="second model does not fit params: 'l0/bias' has shape"):
        align(a, mlp(KEY, (5, 7, 3)))
    with pytest.raises(ValueError, match="'l0/bias' of the second model holds NaN"):
        align(a, a | {"l0": a["l0"] | {"bias": a["l0"]["bias"] * jnp.nan}})
    with pytest.raises(ValueError, match="rounds=0"):
        align(a, a, rounds=0)
    with pytest.raises(ValueError, match="no axis is named 'h9'"):
        align(a, a, start={"h9": np.arange(6)})
    with pytest.raises(ValueError, match="has no axis: there is nothing to permute"):
        weights.align(a, a, jax.tree.map(lambda x: (None,) * x.ndim, a))
    with pytest.raises(ValueError, match="no batch"):
        weights.align_by_gradient(predict, a, a, mlp_axes(2), [], optax.sgd(1.0))
