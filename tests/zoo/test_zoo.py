"""The hand counts of the zoo, proved without `trace`: permute, zero and cut what they name."""

import inspect
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import tree
from tests import zoo
from tests.zoo import model as hand

each = pytest.mark.parametrize("model", zoo.MODELS, ids=lambda m: m.name)


def _jit(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@lru_cache(maxsize=8)
def _run(name):
    (model,) = (m for m in zoo.MODELS if m.name == name)
    apply_fn, params, args = model.build()
    run = _jit(apply_fn)
    return run, params, args, run(params, *args)


def _difference(a, b):
    """The largest difference, relative to the largest output."""
    return float(jnp.abs(a - b).max() / jnp.maximum(1, jnp.abs(a).max()))


def _some(n):
    """A permutation without a fixed point."""
    return np.roll(np.arange(n), 1)


def _size(where):
    return len(next(iter(where.values())))


@each
def test_output_is_finite_and_depends_on_the_input_and_on_every_float_leaf(model):
    run, params, args, out = _run(model.name)
    assert bool(jnp.isfinite(out).all()) and out.size > 1
    other = jax.tree.map(lambda x: jnp.roll(x, 1, axis=-1) if x.ndim else x, args)
    assert _difference(out, run(params, *other)) > 1e-4
    leaves = tree.flatten(params)
    for i, (path, x) in enumerate(leaves.items()):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        noise = 1 + 0.5 * np.random.default_rng(i).random(x.shape).astype(np.float32)
        moved = list({**leaves, path: x * noise}.values())
        moved = jax.tree.unflatten(jax.tree.structure(params), moved)
        assert _difference(out, run(moved, *args)) > 1e-4, path


@each
def test_every_axis_counted_can_be_permuted_and_no_part_of_it_be_spared(model):
    run, params, args, out = _run(model.name)
    groups, leaves = hand.groups(params, model), tree.flatten(params)
    assert sorted(map(_size, model.layout.values())) == list(model.free)
    for axis, where in model.layout.items():
        permutation = _some(_size(where))
        moved = hand.permute(params, groups[axis], where, permutation)
        assert _difference(out, run(moved, *args)) < 1e-5, axis
        for spared in groups[axis]:
            rest = [member for member in groups[axis] if member != spared]
            others = hand.permute(params, rest, where, permutation)
            size = leaves[spared[0]].shape[spared[1]]
            for entry in {0, where[size].shape[1] - 1}:
                but_one = {size: np.delete(where[size], entry, axis=1)}
                moved = hand.permute(others, [spared], but_one, permutation)
                assert _difference(out, run(moved, *args)) > 1e-4, (axis, spared, entry)


@each
def test_no_dimension_outside_the_groups_can_be_permuted_alone(model):
    run, params, args, out = _run(model.name)
    members = {m for group in hand.groups(params, model).values() for m in group}
    for path, x in tree.flatten(params).items():
        for dim, n in enumerate(x.shape):
            if n == 1 or (path, dim) in members:
                continue
            moved = hand.permute(params, [(path, dim)], hand.whole(n), _some(n))
            assert _difference(out, run(moved, *args)) > 1e-4, (path, dim)


@each
def test_a_unit_of_a_removable_axis_can_be_cut_and_of_another_cannot(model):
    run, params, args, _ = _run(model.name)
    groups = hand.groups(params, model)
    built_for = inspect.signature(model.build).parameters
    tried, removable = [], []
    for axis, where in model.layout.items():
        if axis not in built_for:
            continue
        n = _size(where)
        assert built_for[axis].default == n
        smaller, shapes, _ = model.build(**{axis: n - 1})
        removed = hand.cut(params, groups[axis], where, 0)
        assert jax.tree.leaves(jax.tree.map(jnp.shape, removed)) == jax.tree.leaves(
            jax.tree.map(jnp.shape, shapes)
        )
        removed = jax.tree.unflatten(jax.tree.structure(shapes), jax.tree.leaves(removed))
        masked = run(hand.zero(params, groups[axis], where, 0), *args)
        tried.append(n)
        difference = _difference(masked, _jit(smaller)(removed, *args))
        assert difference < 1e-5 or difference > 1e-3
        if difference < 1e-5:
            removable.append(n)
    assert sorted(removable) == [n for n in model.removable if n in tried]


@pytest.mark.parametrize(
    ("name", "groups"),
    [("resnet_batch_norm", zoo.RESNET_GROUPS), ("vgg", zoo.VGG_GROUPS)],
)
def test_groups_written_leaf_by_leaf_are_those_of_the_layout(name, groups):
    (model,) = (m for m in zoo.MODELS if m.name == name)
    found = hand.groups(model.build()[1], model)
    assert {k: sorted(v) for k, v in found.items()} == {k: sorted(v) for k, v in groups.items()}


def test_names_are_unique():
    names = [m.name for m in zoo.MODELS]
    assert len(set(names)) == len(names)
