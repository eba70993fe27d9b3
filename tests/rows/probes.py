"""Rows of probes: lines between networks, and pushes."""

import jax
import jax.numpy as jnp

from jaxkit import probes, tree
from tests.rows.base import Row, loss_fn
from tests.rows.weights import tuned

PLACES = jnp.array([0.0, 0.5, 1.0])


def along(key, params, batch, n):
    return probes.along(params, *tuned(jax.tree.map(jnp.zeros_like, params)))


def bump(key, params, batch, n):
    return probes.barrier(batch.reshape(-1))


def line(key, params, batch, n):
    at = lambda t: probes.line(lambda p: loss_fn(p, batch), params, tuned(params)[0], t)
    return at(n * PLACES)


def push(key, params, batch, n):
    std = jax.tree.map(lambda _: 1.0, params)
    return probes.perturb(key, params, n, std=std, where=tree.every(params)).params


ROWS = [
    Row("probes.along", along, smooth=True, keeps=False),
    Row("probes.barrier", bump, shards=False),
    Row("probes.line", line, number=0.5, shards=False, local=False, tol=1e-4),
    Row("probes.perturb", push, number=0.3, random=True, like_params=True, local=False),
]
OPTIMIZERS = []
EXEMPT = {"probes.Along": "a type", "probes.Perturbed": "a type"}
