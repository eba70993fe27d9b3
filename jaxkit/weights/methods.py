"""Methods of merging: what `merge` does to the deltas of each leaf. See `Method`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.weights.merge import Deltas, Method, combine, total
from jaxkit.weights.sparsify import Scope, after, drop, scoped, window

Weights = Float[Array, " models"] | list[float] | tuple[float, ...] | PyTree | None

__all__ = [
    "average",
    "breadcrumbs",
    "dare",
    "model_stock",
    "task_arithmetic",
    "ties",
]


def given(weights: Weights) -> Callable[[str, Array], Any]:
    """Return ``(path, deltas) -> coefficients`` of what a caller gave, known ones as numpy's."""
    if weights is None:
        return lambda path, deltas: np.ones(len(deltas), np.float32)
    shared = _shared(weights)
    each = {} if shared else tree.flatten(weights)

    def of(path: str, deltas: Array) -> Any:
        if not shared and path not in each:
            raise ValueError(f"weights has nothing for {path!r}")
        c = weights if shared else each[path]
        dtype = jnp.finfo(deltas.dtype).dtype
        c = np.asarray(c, dtype) if tree.concrete(c) else jnp.asarray(c, dtype)
        if c.shape[:1] != deltas.shape[:1]:
            leaf = "" if shared else f" of {path!r}"
            raise ValueError(f"weights of shape {c.shape} for {len(deltas)} models{leaf}")
        return c

    return of


def _shared(weights: Weights) -> bool:
    """Tell whether all leaves have the same weights."""
    return weights is None or isinstance(weights, list | tuple | np.ndarray | jax.Array)


def _everywhere(
    combine: Callable[[str, Array, Any], Array], weights: Weights
) -> Callable[[Array], Array] | None:
    """Return what is the same at every leaf, unless the weights are those of leaves."""
    return (lambda deltas: combine("", deltas, None)) if _shared(weights) else None


def average(weights: Weights = None, *, normalize: bool = True) -> Method:
    """Average the models: theta = sum_i c_i theta_i / sum_i c_i. Leaf by leaf.

    The uniform soup, a weighted one, the average of checkpoints of one run or of several; by leaf,
    the learned soup. Works with and without a base; with one, `scale` goes on from there.

    Fusing is an average of the bodies of models that were tuned on different tasks, with a fresh
    head: the head stays what it is in the base, bit for bit::

        start = merge(fresh, models, average(), where=lambda path, leaf: not is_head(path))

    The running average of one training is `running_mean`, and with exponential weights
    ``optax.incremental_update(params, average, step_size)`` (`optax.ema` averages updates).

    Args:
      weights: one number a model, or a tree like params of vectors of them or of arrays
        (models, *shape); all equal by default. They may be traced.
      normalize: divide by their sum.

    Raises:
      ValueError: (when merging) another number of weights than of models, or weights that sum to 0.

    References: M. Wortsman, G. Ilharco, S. Y. Gadre, R. Roelofs, R. Gontijo-Lopes, A. S. Morcos,
    H. Namkoong, A. Farhadi, Y. Carmon, S. Kornblith, L. Schmidt, "Model soups: averaging weights of
    multiple fine-tuned models improves accuracy without increasing inference time",
    arXiv:2203.05482. L. Choshen, E. Venezian, N. Slonim, Y. Katz, "Fusing finetuned models for
    better pretraining", arXiv:2204.03044. F. D. Schmidt, I. Vulić, G. Glavaš, "Free Lunch: Robust
    Cross-Lingual Transfer via Model Checkpoint Averaging", arXiv:2305.16834.

    >>> from jaxkit import weights
    >>> models = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([5.0, 2.0])}]
    >>> weights.merge(None, models, average([3.0, 1.0]))["w"].tolist()
    [2.0, 2.0]
    """
    coefficients = given(weights)

    def weighted(path: str, deltas: Array, aux: Any) -> Array:
        c = coefficients(path, deltas)
        empty = (c.sum(0) == 0).any()
        if normalize and tree.concrete(empty) and empty:
            leaf = "" if _shared(weights) else f" of {path!r}"
            raise ValueError(f"the weights{leaf} sum to 0")
        return combine(deltas, c, normalize=normalize)

    return Method(weighted, needs_base=False, blend=_everywhere(weighted, weights))


def task_arithmetic(weights: Weights = None) -> Method:
    """Add task vectors: theta = theta_0 + scale * sum_i c_i tau_i. Leaf by leaf.

    A sum, not a mean: with more tasks the best scale gets smaller (the paper: 0.3 to 0.5 for
    eight). A negative weight takes a task away, and c = (1, 1, -1) is the analogy.

    Args:
      weights: as for `average`, not normalized; 1 by default.

    Reference: G. Ilharco, M. T. Ribeiro, M. Wortsman, S. Gururangan, L. Schmidt, H. Hajishirzi,
    A. Farhadi, "Editing Models with Task Arithmetic", arXiv:2212.04089.

    >>> from jaxkit import weights
    >>> base, tuned = {"w": jnp.array([1.0, 1.0])}, {"w": jnp.array([2.0, 1.0])}
    >>> weights.merge(base, [tuned], task_arithmetic([-1.0]))["w"].tolist()
    [0.0, 1.0]
    """
    return average(weights, normalize=False)._replace(needs_base=True)


def ties(
    *,
    sparsity: float | Array = 0.8,
    weights: Weights = None,
    scope: Scope = "tree",
    reduce: str = "mean",
) -> Method:
    r"""Trim, elect signs, merge those that agree (TIES).

    Of each tau_i the fraction `sparsity` with the smallest magnitudes becomes 0; the elected sign
    of an entry is g = sign(sum_i c_i tau_i); and

    .. math:: \tau = \sum_{i \in A} c_i \tau_i / \sum_{i \in A} c_i,
        \quad A = \{i : \mathrm{sign}(c_i \tau_i) = g\},

    0 where A is empty. The paper's scale is 1, or the best of 0.8 to 3.

    Args:
      sparsity: the fraction of zeros that trimming makes, in [0, 1); 0 trims nothing. The paper
        keeps 20%.
      weights: as for `average`.
      scope: "tree" ranks all entries of a model together, as the paper does (two passes over the
        leaves); "leaf" each leaf by itself (as mergekit does); an integer each line along an axis.
      reduce: "mean" over those that agree, or their "sum".

    Exactly round-half-even(sparsity n) entries are trimmed, equal magnitudes in the order of the
    flat index. (The authors' code keeps all that equal the threshold; mergekit keeps
    floor((1 - sparsity) n).) Where the sum is 0 the sign is + (the authors: the majority sign of
    the whole vector; mergekit: +). It matters only where deltas cancel exactly.

    Raises:
      ValueError: a sparsity outside [0, 1), a scope that there is not; no base (when merging).
      TypeError: (when merging) complex leaves, which have no sign.

    Reference: P. Yadav, D. Tam, L. Choshen, C. Raffel, M. Bansal, "TIES-Merging: Resolving
    Interference When Merging Models", arXiv:2306.01708.

    >>> from jaxkit import weights
    >>> base = {"w": jnp.zeros(4)}
    >>> a, b = {"w": jnp.array([4.0, 1.0, 3.0, 0.1])}, {"w": jnp.array([2.0, -3.0, -2.0, 0.1])}
    >>> weights.merge(base, [a, b], ties(sparsity=0.25))["w"].tolist()
    [3.0, -3.0, 3.0, 0.0]
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce={reduce!r}; 'mean' or 'sum' was due")
    coefficients = given(weights)

    def elect(path: str, deltas: Array, aux: Any) -> Array:
        if jnp.iscomplexobj(deltas):
            raise TypeError(f"{path!r} is complex, and complex numbers have no sign")
        c = coefficients(path, deltas)
        c = c.reshape(c.shape + (1,) * (deltas.ndim - c.ndim))
        weighted = c * deltas
        agree = weighted * jnp.where(total(weighted) >= 0, 1, -1) > 0
        return combine(deltas, jnp.where(agree, c, 0), normalize=reduce == "mean")

    trimmed = not (isinstance(sparsity, int | float) and sparsity == 0)
    method = Method(elect, blend=_everywhere(elect, weights))
    return after(window(sparsity, 0.0, scope), method) if trimmed else method


def dare(
    key: PRNGKeyArray,
    *,
    drop_rate: float | Array = 0.9,
    q: float | Array | PyTree | None = None,
    then: Method | None = None,
) -> Method:
    """Drop entries of the deltas at random and rescale the others: m tau / q, m ~ Bernoulli(1 - p).

    DARE is q = 1 - p, for which the expectation is tau and the variance tau^2 p / (1 - p). DAREx-q
    takes a larger q, at most 1: the expectation is tau (1 - p) / q, and the variance
    tau^2 p (1 - p) / q^2 falls faster, which at high p is worth the bias. `search_q` and
    `analytic_q` find it. Leaf by leaf, if `then` is.

    Args:
      key: a typed key. The draw of a leaf depends on it, on the leaf's path and on the place of the
        model in the list: nothing else.
      drop_rate: p in [0, 1).
      q: in (0, 1]; a number, or a tree like params of them (or a dict by path); default: 1 - p.
      then: how the deltas that are left are combined; default: `task_arithmetic`.
        ``ties(sparsity=0)`` elects signs among them.

    The heads of the fine-tuned model are not to be dropped from: leave them out by ``where`` and
    take them from it.

    Raises:
      ValueError: a drop rate outside [0, 1), a q outside (0, 1] or none for a leaf.
      TypeError: a legacy uint32 key.

    References: L. Yu, B. Yu, H. Yu, F. Huang, Y. Li, "Language Models are Super Mario: Absorbing
    Abilities from Homologous Models as a Free Lunch", arXiv:2311.03099 (DARE). W. Deng, Y. Zhao,
    V. Vakilian, M. Chen, X. Li, C. Thrampoulidis, "DARE the Extreme: Revisiting Delta-Parameter
    Pruning For Fine-Tuned Models", arXiv:2410.09344 (DAREx).

    >>> from jaxkit import weights
    >>> method = dare(jax.random.key(0), drop_rate=0.5)
    >>> out = weights.merge({"w": jnp.zeros(6)}, [{"w": jnp.ones(6)}], method)
    >>> sorted(set(out["w"].tolist()))
    [0.0, 2.0]
    """
    single = q is None or jax.tree.structure(q) == jax.tree.structure(0)
    each = {} if single else tree.flatten(q)
    for path, number in each.items() if each else [("", q)]:
        if number is not None and violates(lambda q: (q > 0) & (q <= 1), number):
            raise ValueError(
                f"q{f' of {path!r}' if path else ''} is {number}; due is one in (0, 1]"
            )

    def rescale(path: str) -> Any:
        if single:
            return 1 - drop_rate if q is None else q
        if path not in each:
            raise ValueError(f"q has no number for {path!r}")
        return each[path]

    return after(drop(key, drop_rate, rescale), task_arithmetic() if then is None else then)


def breadcrumbs(
    *,
    sparsity: float | Array = 0.85,
    outliers: float | Array = 0.006,
    scope: Scope = "leaf",
    then: Method | None = None,
) -> Method:
    """Mask both tails of the deltas, and add what is left: the sum of m_i tau_i.

    Of n entries the round(outliers n) with the largest magnitudes and as many of the smallest as
    make round(sparsity n) zeros in all (both half-even). A sum: the authors' scale is 0.2 to start
    a search from, and stays when tasks are added. ``outliers=0`` is pruning by magnitude.

    Args:
      sparsity: the fraction of zeros, in [0, 1).
      outliers: the part of them that are the largest; at most `sparsity`.
      scope: what is ranked together: "leaf" (the paper's layer), "tree" (two passes over the
        leaves), or an integer: each line along that axis. The authors' code ranks along the last
        axis of torch's (out, in) kernels, the inputs of one unit; on a kernel (in, out) that is 0.
      then: how the masked deltas are combined; default: `task_arithmetic`.

    Equal magnitudes are ranked in the order of the flat index. Scalar leaves are left as they are.

    Raises:
      ValueError: a sparsity or outliers outside [0, 1), more outliers than zeros; (when merging) a
        leaf without that axis.

    Warns where lines along an axis are so short that no outlier is removed.

    Reference: M. Davari, E. Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with
    Sparse Masks", arXiv:2312.06795.

    >>> from jaxkit import weights
    >>> base, tuned = {"w": jnp.zeros(4)}, {"w": jnp.array([9.0, -3.0, 2.0, 0.1])}
    >>> weights.merge(base, [tuned], breadcrumbs(sparsity=0.5, outliers=0.25))["w"].tolist()
    [0.0, -3.0, 2.0, 0.0]
    """
    return after(window(sparsity, outliers, scope), task_arithmetic() if then is None else then)


def model_stock(*, scope: Scope = "leaf", angles: str = "cosine", clip: bool = True) -> Method:
    r"""Shrink the mean of a few fine-tunings towards the base by the angle between them.

    .. math:: \tau = t \frac1N \sum_i \tau_i, \quad t = \frac{N c}{1 + (N - 1) c},

    with c the mean cosine between the deltas of two models. A leaf that no model moved stays. (It
    is the projection of the centre that the models scatter around on the line of their mean, if
    they are equally long: a James-Stein shrinkage.) Nothing is added to the product of the norms:
    the 1e-8 of other implementations halves the cosine of deltas of norm 1e-4.

    Args:
      scope: one t for each "leaf", as in the paper, for the whole "tree", or, with an integer, for
        each line along that axis (an axis that the leaf does not have: for the leaf).
      angles: average the "cosine" over the pairs, or the "angle" (the paper does not say; the same
        for two models).
      clip: no t below 0, which there is where deltas point apart.

    Raises:
      ValueError: (when merging) fewer than two models, or no base.

    If t is near 0 everywhere, the base may not be what the models started from.

    Reference: D.-H. Jang, S. Yun, D. Han, "Model Stock: All we need is just a few fine-tuned
    models", arXiv:2403.19522.

    >>> from jaxkit import weights
    >>> base, a, b = {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([1.0, 1.0])}
    >>> merged = weights.merge(base, [a, b], model_stock())["w"]
    >>> [round(t, 4) for t in (merged / jnp.array([1.0, 0.5])).tolist()]  # c = 1 / sqrt(2)
    [0.8284, 0.8284]
    """
    if angles not in ("cosine", "angle"):
        raise ValueError(f"angles={angles!r}; 'cosine' or 'angle' was due")

    def gram(deltas: Array, axes: tuple[int, ...]) -> Array:
        dot = lambda a, b: (a * b.conj()).real.sum(axes, keepdims=True)
        return jax.vmap(lambda a: jax.vmap(lambda b: dot(a, b))(deltas))(deltas)

    def shrink(deltas: Array, grams: Array) -> Array:
        n = len(deltas)
        if n < 2:
            raise ValueError("model stock compares fine-tuned models: at least two are due")
        norms = jnp.sqrt(jnp.stack([grams[i, i] for i in range(n)]))
        size = norms[:, None] * norms[None]
        cosines = jnp.clip(jnp.where(size > 0, grams / jnp.where(size > 0, size, 1), 0), -1, 1)
        pairs = jnp.stack([cosines[i, j] for i in range(n) for j in range(i)])
        c = jnp.cos(jnp.arccos(pairs).mean(0)) if angles == "angle" else pairs.mean(0)
        c = jnp.maximum(c, 0) if clip else c
        t = n * c / (1 + (n - 1) * c)
        return t.reshape(t.shape if t.ndim == deltas.ndim - 1 else ()) * deltas.mean(0)

    def together(deltas: Deltas) -> Array:
        grams = (gram(d, tuple(range(d.ndim - 1))) for d in deltas.values())
        return jnp.stack([g.reshape(g.shape[:2]) for g in grams]).sum(0)

    if not isinstance(scope, int):
        return Method(*scoped(scope, together, lambda path, d, g: shrink(d, g)))

    def lines(path: str, deltas: Array, aux: Any) -> Array:
        ndim = deltas.ndim - 1
        axes = (scope % ndim,) if -ndim <= scope < ndim else tuple(range(ndim))
        return shrink(deltas, gram(deltas, axes))

    return Method(lines)
