"""The hand counts of the zoo, proved without `trace`: permute, zero and cut what they name."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import tree
from tests import zoo
from tests.zoo import model as hand


def _jit(fn):
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", params=zoo.MODELS, ids=lambda m: m.name)
def built(request):
    apply_fn, params, args = request.param.build()
    run = _jit(apply_fn)
    return request.param, run, params, args, run(params, *args)


def _difference(a, b):
    """The largest difference, relative to the largest output."""
    return float(jnp.abs(a - b).max() / jnp.maximum(1, jnp.abs(a).max()))


def _some(n):
    """A permutation without a fixed point."""
    return np.roll(np.arange(n), 1)


def _size(where):
    return len(next(iter(where.values())))


def test_output_is_finite_and_depends_on_the_input_and_on_every_float_leaf(built):
    _, run, params, args, out = built
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


def test_every_axis_counted_can_be_permuted_and_no_part_of_it_be_spared(built):
    model, run, params, args, out = built
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
            entries = where[size].shape[1]
            for entry in {0, entries - 1} if rest or entries > 1 else ():
                but_one = {size: np.delete(where[size], entry, axis=1)}
                moved = hand.permute(others, [spared], but_one, permutation)
                assert _difference(out, run(moved, *args)) > 1e-4, (axis, spared, entry)


def test_no_axis_is_two(built):
    """If some dimensions of an axis could move without the rest, these would be two axes."""
    model, run, params, args, out = built
    rng = np.random.default_rng(0)
    for axis, members in hand.groups(params, model).items():
        where, n = model.layout[axis], len(members)
        subsets = range(1, 2 ** (n - 1))  # of two parts, the one without the last dimension
        if len(subsets) > 31:
            subsets = rng.integers(1, 2 ** (n - 1), 31)
        for bits in subsets:
            some = [member for i, member in enumerate(members) if bits >> i & 1]
            moved = hand.permute(params, some, where, _some(_size(where)))
            assert _difference(out, run(moved, *args)) > 1e-4, (axis, some)


def test_no_dimension_outside_the_groups_can_be_permuted_alone(built):
    model, run, params, args, out = built
    members = {m for group in hand.groups(params, model).values() for m in group}
    for path, x in tree.flatten(params).items():
        for dim, n in enumerate(x.shape):
            if n == 1 or (path, dim) in members:
                continue
            moved = hand.permute(params, [(path, dim)], hand.whole(n), _some(n))
            assert _difference(out, run(moved, *args)) > 1e-4, (path, dim)


def test_a_unit_of_a_removable_axis_can_be_cut_and_of_another_cannot(built):
    model, run, params, args, _ = built
    groups = hand.groups(params, model)
    sizes = inspect.signature(model.build).parameters
    axes = {axis: where for axis, where in model.layout.items() if axis in sizes}
    if model in zoo.LIBRARIES:  # the counts are proved by the plain models: one axis of each kind
        kinds = {_size(where) in model.removable: axis for axis, where in axes.items()}
        axes = {axis: axes[axis] for axis in kinds.values()}
    removable = []
    for axis, where in axes.items():
        n = sizes[axis].default
        assert n == _size(where)
        smaller, due, _ = model.build(**{axis: n - 1})
        removed = jax.tree.leaves(hand.cut(params, groups[axis], where, 0))
        assert [x.shape for x in removed] == [x.shape for x in jax.tree.leaves(due)]
        removed = jax.tree.unflatten(jax.tree.structure(due), removed)
        masked = run(hand.zero(params, groups[axis], where, 0), *args)
        difference = _difference(masked, _jit(smaller)(removed, *args))
        assert difference < 1e-5 or difference > 1e-3, axis
        if difference < 1e-5:
            removable.append(n)
    tried = [_size(where) for where in axes.values()]
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
