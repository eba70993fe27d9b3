"""Stochastic depth: residual branches that are skipped at random in training."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates

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
    branch: Callable[[Array], Any],
    x: Array,
    survival: float | Array,
    *,
    state: PyTree | None = None,
    mode: Literal["batch", "row"] = "batch",
    scale: Literal["test", "train"] = "test",
) -> Any:
    """Return b F(x), the residual branch F dropped with probability 1 - survival.

    Add it to the skip connection: ``jax.nn.relu(skip(x) + stochastic_depth(key, f, x, p))``. In the
    paper's form (mode "batch", scale "test") one b ~ Bernoulli(p) is drawn for the whole batch, F
    is not even computed where b = 0, and at test time the branch is multiplied by p. With scale
    "train", as in later code, it is multiplied by b / p in training and by 1 at test time: the same
    in expectation. One or the other, for training and for inference.

    The branch is a pure function of x that closes over its params: of linen, ``block.apply``; of
    NNX, ``nnx.merge(graph, params, state, copy=True)``. One with BatchNorm returns its new
    statistics too, as in the example below.

    (Layers may be called inline in a compact linen module if they have no state but params, and the
    module is initialized with key None: the branch is traced apart, and what it writes is lost.)

    Args:
      key: a typed key, the same on all devices in mode "batch"; None: predict.
      branch: ``F(x)``, of the output's shape; with a state, ``(F(x), new state)``.
      x: examples along the first axis.
      survival: p, in [0, 1] (above 0 for scale "train"); it may be traced.
      state: of the branch, as it was: what is returned for it where the branch is dropped. A tree
        like the new one; None: the branch has none.
      mode: one draw for the "batch", or for each "row" (example); then F is computed for all.
      scale: when to scale.

    Returns:
      b F(x), and with a state the pair of it and the new state.

    Raises:
      ValueError: survival outside its range, another mode or scale.
      TypeError: a legacy uint32 key.

    Reference: as for `linear_decay`.

    >>> x = jnp.ones((2, 3))
    >>> stochastic_depth(None, lambda x: 4 * x, x, 0.5)[0].tolist()
    [2.0, 2.0, 2.0]
    >>> from flax import linen
    >>> block = linen.BatchNorm(use_running_average=False)
    >>> stats = dict(block.init(jax.random.key(0), x))
    >>> params = stats.pop("params")
    >>> branch = lambda x: block.apply({"params": params, **stats}, x, mutable=["batch_stats"])
    >>> y, new = stochastic_depth(jax.random.key(0), branch, x, 0.0, state=stats)
    >>> new["batch_stats"]["mean"].tolist()  # dropped: as it was
    [0.0, 0.0, 0.0]
    """
    if mode not in ("batch", "row") or scale not in ("test", "train"):
        raise ValueError(f"mode={mode!r} or scale={scale!r} is unknown")
    if violates(lambda p: (p >= 0) & (p <= 1) & ((p > 0) | (scale == "test")), survival):
        raise ValueError(f"survival={survival}, and a probability was due (above 0 to divide by)")
    full = branch if state is not None else lambda x: (branch(x), None)
    out = lambda y, new: y if state is None else (y, new)
    if key is None:
        y, new = full(x)
        return out((survival * y).astype(y.dtype) if scale == "test" else y, new)
    tree.check_key(key)
    factor = 1.0 if scale == "test" else 1 / jnp.asarray(survival)
    if mode == "row":
        y, new = full(x)
        keep = jax.random.bernoulli(key, survival, x.shape[:1])
        keep = keep.reshape(keep.shape + (1,) * (y.ndim - 1))
        return out(jnp.where(keep, factor * y, 0).astype(y.dtype), new)
    # traced once, since a layer that is called twice would be two layers to linen
    traced, (shape, new) = jax.make_jaxpr(full, return_shape=True)(x)

    def run(x):
        y, *leaves = jaxpr_as_fun(traced)(*jax.tree.leaves(x))
        return (factor * y).astype(shape.dtype), jax.tree.unflatten(jax.tree.structure(new), leaves)

    def skip(x):
        same = lambda old, s: jnp.asarray(old, s.dtype)
        return jnp.zeros(shape.shape, shape.dtype), jax.tree.map(same, state, new)

    return out(*jax.lax.cond(jax.random.bernoulli(key, survival), run, skip, x))


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
