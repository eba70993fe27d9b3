"""The contract that every public function of jaxkit keeps.

One table, and the same checks over all of it. A row calls the function through the one signature
``fn(key, params, batch, number)`` and ignores what it does not need; a row of an optimizer returns
the optax transformation instead. A public name that is neither in the table nor in `EXEMPT` (with
its reason) fails `test_every_public_name_is_in_the_table`.
"""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxkit
from jaxkit import data, init, masks, trace, tree

KEY = jax.random.key(0)


class Row(NamedTuple):
    """One public function: how to call it, and which promises it makes.

    `number` is the value of its numeric option, None if it has none; `random` says that it draws;
    `like_params` that the result is a tree like params of the leaves' dtypes; `shards` that the
    result over data split across devices equals that over all data; `local` that on sharded
    leaves it moves no whole leaf; `smooth` that its gradient is finite; `keeps` that extreme trees
    (empty, zero-size, scalar, integer leaves) go through. `tol` is the relative deviation that
    rounding may cause.
    """

    name: str
    fn: Callable[..., Any]
    number: float | None = None
    random: bool = False
    like_params: bool = False
    shards: bool = True
    local: bool = True
    smooth: bool = False
    keeps: bool = True
    tol: float = 2e-5


def loss_fn(params, batch):
    leaves = [x.astype(jnp.float32).sum() for x in jax.tree.leaves(params) if tree.is_inexact(x)]
    return jnp.mean(jnp.sin(batch)) * sum(leaves, jnp.float32(0)) ** 2


def half(params):
    """A mask that any tree has: every other entry."""
    every_other = lambda w: (jnp.arange(np.size(w)) % 2 == 0).reshape(np.shape(w))
    return jax.tree.map(every_other, params)


def every_axis(params):
    """An axes tree that any tree has, written by hand: each dimension an axis of its own."""
    name = lambda path, w: tuple(
        f"{path}:{d}" if n > 1 and tree.is_inexact(w) else None for d, n in enumerate(np.shape(w))
    )
    return jax.tree.map(name, tree.paths(params), params)


def reversed_units(params):
    """The reversal of each axis of `every_axis`."""
    sizes = {name: axis.size for name, axis in trace.named(axes_of(params)).items()}
    return {name: np.arange(n)[::-1] for name, n in sizes.items()}


def axes_of(params):
    return trace.resolve(params, every_axis(params))


def examples(batch):
    """Four examples of eight features, and their labels."""
    return batch.reshape(4, 8), jnp.array([0, 1, 2, 0])


def axis_or_none() -> Any:
    """Return the name of the mapped axis inside pmap and shard_map, None outside."""
    try:
        jax.lax.axis_index("data")
    except NameError:
        return None
    return "data"


def every(params):
    """Choose all leaves."""
    return jax.tree.map(lambda _: True, params)


def draw(initializer):
    """Call an array initializer on every weight."""

    def fn(key, params, batch, n):
        own = tree.keys(key, params, "contract")
        init = initializer(n)
        return tree.map(lambda path, w, k: init(k, w.shape, w.dtype), params, own)

    return fn


def square(batch):
    return batch.reshape(2, 4, 4)


def bounds(batch):
    return batch - 0.5, batch + 0.5


def mlp(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


MLP = {"up": jnp.arange(8.0).reshape(2, 4) - 3, "down": jnp.ones((4, 3))}
ATTENTION = {
    "query": {"kernel": jnp.zeros((8, 2, 4))},
    "key": {"kernel": jnp.zeros((8, 2, 4))},
    "value": {"kernel": jnp.zeros((8, 2, 4))},
    "out": {"kernel": jnp.zeros((2, 4, 8))},
}
STATE_SPACE = {
    "A_log": jnp.zeros((6, 2)),
    "dt": jnp.ones((1, 6)),
    "dt_bias": jnp.zeros(6),
    "x_proj": jnp.zeros((6, 5)),
    "conv": jnp.ones((4, 1, 6)),
}
RESIDUAL = {"block": {"alpha": jnp.ones(()), "kernel": jnp.ones((2, 2))}}
MAMBA = {"a_log": "A_log", "dt": "dt", "dt_bias": "dt_bias", "conv": "conv", "dt_b_c": "x_proj"}

ROWS = [
    Row(
        "tree.map",
        lambda key, params, batch, n: tree.map(lambda path, w: w * n, params),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row(
        "tree.ravel", lambda key, params, batch, n: tree.ravel(params)[0], local=False, smooth=True
    ),
    Row("tree.keys", lambda key, params, batch, n: tree.keys(key, params, "contract"), random=True),
    Row("tree.topk", lambda key, params, batch, n: tree.topk(params, n * 4), number=3.0),
    Row(
        "tree.kth_largest",
        lambda key, params, batch, n: tree.kth_largest(params, n * 4),
        number=3.0,
        keeps=False,
    ),
    Row(
        "tree.quantile",
        lambda key, params, batch, n: tree.quantile(params, n),
        number=0.5,
        keeps=False,
    ),
    Row(
        "trace.permute",
        lambda key, params, batch, n: trace.permute(
            params, every_axis(params), reversed_units(params)
        ),
        like_params=True,
        local=False,
        smooth=True,
    ),
    Row(
        "trace.take",
        lambda key, params, batch, n: trace.take(
            params, every_axis(params), reversed_units(params)
        ),
        like_params=True,
        local=False,
        smooth=True,
    ),
    Row(
        "data.random_labels",
        lambda key, params, batch, n: data.random_labels(key, *examples(batch), classes=9, p=n),
        number=1.0,
        random=True,
        shards=False,
    ),
    Row(
        "data.shuffled_pixels",
        lambda key, params, batch, n: data.shuffled_pixels(key, *examples(batch)),
        random=True,
        shards=False,
    ),
    Row(
        "data.random_pixels",
        lambda key, params, batch, n: data.random_pixels(key, *examples(batch)),
        random=True,
        shards=False,
    ),
    Row(
        "data.gaussian",
        lambda key, params, batch, n: data.gaussian(key, *examples(batch), std=n),
        number=2.0,
        random=True,
        shards=False,
    ),
    Row(
        "init.rules",
        lambda key, params, batch, n: init.rules((None, jax.nn.initializers.normal(n)))(
            key, params
        ),
        number=0.1,
        random=True,
        like_params=True,
    ),
    Row("masks.magnitude", lambda key, params, batch, n: masks.magnitude(params), smooth=True),
    Row("masks.random", lambda key, params, batch, n: masks.random(key, params), random=True),
    Row(
        "masks.snip",
        lambda key, params, batch, n: masks.snip(loss_fn, params, batch, axis_name=axis_or_none()),
    ),
    Row("masks.uniform", lambda key, params, batch, n: masks.uniform(params, n), number=0.5),
    Row("masks.erk", lambda key, params, batch, n: masks.erk(params, n), number=0.5),
    Row(
        "masks.topk",
        lambda key, params, batch, n: masks.topk(params, sparsity=n),
        number=0.5,
    ),
    Row(
        "masks.apply",
        lambda key, params, batch, n: masks.apply(params, half(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.units",
        lambda key, params, batch, n: masks.units(
            params,
            {name: unit % 2 == 0 for name, unit in reversed_units(params).items()},
            every_axis(params),
        ),
    ),
    Row(
        "masks.regrow",
        lambda key, params, batch, n: masks.regrow(
            half(params), params, jax.tree.map(lambda x: -x, params), drop_rate=n
        ),
        number=0.5,
    ),
    Row(
        "masks.update_mask",
        lambda key, params, batch, n: masks.update_mask(
            key, half(params), params, None, sparsity=n, drop_rate=n
        ),
        number=0.75,
        random=True,
    ),
    Row(
        "init.calibrate",
        lambda key, params, batch, n: init.calibrate(
            mlp, MLP, batch, target=n, warn=False, axis_name=axis_or_none()
        ),
        number=1.0,
        tol=1e-4,
    ),
    Row(
        "init.lsuv",
        lambda key, params, batch, n: init.lsuv(
            key, mlp, MLP, batch, target=n, warn=False, axis_name=axis_or_none()
        ),
        number=1.0,
        random=True,
        tol=1e-4,
    ),
    Row(
        "init.signals",
        lambda key, params, batch, n: (
            init.signals(mlp, MLP, batch, axis_name=axis_or_none()).layers
        ),
        tol=1e-4,
    ),
    Row(
        "init.transplant",
        lambda key, params, batch, n: init.transplant(params, params, where=every(params))[0],
        like_params=True,
        keeps=False,  # an empty tree has nothing to load
    ),
    Row(
        "init.sample_prior",
        lambda key, params, batch, n: init.sample_prior(
            key, jax.tree.map(lambda w: n, params), params
        ),
        number=0.5,
        random=True,
        like_params=True,
    ),
    # losses and masks of warm starts
    Row(
        "init.span_mask",
        lambda key, params, batch, n: init.span_mask(key, (2, 12), span=3),
        random=True,
    ),
    Row(
        "init.hide",
        lambda key, params, batch, n: init.hide(square(batch), square(batch)[..., 0] > 1),
        shards=False,
    ),
    Row(
        "init.masked_loss",
        lambda key, params, batch, n: init.masked_loss(
            square(batch), jnp.sin(square(batch)), square(batch)[..., 0] > 1
        ),
        shards=False,
    ),
    Row(
        "init.triplet_loss",
        lambda key, params, batch, n: init.triplet_loss(
            batch, jnp.sin(batch), jnp.cos(batch), 2 * (jnp.arange(16) % 2) - 1, margin=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.contrastive_loss",
        lambda key, params, batch, n: init.contrastive_loss(
            jnp.sin(batch), jnp.cos(batch), temperature=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.count_foreground",
        lambda key, params, batch, n: init.count_foreground(
            (batch - 1).astype(int), axis_name=axis_or_none()
        ),
    ),
    Row("init.class_prior", lambda key, params, batch, n: init.class_prior(n, 10.0), number=2.0),
    Row(
        "init.prior_bias",
        lambda key, params, batch, n: init.prior_bias(n)(key, (3,)),
        number=0.1,
    ),
    Row(
        "init.sampling_free_loss",
        lambda key, params, batch, n: init.sampling_free_loss(batch, (batch > 1).astype(int), n),
        number=4.0,
        shards=False,
    ),
    Row(
        "init.guided_loss",
        lambda key, params, batch, n: init.guided_loss(n**2, n + 1),
        number=2.0,
    ),
    # array initializers
    Row("init.zero", draw(lambda n: init.zero()), like_params=True),
    Row("init.idi", draw(lambda n: init.idi(tau=n)), number=1.0, random=True, like_params=True),
    Row("init.idiz", draw(lambda n: init.idiz(eps=n)), number=1.0, like_params=True),
    Row("init.convaware", draw(lambda n: init.convaware()), random=True, like_params=True),
    Row(
        "init.orthogonal",
        draw(lambda n: init.orthogonal(n)),
        number=1.0,
        random=True,
        like_params=True,
    ),
    Row(
        "init.low_rank",
        draw(lambda n: init.low_rank(0.5, n)),
        number=1.0,
        random=True,
        like_params=True,
        keeps=False,  # a kernel without entries has no rank
    ),
    Row(
        "init.block_sparse",
        draw(lambda n: init.block_sparse(1, n)),
        number=1.0,
        random=True,
        like_params=True,
    ),
    # (the next four are jax.nn.initializers.variance_scaling, which refuses a fan of zero)
    Row(
        "init.vi3nr",
        draw(lambda n: init.vi3nr(jnp.sin)),
        random=True,
        like_params=True,
        keeps=False,
    ),
    Row("init.maxout", draw(lambda n: init.maxout(1)), random=True, like_params=True, keeps=False),
    Row("init.ibp", draw(lambda n: init.ibp()), random=True, like_params=True, keeps=False),
    Row(
        "init.architecture_aware",
        draw(lambda n: init.architecture_aware(2)),
        random=True,
        like_params=True,
        keeps=False,
    ),
    Row(
        "init.last_tap",
        lambda key, params, batch, n: init.last_tap(key, (3, 1, 4)),
    ),
    Row(
        "init.orthonormal_rows",
        lambda key, params, batch, n: init.orthonormal_rows(key, 3, 5),
        random=True,
    ),
    # tree initializers
    Row(
        "init.mimetic_attention",
        lambda key, params, batch, n: init.mimetic_attention(qk=(0.7, n))(key, ATTENTION),
        number=0.7,
        random=True,
        tol=1e-3,  # singular vectors, of gaps that are no larger
    ),
    Row(
        "init.mimetic_ssm",
        lambda key, params, batch, n: init.mimetic_ssm(8, state=2, noise=n, **MAMBA)(
            key, STATE_SPACE
        ),
        number=0.1,
        random=True,
    ),
    Row("init.rezero", lambda key, params, batch, n: init.rezero()(key, RESIDUAL)),
    Row(
        "init.standardized",
        lambda key, params, batch, n: init.standardized(
            init.unit_gains(params, where=None), params, where=None
        ),
        like_params=True,
        smooth=True,
    ),
    Row(
        "init.unit_gains",
        lambda key, params, batch, n: init.unit_gains(params, where=None),
    ),
    # arrays
    Row("init.standardize", lambda key, params, batch, n: init.standardize(batch), shards=False),
    Row(
        "init.signal_moments",
        lambda key, params, batch, n: init.signal_moments(batch),
        shards=False,
    ),
    Row("init.relu_one", lambda key, params, batch, n: init.relu_one(batch - 1), shards=False),
    Row(
        "init.shaped_attention",
        lambda key, params, batch, n: init.shaped_attention(square(batch), identity=n),
        number=1.0,
        shards=False,
    ),
    Row(
        "init.shaped_relu", lambda key, params, batch, n: init.shaped_relu(batch, 16), shards=False
    ),
    Row(
        "init.residual",
        lambda key, params, batch, n: init.residual(jnp.sin, batch, init.Wire(n, n, n)),
        number=0.5,
        shards=False,
    ),
    Row("init.convex_wire", lambda key, params, batch, n: init.convex_wire(3, n), number=0.5),
    Row(
        "init.deepscale_wire", lambda key, params, batch, n: init.deepscale_wire(3, k=n), number=0.5
    ),
    Row("init.nf_wire", lambda key, params, batch, n: init.nf_wire((2, 1), alpha=n), number=0.5),
    Row(
        "init.deepscale",
        lambda key, params, batch, n: init.deepscale(16, 3, dropout=n),
        number=0.5,
    ),
    Row(
        "init.relu_covariance",
        lambda key, params, batch, n: init.relu_covariance(n),
        number=0.5,
    ),
    Row(
        "init.relu_correlation",
        lambda key, params, batch, n: init.relu_correlation(n),
        number=0.5,
    ),
    Row(
        "init.factor_pair",
        lambda key, params, batch, n: jnp.matmul(*init.factor_pair(square(batch)[0], 2)),
        shards=False,
    ),
    Row(
        "init.input_gain",
        lambda key, params, batch, n: init.input_gain(batch, n),
        0.5,
        shards=False,
    ),
    Row(
        "init.affine_bounds",
        lambda key, params, batch, n: init.affine_bounds(*bounds(batch), jnp.eye(2)),
        shards=False,
    ),
    Row(
        "init.ibp_regularizer",
        lambda key, params, batch, n: init.ibp_regularizer(
            bounds(batch), [bounds(batch - 1)], eps_ratio=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.width_fluctuation",
        lambda key, params, batch, n: init.width_fluctuation(batch.reshape(8, 4)),
        shards=False,
    ),
    Row(
        "init.mode_strength",
        lambda key, params, batch, n: init.mode_strength(jnp.arange(4.0), 2.0, n),
        number=0.1,
    ),
    Row(
        "init.linear_modes",
        lambda key, params, batch, n: init.linear_modes(2 * jnp.eye(4), batch.reshape(4, 8)).s,
        shards=False,
    ),
    Row(
        "init.aligned",
        lambda key, params, batch, n: init.aligned(key, batch[:4], 2, u0=n),
        number=0.25,
        random=True,
        shards=False,
    ),
    Row(
        "init.class_fractions",
        lambda key, params, batch, n: init.class_fractions(jnp.sin(7 * batch)),
        shards=False,
    ),
]

OPTIMIZERS = [
    Row("masks.sparse", lambda params, n: masks.sparse(optax.adam(n), half), number=0.1),
    Row("masks.hold", lambda params, n: optax.chain(optax.adam(n), masks.hold(half)), number=0.1),
    Row("masks.gradual", lambda params, n: masks.gradual(optax.adam(0.1), n, end=3, every=1), 0.5),
    Row(
        "masks.rigl",
        lambda params, n: masks.rigl(optax.adam(0.1), half, every=2, drop_rate=n),
        number=0.5,
    ),
]

EXEMPT = {
    "tree.Where": "a type",
    "tree.check_key": "raises or does nothing; tested in test_tree.py",
    "tree.check_like": "raises or does nothing; tested in test_tree.py",
    "tree.flatten": "host-side: paths are strings",
    "tree.is_array": "host-side predicate",
    "tree.is_inexact": "host-side predicate",
    "tree.is_weight": "host-side predicate",
    "tree.paths": "host-side: paths are strings",
    "tree.select": "host-side: a tree of Python bools",
    "data.TwoLayer": "a type",
    "data.evaluate": "host-side, in float64; tested in data/test_interpolate.py",
    "data.two_layer": "host-side, in float64; tested in data/test_interpolate.py",
    "trace.Axis": "a type",
    "trace.Concat": "a type",
    "trace.Op": "a type",
    "trace.Prod": "a type",
    "trace.Role": "a type",
    "trace.Tap": "a type",
    "trace.Unfollowed": "a type",
    "trace.axes": "reads a jaxpr, no values; tested in trace/test_axes.py",
    "trace.check": "raises or returns a float; tested in trace/test_apply.py",
    "trace.named": "host-side: names and sizes",
    "trace.rename": "host-side: names and sizes",
    "trace.replay": "a transform of functions; tested in trace/test_replay.py",
    "trace.resolve": "host-side: names and sizes",
    "trace.roles": "reads a jaxpr, no values; tested in trace/test_roles.py",
    "trace.taps": "a transform of functions; tested in trace/test_taps.py",
    "trace.unfollowed": "reads a jaxpr, no values; tested in trace/test_axes.py",
    "weights.files.Leaf": "a type",
    "weights.files.Stats": "a type",
    "weights.files.leaves": "reads a file",
    "weights.files.stats": "host-side, in float64; tested in weights/test_files.py",
    "init.Activation": "a type",
    "init.Bounds": "a type",
    "init.Advice": "a type",
    "init.Calibration": "a type",
    "init.FunctionalPrior": "a type",
    "init.Signals": "a type",
    "init.Transplanted": "a type",
    "init.advise": "host-side: a verdict in words; its numbers are those of init.signals",
    "init.crop": "a rule for init.transplant",
    "init.functional_prior": "a training loop; tested in init/test_prior.py",
    "init.gaussian_process": "makes a function; tested in init/test_prior.py",
    "init.resize": "a rule for init.transplant",
    "init.Critical": "a type",
    "init.DeepScale": "a type",
    "init.FiniteWidth": "a type",
    "init.Guessing": "a type",
    "init.Initializer": "a type",
    "init.Modes": "a type",
    "init.Moments": "a type",
    "init.Susceptibilities": "a type",
    "init.Trajectory": "a type",
    "init.Wire": "a type",
    "init.TreeInitializer": "a type",
    "masks.Mask": "a type",
    "masks.Report": "a type",
    "masks.Rule": "a type",
    "masks.Shrunk": "a type",
    "masks.SparseState": "a type",
    "masks.current": "reads a state; every optimizer row calls it",
    "masks.shrink": "its shapes depend on values; tested in masks/test_structured.py",
    "masks.report": "host-side: counts for people; tested in test_select.py",
}


THEORY = "theory, on the host in float64; its numbers are constants of a program"
EXEMPT |= {
    f"init.{name}": THEORY
    for name in [
        "balanced_sigma",
        "correlation_map",
        "correlation_rate",
        "criticality",
        "edge_of_chaos",
        "expect",
        "finite_width",
        "fluctuation",
        "gain",
        "guessing_bias",
        "hadamard",
        "in_degrees",
        "learning_rate_scale",
        "learning_time",
        "maxout_range",
        "moments",
        "path_lengths",
        "pool_moment",
        "propagate",
        "shaped_relu_moment",
        "shaped_scale",
        "sincos_2d",
        "susceptibilities",
        "variance_map",
    ]
}


def by_name(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


# --------------------------------------------------------------------------------------- material


def dict_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    return {
        "layer": {"bias": draw(8), "kernel": draw(16, 8)},
        "out": {"kernel": draw(8, 4)},
        "steps": jnp.arange(4),
    }


class Linen(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(4, param_dtype=self.dtype)
        return nn.LayerNorm(param_dtype=self.dtype)(dense(x))


class Nnx(nnx.Module):
    def __init__(self, dtype, rngs):
        self.dense = nnx.Linear(3, 4, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, param_dtype=dtype, rngs=rngs)


def front_ends(dtype):
    key = jax.random.key(1)
    mlp = eqx.nn.MLP(2, 3, 4, 1, key=key, dtype=dtype)
    return {
        "dict": dict_params(dtype),
        "linen": Linen(dtype).init(key, jnp.ones((1, 3))),
        "nnx": nnx.state(Nnx(dtype, nnx.Rngs(0))),
        "equinox": eqx.filter(mlp, eqx.is_array),
    }


def batch(n=16):
    return jnp.linspace(0.0, 3.0, 2 * n).reshape(n, 2)


def raw(x):
    """Turn typed keys into words so that numpy can compare them."""
    is_key = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


def assert_same(got, want, exact=False, tol=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = raw(a), raw(b)
        if exact or a.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=tol, atol=tol / 20)


def mesh():
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def spread(params):
    """Shard every matrix over the whole mesh, and the rest as far as it goes."""
    spec = {2: PartitionSpec("x", "y"), 1: PartitionSpec("y"), 0: PartitionSpec()}
    place = lambda w: jax.device_put(w, NamedSharding(mesh(), spec[jnp.ndim(w)]))
    return jax.tree.map(place, params)


MOVES_LEAVES = ("all-gather", "all-to-all", "collective-permute")


# ----------------------------------------------------------------------------------------- checks


def public_names(module=jaxkit, prefix=""):
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield from public_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_public_name_is_in_the_table():
    table = {row.name for row in [*ROWS, *OPTIMIZERS]}
    names = set(public_names())
    assert names - table - set(EXEMPT) == set(), "give these public names a row in the table"
    assert (table | set(EXEMPT)) - names == set(), "these names are no longer public"
    assert not table & set(EXEMPT)


@by_name(ROWS)
def test_jit_equals_eager_and_a_changed_number_compiles_nothing(row):
    params, number = dict_params(), row.number
    # a function of its own: jit keeps one cache for all who jit the same one
    jitted = jax.jit(lambda *args: row.fn(*args))
    want = row.fn(KEY, params, batch(), number)
    assert_same(jitted(KEY, params, batch(), number), want, tol=row.tol)
    if number is not None:
        other = jitted(KEY, params, batch(), number * 0.9)
        assert jitted._cache_size() == 1
        assert_same(other, row.fn(KEY, params, batch(), number * 0.9), tol=row.tol)


@by_name([row for row in ROWS if row.number is not None or row.random])
def test_vmap_equals_a_loop(row):
    params, number = dict_params(), row.number
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    if number is not None:
        values = jnp.array([number, number * 0.9, number * 0.5])
        swept = jax.jit(jax.vmap(lambda n: row.fn(KEY, params, batch(), n)))(values)
        for i in range(3):
            assert_same(at(swept, i), row.fn(KEY, params, batch(), values[i]), tol=row.tol)
    if row.random:
        keys = jax.random.split(KEY, 2)
        drawn = jax.jit(jax.vmap(lambda k: row.fn(k, params, batch(), number)))(keys)
        for i in range(2):
            assert_same(at(drawn, i), row.fn(keys[i], params, batch(), number), tol=row.tol)


@by_name([row for row in ROWS if row.random])
def test_a_key_gives_its_bits_and_another_key_others(row):
    call = lambda key: [raw(x) for x in jax.tree.leaves(row.fn(key, params, batch(), row.number))]
    params = dict_params()
    one, same, other = call(KEY), call(jax.random.key(0)), call(jax.random.key(1))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert any((a != b).any() for a, b in zip(one, other, strict=True))


@by_name(ROWS)
def test_shard_map_and_pmap_equal_one_device(row):
    params, data = dict_params(), batch()
    call = lambda params, data: jax.tree.map(jnp.asarray, row.fn(KEY, params, data, row.number))
    want = call(params, data)
    line = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = PartitionSpec("data") if row.shards else PartitionSpec()
    inside = lambda params, data: jax.tree.map(lambda x: x[None], call(params, data))
    mapped = jax.shard_map(
        inside,
        mesh=line,
        in_specs=(PartitionSpec(), split),
        out_specs=PartitionSpec("data"),
        check_vma=False,
    )
    over = jax.jit(mapped)(params, data)
    parts = data.reshape(8, 2, 2) if row.shards else jnp.stack([data] * 8)
    pmapped = jax.pmap(call, "data", in_axes=(None, 0))(params, parts)
    for device in (0, 7):
        assert_same(jax.tree.map(lambda x: x[device], over), want, tol=row.tol)
        assert_same(jax.tree.map(lambda x: x[device], pmapped), want, tol=row.tol)


@by_name(ROWS)
def test_sharded_inputs_give_the_same_values(row):
    params = dict_params()
    jitted = jax.jit(row.fn)
    placed = spread(params)
    want = row.fn(KEY, params, batch(), row.number)
    assert_same(jitted(KEY, placed, batch(), row.number), want, tol=row.tol)
    if row.local:
        program = jitted.lower(KEY, placed, batch(), row.number).compile().as_text()
        assert [move for move in MOVES_LEAVES if move in program] == []


@by_name(ROWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_and_structures_of_every_front_end_survive(row, dtype):
    for params in front_ends(dtype).values():
        out = jax.eval_shape(row.fn, KEY, params, batch(), row.number)
        if row.like_params:
            assert jax.tree.structure(out) == jax.tree.structure(params)
            for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
                assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@by_name([row for row in ROWS if row.keeps])
def test_empty_zero_size_scalar_and_integer_leaves(row):
    row.fn(KEY, {}, batch(), row.number)
    odd = {
        "empty": {"kernel": jnp.zeros((0, 3))},
        "kernel": jnp.arange(6.0).reshape(2, 3),
        "scalar": jnp.array(2.0),
        "steps": jnp.arange(3),
    }
    out = row.fn(KEY, odd, batch(), row.number)
    if row.like_params:
        np.testing.assert_array_equal(out["steps"], odd["steps"])
        assert out["empty"]["kernel"].shape == (0, 3)


@by_name([row for row in ROWS if row.smooth])
def test_gradients_are_finite(row):
    params = {k: v for k, v in dict_params().items() if k != "steps"}
    total = lambda params: sum(
        x.sum() for x in jax.tree.leaves(row.fn(KEY, params, batch(), row.number))
    )
    grads = jax.tree.leaves(jax.grad(total)(params))
    assert all(np.isfinite(g).all() for g in grads) and any((g != 0).any() for g in grads)


# ------------------------------------------------------------------------------------- optimizers


def steps(row, params, number, n=4):
    tx = row.fn(params, number)

    def step(carry, i):
        params, state = carry
        grads = jax.tree.map(lambda w: jnp.cos(w + i) if tree.is_inexact(w) else w, params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(n))[0]


def floats(dtype=jnp.float32):
    return {k: v for k, v in dict_params(dtype).items() if k != "steps"}


@by_name(OPTIMIZERS)
def test_optimizers_jit_vmap_and_sweep(row):
    params = floats()
    run = jax.jit(lambda n: steps(row, params, n)[0])
    values = jnp.array([row.number, row.number * 0.9])
    swept = jax.jit(jax.vmap(run))(values)
    for i in range(2):
        assert_same(jax.tree.map(lambda x: x[i], swept), run(values[i]))
    assert run._cache_size() == 1


@by_name(OPTIMIZERS)
def test_optimizers_with_injected_hyperparams(row):
    params = floats()
    tx = optax.inject_hyperparams(lambda number: row.fn(params, number))(number=row.number)
    state = tx.init(params)
    step = jax.jit(lambda state: tx.update(params, state, params))
    first, _ = step(state)
    state.hyperparams["number"] *= 0.5
    second, _ = step(state)
    assert step._cache_size() == 1
    again = row.fn(params, row.number)
    assert_same(first, again.update(params, again.init(params), params)[0])
    half_way = row.fn(params, row.number * 0.5)
    assert_same(second, half_way.update(params, half_way.init(params), params)[0])


@by_name(OPTIMIZERS)
def test_optimizers_over_eight_devices(row):
    params = floats()
    want, _ = steps(row, params, row.number)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
    got, _ = jax.pmap(lambda params: steps(row, params, row.number))(copies)
    assert_same(jax.tree.map(lambda x: x[5], got), want)
    run = jax.jit(lambda params: steps(row, params, row.number)[0])
    placed = spread(params)
    out = run(placed)
    assert_same(out, want)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(placed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    program = run.lower(placed).compile().as_text()
    assert [move for move in MOVES_LEAVES if move in program] == []


@by_name(OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_optimizers_keep_dtypes_and_structures(row, dtype):
    for name, params in front_ends(dtype).items():
        if name == "dict":
            params = {k: v for k, v in params.items() if k != "steps"}
        params = jax.tree.map(lambda x: x if tree.is_inexact(x) else None, params)
        out, _ = jax.eval_shape(lambda params: steps(row, params, row.number), params)
        assert jax.tree.structure(out) == jax.tree.structure(params)
        for got, leaf in zip(jax.tree.leaves(out), jax.tree.leaves(params), strict=True):
            assert (got.shape, got.dtype) == (leaf.shape, leaf.dtype)


@by_name(OPTIMIZERS)
def test_optimizer_states_map_donate_and_checkpoint(row, tmp_path):
    params = floats()
    tx = row.fn(params, row.number)
    params, state = steps(row, params, row.number)
    assert masks.current(state)["out"]["kernel"].dtype == bool

    specs = jax.tree.map(lambda w: f"spec of {w.shape}", params)
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda s, spec: spec, state, specs, transform_non_params=lambda s: "other"
    )
    assert "spec of (16, 8)" in jax.tree.leaves(mapped) and "other" in jax.tree.leaves(mapped)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # orbax warns of what it will change one day
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "state", state)
            saver.wait_until_finished()
            restored = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_same(restored, state, exact=True)

    step = lambda state: tx.update(params, state, params)
    want = jax.jit(step)(state)
    assert_same(jax.jit(step, donate_argnums=0)(restored), want)


@by_name(OPTIMIZERS)
def test_optimizers_take_empty_and_odd_trees(row):
    for params in (
        {},
        {"empty": {"kernel": jnp.zeros((0, 3))}, "kernel": jnp.ones((2, 3)), "s": jnp.array(1.0)},
    ):
        out, _ = steps(row, params, row.number, n=2)
        assert jax.tree.structure(out) == jax.tree.structure(params)
