"""Networks that are graphs: initialization by in-degree, learning rate by paths and depth.

A graph is a square matrix of edges, ``edges[i][j]`` from node i to node j > i or any other acyclic
order: 0 no edge, 1 a skip, 2 a layer with weights (followed by ReLU). Node 0 is the input and the
last node the output; a node is the sum of its incoming edges.

Reference: W. Chen, J. Wu, Z. Wang, B. Hanin, "Principled Architecture-aware Scaling of
Hyperparameters", arXiv:2402.17440.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

__all__ = ["architecture_aware", "in_degrees", "learning_rate_scale", "path_lengths"]

Edges = Sequence[Sequence[int]] | Int[np.ndarray, "n n"]


def _checked(edges: Edges) -> tuple[np.ndarray, list[int]]:
    """Return the edges and the nodes in topological order."""
    a = np.asarray(edges)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] < 2:
        raise ValueError(f"a square matrix of edges between two nodes or more is due: {a.shape}")
    if not np.isin(a, (0, 1, 2)).all():
        raise ValueError("edges are 0 (none), 1 (skip) or 2 (weights)")
    left, order = set(range(len(a))), []
    while left:
        free = sorted(j for j in left if not any(a[i, j] for i in left))
        if not free:
            raise ValueError(f"the graph has a cycle among the nodes {sorted(left)}")
        order += free
        left -= set(free)
    return a, order


def in_degrees(edges: Edges) -> list[int]:
    """Return the number of incoming edges of each node, skips included, and at least 1.

    Raises:
      ValueError: no square matrix of 0, 1 and 2, or a cycle.

    >>> in_degrees([[0, 2, 1], [0, 0, 2], [0, 0, 0]])
    [1, 1, 2]
    """
    return [max(int(n), 1) for n in (_checked(edges)[0] > 0).sum(0)]


def architecture_aware(
    degree: int = 1, *, distribution: str = "normal", fan: str = "fan_in", **axes
) -> jax.nn.initializers.Initializer:
    """Return the initializer of an edge: Var W = 2 / (degree * fan_in).

    Args:
      degree: `in_degrees` of the node that the edge leaves; 1 for the stem and the readout (where
        the authors' code squares the standard deviation instead, which reads as a slip).
      distribution: of ``variance_scaling``.
      fan: "fan_in", as the paper has it, or "fan_out", as its code.
      **axes: ``in_axis``, ``out_axis``, ``batch_axis``, ``dtype`` of ``variance_scaling``.

    Raises:
      ValueError: degree < 1.

    >>> w = architecture_aware(4)(jax.random.key(0), (200, 200))
    >>> round(float(w.var() * 200), 1)
    0.5
    """
    if degree < 1:
        raise ValueError(f"an edge leaves a node of degree 1 or more, and {degree} came")
    return jax.nn.initializers.variance_scaling(2 / degree, fan, distribution, **axes)  # type: ignore


def path_lengths(edges: Edges) -> dict[int, int]:
    """Return how many paths from the first to the last node cross how many edges with weights.

    ``{length: number of paths}``, counted in one sweep rather than path by path.

    Raises:
      ValueError: as `in_degrees`, or an output that no path reaches.

    >>> path_lengths([[0, 2, 1], [0, 0, 2], [0, 0, 0]])
    {0: 1, 2: 1}
    """
    a, order = _checked(edges)
    counts: list[dict[int, int]] = [{} for _ in a]
    counts[0] = {0: 1}
    for j in order:
        for i in np.flatnonzero(a[:, j]):
            for length, count in counts[i].items():
                longer = length + (a[i, j] == 2)
                counts[j][int(longer)] = counts[j].get(int(longer), 0) + count
    if not counts[-1]:
        raise ValueError("no path leads from the first node to the last")
    return dict(sorted(counts[-1].items()))


def learning_rate_scale(
    edges: Edges, *, extra: int = 3, base: Sequence[int] = (3,), kernel_size: int = 3
) -> float:
    """Return the factor from the best learning rate of a base network to this one's.

    (Σ_p L_p³)^(-1/2) / (Σ_base L³)^(-1/2) * 3 / kernel_size, with L_p = `path_lengths` + extra.
    One number for the whole network: ``optax.sgd(base_rate * learning_rate_scale(edges))``. Without
    convolutions leave kernel_size at 3, which cancels.

    Args:
      extra: layers with weights outside the graph on every path: 3 in the paper's MLPs and CNNs
        (stem, one layer and readout), 1 on NAS-Bench-201 (with ``base=[1]``), 0 where `edges` is
        the whole network.
      base: the lengths of the base network's paths, with all their layers: that of the default has
        the three outside the graph and a skip in it.

    Raises:
      ValueError: as `path_lengths`; a network or a base without weights; kernel_size < 1.

    >>> chain = [[0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 2], [0, 0, 0, 0]]
    >>> round(learning_rate_scale(chain), 5)
    0.35355
    """
    if extra < 0 or kernel_size < 1:
        raise ValueError(f"extra >= 0 and kernel_size >= 1 are due: {extra}, {kernel_size} came")
    cubes = sum(count * (length + extra) ** 3 for length, count in path_lengths(edges).items())
    base_cubes = sum(length**3 for length in base)
    if cubes <= 0 or base_cubes <= 0:
        raise ValueError("a learning rate needs layers with weights, in the network and the base")
    return math.sqrt(base_cubes / cubes) * 3 / kernel_size
