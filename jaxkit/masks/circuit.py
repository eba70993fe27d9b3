r"""Sparse probabilistic circuits: prune sum edges by their flow, grow latent states, EM between.

The circuit is that of a tree of n discrete variables with a latent state each (a chain is an HMM
with parameters of its own at every step):

.. math:: p(x) = \sum_{z} \prod_v \theta^v_{z_{pa(v)} z_v} \, \beta^v_{z_v x_v}

Sum nodes are the rows of theta and beta, and sum to 1. Parameters are logarithms,
``{"edges": (theta_0 of (1, states), theta_v of (parent's states, states), ...),
"leaves": (beta_v of (states, categories), ...)}``, and an edge is pruned where it is -inf.
``parents[v] < v`` is the parent of variable v, and ``parents[0] = -1``.

Reference: Dang, Liu, Van den Broeck, "Sparse Probabilistic Circuits via Pruning and Growing",
arXiv:2211.12551.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit._rank import decimal

__all__ = ["compact", "em", "flows", "grow", "init", "log_prob", "prune"]

Parents = Sequence[int]


def _check(parents: Parents) -> None:
    if not parents or parents[0] != -1 or any(not 0 <= p < v for v, p in enumerate(parents) if v):
        raise ValueError(f"parents: -1, then for each variable an earlier one, not {parents}")


def _normalize(logs: Array) -> Array:
    return logs - _logsumexp(logs)[:, None]


def _logsumexp(logs: Array) -> Array:
    """Sum over the last axis; where all are -inf, so is the sum, and the gradient is 0, not nan."""
    top = jax.lax.stop_gradient(logs.max(-1))
    top = jnp.where(jnp.isfinite(top), top, 0)
    total = jnp.exp(logs - top[..., None]).sum(-1)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + top, -jnp.inf)


def init(key: PRNGKeyArray, parents: Parents, states: int, categories: int) -> PyTree:
    """Draw a dense circuit: every row is the softmax of standard normal numbers.

    Args:
      key: a typed key.
      parents: the tree.
      states: of each latent variable.
      categories: of each observed variable.

    Raises:
      ValueError: parents that are no tree in order.
      TypeError: a legacy uint32 key.

    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), (-1, 0), 3, 2))
    {'edges': ((1, 3), (3, 3)), 'leaves': ((3, 2), (3, 2))}
    """
    _check(parents)
    shapes = {
        "edges": [(1 if p < 0 else states, states) for p in parents],
        "leaves": [(states, categories) for _ in parents],
    }
    empty = {name: tuple(jnp.zeros(s) for s in each) for name, each in shapes.items()}
    keys = tree.keys(key, empty, "jaxkit.masks.circuit.init")
    return jax.tree.map(lambda k, x: _normalize(jax.random.normal(k, x.shape)), keys, empty)


def log_prob(params: PyTree, parents: Parents, x: Int[Array, " n"]) -> Float[Array, ""]:
    """Return log p(x) in nats; -inf for what has no probability, categories that are none included.

    Args:
      params: the circuit.
      parents: the tree.
      x: a category per variable; vmap over examples.

    Raises:
      ValueError: parents that are no tree in order, or another number of variables.

    >>> params = init(jax.random.key(0), (-1, 0), 3, 2)
    >>> every = jnp.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> total = sum(jnp.exp(log_prob(params, (-1, 0), x)) for x in every)
    >>> round(float(total), 5)
    1.0
    """
    _check(parents)
    n = len(parents)
    if not n == len(params["edges"]) == len(params["leaves"]) == np.shape(x)[0]:
        raise ValueError(f"{n} parents, {len(params['edges'])} latent variables, x {np.shape(x)}")
    up = []
    for leaf, category in zip(params["leaves"], x, strict=True):
        inside = (category >= 0) & (category < leaf.shape[1])
        up.append(jnp.where(inside, jnp.take(leaf, category, axis=1, mode="clip"), -jnp.inf))
    for v in reversed(range(1, n)):
        up[parents[v]] = up[parents[v]] + _logsumexp(params["edges"][v] + up[v])
    return _logsumexp(params["edges"][0] + up[0])[0]


def flows(params: PyTree, parents: Parents, x: Int[Array, "batch n"]) -> PyTree:
    """Sum the flow of every edge over examples: F_e = d log p(x) / d log theta_e.

    It is the expected number of times that the edge is used, given x. Without the edge, and not
    renormalized, the probability is p(x) (1 - F_e(x)). Flows out of a node sum to the flow into it,
    those of the root to the number of examples (of those with a probability).

    Args:
      params: the circuit.
      parents: the tree.
      x: examples.

    Raises:
      ValueError: as for `log_prob`.

    >>> params = init(jax.random.key(0), (-1, 0), 3, 2)
    >>> float(flows(params, (-1, 0), jnp.array([[0, 1], [1, 1]]))["edges"][0].sum())
    2.0
    """
    total = lambda params: jax.vmap(lambda row: log_prob(params, parents, row))(x).sum()
    return jax.grad(total)(params)


def em(
    params: PyTree,
    flows: PyTree,
    *,
    pseudocount: float | Array = 0.0,
    inertia: float | Array = 0.0,
) -> PyTree:
    """Take one EM step: theta <- inertia theta + (1 - inertia) (F + pseudocount) / sum of these.

    On all examples, with neither pseudocount nor inertia, the likelihood does not fall. Pruned
    edges stay pruned, and a node that no example uses stays as it is.

    Args:
      params: the circuit.
      flows: of a batch of examples.
      pseudocount: added to every live edge.
      inertia: how much of the old parameters stays, in [0, 1), for small batches.

    Raises:
      ValueError: flows that do not fit.

    >>> params = init(jax.random.key(0), (-1,), 1, 2)
    >>> counts = flows(params, (-1,), jnp.array([[0], [0], [0], [1]]))
    >>> jnp.exp(em(params, counts)["leaves"][0])
    Array([[0.75, 0.25]], dtype=float32)
    """
    tree.check_like(params, flows, "flows")

    def step(logs, flow):
        counts = jnp.where(jnp.isfinite(logs), jnp.maximum(flow, 0) + pseudocount, 0)
        total = counts.sum(-1, keepdims=True)
        old = jnp.exp(logs)
        new = jnp.where(total > 0, counts / jnp.where(total > 0, total, 1), old)
        return jnp.log(inertia * old + (1 - inertia) * new)

    return jax.tree.map(step, params, flows)


def prune(params: PyTree, flows: PyTree, fraction: float | Array) -> PyTree:
    """Remove the edges of least flow: floor(fraction E) of the E live ones, then renormalize.

    All nodes are ranked together; those with a single edge are left out. A node that would lose all
    its edges keeps the first, so somewhat fewer may go. The leaves stay: their sums are
    deterministic. The log-likelihood falls by at most -log(1 - sum of the removed flows), example
    by example.

    Args:
      params: the circuit.
      flows: over the training examples.
      fraction: of the edges, in [0, 1].

    Returns:
      The circuit with -inf at the pruned edges; `compact` drops the states that nothing reaches.

    Raises:
      ValueError: flows that do not fit, a fraction outside [0, 1], a node without edges (eagerly).

    >>> params = init(jax.random.key(0), (-1, 0), 3, 2)
    >>> sparse = prune(params, flows(params, (-1, 0), jnp.array([[0, 1], [1, 1]])), 0.25)
    >>> sum(int(jnp.isfinite(e).sum()) for e in sparse["edges"])
    9
    """
    tree.check_like(params, flows, "flows")
    if violates(lambda f: (f >= 0) & (f <= 1), fraction):
        raise ValueError(f"fraction={fraction}: a number in [0, 1] is due")
    live = tuple(jnp.isfinite(e) for e in params["edges"])
    for v, alive in enumerate(live):
        if tree.concrete(alive) and not alive.any(-1).all():
            raise ValueError(f"'edges/{v}': a node without edges")
    choice = tuple(alive & (alive.sum(-1, keepdims=True) > 1) for alive in live)
    count = sum(c.sum() for c in choice)
    if tree.concrete(count, fraction):
        gone = math.floor(decimal(fraction) * int(count))
    else:
        gone = jnp.floor(fraction * count).astype(jnp.int32)
    every = lambda path, leaf: True
    kept = tree.topk(flows["edges"], count - gone, where=every, within=choice)

    def renormalize(logs, alive, candidate, kept):
        first = candidate & (jnp.cumsum(candidate, -1) == 1)
        kept = kept | (alive & ~candidate) | (first & ~kept.any(-1, keepdims=True))
        return _normalize(jnp.where(kept, logs, -jnp.inf))

    edges = jax.tree.map(renormalize, params["edges"], live, choice, kept)
    return params | {"edges": edges}


def grow(key: PRNGKeyArray, params: PyTree, *, std: float | Array = 0.3) -> PyTree:
    """Double the latent states: each becomes two, which have the children of both copies.

    Probabilities of edges and leaves are multiplied by independent max(1 + std N(0, 1), 0.1) and
    renormalized. With std = 0 the distribution is what it was; then the copies are equal, and
    EM keeps them so. (The published code scales the logarithms of the edges, by one noise for both
    copies of a node.)

    Args:
      key: a typed key.
      params: the circuit.
      std: of the noise.

    Returns:
      A circuit with twice the states and four times the edges.

    Raises:
      TypeError: a legacy uint32 key.

    >>> big = grow(jax.random.key(1), init(jax.random.key(0), (-1, 0), 3, 2))
    >>> jax.tree.map(jnp.shape, big)
    {'edges': ((1, 6), (6, 6)), 'leaves': ((6, 2), (6, 2))}
    """
    first, *rest = params["edges"]
    copies = {
        "edges": (jnp.tile(first, (1, 2)), *(jnp.tile(e, (2, 2)) for e in rest)),
        "leaves": tuple(jnp.tile(leaf, (2, 1)) for leaf in params["leaves"]),
    }
    keys = tree.keys(key, copies, "jaxkit.masks.circuit.grow")

    def disturb(logs, k):
        noise = 1 + std * jax.random.normal(k, logs.shape, logs.dtype)
        return _normalize(logs + jnp.log(jnp.maximum(noise, 0.1)))

    return jax.tree.map(disturb, copies, keys)


def compact(params: PyTree, parents: Parents) -> PyTree:
    """Drop the states that no live edge reaches from the root: smaller arrays, the same p(x).

    Args:
      params: the circuit, with known values.
      parents: the tree.

    Raises:
      ValueError: parents that are no tree in order.

    >>> params = {"edges": (jnp.log(jnp.array([[1.0, 0.0]])),), "leaves": (jnp.zeros((2, 1)),)}
    >>> jax.tree.map(jnp.shape, compact(params, (-1,)))
    {'edges': ((1, 1),), 'leaves': ((1, 1),)}
    """
    _check(parents)
    reached: list[np.ndarray] = []
    edges, leaves = [], []
    for p, edge, leaf in zip(parents, params["edges"], params["leaves"], strict=True):
        rows = np.array([0]) if p < 0 else reached[p]
        reached.append(np.flatnonzero(np.isfinite(np.asarray(edge)[rows]).any(0)))
        edges.append(edge[np.ix_(rows, reached[-1])])
        leaves.append(leaf[reached[-1]])
    return {"edges": tuple(edges), "leaves": tuple(leaves)}
