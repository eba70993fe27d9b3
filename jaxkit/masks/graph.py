"""Masks from graphs: the edges of an adjacency matrix as the entries of kernels.

Bring the graph as a square matrix: ``networkx.to_numpy_array(networkx.watts_strogatz_graph(50, 4,
0.3))``, say. To predict a structure's performance from its graph, compute features of the same
matrix (vertices, edges, diameter, path lengths, degrees, centralities: networkx has them), train
the masked network of each of some hundred graphs, and fit a regressor of scikit-learn
(``RandomForestRegressor``, ``GradientBoostingRegressor``) to the scores; report R^2 on graphs that
it has not seen.

Reference: J. Stier, H. Darji, M. Granitzer, "Experiments on Properties of Hidden Structures of
Sparse Neural Networks", arXiv:2107.12917.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

__all__ = ["Layered", "layered", "recurrent"]

Adjacency = Shaped[np.ndarray, "n n"] | Shaped[Array, "n n"]


class Layered(NamedTuple):
    """A directed acyclic graph in layers.

    Attributes:
      layers: the vertices of each layer, in ascending order. A vertex lies in the layer of its
        longest path from a source (a vertex without incoming edges).
      masks: by pair of layers (i, j), i < j, the mask (vertices of i, vertices of j) of a kernel
        between them. Pairs of neighbours are all there; others, the skips, where there are edges.
      dead_ends: the vertices from which no path leads to the last layer: a network that is read
        out at the last layer computes them for nothing.
    """

    layers: tuple[tuple[int, ...], ...]
    masks: dict[tuple[int, int], Bool[Array, "vertices_i vertices_j"]]
    dead_ends: tuple[int, ...]


def _square(adjacency: Adjacency) -> np.ndarray:
    a = np.asarray(adjacency)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not len(a):
        raise ValueError(f"a square adjacency matrix is due, and the shape {a.shape} came")
    return a != 0


def layered(adjacency: Adjacency, *, directed: bool = False) -> Layered:
    """Turn a graph into the masks of a layered network with skips.

    h_j = phi(sum_{i < j} h_i (W_ij * masks[i, j]) + b_j), with h_0 read off the input and the last
    h read out. Each edge is one entry of one mask.

    Args:
      adjacency: a square matrix; what is not zero at [i, j] is an edge from i to j. Weights and
        loops of an undirected graph are not looked at.
      directed: False takes the graph as undirected and orients each edge from the lower to the
        higher vertex, which makes any graph acyclic. True takes it as it is.

    Raises:
      ValueError: no square matrix, or a directed graph with a cycle (its vertices are named).

    >>> found = layered(np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]))
    >>> found.layers, sorted(found.masks)
    (((0,), (1,), (2,)), [(0, 1), (0, 2), (1, 2)])
    """
    edges = _square(adjacency)
    if not directed:
        edges = np.triu(edges | edges.T, 1)
    n = len(edges)
    level, left = np.zeros(n, int), np.ones(n, bool)
    for depth in range(n):
        free = left & ~edges[left].any(0)  # no edge from those that are left
        if not free.any():
            break
        level[free] = depth
        left &= ~free
    if left.any():
        raise ValueError(
            f"the graph has a cycle among the vertices {np.flatnonzero(left).tolist()}"
        )
    layers = [np.flatnonzero(level == depth) for depth in range(level.max() + 1)]
    masks = {}
    for i, sources in enumerate(layers):
        for j in range(i + 1, len(layers)):
            mask = edges[np.ix_(sources, layers[j])]
            if mask.any() or j == i + 1:
                masks[i, j] = jnp.asarray(mask)
    alive = level == len(layers) - 1
    for vertices in reversed(layers):
        alive[vertices] |= (edges[vertices] & alive).any(1)
    dead_ends = tuple(np.flatnonzero(~alive).tolist())
    return Layered(tuple(tuple(vertices.tolist()) for vertices in layers), masks, dead_ends)


def recurrent(adjacency: Adjacency, *, gates: int = 1) -> Bool[Array, "n gates*n"]:
    """Return the adjacency matrix as the mask of a recurrent kernel: h' = phi(h (W * mask) + ...).

    Args:
      adjacency: a square matrix; what is not zero at [i, j] lets unit i reach unit j.
      gates: the number of blocks side by side in the kernel: 4 for the fused kernel of an LSTM.

    Raises:
      ValueError: no square matrix, or gates < 1.

    >>> recurrent(np.array([[0, 1], [1, 1]]))
    Array([[False,  True],
           [ True,  True]], dtype=bool)
    """
    if gates < 1:
        raise ValueError(f"gates is {gates}, and 1 or more are due")
    return jnp.tile(jnp.asarray(_square(adjacency)), (1, gates))
