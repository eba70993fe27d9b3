"""Masks from graphs: every edge is an entry, layers are longest paths; the scopes of pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkit import masks


def watts_strogatz(n, k, p, seed):
    """A ring of n vertices, each tied to its k nearest, edges rewired with probability p."""
    rng = np.random.default_rng(seed)
    a = np.zeros((n, n), int)
    for i in range(n):
        for d in range(1, k // 2 + 1):
            j = rng.integers(n) if rng.random() < p else (i + d) % n
            if j != i:
                a[i, j] = a[j, i] = 1
    return a


def longest_paths(edges):
    """The longest path to each vertex, by trying all."""
    n = len(edges)

    def longest(j):
        return max((1 + longest(i) for i in range(n) if edges[i, j]), default=0)

    return [longest(j) for j in range(n)]


@pytest.mark.parametrize("seed", range(3))
def test_every_edge_is_one_entry_and_layers_are_longest_paths(seed):
    a = watts_strogatz(14, 4, 0.4, seed)
    found = masks.layered(a)
    edges = np.triu(a, 1)
    assert sum(int(m.sum()) for m in found.masks.values()) == edges.sum() == a.sum() // 2
    level = longest_paths(edges)
    for i, vertices in enumerate(found.layers):
        assert all(level[v] == i for v in vertices)
    assert sorted(v for vertices in found.layers for v in vertices) == list(range(14))
    back = np.zeros_like(edges)
    for (i, j), m in found.masks.items():
        assert i < j
        assert m.shape == (len(found.layers[i]), len(found.layers[j]))
        back[np.ix_(found.layers[i], found.layers[j])] = m
    np.testing.assert_array_equal(back, edges)
    # a vertex of layer j > 0 has an edge from the layer before: its longest path ends with it
    assert all(found.masks[j - 1, j].any(0).all() for j in range(1, len(found.layers)))


def test_the_layered_network_is_the_graph_evaluated_vertex_by_vertex():
    a = watts_strogatz(12, 4, 0.5, 7)
    found, rng = masks.layered(a), np.random.default_rng(0)
    w = rng.normal(size=(12, 12)) * np.triu(a, 1)
    by_vertex = np.zeros(12)
    for j in range(12):
        by_vertex[j] = np.tanh(by_vertex @ w[:, j] + j)
    h = []
    for j, vertices in enumerate(found.layers):
        z = np.array(vertices, float)
        for i in range(j):
            if (i, j) in found.masks:
                kernel = w[np.ix_(found.layers[i], vertices)] + ~np.asarray(found.masks[i, j])
                z = z + h[i] @ np.where(found.masks[i, j], kernel, 0)
        h.append(np.tanh(z))
    for values, vertices in zip(h, found.layers, strict=True):
        np.testing.assert_allclose(values, by_vertex[list(vertices)])


def test_what_leads_nowhere_is_told():
    """0 -> 1 -> 2 and 0 -> 3: 3 ends in the middle layer; 4 has no edge at all."""
    a = np.zeros((5, 5), int)
    a[0, 1] = a[1, 2] = a[0, 3] = 1
    found = masks.layered(a)
    assert found.layers == ((0, 4), (1, 3), (2,))
    assert found.dead_ends == (3, 4)
    assert masks.layered(np.zeros((3, 3))).layers == ((0, 1, 2),)
    chain = masks.layered(np.eye(4, k=1))
    assert chain.dead_ends == ()
    assert sorted(chain.masks) == [(0, 1), (1, 2), (2, 3)]
    assert sorted(masks.layered(1 - np.eye(3)).masks) == [(0, 1), (0, 2), (1, 2)]  # a skip


def test_orientation():
    down = np.zeros((3, 3), int)
    down[2, 1] = down[1, 0] = 1
    assert masks.layered(down).layers == ((0,), (1,), (2,))
    assert masks.layered(down, directed=True).layers == ((2,), (1,), (0,))
    with pytest.raises(ValueError, match=r"cycle among the vertices \[0, 1\]"):
        masks.layered(np.array([[0, 1, 0], [1, 0, 0], [0, 1, 0]]), directed=True)
    with pytest.raises(ValueError, match=r"shape \(2, 3\)"):
        masks.layered(np.ones((2, 3)))


def test_a_recurrent_kernel_reaches_along_edges_alone():
    a = watts_strogatz(9, 2, 0.0, 0)  # a ring
    mask = masks.recurrent(a)
    assert int(mask.sum()) == a.sum() == 18
    w = jnp.where(mask, 1.0, 0.0)
    h = jnp.zeros(9).at[0].set(1.0)
    for steps in range(1, 5):
        h = h @ w
        distance = np.minimum(np.arange(9), 9 - np.arange(9))
        assert (np.asarray(h)[distance > steps] == 0).all()
        assert (np.asarray(h)[distance == steps] > 0).all()
    fused = masks.recurrent(a, gates=4)
    assert fused.shape == (9, 36)
    np.testing.assert_array_equal(fused[:, 9:18], mask)
    with pytest.raises(ValueError, match="gates is 0"):
        masks.recurrent(a, gates=0)


# ------------------------------------------- scopes of pruning, as compositions


def test_scopes_on_layers_of_different_scale():
    """Blinded is one threshold, uniform one per layer, distributed blinded on |w| / std."""
    key = jax.random.key(0)
    params = {"small": jax.random.normal(key, (20, 20)), "big": jnp.zeros((20, 20))}
    params["big"] = 100 + 100 * jax.random.uniform(key, (20, 20))
    scores = masks.magnitude(params)
    count = lambda mask: {path: int(m.sum()) for path, m in mask.items()}
    blinded = masks.topk(scores, sparsity=0.5)
    assert count(blinded) == {"small": 0, "big": 400}
    uniform = masks.topk(scores, sparsity=masks.uniform(params, 0.5))
    assert count(uniform) == {"small": 200, "big": 200}
    params["big"] = 100 * jax.random.normal(jax.random.key(1), (20, 20))
    standard = jax.tree.map(lambda w: w / w.std(), params)
    distributed = masks.topk(jax.tree.map(lambda w: jnp.abs(w) / w.std(), params), sparsity=0.5)
    again = masks.topk(masks.magnitude(standard), sparsity=0.5)
    for path in params:
        np.testing.assert_array_equal(distributed[path], again[path])
        assert 150 < count(distributed)[path] < 250
    flat = np.abs(np.concatenate([params["big"].ravel(), params["small"].ravel()]))
    blinded = masks.topk(masks.magnitude(params), sparsity=0.5)
    for path in params:  # the percentile rule of the reference, off ties and between entries
        np.testing.assert_array_equal(
            blinded[path], np.abs(params[path]) >= np.percentile(flat, 50)
        )
