"""Rows of masks: nested sub-networks, greedy removal, masks per input, tokens and circuits."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkit import losses, masks, trace
from tests.rows.base import Row, axes_of, every_axis, loss_fn

MLP = {"up": jnp.arange(8.0).reshape(2, 4) - 3, "down": jnp.ones((4, 3))}
MLP_AXES = {"up": (None, "mlp"), "down": ("mlp", None)}
MLP_LAYERS = [["mlp"]]
MANY = masks.subnets.large({"up": jnp.ones((2, 64))}, MLP_LAYERS, {"up": (None, "mlp")})
SPACE = masks.nested.sorted_space(MLP, {"mlp": (1, 2, 4)}, MLP_AXES)

PARENTS = (-1, 0, 0, 1)
CIRCUIT = masks.circuit.init(jax.random.key(3), PARENTS, 3, 2)


def sizes(params):
    return {name: axis.size for name, axis in trace.named(axes_of(params)).items()}


def first_units(params, n):
    """All but the last units of each axis, if n > 0."""
    return {name: jnp.arange(size) < size - jnp.sign(n) for name, size in sizes(params).items()}


def stacked(params):
    """Two sub-networks of any tree."""
    both = {name: np.ones((2, size), bool) for name, size in sizes(params).items()}
    for mask in both.values():
        mask[1, -1] = False
    return both


def flat(batch):
    """Sixteen numbers."""
    return batch.reshape(-1)[:16]


def examples(batch):
    """Bits for the variables of the circuit."""
    return (flat(batch)[:, None] * jnp.array([1.0, 2.0, 3.0, 5.0]) % 2 > 1).astype(int)


def tokens(batch):
    """Logits of the types of tokens."""
    batch = flat(batch)
    return jnp.stack([batch, jnp.cos(7 * batch), jnp.sin(9 * batch)], -1)


def queries(batch):
    return jnp.sin(flat(batch)[:, None, None] * jnp.arange(1.0, 9.0).reshape(4, 2))


def decode(batch, n):
    """Decode a whole batch as one text."""
    q = queries(batch)
    kinds = masks.tokens.decide(tokens(batch))

    def step(state, each):
        q, kind = each
        out, state = masks.tokens.decode(state, q, q[:2], q[:2], jnp.stack([kind, kind]), scale=n)
        return state, out

    return jax.lax.scan(step, masks.tokens.cache(16, 2, 2), (q, kinds))[1]


ROWS = [
    Row(
        "masks.nested.prefix",
        lambda key, params, batch, n: masks.nested.prefix(
            params, {name: size - n for name, size in sizes(params).items()}, every_axis(params)
        ),
        number=1.0,
        keeps=False,
    ),
    Row(
        "masks.nested.subnet",
        lambda key, params, batch, n: masks.nested.subnet(
            params, first_units(params, n), every_axis(params)
        ),
        number=1.0,
    ),
    Row(
        "masks.nested.draw",
        lambda key, params, batch, n: masks.nested.draw(key, SPACE, 8, p=n),
        number=0.7,
        random=True,
    ),
    Row(
        "masks.nested.sandwich",
        lambda key, params, batch, n: masks.nested.sandwich(key, SPACE, random=8),
        random=True,
    ),
    Row(
        "masks.nested.subnet_grad",
        lambda key, params, batch, n: masks.nested.subnet_grad(
            lambda p, b: n * loss_fn(p, b),
            params,
            stacked(params),
            batch,
            every_axis(params),
            same_batch=True,
        )[1],
        number=2.0,
        like_params=True,
        shards=False,
        local=False,
        keeps=False,  # where there is no axis there are no sub-networks
        tol=1e-4,
    ),
    Row(
        "masks.subnets.mutate",
        lambda key, params, batch, n: masks.subnets.mutate(key, MANY, MANY.low),
        random=True,
    ),
    Row(
        "masks.subnets.pareto",
        lambda key, params, batch, n: masks.subnets.pareto(flat(batch).reshape(-1, 2)),
        shards=False,
    ),
    Row(
        "masks.subnets.hypervolume",
        lambda key, params, batch, n: masks.subnets.hypervolume(
            flat(batch).reshape(-1, 2), n * jnp.ones(2)
        ),
        number=3.0,
        shards=False,
    ),
    Row(
        "losses.kd_loss",
        lambda key, params, batch, n: losses.kd_loss(
            flat(batch).reshape(-1, 2),
            -flat(batch).reshape(-1, 2),
            jnp.zeros(8, int),
            temperature=n,
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.hard_attention",
        lambda key, params, batch, n: masks.hard_attention(
            n * jnp.outer(flat(batch), flat(batch)), 3
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.route.largest",
        lambda key, params, batch, n: masks.route.largest(flat(batch).reshape(-1, 2), 1),
        shards=False,
    ),
    Row(
        "masks.route.top_activations",
        lambda key, params, batch, n: masks.route.top_activations(flat(batch).reshape(-1, 2), 1),
        shards=False,
    ),
    Row(
        "masks.route.activity",
        lambda key, params, batch, n: masks.route.activity(flat(batch).reshape(-1, 2), threshold=n),
        number=0.3,
        shards=False,
    ),
    Row(
        "masks.route.measure",
        lambda key, params, batch, n: masks.route.measure(
            lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"],
            MLP,
            flat(batch).reshape(-1, 2),
            where="down",
            threshold=0.1,
        ),
        shards=False,
    ),
    Row(
        "masks.route.mass",
        lambda key, params, batch, n: masks.route.mass(jnp.abs(flat(batch).reshape(-1, 4)), n),
        number=0.7,
        shards=False,
    ),
    Row(
        "masks.route.predict",
        lambda key, params, batch, n: masks.route.predict(
            {"kernel": n * jnp.ones((2, 3)), "bias": jnp.arange(3.0)}, flat(batch).reshape(-1, 2, 2)
        ),
        number=0.7,
        shards=False,
    ),
    Row(
        "masks.route.predictor_loss",
        lambda key, params, batch, n: masks.route.predictor_loss(
            n * flat(batch).reshape(-1, 2), flat(batch).reshape(-1, 2) > 0
        ),
        number=0.7,
        shards=False,
    ),
    Row(
        "masks.route.macs",
        lambda key, params, batch, n: masks.route.macs(
            flat(batch).reshape(-1, 2) > 0, flat(batch).reshape(-1, 2) < 1, pixels=4, taps=9
        ),
        shards=False,
    ),
    Row(
        "masks.route.token_core",
        lambda key, params, batch, n: masks.route.token_core(flat(batch).reshape(-1, 4), 0.5),
        shards=False,
    ),
    Row(
        "masks.route.sentence_core",
        lambda key, params, batch, n: masks.route.sentence_core(
            flat(batch).reshape(-1, 4) > n, 0.5
        ),
        number=0.0,
        shards=False,
    ),
    Row(
        "masks.route.cluster_cores",
        lambda key, params, batch, n: masks.route.cluster_cores(
            flat(batch).reshape(-1, 4) > n, jnp.arange(4) % 2, 2, 0.5
        ),
        number=0.0,
        shards=False,
    ),
    Row(
        "masks.route.nearest_core",
        lambda key, params, batch, n: masks.route.nearest_core(
            n * flat(batch), jnp.eye(16), jnp.arange(32).reshape(-1, 2)
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.tokens.draw",
        lambda key, params, batch, n: masks.tokens.draw(key, tokens(batch), temperature=n),
        number=1.0,
        random=True,
        shards=False,
    ),
    Row(
        "masks.tokens.decide",
        lambda key, params, batch, n: masks.tokens.decide(tokens(batch), bonus=n),
        number=0.1,
        shards=False,
    ),
    Row(
        "masks.tokens.next_global",
        lambda key, params, batch, n: masks.tokens.next_global(masks.tokens.decide(tokens(batch))),
        shards=False,
    ),
    Row(
        "masks.tokens.visible",
        lambda key, params, batch, n: masks.tokens.visible(masks.tokens.decide(tokens(batch)), n),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.tokens.soft_visible",
        lambda key, params, batch, n: masks.tokens.soft_visible(jax.nn.softmax(tokens(batch)), n),
        number=2.0,
        shards=False,
    ),
    Row(
        "masks.tokens.attention",
        lambda key, params, batch, n: masks.tokens.attention(
            queries(batch),
            queries(batch)[:, :2],
            queries(batch)[:, 2:],
            jnp.ones((2, 16, 16)),
            scale=n,
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "masks.tokens.life",
        lambda key, params, batch, n: masks.tokens.life(jax.nn.softmax(tokens(batch))),
        shards=False,
    ),
    Row(
        "masks.tokens.decode",
        lambda key, params, batch, n: decode(batch, n),
        number=0.5,
        shards=False,
    ),
    Row(
        "masks.circuit.init",
        lambda key, params, batch, n: masks.circuit.init(key, PARENTS, 3, 2),
        random=True,
    ),
    Row(
        "masks.circuit.log_prob",
        lambda key, params, batch, n: masks.circuit.log_prob(CIRCUIT, PARENTS, examples(batch)[0]),
        shards=False,
    ),
    Row(
        "masks.circuit.flows",
        lambda key, params, batch, n: masks.circuit.flows(CIRCUIT, PARENTS, examples(batch)),
        shards=False,
    ),
    Row(
        "masks.circuit.em",
        lambda key, params, batch, n: masks.circuit.em(
            CIRCUIT,
            masks.circuit.flows(CIRCUIT, PARENTS, examples(batch)),
            pseudocount=n,
            inertia=n,
        ),
        number=0.1,
        shards=False,
    ),
    Row(
        "masks.circuit.prune",
        lambda key, params, batch, n: masks.circuit.prune(CIRCUIT, CIRCUIT, n),
        number=0.5,
    ),
    Row(
        "masks.circuit.grow",
        lambda key, params, batch, n: masks.circuit.grow(key, CIRCUIT, std=n),
        number=0.2,
        random=True,
    ),
]

EXEMPT = {
    "masks.Greedy": "a type",
    "masks.Visit": "a type",
    "masks.greedy_removal": "host-side decisions; tested in masks/test_greedy.py",
    "masks.nested.Space": "a type",
    "masks.nested.sorted_space": "makes functions; they are the material of the rows above",
    "masks.subnets.Found": "a type",
    "masks.subnets.entries": "host-side: counts of shapes; tested in masks/test_subnets.py",
    "masks.subnets.large": "makes functions; tested in masks/test_subnets.py",
    "masks.subnets.layerwise": "makes functions; tested in masks/test_subnets.py",
    "masks.subnets.local_search": "a host-side loop; tested in masks/test_subnets.py",
    "masks.subnets.medium": "makes functions; tested in masks/test_subnets.py",
    "masks.subnets.random_search": "a host-side loop; tested in masks/test_subnets.py",
    "masks.subnets.small": "makes functions; tested in masks/test_subnets.py",
    "masks.tokens.Cache": "a type",
    "masks.tokens.cache": "makes an empty state; tested with masks.tokens.decode",
    "masks.circuit.compact": "host-side: values choose shapes; tested in masks/test_circuit.py",
}
