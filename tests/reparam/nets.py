"""A small network on the digits, and a train loop in one program."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments import data


@functools.cache
def digits():
    """Return (x, y, x_test, y_test), images as rows of 64 numbers of mean 0 and variance 1."""
    d = data.load(train=1257, test=540, seed=0)
    mean, std = d.x.mean(), d.x.std()
    rows = lambda x: jnp.asarray((x.reshape(len(x), -1) - mean) / std)
    return rows(d.x), jnp.asarray(d.y), rows(d.x_test), jnp.asarray(d.y_test)


def mlp(sizes, key, draw=None, *, bias=False):
    draw = draw or jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{i}": {"kernel": draw(k, (a, b), jnp.float32)}
        | ({"bias": jnp.zeros(b)} if bias else {})
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def logits(params, x, act=jax.nn.relu):
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = (act(x) if i else x) @ layer["kernel"] + layer.get("bias", 0.0)
    return x


def cross_entropy(params, batch, act=jax.nn.relu):
    out = logits(params, batch[0], act)
    return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


def accuracy(params, x, y, act=jax.nn.relu):
    return (logits(params, x, act).argmax(1) == y).mean()


def train(loss, theta, tx, steps, key, *, batch=64, after=None):
    """Run `steps` of ``loss(theta, batch)``; ``after(i, theta, extra)`` may change extra.

    With `after`, theta is ``(trained, extra)`` and loss takes ``(trained, extra, batch)``.
    """
    x, y, *_ = digits()
    trained, extra = theta if after else (theta, None)

    def step(carry, i):
        trained, extra, state = carry
        index = jax.random.randint(jax.random.fold_in(key, i), (batch,), 0, len(x))
        rows = (x[index], y[index])
        fn = (lambda t: loss(t, extra, rows)) if after else (lambda t: loss(t, rows))
        updates, state = tx.update(jax.grad(fn)(trained), state, trained)
        trained = optax.apply_updates(trained, updates)
        extra = after(i, trained, extra) if after else None
        return (trained, extra, state), None

    run = lambda: jax.lax.scan(step, (trained, extra, tx.init(trained)), jnp.arange(steps))[0]
    trained, extra, _ = jax.jit(run)()
    return (trained, extra) if after else trained
