"""Residual blocks by three numbers: ``x <- skip * x + branch * F(pre * x)``.

What the methods that keep the signal alive through hundreds of layers have in common is a `Wire`
for each block: numbers that depend on the depth and on nothing else. An array in a `Wire` holds one
number per block, so that a scan over blocks takes it as its ``xs``, and
``jax.tree.map(lambda n: n[i], wire)`` is that of block i.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree

__all__ = ["Wire", "convex_wire", "deepscale_wire", "nf_wire", "residual", "rezero"]

Number = float | Float[Array, ""]


class Wire(NamedTuple):
    """The numbers of ``x <- skip * x + branch * F(pre * x)``: one each, or one a block."""

    skip: Float[Array, "*blocks"]
    branch: Float[Array, "*blocks"]
    pre: Float[Array, "*blocks"]


def residual(
    branch: Callable[[Array], Array], x: Float[Array, "*shape"], wire: Wire
) -> Float[Array, "*shape"]:
    """Return ``wire.skip * x + wire.branch * branch(wire.pre * x)``, in the dtype of `x`.

    Where the branch has biases, they are scaled with it.

    Raises:
      ValueError: a branch that changes the shape.

    >>> wire = Wire(jnp.array(0.5), jnp.array(2.0), jnp.array(1.0))
    >>> residual(jnp.square, jnp.array([3.0]), wire).tolist()
    [19.5]
    """
    skip, scale, pre = (jnp.asarray(number, x.dtype) for number in wire)
    y = branch(pre * x)
    if y.shape != x.shape:
        raise ValueError(f"the branch returned {y.shape}, and the shape {x.shape} of x was due")
    return (skip * x + scale * y).astype(x.dtype)


def convex_wire(blocks: int, g2: Number) -> Wire:
    """The wire that keeps variance: ``x <- sqrt(1 - g2) x + sqrt(g2) F(x)``.

    If x and F(x) are uncorrelated and of the same variance, the sum has it too, at every depth;
    with 1 and 1 in place of the roots it grows by as much again with each block. It is the wire of
    the shaped Transformer (lambda^2 + gamma^2 = 1), and at ``g2 = k / N`` of DeepScaleLM.

    Args:
      blocks: the number of blocks.
      g2: the share of the branch in the variance, in [0, 1]; may be traced.

    Raises:
      ValueError: `g2` outside [0, 1], or no block.

    >>> convex_wire(2, 0.36).skip.tolist()
    [0.800000011920929, 0.800000011920929]

    Reference: Lorenzo Noci, Chuning Li, Mufan Bill Li, Bobby He, Thomas Hofmann, Chris Maddison,
    Daniel M. Roy, "The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit",
    arXiv 2306.17759.
    """
    if blocks < 1:
        raise ValueError(f"blocks={blocks}: at least one block is due")
    if tree.concrete(g2) and not 0 <= float(g2) <= 1:
        raise ValueError(f"g2={g2}: a share of the variance in [0, 1] is due")
    share = jnp.full(blocks, g2, jnp.zeros(()).dtype)
    return Wire(jnp.sqrt(1 - share), jnp.sqrt(share), jnp.ones_like(share))


def deepscale_wire(layers: int, *, k: Number = 1.0, sublayers: int = 2) -> Wire:
    """The wire of DeepScaleLM: ``lambda^2 = 1 - beta^2`` with ``beta^2 = k / layers``.

    One number per sub-layer (attention and feed-forward): ``layers * sublayers`` of them, to use
    with ``F`` reading ``LN(x)`` (pre-LN) or with `x` being a layer-normalized sum (post-LN). The
    skips alone multiply a gradient by ``(1 - k / layers)^(layers * sublayers / 2)``, which tends to
    ``exp(-k * sublayers / 2)``: it does not vanish with depth.

    Args:
      layers: N, the number of layers.
      k: the share that a branch has at N = 1; may be traced.
      sublayers: the residual sums in a layer.

    Raises:
      ValueError: k / layers outside [0, 1].

    >>> wire = deepscale_wire(192, k=0.96)  # the figures of the authors' 192-layer models
    >>> wire.skip.shape, round(float(wire.skip[0] ** 2), 4), round(float(wire.branch[0] ** 2), 4)
    ((384,), 0.995, 0.005)

    Reference: Akhil Kedia, Mohd Abbas Zaidi, Sushil Khyalia, Jungho Jung, Harshith Goka, Haejun
    Lee, "Transformers Get Stable: An End-to-End Signal Propagation Theory for Language Models",
    arXiv 2403.09635.
    """
    if layers < 1 or sublayers < 1:
        raise ValueError(f"layers={layers} and sublayers={sublayers}: at least one each is due")
    return convex_wire(layers * sublayers, k / layers)


def nf_wire(depths: Sequence[int], *, alpha: Number = 0.2, skip_gain: Number = 1.0) -> Wire:
    """The wire of normalizer-free ResNets: each block divides by the deviation that it receives.

    Block l computes ``h + alpha * F(h / beta_l)``, where F keeps the variance of its input, so
    that the variance grows by ``alpha^2`` a block: ``beta_{l+1}^2 = beta_l^2 + alpha^2``, with
    ``beta = 1`` at the start. The first block of a stage brings it back to 1 before it adds its
    own: its shortcut is a convolution of the activated, scaled input.

    Both orders are in use: the paper has ``phi(h / beta)``, which is this wire with an F that
    starts with the activation; the authors' code ``phi(h) / beta``. They agree for positively
    homogeneous activations (relu), and not for silu or gelu. Either way, activations are scaled to
    unit variance (the centered rule of `jaxkit.init.gain`) and kernels standardized
    (`jaxkit.init.standardize`). The first block's shortcut
    reads the same ``phi(h / beta)`` as F, so that a transition is not of the form of `residual`.

    Args:
      depths: the number of blocks in each stage.
      alpha: the size of a branch.
      skip_gain: a factor of every branch; the authors train one per block, from 0. With 1 the
        variances are those of the theory.

    Returns:
      The wire ``(1, alpha * skip_gain, 1 / beta)`` with one number per block.

    Raises:
      ValueError: no stage, or a stage without blocks.

    >>> [round(float(pre) ** -2, 3) for pre in nf_wire((2, 2)).pre]
    [1.0, 1.04, 1.08, 1.04]

    Reference: Andrew Brock, Soham De, Samuel L. Smith, "Characterizing signal propagation to close
    the performance gap in unnormalized ResNets", arXiv 2101.08692.
    """
    if not depths or min(depths) < 1:
        raise ValueError(
            f"depths={tuple(depths)}: one or more stages of one or more blocks are due"
        )
    one = jnp.ones(())
    variance, received = one, []
    for depth in depths:
        for block in range(depth):
            received.append(variance)
            variance = (one if block == 0 else variance) + alpha**2
    pre = jax.lax.rsqrt(jnp.stack(received))
    ones = jnp.ones_like(pre)
    return Wire(ones, alpha * skip_gain * ones, pre)


def rezero(*, where: tree.Where = "**/alpha") -> Callable[[PRNGKeyArray, PyTree], PyTree]:
    """ReZero: ``x <- x + alpha * F(x)``, with the trained numbers `alpha` starting at zero.

    Returns ``init(key, params) -> params`` with zeros at the leaves that `where` chooses: one
    number per layer, which the attention and the feed-forward branch share. Every block is then
    exactly the identity, and so is its Jacobian. At the first step alpha alone has a gradient;
    F's is exactly zero until alpha moves.

    There must be no normalization after the sum, nor at the end, and F must be initialized as
    usual: if F starts at zero as well, no gradient is ever anything but zero. Keep alpha out of
    weight decay (jaxkit's default `where` does), and at hundreds of layers give it a smaller or an
    adaptive rate: all alphas move in the same direction at first, and plain SGD at 0.03 diverges at
    128 layers.

    Args:
      where: chooses the leaves that hold alpha.

    Raises:
      ValueError: a weight beside (or below the parent of) an alpha that is all zero, where its
        values are known.

    >>> params = {"block": {"alpha": jnp.ones(()), "kernel": jnp.ones((2, 2))}}
    >>> rezero()(jax.random.key(0), params)["block"]["alpha"].item()
    0.0

    Reference: Thomas Bachlechner, Bodhisattwa Prasad Majumder, Huanru Henry Mao, Garrison W.
    Cottrell, Julian McAuley, "ReZero is All You Need: Fast Convergence at Large Depth",
    arXiv 2003.04887.
    """

    def init(key: PRNGKeyArray, params: PyTree) -> PyTree:
        del key
        leaves = tree.flatten(params)
        blocks = {path.rpartition("/")[0] + "/" for path in tree.chosen(params, where)}
        for path, leaf in leaves.items():
            known = isinstance(leaf, jax.Array | np.ndarray) and tree.concrete(leaf)
            inside = any(path.startswith(block) for block in blocks if block != "/")
            weight = inside and known and leaf.size and tree.is_weight(path, leaf)
            if weight and not np.asarray(leaf).any():
                raise ValueError(
                    f"{path!r} is all zero: with alpha = 0 no gradient of its block would ever be "
                    "anything but zero; initialize the branch as usual"
                )
        return tree.map(lambda _, leaf: jnp.zeros(leaf.shape, leaf.dtype), params, where=where)

    return init
