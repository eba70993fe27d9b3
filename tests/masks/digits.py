"""Digits and a perceptron, for what only shows in training."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZES = (64, 256, 256, 10)


@cache
def data():
    """Return x_train, x_test, y_train, y_test: 1257 and 540 images of 64 pixels in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=0.3, random_state=0, stratify=y)
    x_train, x_test, y_train, y_test = map(jnp.asarray, split)
    return x_train.astype(jnp.float32), x_test.astype(jnp.float32), y_train, y_test


def init(key, sizes=SIZES):
    shapes = list(pairwise(sizes))
    keys = jax.random.split(key, len(shapes))
    he = jax.nn.initializers.he_normal()
    weights = {f"w{i}": he(k, s) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))}
    return weights | {f"bias{i}": jnp.zeros(s[1]) for i, s in enumerate(shapes)}


def logits(params, x):
    depth = len(params) // 2
    for i in range(depth):
        x = x @ params[f"w{i}"] + params[f"bias{i}"]
        x = jax.nn.relu(x) if i < depth - 1 else x
    return x


def accuracy(params, x, y):
    return jnp.mean(logits(params, x).argmax(-1) == y)


def cross_entropy(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def fit(key, tx, params, x, y, steps, batch=64):
    """Train on batches drawn with replacement; return the params and the optimizer state."""

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (batch,), 0, len(x))
        grads = jax.grad(cross_entropy)(params, x[rows], y[rows])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0]
