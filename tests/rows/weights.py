"""Rows of weights: merging."""

import jax
import jax.numpy as jnp
import optax

from jaxkit import tree, weights
from tests.rows.base import Row, axis_or_none


def tuned(params):
    """Two models that were tuned from the params, by sines and by cosines."""

    def moved(wave):
        shift = lambda w: wave(jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape)
        add = lambda path, w: (tree.float32(w) + shift(w)).astype(w.dtype)
        return tree.map(add, params, where=tree.every(params))

    return [moved(jnp.sin), moved(jnp.cos)]


def merged(method):
    """Call merge with a method of the number (and of the key)."""
    return lambda key, params, batch, n: weights.merge(params, tuned(params), method(key, n))


def row(name, method, **options):
    return Row(f"weights.{name}", merged(method), like_params=True, **options)


def fishers(params):
    """A positive tree for each of two models."""
    positive = lambda path, w: jnp.square(tree.float32(w)) + 0.1
    return [tree.map(positive, model, where=tree.every(params)) for model in tuned(params)]


def predict(params, x):
    """Logits of three classes that depend on every float leaf."""
    leaves = [x.astype(jnp.float32).sum() for x in jax.tree.leaves(params) if tree.is_inexact(x)]
    total = 0.1 * sum(leaves, jnp.float32(0))
    return jnp.sin(x[:, :1] + jnp.arange(3.0)) * total


def estimate(key, params, batch, n):
    return weights.fisher(predict, params, batch, axis_name=axis_or_none())


def learned(key, params, batch, n):
    loss = lambda p, target: jnp.square(predict(p, target[None])).mean()
    soup = weights.learned_soup(loss, tuned(params), batch[:3], tx=optax.sgd(n))
    return soup.params


def pulled(key, params, batch, n):
    """Take one step of adamr on the float leaves."""
    own = tree.chosen(params, tree.every(params))
    start = tree.chosen(tuned(params)[0], tree.every(params))
    tx = weights.adamr(n, start, strength=0.5)
    return tx.update(own, tx.init(own), own)[0]


ROWS = [
    row("average", lambda key, n: weights.average(jnp.stack([n, 1.0])), number=0.5),
    row("task_arithmetic", lambda key, n: weights.task_arithmetic(n * jnp.ones(2)), number=0.5),
    row("ties", lambda key, n: weights.ties(sparsity=n), number=0.5),
    row("dare", lambda key, n: weights.dare(key, drop_rate=n), number=0.5, random=True),
    row("breadcrumbs", lambda key, n: weights.breadcrumbs(sparsity=n, outliers=0.1), number=0.5),
    row("pcb", lambda key, n: weights.pcb(keep=n), number=0.5, keeps=False),
    row("model_stock", lambda key, n: weights.model_stock()),
    Row(
        "weights.fisher_average",
        lambda key, params, batch, n: weights.merge(
            params, tuned(params), weights.fisher_average(fishers(params), jnp.stack([n, 1.0]))
        ),
        number=0.5,
        like_params=True,
        keeps=False,
    ),
    Row(
        "weights.merge",
        lambda key, params, batch, n: weights.merge(
            params, tuned(params), weights.task_arithmetic(), scale=n
        ),
        number=0.5,
        like_params=True,
        smooth=True,
    ),
    Row(
        "weights.deltas",
        lambda key, params, batch, n: weights.deltas(params, tuned(params)),
    ),
    Row(
        "weights.combine",
        lambda key, params, batch, n: tree.map(
            lambda path, w: weights.combine(jnp.stack([tree.float32(w)] * 2), jnp.stack([n, 1.0])),
            params,
        ),
        number=0.5,
        smooth=True,
    ),
    Row(
        "weights.interpolate",
        lambda key, params, batch, n: weights.interpolate(params, tuned(params)[0], n),
        number=0.5,
        like_params=True,
        smooth=True,
    ),
    Row(
        "weights.running_mean",
        lambda key, params, batch, n: weights.running_mean(params, tuned(params)[0], n),
        number=2.0,
        like_params=True,
        smooth=True,
    ),
    Row("weights.fisher", estimate),
    Row("weights.learned_soup", learned, number=0.5, like_params=True, shards=False),
    Row("weights.adamr", pulled, number=0.1),
    Row(
        "weights.output_change",
        lambda key, params, batch, n: weights.output_change(
            key, predict, params, tuned(params)[0], batch, drop_rate=n, q=0.5
        ),
        number=0.5,
        random=True,
        shards=False,
    ),
    Row(
        "weights.flips",
        lambda key, params, batch, n: weights.flips(
            jnp.arange(4) % 2, jnp.zeros(4), (batch[:4, 0] > n).astype(int)
        ),
        number=0.2,
        shards=False,
        keeps=False,
    ),
]

EXEMPT = {
    "weights.Difference": "a type",
    "weights.Learned": "a type",
    "weights.Rule": "a type",
    "weights.Task": "a type",
    "weights.difference": "host-side: files; tested in weights/test_write.py",
    "weights.merge_files": "host-side: files; tested in weights/test_stream.py",
    "weights.plan": "host-side: files; tested in weights/test_stream.py",
    "weights.writing": "host-side: files; tested in weights/test_write.py",
    "weights.GreedySoup": "a type",
    "weights.LearnedSoup": "a type",
    "weights.Method": "a type",
    "weights.align": "host-side: assignment problems; tested in weights/test_align.py",
    "weights.align_activations": "host-side, as align; tested in weights/test_align.py",
    "weights.align_by_gradient": "host-side, as align; tested in weights/test_align.py",
    "weights.analytic_q": "needs a model with kernels; tested in weights/test_darex.py",
    "weights.greedy_soup": "a host loop; tested in weights/test_soup.py",
    "weights.search_q": "a host loop; tested in weights/test_darex.py",
}
