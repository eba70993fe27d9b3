"""Rows of optim, nn, losses and probes: noise, schedules in time, penalties, measures."""

import jax
import jax.numpy as jnp

from jaxkit import losses, nn, optim, probes
from tests.rows.base import MLP, Row, mlp


def noised(key, params, batch, n):
    tx = optim.gradient_noise(n, key=key)
    return tx.update(params, tx.init(params))[0]


def rank(key, params, batch, n):
    net = lambda p, x: mlp({**MLP, "up": MLP["up"] * jnp.where(jnp.arange(4) < 2, 1, n)}, x) * p
    return probes.gradient_rank(net, jnp.ones(3), batch[:4])


ROWS = [
    # (the state has no leaf that is like one of params, so that it is no row of an optimizer)
    Row("optim.gradient_noise", noised, number=0.1, random=True, like_params=True),
    Row(
        "optim.weight_noise",
        lambda key, params, batch, n: optim.weight_noise(key, 16, small=n),
        number=4.0,
        random=True,
    ),
    Row(
        "optim.gradient_noise_scale",
        lambda key, params, batch, n: optim.gradient_noise_scale(
            batch + n, batch, small_batch=2.0, large_batch=8.0
        ),
        number=1.5,
        shards=False,
    ),
    Row(
        "optim.stretch",
        lambda key, params, batch, n: jax.vmap(optim.stretch(optim.uba(1.0, 10), n))(
            jnp.arange(25)
        ),
        number=2.0,
    ),
    Row(
        "nn.max_w",
        lambda key, params, batch, n: nn.max_w(n * batch),
        number=0.5,
        shards=False,
    ),
    Row(
        "nn.dropout_head",
        lambda key, params, batch, n: nn.dropout_head(jnp.sin(3 * batch), batch[:, 0], rate=n),
        number=0.9,
        shards=False,
        tol=1e-4,
    ),
    Row(
        "losses.target_posterior",
        lambda key, params, batch, n: losses.target_posterior(batch, n * jnp.sin(batch)),
        number=0.5,
        shards=False,
    ),
    Row(
        "losses.z_loss",
        lambda key, params, batch, n: losses.z_loss(batch, scale=n),
        number=0.1,
        shards=False,
    ),
    Row(
        "probes.feature_sparsity",
        lambda key, params, batch, n: probes.feature_sparsity(
            jax.nn.relu(jnp.sin(7 * batch.reshape(8, 4))), correlation=n
        ),
        number=0.5,
        shards=False,
        local=False,
    ),
    Row("probes.gradient_rank", rank, number=0.5, shards=False, local=False),
]

EXEMPT = {
    "optim.NoiseScale": "a type",
    "optim.one_epoch_parameters": "a ratio on the host; tested in optim/test_batch.py",
}
