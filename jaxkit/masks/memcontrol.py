"""Search over what to fine-tune: units that are switched on by bits, and what to measure."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxkit import tree
from jaxkit.masks.select import Mask
from jaxkit.masks.train import constrain

__all__ = ["memcontrol", "memorization", "switch"]


def switch(bits: Bool[Array, " n"], params: PyTree, units: Sequence[tree.Where]) -> Mask:
    """Return the mask that trains unit i where bit i is on, and freezes every other leaf.

    Args:
      bits: one a unit; traced bits compile nothing anew, and vmap over them.
      params: any tree.
      units: one `where` a unit: which leaves it owns.

    Raises:
      ValueError: bits that are not as many as the units, or a leaf of two units.

    >>> params = {"a": jnp.ones(2), "b": jnp.ones(1), "c": jnp.ones(1)}
    >>> mask = switch(jnp.array([True, False]), params, ["a", ["b", "c"]])
    >>> {path: m.tolist() for path, m in mask.items()}
    {'a': [True, True], 'b': [False], 'c': [False]}
    """
    if jnp.shape(bits) != (len(units),):
        raise ValueError(f"bits of shape {jnp.shape(bits)} came, and {(len(units),)} were due")
    owner: dict[str, int] = {}
    for i, where in enumerate(units):
        for path in tree.chosen(params, where):
            if path in owner:
                raise ValueError(f"{path!r} belongs to the units {owner[path]} and {i}")
            owner[path] = i
    bits = jnp.asarray(bits, bool)

    def leaf(path, w):
        if not tree.is_array(w):
            return w
        on = bits[owner[path]] if path in owner else False
        return jnp.broadcast_to(on, w.shape)

    return jax.tree.map(leaf, tree.paths(params), params)


def memcontrol(
    tx: optax.GradientTransformation,
    params: PyTree,
    units: Sequence[tree.Where],
    fit: Callable[[optax.GradientTransformation, PyTree], PyTree],
    evaluate: Callable[[PyTree], Any],
) -> Callable[[Bool[Array, " n"]], Any]:
    """Return the objective of a search over what to fine-tune: bits -> rewards.

    objective(b) = evaluate(fit(constrain(tx, switch(b, params, units)), params)). It is pure: one
    compilation serves all masks, and vmap tries several at once. In the paper the rewards are
    `memorization` and an image quality, both to be minimized, the search is Optuna's, and one
    point of the Pareto front is taken (`pareto`).

    Args:
      tx: the optimizer of the inner problem.
      params: the pretrained params.
      units: one `where` a unit (the insertion sites of an adapter, say).
      fit: ``fit(tx, params) -> params``, the fine-tuning.
      evaluate: ``evaluate(params) -> rewards``.

    Reference: R. Dutt et al., "MemControl: Mitigating Memorization in Diffusion Models via
    Automated Parameter Selection", arXiv:2405.19458.

    >>> step = lambda tx, p: optax.apply_updates(p, tx.update(p, tx.init(p), p)[0])
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(1)}
    >>> moved = lambda p: jnp.array([jnp.sum(p["a"] != 1), jnp.sum(p["b"] != 1)])
    >>> objective = memcontrol(optax.sgd(0.1), params, ["a", "b"], step, moved)
    >>> jax.vmap(objective)(jnp.array([[True, False], [False, True]])).tolist()
    [[2, 0], [0, 1]]
    """
    return lambda bits: evaluate(fit(constrain(tx, switch(bits, params, units)), params))


def memorization(
    conditional: Float[Array, "batch ..."], unconditional: Float[Array, "batch ..."]
) -> dict[str, Float[Array, ""]]:
    """Measure how far a prompt steers a denoiser: d_i = ||eps(x_t, t, c) - eps(x_t, t, {})||_2.

    Large where the prompt recalls one training image. Average over batches, that is over noise and
    times t.

    Args:
      conditional: the noise predicted with the prompts.
      unconditional: with the empty prompt, for the same noisy images and times.

    Returns:
      The mean and the maximum of d over the batch.

    Raises:
      ValueError: different shapes.

    Reference: R. Dutt et al., arXiv:2405.19458, after Y. Wen, Y. Liu, C. Chen, L. Lyu, "Detecting,
    Explaining, and Mitigating Memorization in Diffusion Models", arXiv:2407.21720.

    >>> found = memorization(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.zeros((2, 2)))
    >>> float(found["mean"]), float(found["max"])
    (2.5, 5.0)
    """
    if jnp.shape(conditional) != jnp.shape(unconditional):
        shapes = f"{jnp.shape(conditional)} and {jnp.shape(unconditional)}"
        raise ValueError(f"the predictions have the shapes {shapes}, and equal ones are due")
    gap = tree.float32(conditional) - tree.float32(unconditional)
    distance = jnp.linalg.norm(gap.reshape(len(gap), -1), axis=1)
    return {"mean": distance.mean(), "max": distance.max()}
