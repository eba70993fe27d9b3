"""Rows of what edits, compares and certifies weights: rewriting, gossip, hashes, selection."""

import jax
import jax.numpy as jnp

from jaxkit import probes, tree, weights
from tests.rows.base import Row, axis_or_none


def waves(*shape):
    """Numbers that fill a shape and depend on nothing."""
    size = 1
    for n in shape:
        size *= n
    return jnp.sin(1 + 0.7 * jnp.arange(size, dtype=jnp.float32)).reshape(shape)


def moment(size):
    return jnp.eye(size) + 0.1 * jnp.ones((size, size))


def rewritten(key, params, batch, n):
    """Give one key another value in every weight."""
    edit = lambda path, w: weights.rewrite(
        w, moment(w.shape[-2]), waves(w.shape[-2]), waves(*w.shape[:-2], w.shape[-1]), ridge=n
    )
    return tree.map(edit, params)


def confined(key, params, batch, n):
    direction = lambda size: waves(size, 1) / jnp.linalg.norm(waves(size))
    project = lambda path, w: weights.confine(w, (n * w).astype(w.dtype), direction(w.shape[-2]))
    return tree.map(project, params)


def related(key, params, batch, n):
    each = lambda path, w: probes.relative(w, waves(3, w.shape[-1]), eps=n)
    return tree.map(each, params)


def mixed(key, params, batch, n):
    """Two models that are one and its half."""
    halved = lambda path, w: jnp.stack([w, (0.5 * w).astype(w.dtype)])
    models = tree.map(halved, tree.chosen(params, tree.every(params)), where="**") if params else {}
    return weights.gossip(models, jnp.stack([jnp.stack([1 - n, n]), jnp.stack([n, 1 - n])]))


def hashed(key, params, batch, n):
    """Hash an image of which no coefficient comes near the median, so that no rounding shows."""
    x, y = jnp.arange(32) / 32, jnp.arange(32)[:, None] / 32
    return weights.phash(n * (jnp.sin(5 * x + 4 * y**2) + jnp.cos(7 * x * y)))


def chosen(key, params, batch, n):
    """Draw multiples of the float leaves, and keep that whose sum is nearest to the number."""

    def sample(key):
        factor = jax.random.normal(key)
        return tree.map(
            lambda path, w: (factor * w).astype(w.dtype), params, where=tree.every(params)
        )

    def loss_fn(params, target):
        floats = tree.chosen(params, tree.every(params)).values()
        return jnp.square(sum((tree.float32(w).sum() for w in floats), 0.0) - target)

    return probes.best_of(key, sample, loss_fn, n, count=4, chunk=2).params


ROWS = [
    Row("weights.rewrite", rewritten, number=0.1, like_params=True, keeps=False, smooth=True),
    Row("weights.confine", confined, number=0.5, like_params=True, smooth=True),
    Row(
        "weights.second_moment",
        lambda key, params, batch, n: weights.second_moment(batch, axis_name=axis_or_none()),
    ),
    Row(
        "weights.edit_directions",
        lambda key, params, batch, n: weights.edit_directions(moment(4), waves(6, 4), ridge=n),
        number=0.1,
    ),
    Row("weights.gossip", mixed, number=0.25, smooth=True),
    Row("weights.majority", lambda key, params, batch, n: weights.majority(n, 5), number=0.7),
    Row(
        "weights.agree",
        lambda key, params, batch, n: weights.agree(waves(3, 8) > 0, waves(8) > 0.5, tolerance=n),
        number=3.0,
    ),
    Row("weights.phash", hashed, number=0.5),
    Row("probes.relative", related, number=1e-6, smooth=True),
    Row(
        "probes.best_of",
        chosen,
        number=3.0,
        random=True,
        like_params=True,
        keeps=False,
    ),
]

EXEMPT = {
    "probes.Best": "a type",
    "probes.Certificate": "a type",
    "probes.certificate": "host-side, in float64; tested in probes/test_certificate.py",
    "weights.SecondMoment": "a type",
    "weights.tree_digest": "host-side: bytes; tested in weights/test_consensus.py",
}
