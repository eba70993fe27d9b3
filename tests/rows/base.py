"""What a row of the contract is, and the material that rows share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import trace, tree

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
