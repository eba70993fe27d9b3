"""Rows of ensembles, of distillation from two versions, and of perplexity."""

import jax.numpy as jnp

from jaxkit import data, losses, nn
from tests.rows.base import MLP, Row, axis_or_none, examples

HIDDEN = {"up": jnp.stack([MLP["up"], MLP["up"][::-1] ** 2])}


def hidden(params, x):
    return jnp.tanh(x @ params["up"])


def joined(key, params, batch, n):
    """The statistics of a training set, and the features of two examples."""
    stack = {"up": n * HIDDEN["up"]}
    stats = nn.concatenated_features(hidden, stack, batch, axis_name=axis_or_none())[1]
    return stats, nn.concatenated_features(hidden, stack, jnp.eye(2), stats=stats)[0]


def layers(batch):
    return {"first": batch, "second": jnp.sin(batch).reshape(len(batch), 1, 2)}


def adapting(key, batch):
    return nn.levi_init(key, layers(batch), batch, 3, width=4)


def versions(batch):
    """The logits of three models for eight tokens of a vocabulary of four, and the labels."""
    student = batch.reshape(8, 4)
    return student, jnp.sin(3 * student), jnp.cos(3 * student), jnp.arange(8) % 4


ROWS = [
    Row(
        "losses.compatibility_loss",
        lambda key, params, batch, n: losses.compatibility_loss(
            n * versions(batch)[0], *versions(batch)[1:], jnp.arange(8) < 6
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "nn.mask_classes",
        lambda key, params, batch, n: nn.mask_classes(n * examples(batch)[0], jnp.arange(8) < 5),
        number=0.5,
        shards=False,
    ),
    Row(
        "nn.max_probability",
        lambda key, params, batch, n: nn.max_probability(batch[:2], n * jnp.cos(batch[:2])),
        number=0.5,
        shards=False,
    ),
    Row("nn.concatenated_features", joined, number=0.5),
    Row("nn.levi_init", lambda key, params, batch, n: adapting(key, batch), random=True),
    Row(
        "nn.levi_apply",
        lambda key, params, batch, n: nn.levi_apply(
            adapting(key, batch[:2]), layers(batch[:2]), n * batch[:2]
        ),
        number=0.5,
        random=True,
        shards=False,
    ),
    Row(
        "nn.levi_loss",
        lambda key, params, batch, n: nn.levi_loss(
            n * batch.reshape(2, 4, 4), jnp.array([0, 1, 2, 3])
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "data.perplexity",
        lambda key, params, batch, n: data.perplexity(
            n * examples(batch)[0], jnp.arange(8) < jnp.array([[8], [3], [1], [0]])
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "data.perplexity_filter",
        lambda key, params, batch, n: data.perplexity_filter(jnp.cos(batch[:, 0]), n),
        number=0.5,
        shards=False,
    ),
]

EXEMPT = {"nn.FeatureStats": "a type"}
