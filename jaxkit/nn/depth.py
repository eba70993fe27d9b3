"""Stochastic depth: residual branches that are skipped at random in training."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxkit import tree

__all__ = ["fold_depth", "linear_decay", "stochastic_depth"]


def linear_decay(blocks: int, last: float = 0.5) -> Float[Array, " blocks"]:
    """Return the survival probabilities p_l = 1 - (l / L) (1 - p_L) of blocks l = 1, ..., L.

    The expected depth at p_L = 1/2 is (3 L - 1) / 4.

    Args:
      blocks: L.
      last: p_L, in (0, 1].

    Raises:
      ValueError: a probability outside (0, 1].

    Reference: G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Weinberger, "Deep Networks with Stochastic
    Depth", arXiv:1603.09382.

    >>> linear_decay(4).tolist()
    [0.875, 0.75, 0.625, 0.5]
    """
    if not 0 < last <= 1:
        raise ValueError(f"last={last}, and a probability in (0, 1] was due")
    return 1 - jnp.arange(1, blocks + 1) / blocks * (1 - last)


def stochastic_depth(
    key: PRNGKeyArray | None,
    branch: Callable[[Array], Array],
    x: Array,
    survival: float | Array,
    *,
    mode: Literal["batch", "row"] = "batch",
    scale: Literal["test", "train"] = "test",
) -> Array:
    """Return b F(x), the residual branch F dropped with probability 1 - survival.

    Add it to the skip connection: ``jax.nn.relu(skip(x) + stochastic_depth(key, f, x, p))``. In the
    paper's form (mode "batch", scale "test") one b ~ Bernoulli(p) is drawn for the whole batch, F
    is not even computed where b = 0, and at test time the branch is multiplied by p. With scale
    "train", as in later code, it is multiplied by b / p in training and by 1 at test time: the same
    in expectation. One or the other, for training and for inference.

    Args:
      key: a typed key, the same on all devices in mode "batch"; None: predict.
      branch: ``F(x)``, of the output's shape.
      x: examples along the first axis.
      survival: p, in [0, 1] (above 0 for scale "train"); it may be traced.
      mode: one draw for the "batch", or for each "row" (example); then F is computed for all.
      scale: when to scale.

    Raises:
      ValueError: survival outside its range, another mode or scale.
      TypeError: a legacy uint32 key.

    Reference: as for `linear_decay`.

    >>> x = jnp.ones((2, 3))
    >>> stochastic_depth(None, lambda x: 4 * x, x, 0.5)[0].tolist()
    [2.0, 2.0, 2.0]
    """
    if mode not in ("batch", "row") or scale not in ("test", "train"):
        raise ValueError(f"mode={mode!r} or scale={scale!r} is unknown")
    if tree.concrete(survival) and not (0 <= survival <= 1 and (survival > 0 or scale == "test")):
        raise ValueError(f"survival={survival}, and a probability was due (above 0 to divide by)")
    if key is None:
        y = branch(x)
        return (survival * y).astype(y.dtype) if scale == "test" else y
    tree.check_key(key)
    factor = 1.0 if scale == "test" else 1 / jnp.asarray(survival)
    if mode == "row":
        y = branch(x)
        keep = jax.random.bernoulli(key, survival, x.shape[:1])
        keep = keep.reshape(keep.shape + (1,) * (y.ndim - 1))
        return jnp.where(keep, factor * y, 0).astype(y.dtype)
    shape = jax.eval_shape(branch, x)
    skip = lambda x: jnp.zeros(shape.shape, shape.dtype)
    run = lambda x: (factor * branch(x)).astype(shape.dtype)
    return jax.lax.cond(jax.random.bernoulli(key, survival), run, skip, x)


def fold_depth(
    kernel: Array, bias: Array | None, survival: float | Array
) -> tuple[Array, Array | None]:
    """Fold the test-time factor into a branch's last affine layer: (p W, p b).

    So that inference needs no factor. Of a normalization, its scale and bias.

    Reference: as for `linear_decay`.

    >>> fold_depth(jnp.ones(2), None, 0.5)[0].tolist()
    [0.5, 0.5]
    """
    times = lambda w: (survival * w).astype(w.dtype)
    return times(kernel), None if bias is None else times(bias)
