"""Synaptic flow: the score that asks the network alone, and pruning in rounds, which it needs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxkit import _rank as rank
from jaxkit import tree
from jaxkit.masks.select import Mask, check_sparsity, kept_count
from jaxkit.masks.sensitivity import snip

__all__ = ["prune_in_rounds", "synflow", "synflow_mask"]


def synflow(apply_fn: Callable[..., Any], params: PyTree, inputs: Any, *args: Any) -> PyTree:
    """Score every entry by the synaptic flow through it: s = |w| dR/d|w|, without data.

    R is the sum of all outputs of the network with |w| for its params and ones for its inputs: in
    a bias-free ReLU net, the sum over all paths of the product of |w| along the path, and s that
    over the paths through the entry. So what flows into a hidden unit flows out of it, and through
    every layer flows R. One shot of it still empties layers: it is meant to be taken again after
    each small step of pruning, as `synflow_mask` does.

    Args:
      apply_fn: ``apply_fn(params, inputs, *args)``, as it predicts (no dropout, BatchNorm with
        its running statistics).
      params: any tree; leaves that are not inexact arrays pass through.
      inputs: a tree of float arrays or of their shapes; ones take their place. One example is
        enough. (Tokens have no ones: take the network from its embeddings on.)
      *args: handed through, model state for one.

    Returns:
      A tree like params of float32.

    Raises:
      TypeError: inputs that are not floats.
      ValueError: scores that overflow (eagerly). In a bias-free net, any constant factor of a leaf
        changes no ranking: scale the params down, or take float64.

    Reference: H. Tanaka, D. Kunin, D. L. K. Yamins, S. Ganguli, "Pruning neural networks without
    any data by iteratively conserving synaptic flow", arXiv:2006.05467.

    >>> apply = lambda params, x: x @ params["up"] @ params["down"]
    >>> params = {"down": jnp.array([[3.0], [1.0]]), "up": jnp.array([[1.0, -2.0]])}
    >>> {name: s.ravel().tolist() for name, s in synflow(apply, params, jnp.zeros((1, 1))).items()}
    {'down': [3.0, 2.0], 'up': [3.0, 2.0]}
    """
    for path, x in tree.flatten(inputs).items():
        if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"float inputs are due, and inputs/{path} is {jnp.result_type(x)}")
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)

    def flow(params, _):
        outputs = jax.tree.leaves(apply_fn(params, ones, *args))
        return sum((tree.float32(y).sum() for y in outputs), jnp.float32(0))

    size = tree.map(lambda path, w: jnp.abs(w), params, where=tree.every(params))
    scores = snip(flow, size, None)
    _check_finite(scores)
    return scores


def _check_finite(scores: PyTree) -> None:
    for path, s in tree.chosen(scores, tree.every(scores)).items():
        finite = jnp.isfinite(s).all()
        if tree.concrete(finite) and not finite:
            raise ValueError(
                f"the scores of {path!r} are not finite: the flow through the network overflows; "
                "scale the params down, or take float64"
            )


def prune_in_rounds(
    score_fn: Callable[[PyTree], PyTree],
    params: PyTree,
    sparsity: float | Array,
    *,
    rounds: int = 100,
    where: tree.Where = None,
) -> Mask:
    """Prune step by step, with new scores after every step: density (1 - sparsity)^(r / rounds).

    Round r = 1 ... rounds scores the params masked so far and keeps, among what is left, the
    entries with the largest scores over all chosen leaves together. The same share of what is left
    goes in every round. One scan: under jit or not, `score_fn` is traced once.

    Args:
      score_fn: ``score_fn(masked params) -> scores`` (`synflow`, or `snip` on a batch).
      params: any tree.
      sparsity: the fraction of zeros at the end, in [0, 1); a number (then counts are exact) or a
        traced scalar.
      rounds: how many steps.
      where: the leaves to prune; default: the weights.

    Returns:
      A mask: exactly round-half-even((1 - sparsity) n) entries, all True at other leaves.

    Raises:
      ValueError: sparsity outside [0, 1), no round, or scores that are not finite (eagerly).

    References: H. Tanaka et al., arXiv:2006.05467; P. de Jorge et al., "Progressive
    Skeletonization: Trimming more fat from a network at initialization", arXiv:2006.09081 (`snip`
    in rounds).

    >>> params = {"kernel": jnp.array([[4.0, -3.0, 2.0, 1.0]])}
    >>> score = lambda params: jax.tree.map(jnp.square, params)
    >>> prune_in_rounds(score, params, 0.5, rounds=2)["kernel"].tolist()
    [[True, True, False, False]]
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, and at least one is due")
    where = tree.select(params, where)
    leaves = tree.chosen(params, where)
    n = sum(w.size for w in leaves.values())
    xp: Any = math if isinstance(sparsity, int | float | np.number) else jnp
    fall = xp.log1p(-sparsity) / rounds
    each = [*(-xp.expm1(r * fall) for r in range(1, rounds)), sparsity]
    counts = [rank.as_pair(kept_count(s, n)) for s in each]
    counts = rank.Pair(*(jnp.stack(words) for words in zip(*counts, strict=True)))

    def step(live, count):
        cut = lambda path, w: jnp.where(live[path], w, jnp.zeros_like(w))
        scores = tree.chosen(score_fn(tree.map(cut, params, where=where)), where)
        finite = [jnp.isfinite(s).all() for s in scores.values()]
        new = tree.topk(scores, count, where=tree.every(scores), within=live)
        return new, jnp.all(jnp.array(finite, bool))

    dense = {path: jnp.ones_like(w, bool) for path, w in leaves.items()}
    live, finite = jax.lax.scan(step, dense, counts)
    if tree.concrete(finite) and not bool(finite.all()):
        raise ValueError(
            f"the scores of round {int(jnp.argmin(finite)) + 1} are not finite: where they "
            "overflow, scale the params down, or take float64"
        )
    nothing = jax.tree.map(lambda _: False, params)
    exempt = tree.topk(params, 0, where=nothing)  # all True
    return jax.tree.map(
        lambda bit, path, m: live[path] if bit else m, where, tree.paths(params), exempt
    )


def synflow_mask(
    apply_fn: Callable[..., Any],
    params: PyTree,
    inputs: Any,
    *args: Any,
    sparsity: float | Array,
    rounds: int = 100,
    where: tree.Where = None,
) -> Mask:
    """Prune by synaptic flow at initialization, without data: `synflow` in 100 rounds.

    ``prune_in_rounds(lambda p: synflow(apply_fn, p, inputs, *args), params, sparsity)``. In a
    bias-free net no layer is emptied before the whole network has to be: the weakest entry of a
    layer that thins out carries a growing share of a flow that is the same through all layers.

    Args:
      apply_fn, params, inputs, *args: as for `synflow`.
      sparsity, rounds, where: as for `prune_in_rounds`.

    Raises:
      TypeError, ValueError: what `synflow` and `prune_in_rounds` raise.

    Reference: H. Tanaka, D. Kunin, D. L. K. Yamins, S. Ganguli, "Pruning neural networks without
    any data by iteratively conserving synaptic flow", arXiv:2006.05467.

    >>> apply = lambda params, x: x @ params["up"] @ params["down"]
    >>> params = {"down": jnp.array([[3.0], [1.0]]), "up": jnp.array([[1.0, -2.0]])}
    >>> mask = synflow_mask(apply, params, jnp.zeros((1, 1)), sparsity=0.5, rounds=2)
    >>> mask["up"].tolist(), mask["down"].tolist()
    ([[True, False]], [[True], [False]])
    """
    score = lambda masked: synflow(apply_fn, masked, inputs, *args)
    return prune_in_rounds(score, params, sparsity, rounds=rounds, where=where)
