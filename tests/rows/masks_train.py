"""Rows of masks: sparse, dynamic and partial training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxkit import masks, probes, reparam, tree
from tests.rows.base import KEY, Row, half

negative = lambda params: jax.tree.map(lambda x: -x, params)
none = lambda params: jax.tree.map(lambda x: jnp.zeros_like(x, bool), params)


def known_half(params):
    """`half`, known under jit too."""
    alternate = lambda w: (np.arange(np.size(w)) % 2 == 0).reshape(np.shape(w))
    return jax.tree.map(alternate, params)


def two(params):
    """A category of two matrices: the first two float leaves."""
    first = list(tree.chosen(params, tree.every(params)))[:2]
    return {"both": [lambda path, w, own=own: path == own for own in first]}


def first_entries(params):
    """A patch that adds 1 to the first entry of every weight."""
    leaves = {path: w for path, w in tree.chosen(params).items() if w.size}
    base = masks.fingerprint(params) if tree.concrete(params) else np.zeros(32, np.uint8)
    one = lambda w: masks.Entries(jnp.zeros((1, w.ndim), jnp.int32), jnp.ones(1))
    return masks.Patch(base, {path: one(w) for path, w in leaves.items()}, {})


def one_step(tx, params):
    grads = jax.tree.map(lambda w: w if tree.is_inexact(w) else jnp.zeros_like(w), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def task(params):
    return masks.Task(half(params), tree.chosen(negative(params)))


def trained(make):
    """Call a reparametrization at its start."""

    def fn(key, params, batch, n):
        r = make(params, n)
        return r.apply(r.init(key, params), params)

    return fn


ROWS = [
    Row(
        "masks.grow",
        lambda key, params, batch, n: masks.grow(
            masks.prune(half(params), masks.magnitude(params), n), negative(params), half(params)
        ),
        number=0.5,
    ),
    Row("masks.small", lambda key, params, batch, n: masks.small(params, n), number=0.5),
    Row(
        "masks.sara_penalty",
        lambda key, params, batch, n: masks.sara_penalty(
            key, params, half(params), min_size=1, min_count=1
        ),
        smooth=True,
        local=False,
        keeps=False,
    ),
    Row(
        "masks.most_moved",
        lambda key, params, batch, n: masks.most_moved(params, negative(params), sparsity=n),
        number=0.5,
    ),
    Row(
        "masks.lt_sft",
        lambda key, params, batch, n: masks.lt_sft(
            params, negative(params), 3, selected=none(params), dense="**/bias"
        ),
        keeps=False,
    ),
    Row(
        "masks.lt_sft_penalty",
        lambda key, params, batch, n: masks.lt_sft_penalty(params, negative(params)),
        smooth=True,
        local=False,
        keeps=False,
    ),
    Row(
        "masks.hft",
        lambda key, params, batch, n: masks.hft(key, params, two(params)),
        keeps=False,
    ),
    Row(
        "masks.graft",
        lambda key, params, batch, n: masks.graft(params, negative(params), half(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.overlap",
        lambda key, params, batch, n: masks.overlap(
            half(params), masks.topk(masks.magnitude(params), sparsity=n)
        ),
        number=0.5,
    ),
    Row("masks.compose", lambda key, p, batch, n: masks.compose(p, first_entries(p)), local=False),
    Row("masks.revert", lambda key, p, batch, n: masks.revert(p, first_entries(p)), local=False),
    Row(
        "masks.switch",
        lambda key, params, batch, n: masks.switch(
            jnp.stack([jnp.asarray(n) > 0.3]), params, [tree.every(params)]
        ),
        number=0.5,
    ),
    Row(
        "masks.memcontrol",
        lambda key, params, batch, n: masks.memcontrol(
            optax.sgd(n), params, [tree.every(params)], one_step, lambda tuned: tuned
        )(jnp.array([True])),
        number=0.5,
        like_params=True,
    ),
    Row(
        "masks.memorization",
        lambda key, params, batch, n: masks.memorization(batch, jnp.zeros_like(batch)),
        shards=False,
    ),
    Row(
        "masks.remember",
        lambda key, params, batch, n: masks.remember(
            params, none(params), negative(params), half(params), own=lambda path, w: w.ndim < 2
        )[:2],
        keeps=False,
    ),
    Row(
        "masks.recall",
        lambda key, params, batch, n: masks.recall(params, task(params)),
        like_params=True,
        smooth=True,
    ),
    Row(
        "masks.transfer",
        lambda key, params, batch, n: masks.transfer(batch[:2]),
        shards=False,
    ),
    Row(
        "probes.ece",
        lambda key, params, batch, n: probes.ece(jax.nn.softmax(batch), jnp.zeros(len(batch), int)),
        shards=False,
    ),
    Row(
        "reparam.compact",
        trained(lambda params, n: reparam.compact(known_half(params))),
        like_params=True,
        smooth=True,
        local=False,
    ),
    Row(
        "reparam.grafting",
        trained(lambda params, n: reparam.grafting(negative(params), half(params))),
        random=True,
        like_params=True,
        smooth=True,
    ),
    Row(
        "reparam.hardened",
        lambda key, params, batch, n: reparam.hardened(
            {path: 20 * w for path, w in tree.chosen(params).items()}, half(params)
        ),
    ),
    Row(
        "reparam.soft_threshold",
        trained(lambda params, n: reparam.soft_threshold(initial=n)),
        number=-2.0,
        like_params=True,
        smooth=True,
    ),
]

OPTIMIZERS = [
    Row("masks.constrain", lambda params, n: masks.constrain(optax.adam(n), half), number=0.1),
    Row("masks.sara", lambda params, n: masks.sara(optax.adam(n), 0.5, reselect=2), number=0.1),
    Row(
        "masks.set",
        lambda params, n: masks.set(optax.adam(0.1), half, key=KEY, every=2, drop_rate=n),
        number=0.5,
    ),
    Row(
        "masks.granet",
        lambda params, n: masks.granet(
            optax.adam(0.1), n, end=2, steps=4, every=1, initial_sparsity=0.25,
            mask=lambda p: masks.topk(masks.magnitude(p), sparsity=0.25),
        ),
        number=0.8,
    ),
    Row(
        "masks.cl_dst",
        lambda params, n: masks.cl_dst(
            optax.adam(0.1), half(params), none(params), key=KEY, every=2, growth="unfired",
            drop_rate=n,
        ),
        number=0.5,
    ),
]  # fmt: skip

EXEMPT = {
    "masks.Change": "a type",
    "masks.ConstrainState": "a type",
    "masks.Entries": "a type",
    "masks.Memory": "a type",
    "masks.Patch": "a type",
    "masks.Task": "a type",
    "masks.Transfer": "a type",
    "masks.difference": "host-side: its shapes depend on values; tested in test_finetune.py",
    "masks.fingerprint": "host-side: a hash of bytes; tested in test_finetune.py",
}
