"""What a model costs, entry by entry: multiply-adds of any apply function, read off its jaxpr."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxkit import tree
from jaxkit.trace import _jaxpr, _uses
from jaxkit.trace._uses import Tag
from jaxkit.trace.axes import make_jaxpr

__all__ = ["Costs", "costs", "flops"]


class Costs(NamedTuple):
    """What one call of a function costs.

    Attributes:
      entries: a tree like params: the multiply-adds in which an entry of the leaf takes part (for a
        dense kernel the number of examples and positions; 0 for a bias, a gain, an embedding). On
        average, where the entries of a leaf differ.
      sizes: a tree like params: the number of entries.
      between: the multiply-adds of activations with activations (attention), and of leaves with
        leaves.
      notes: what was not counted, or only guessed, with the user's lines.
    """

    entries: PyTree
    sizes: PyTree
    between: float
    notes: tuple[str, ...]


def costs(apply_fn: Callable[..., Any], params: PyTree, *args: Any) -> Costs:
    """Count the multiply-adds of ``apply_fn(params, *args)``, per entry of every leaf.

    Contractions count (dot_general, convolutions, ragged_dot_general), through jit, remat, scan and
    custom derivatives; taps of a convolution that meet padding count too. Of the branches of a
    cond the dearest counts, of a while loop one iteration (`Costs.notes` says where).

    Args:
      apply_fn: ``apply_fn(params, *args)``.
      params: a tree of arrays, or of their shapes.
      *args: arrays, or their shapes; the batch counts: give one example for the cost of one.

    Raises:
      TypeError: a leaf or an argument that is no array.

    >>> params = {"bias": np.ones(5), "kernel": np.ones((3, 5))}
    >>> found = costs(lambda p, x: x @ p["kernel"] + p["bias"], params, np.ones((2, 3)))
    >>> found.entries, found.between
    ({'bias': 0, 'kernel': 2}, 0)
    """
    jaxpr = make_jaxpr(apply_fn, params, args)
    leaves = tree.flatten(params)
    tags = [Tag(False, frozenset({path})) for path in leaves]
    tags += [Tag(True)] * (len(jaxpr.jaxpr.invars) - len(tags))
    sizes = {
        path: int(np.size(leaf)) if tree.is_array(leaf) else 1 for path, leaf in leaves.items()
    }
    notes: dict[str, None] = {}
    total = _count(jaxpr, tags, _Around(1, dict.fromkeys(leaves, 1), sizes), notes)
    structure = jax.tree.structure(params)
    return Costs(
        jax.tree.unflatten(structure, [_whole(total[path]) for path in leaves]),
        jax.tree.unflatten(structure, list(sizes.values())),
        _whole(total[None]),
        tuple(notes),
    )


def flops(
    found: Costs,
    mask: PyTree | None = None,
    *,
    training: bool = False,
    dense_gradients: float = 0.0,
) -> float:
    """Return the FLOPs of one forward pass, or of one training step, under a mask.

    f = 2 (sum_l entries_l kept_l + between), two to a multiply-add. A training step is 3 f:
    forward, the gradient of the activations, and that of the weights. In the steps in which the
    dense gradient of the weights is computed it is 2 f + f_dense.

    FLOPs are linear in the mask, so the mean over training of the masks in force gives the mean
    cost of training: ``flops(found, mean_mask, training=True)`` for dense-to-sparse training, which
    costs more than the sparsity it ends at. An optimizer that computes dense gradients and then
    masks them (as all of `sparse` do on today's hardware) saves nothing: these are the FLOPs that
    have to be done.

    Args:
      found: what `costs` returned, and so for its batch.
      mask: a tree like params of bools, or of numbers in [0, 1] (a mean of masks), or of one number
        a leaf (densities); default: dense.
      training: a training step instead of a forward pass.
      dense_gradients: the share of the training steps that need the dense gradient: 1 / (every + 1)
        in RigL's account, 1 where every step looks at it.

    Raises:
      ValueError: a mask that does not fit, or dense_gradients outside [0, 1].

    References:
      U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", arXiv:1911.11134 (its
      account of training).
      S. Liu, Z. Wang, "Ten Lessons We Have Learned in the New "Sparseland": A Short Handbook for
      Sparse Neural Network Researchers", arXiv:2302.02596 (training and inference told apart).

    >>> params = {"kernel": np.ones((3, 5))}
    >>> found = costs(lambda p, x: x @ p["kernel"], params, np.ones((1, 3)))
    >>> flops(found), flops(found, {"kernel": 0.2}), flops(found, {"kernel": 0.2}, training=True)
    (30.0, 6.0, 18.0)
    """
    if not 0 <= dense_gradients <= 1:
        raise ValueError(f"dense_gradients is {dense_gradients}, and a share in [0, 1] is due")
    sizes = jax.tree.leaves(found.sizes)
    kept = sizes
    if mask is not None:
        if jax.tree.structure(mask) != jax.tree.structure(found.sizes):
            raise ValueError("the mask does not fit: it has another structure than the params")
        kept = []
        for (path, m), n in zip(tree.flatten(mask).items(), sizes, strict=True):
            if np.size(m) not in (1, n):
                raise ValueError(f"the mask has {np.size(m)} entries at {path!r}, and {n} are due")
            kept.append(float(np.mean(np.asarray(m, np.float64))) * n if n else 0)
    uses = jax.tree.leaves(found.entries)
    cost = lambda counts: (
        2.0 * (found.between + sum(u * k for u, k in zip(uses, counts, strict=True)))
    )
    forward = cost(kept)
    if not training:
        return forward
    return 3 * forward + dense_gradients * (cost(sizes) - forward)


# ---------------------------------------------------------------------------------------- counting


Total = Any  # a Counter of floats, by path


class _Around(NamedTuple):
    """How often what is here runs, and how often with each slice of a leaf; sizes of the slices."""

    times: float
    each: dict[str, float]
    sizes: dict[str, int]


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _count(jaxpr: Any, tags: Sequence[Tag], around: _Around, notes: dict[str, None]) -> Total:
    """Return the multiply-adds per entry by path, and those of no leaf under None."""
    env = dict.fromkeys(jaxpr.jaxpr.constvars, Tag()) | dict(
        zip(jaxpr.jaxpr.invars, tags, strict=True)
    )
    total: Total = Counter()
    for eqn in jaxpr.jaxpr.eqns:
        own = [Tag() if _jaxpr.is_literal(v) else env[v] for v in eqn.invars]
        total.update(_count_eqn(eqn, own, around, notes))
        env |= zip(eqn.outvars, _uses.step(eqn, own).tags, strict=True)
    return total


def _count_eqn(eqn: Any, tags: list[Tag], around: _Around, notes: dict[str, None]) -> Total:
    name, params = eqn.primitive.name, eqn.params
    if name in _jaxpr.CALLS:
        return _count(_jaxpr.called(eqn), tags, around, notes)
    if name == "scan":
        a = params["num_consts"]
        b = a + params["num_carry"]
        consts, xs = tags[:a], tags[b:]
        carry, _ = _uses.loop(params["jaxpr"], consts, tags[a:b], xs)
        n = params["length"]
        sliced = frozenset().union(*(t.leaves for t in xs))
        each = {path: k if path in sliced else k * n for path, k in around.each.items()}
        sizes = {p: k // n if p in sliced and n else k for p, k in around.sizes.items()}
        inside = _Around(around.times * n, each, sizes)
        return _count(params["jaxpr"], [*consts, *carry, *xs], inside, notes)
    if name == "cond":
        branches = [_count(branch, tags[1:], around, notes) for branch in params["branches"]]
        if any(branches):
            notes[f"the dearest branch of `cond` at {_jaxpr.source(eqn)}"] = None
        size = lambda path: around.sizes[path] if path is not None else 1
        return max(branches, key=lambda c: sum(uses * size(path) for path, uses in c.items()))
    if name == "while":
        a = params["cond_nconsts"]
        b = a + params["body_nconsts"]
        carry, _ = _uses.loop(params["body_jaxpr"], tags[a:b], tags[b:], [])
        inside = _count(params["body_jaxpr"], [*tags[a:b], *carry], around, notes)
        if inside:
            notes[f"one iteration of `while` at {_jaxpr.source(eqn)}"] = None
        return inside
    if name in _uses.OPAQUE:
        notes[f"nothing of `{name}` at {_jaxpr.source(eqn)}"] = None
    if name not in _uses.CONTRACTIONS:
        return Counter()
    macs = _multiply_adds(eqn)
    entered = _uses.entries(eqn, tags)
    if len(set(entered.values())) != 1:  # two activations, or two leaves
        return Counter({None: macs * around.times})
    total: Total = Counter()
    for path, i in entered.items():
        alone = len(tags[i].leaves) == 1  # else it is a part of the operand
        size = around.sizes[path] if alone else math.prod(eqn.invars[i].aval.shape)
        total.update({path: macs / max(size, 1) * around.each[path]})
    return total


def _multiply_adds(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    left, right = (v.aval.shape for v in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        return out * math.prod(right) // max(right[params["dimension_numbers"].rhs_spec[0]], 1)
    numbers = params.get("dimension_numbers")
    if name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (contracted, _), _ = numbers
    return out * math.prod(left[d] for d in contracted)
