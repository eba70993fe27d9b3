"""Random masks that lose no unit: flow, the live fan-in through twenty layers, the width rule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks
from jaxkit.masks.connect import _reach

KEY = jax.random.key(0)


def random_mask(shape, density, key=KEY):
    return jax.random.uniform(key, shape) < density


@pytest.mark.parametrize("shape", [(20, 30), (3, 3, 12, 10), (5, 4, 6)])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.3])
def test_every_unit_is_connected_with_at_most_one_entry_for_each_dead_one(shape, density):
    mask = {"kernel": random_mask(shape, density)}
    new = masks.connect(KEY, mask)["kernel"]
    old = mask["kernel"]
    rows, columns = (*range(len(shape) - 2), len(shape) - 1), tuple(range(len(shape) - 1))
    assert new.any(rows).all()
    assert new.any(columns).all()
    assert (new | ~old).all()  # it contains the old mask
    dead = int((~old.any(rows)).sum() + (~old.any(columns)).sum())
    assert int(new.sum() - old.sum()) <= dead
    # columns first: a dead column gets exactly one entry, and rows may add to it
    added = np.asarray(new & ~old)
    alive = np.asarray(old.any(rows)), np.asarray(old.any(columns))
    by_rows = added.any(columns) if len(shape) == 2 else added.any(axis=columns)
    assert by_rows[~alive[1]].all()
    if dead == 0:
        np.testing.assert_array_equal(new, old)


def test_the_entry_is_uniform_over_the_column():
    mask = jnp.zeros((2, 4, 3), bool).at[:, :, 1:].set(True)  # one dead output, no dead input
    draw = jax.jit(jax.vmap(lambda key: masks.connect(key, {"w": mask})["w"][..., 0]))
    counts = np.asarray(draw(jax.random.split(KEY, 4000)).sum(0)).ravel()
    assert counts.sum() == 4000
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 24.3  # the 99.9 % quantile with 7 degrees of freedom


@pytest.mark.parametrize("axis", [1, 2])
def test_a_tie_connects_once(axis):
    """All draws are equal, and one side is alive already."""
    mask = jnp.zeros((2, 4, 4), bool).at[0].set(jnp.arange(4) == 0)
    mask = mask if axis == 1 else mask.transpose(0, 2, 1)
    new = _reach(mask, jnp.full((2, 2, 4, 4), 0.5))
    assert new.any((0, axis)).all() and int(new.sum() - mask.sum()) == 3


def test_axes_and_stacks():
    dead = jnp.zeros((3, 6, 4), bool)
    stacked = masks.connect(KEY, {"w": dead}, batch_axis=[0])["w"]
    assert stacked.any(1).all()
    assert stacked.any(2).all()
    oihw = masks.connect(KEY, {"w": jnp.zeros((6, 4, 3, 3), bool)}, in_axis=1, out_axis=0)["w"]
    assert oihw.any((0, 2, 3)).all()
    assert oihw.any((1, 2, 3)).all()
    assert int(oihw.sum()) <= 10
    whole = {"w": jnp.ones((2, 2), bool), "bias": jnp.zeros(2, bool), "step": jnp.zeros((), bool)}
    for path, m in masks.connect(KEY, whole).items():
        np.testing.assert_array_equal(m, whole[path])
    assert masks.connect(KEY, {}) == {}
    assert masks.connect(KEY, {"w": jnp.zeros((0, 3), bool)})["w"].shape == (0, 3)
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\), without the axes \[-2, -1\]"):
        masks.connect(KEY, {"w": jnp.ones(2, bool)}, where="**")
    with pytest.raises(TypeError, match="typed key"):
        masks.connect(jax.random.PRNGKey(0), whole)


@pytest.fixture(scope="module")
def deep():
    """Twenty layers of width 400 with random masks of density 0.5, biases of zero."""
    params = {f"w{i:02}": jnp.zeros((400, 400)) for i in range(20)}
    draws = random_mask((20, 400, 400), 0.5)
    return params, masks.connect(KEY, dict(zip(params, draws, strict=True)))


def he(key, params):
    init = jax.nn.initializers.he_normal()
    keys = dict(zip(params, jax.random.split(key, len(params)), strict=True))
    return {path: init(keys[path], w.shape) for path, w in params.items()}


def test_the_live_fan_in_holds_the_signal_through_twenty_layers(deep):
    params, mask = deep
    x = jax.random.normal(KEY, (64, 400))

    @jax.jit
    def moment(params):
        h = x
        for w in params.values():
            h, z = jax.nn.relu(h @ w), h @ w
        return jnp.mean(z**2)

    live = masks.reinit(KEY, he, params, mask, live=True)
    scaled, plain = moment(live), moment(masks.apply(he(KEY, params), mask))
    assert 0.25 < float(scaled) / 2 < 4  # 2 in expectation: dense and critical
    assert 2.0**-22 < float(plain / scaled) < 2.0**-18  # d^L = 2^-20 without it
    w, m = live["w05"], mask["w05"]
    fan_in = np.asarray(m.sum(0))
    var = np.asarray((w**2).sum(0)) / fan_in
    assert np.mean(var * fan_in / 2) == pytest.approx(1, abs=0.02)
    # over the leaf it is the 2 / (fan_in p) of the paper
    assert float((w**2).sum() / m.sum()) == pytest.approx(2 / (400 * 0.5), rel=0.02)


def test_masks_stay_inside_their_source():
    params = {"w": jax.random.normal(KEY, (12, 20))}
    source = masks.connect(KEY, {"w": random_mask((12, 20), 0.4)})
    mask = masks.topk(masks.magnitude(params), sparsity=0.8, within=source)

    def step(mask, key):
        grads = {"w": jax.random.normal(key, (12, 20))}
        growth = jax.tree.map(lambda m, g: jnp.where(m, jnp.abs(g), -1), source, grads)
        new = masks.regrow(mask, masks.magnitude(grads), growth, drop_rate=0.7)
        seen = ((new["w"] & ~source["w"]).sum(), (new["w"] != mask["w"]).sum(), new["w"].sum())
        return new, seen

    outside, moved, count = jax.lax.scan(step, mask, jax.random.split(KEY, 30))[1]
    assert (outside == 0).all()
    assert (moved > 0).sum() > 20
    assert (count == 48).all()


def test_the_width_rule():
    for s, delta in ((0.5, 0.1), (0.9, 0.01), (0.99, 0.3)):
        w = masks.er_width(s, delta)
        assert s**w <= delta < s ** (w - 1)
    assert masks.er_width(0.5, 0.25) == 2  # met exactly: 0.5^2
    assert masks.er_width(0.0, 0.1) == 1
    w = masks.er_width(0.8, 0.05, edges=30)
    draws = jax.random.uniform(KEY, (4000, 30, w)) < 0.2
    failed = float((~draws.any(2)).any(1).mean())
    exact = 1 - (1 - 0.8**w) ** 30
    assert failed == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 4000))
    assert exact <= 0.05
    one = float((~draws[:, 0].any(1)).mean())
    p = 0.8**w
    assert abs(one - p) <= 3 * math.sqrt(p * (1 - p) / 4000)
    # wider networks by 1 / log(1 / s)
    ratio = masks.er_width(0.99, 1e-6) / masks.er_width(0.9, 1e-6)
    assert ratio == pytest.approx(math.log(1 / 0.9) / math.log(1 / 0.99), rel=0.02)
    with pytest.raises(ValueError, match="sparsity is 1"):
        masks.er_width(1, 0.1)
    with pytest.raises(ValueError, match="failure=0"):
        masks.er_width(0.5, 0)
