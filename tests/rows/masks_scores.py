"""Rows of masks: scores, patterns, rescaling and the PQ index."""

import jax
import jax.numpy as jnp

from jaxkit import masks, tree
from tests.rows.base import (
    Row,
    axis_or_none,
    half,
    loss_fn,
)


def network(params, x):
    """A network that any tree has: every leaf is a layer that looks at its own entries."""
    leaves = [leaf for leaf in jax.tree.leaves(params) if tree.is_inexact(leaf)]
    return sum((jnp.sum(jax.nn.relu(leaf * x)) for leaf in leaves), jnp.float32(0)) + 0 * x


def even(params):
    """The chosen leaves, of sizes that blocks of two divide."""
    return jax.tree.map(lambda w: jnp.ndim(w) > 1 and jnp.shape(w)[-2] % 2 == 0, params)


ROWS = [
    Row(
        "masks.movement",
        lambda key, params, batch, n: masks.movement(
            params, jax.tree.map(lambda w: w * n if tree.is_inexact(w) else w, params)
        ),
        number=0.5,
        smooth=True,
    ),
    Row(
        "masks.gumbel",
        lambda key, params, batch, n: masks.gumbel(key, masks.magnitude(params), n),
        number=1.0,
        random=True,
    ),
    Row(
        "masks.tempered",
        lambda key, params, batch, n: masks.tempered(lambda p, x: x * p, n)(
            1.5, (batch, jnp.zeros(16, int))
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.grasp",
        lambda key, params, batch, n: masks.grasp(
            loss_fn, params, batch, where=tree.every(params), axis_name=axis_or_none()
        ),
        tol=1e-4,
    ),
    Row(
        "masks.obd",
        lambda key, params, batch, n: masks.obd(
            loss_fn, params, batch, key=key, samples=2, axis_name=axis_or_none()
        ),
        random=True,
        tol=1e-4,
    ),
    Row(
        "masks.synflow",
        lambda key, params, batch, n: masks.synflow(network, params, jnp.ones(1)),
    ),
    Row(
        "masks.synflow_mask",
        lambda key, params, batch, n: masks.synflow_mask(
            network, params, jnp.ones(1), sparsity=n, rounds=2
        ),
        number=0.5,
    ),
    Row(
        "masks.prune_in_rounds",
        lambda key, params, batch, n: masks.prune_in_rounds(masks.magnitude, params, n, rounds=2),
        number=0.5,
    ),
    Row(
        "masks.bernoulli",
        lambda key, params, batch, n: masks.bernoulli(key, params, n),
        number=0.5,
        random=True,
    ),
    Row(
        "masks.sample",
        lambda key, params, batch, n: masks.sample(key, masks.magnitude(params), sparsity=n),
        number=0.5,
        random=True,
    ),
    Row(
        "masks.threshold",
        lambda key, params, batch, n: masks.threshold(masks.magnitude(params), n),
        number=0.5,
    ),
    Row(
        "masks.blocks",
        lambda key, params, batch, n: masks.blocks(
            masks.magnitude(params), {-2: 2}, sparsity=n, where=even(params)
        ),
        number=0.5,
    ),
    Row(
        "masks.n_of_m",
        lambda key, params, batch, n: masks.n_of_m(
            masks.magnitude(params), n, 2, where=even(params)
        ),
        number=1.0,
    ),
    Row(
        "masks.rescale",
        lambda key, params, batch, n: masks.rescale(params, half(params), sigma_w2=n),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.sketch",
        lambda key, params, batch, n: masks.sketch(
            key, batch.ravel(), jnp.abs(batch.ravel()), draws=5
        ),
        random=True,
        shards=False,
    ),
    Row(
        "masks.pq_index",
        lambda key, params, batch, n: masks.pq_index(params, half(params), p=n),
        number=0.5,
    ),
    Row(
        "masks.sap_fraction",
        lambda key, params, batch, n: masks.sap_fraction(params, half(params), eta=n),
        number=0.5,
    ),
]
