"""What a mask takes from the signal, given back: rescaling to the edge of chaos, and sketching."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.masks.select import Mask, apply

__all__ = ["rescale", "sketch"]


def rescale(
    params: PyTree,
    mask: Mask,
    *,
    sigma_w2: float | Array = 2.0,
    out_axis: int | Sequence[int] = -1,
    batch_axis: int | Sequence[int] = (),
    where: tree.Where = None,
) -> PyTree:
    """Mask the params and bring every kernel back to the edge of chaos: m W becomes rho m W.

    rho = sqrt(sigma_w2 / (fan_in * mean(m W^2))), with the mean over all entries of the leaf, zeros
    included: so fan_in * mean(rho^2 m W^2) = sigma_w2, the variance of a unit's pre-activation over
    the mean square of its input. Pruning alone takes it down by the energy that is lost, in every
    layer, which after L layers is exponentially little. Do it once, after pruning; then train.

    A kernel that feeds a normalization keeps its function, but for the epsilon: there rescaling
    changes nothing that training sees but the effective learning rate.

    Residual networks have another cure, which needs no rescaling (Stable ResNet of the same paper):
    branches times 1 / sqrt(L) for L blocks, ``init.residual(branch, x, init.Wire(1.0, L**-0.5,
    1.0))``.

    Args:
      params: any tree.
      mask: a tree of bools like params.
      sigma_w2: the variance of weights times fan-in on the edge of chaos: 2 for ReLU without
        biases, ``init.edge_of_chaos(activation).sigma_w ** 2`` for others (``init.criticality`` for
        GELU and SiLU, which need a bias); may be traced.
      out_axis: the dimensions that a kernel produces, the others being its fan-in: -1 for
        (in, out) and (height, width, in, out), (-2, -1) for a projection to heads.
      batch_axis: dimensions of a stack of kernels (a scan over layers), each with its own rho.
      where: the leaves to rescale; default: the weights. The others are masked alone.

    Returns:
      A tree like params, in its dtypes.

    Raises:
      ValueError: a kernel of which nothing is left (eagerly, with its path; under jit it stays
        zero), dimensions that it does not have, or a mask that does not fit.

    Reference: S. Hayou, J.-F. Ton, A. Doucet, Y. W. Teh, "Robust Pruning at Initialization",
    arXiv:2002.08797.

    >>> params = {"kernel": jnp.array([[3.0, 1.0], [1.0, 2.0]])}
    >>> mask = {"kernel": jnp.array([[True, False], [False, True]])}
    >>> kernel = rescale(params, mask, sigma_w2=2.0)["kernel"]
    >>> round(float(2 * jnp.mean(kernel**2)), 5)
    2.0
    """

    def one(path, w):
        named = [(a,) if isinstance(a, int) else tuple(a) for a in (out_axis, batch_axis)]
        if any(not -w.ndim <= a < w.ndim for axes in named for a in axes):
            raise ValueError(
                f"{path!r} of shape {w.shape} lacks some of the dimensions out_axis={out_axis}, "
                f"batch_axis={batch_axis}"
            )
        outs, batch = ({a % w.ndim for a in axes} for axes in named)
        rest = tuple(a for a in range(w.ndim) if a not in batch)
        energy = jnp.sum(jnp.square(tree.float32(jnp.abs(w))), rest, keepdims=True)
        empty = jnp.any(energy == 0)
        if w.size and tree.concrete(empty) and empty:
            raise ValueError(f"{path!r}: nothing of this kernel is left, so no factor rescales it")
        outputs = math.prod(w.shape[a] for a in outs)
        # fan_in * mean is the sum over outputs
        rho = jnp.sqrt(sigma_w2 * outputs / jnp.where(energy > 0, energy, 1))
        return (w * rho).astype(w.dtype)

    return tree.map(one, apply(params, mask), where=where)


def sketch(
    key: PRNGKeyArray, weights: Float[Array, " D"], scores: Float[Array, " D"], draws: int
) -> Float[Array, " D"]:
    """Sparsify the weights of a linear model without bias: w~_i = w_i c_i / (draws p_i).

    c_i counts how often i comes in `draws` independent draws with probabilities p = scores / sum.
    So at most `draws` weights are not zero, and for f(w) = X^T w, with X of D features times N
    samples and X_i its rows, E[X^T w~] = X^T w and

        E ||X^T w~ - X^T w||^2 = (sum_i ||X_i||^2 w_i^2 / p_i - ||X^T w||^2) / draws.

    The error is least at p_i ~ ||X_i|| |w_i|: where all features are of a size, the magnitude is
    the best score and the data drop out. For networks the binary mask of `sample` is the method.

    A draw goes down a binary tree of the sums of scores, in float32 whatever the dtypes, with a
    fine random number of its own at each fork: probabilities are right to 1e-5 of themselves, the
    smallest too, for any D. It takes the memory of some vectors of D and of `draws`.

    Args:
      key: a typed key.
      weights: the vector; of a tree, ``tree.ravel(params)``.
      scores: non-negative, with a positive one wherever X_i w_i is not zero.
      draws: how many, static.

    Raises:
      ValueError: shapes that differ, draws < 1; if the scores are known, negative or infinite
        ones, or none that is positive.
      TypeError: a legacy uint32 key.

    Reference: N. Bar, R. Giryes, "Pruning at Initialization -- A Sketching Perspective",
    arXiv:2305.17559.

    >>> sketch(jax.random.key(0), jnp.array([2.0, 5.0]), jnp.array([1.0, 0.0]), 3).tolist()
    [2.0, 0.0]
    """
    tree.check_key(key)
    if jnp.ndim(weights) != 1 or jnp.shape(weights) != jnp.shape(scores):
        raise ValueError(
            f"weights and scores are vectors of one size; came: {jnp.shape(weights)} and "
            f"{jnp.shape(scores)}"
        )
    if draws < 1:
        raise ValueError(f"draws is {draws}, and at least one is due")
    if violates(lambda s: np.all((s >= 0) & (s < np.inf)) & np.any(s > 0), scores):
        raise ValueError(
            "scores are probabilities: finite, none may be negative, and one must be positive"
        )
    weights, scores = jnp.asarray(weights), tree.float32(jnp.asarray(scores))
    scores = scores / jnp.max(scores)  # their sum is finite
    levels = (scores.size - 1).bit_length()
    sums = [jnp.pad(scores, (0, 2**levels - scores.size))]
    while sums[0].size > 1:
        sums.insert(0, sums[0].reshape(-1, 2).sum(1))
    # node 1 is the root, nodes 2 i and 2 i + 1 are the children of node i
    heap = jnp.concatenate([jnp.zeros(1), *sums])

    def down(node, key):
        left, right = heap[2 * node], heap[2 * node + 1]
        rare = _uniform(key, draws) * (left + right) < jnp.minimum(left, right)
        return 2 * node + (rare == (right < left)), None

    node = jax.lax.scan(down, jnp.ones(draws, jnp.int32), jax.random.split(key, levels))[0]
    drawn = node - 2**levels
    counts = jnp.zeros(scores.shape, jnp.int32).at[drawn].add(1)
    p = scores / sums[0][0]
    return (tree.float32(weights) * counts / (draws * jnp.where(p > 0, p, 1))).astype(weights.dtype)


def _uniform(key: PRNGKeyArray, draws: int) -> Float[Array, " draws"]:
    """Draw from [0, 1] in steps of 2^-64, where those of `jax.random.uniform` are 2^-23."""
    high, low = jax.random.bits(key, (2, draws), jnp.uint32).astype(jnp.float32)
    return high * 2.0**-32 + low * 2.0**-64
