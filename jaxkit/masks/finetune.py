"""Which weights to fine-tune: masks for `constrain`, True at the entries that train.

The weights that moved most (`lt_sft`), those that are nearly zero (`sara`), or half of the matrices
of every kind (`hft`). All others stay as they are, to the bit.
"""

import warnings
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from jaxkit import tree
from jaxkit.masks.graft import most_moved, only
from jaxkit.masks.select import Mask
from jaxkit.masks.train import constrain

__all__ = ["hft", "lt_sft", "lt_sft_penalty", "sara", "sara_penalty", "small"]


# --------------------------------------------------------------------------- what moved the most


def lt_sft(
    after: PyTree,
    before: PyTree,
    keep: int | Array,
    *,
    selected: Mask | None = None,
    where: tree.Where = None,
    dense: tree.Where = lambda path, leaf: False,
) -> Mask:
    """Choose the entries that full fine-tuning moved most, all leaves ranked together.

    Lottery-ticket sparse fine-tuning: train all of `where` (and `dense`), choose here, go back to
    the values before, and train again, with a new optimizer, inside ``constrain(tx, mask)``. What
    changes is a sparse difference (`patch`), and differences add. In several rounds, give the mask
    of the last one as `selected` and keep K / rounds each time. The paper adds 0.1 times
    `lt_sft_penalty` to the loss of both trainings for languages, and nothing for tasks.

    Args:
      after: the params after full fine-tuning.
      before: those at its beginning.
      keep: how many entries come in, exactly (in the paper 1 % and more of the model's).
      selected: the mask so far; its entries stay in and do not count.
      where: the leaves to choose from; default: the weights.
      dense: leaves that train as a whole (the head). All others are frozen.

    Returns:
      A mask for `constrain`: True at what trains.

    Raises:
      ValueError: more entries to choose than there are left, trees that do not fit.

    Reference: A. Ansell, E. M. Ponti, A. Korhonen, I. Vulić, "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer", arXiv:2110.07560. (The authors' code chooses all entries at or above a
    threshold, which may be more than K.)

    >>> before = {"w": jnp.zeros((1, 3)), "bias": jnp.zeros(3)}
    >>> mask = lt_sft({"w": jnp.array([[0.1, -3.0, 2.0]]), "bias": jnp.ones(3)}, before, 2)
    >>> mask["w"].tolist(), mask["bias"].tolist()
    ([[False, True, True]], [False, False, False])
    """
    chosen = tree.select(before, where)
    pairs = lambda other: zip(jax.tree.leaves(chosen), jax.tree.leaves(other), strict=True)
    left = sum(int(np.size(w)) for bit, w in pairs(before) if bit)
    if selected is not None:
        tree.check_like(before, selected, "mask `selected`")
        if tree.concrete(selected):
            left -= sum(int(np.asarray(m).sum()) for bit, m in pairs(selected) if bit)
    if isinstance(keep, int | np.integer) and not 0 <= keep <= left:
        raise ValueError(f"keep={keep} entries are to be chosen, and {left} are left")
    free = None if selected is None else jax.tree.map(jnp.logical_not, selected)
    mask = most_moved(after, before, keep=keep, where=chosen, within=free)
    if selected is not None:
        mask = jax.tree.map(jnp.logical_or, mask, only(selected, chosen))
    whole = _where_or_none(before, dense)
    return jax.tree.map(lambda bit, m: jnp.ones_like(m) if bit else m, whole, mask)


def lt_sft_penalty(
    params: PyTree, before: PyTree, *, where: tree.Where = tree.every
) -> Float[Array, ""]:
    """Return how far params have drifted on average: sum |w - w_0| / N over the chosen entries.

    The gradient is sign(w - w_0) / N, and 0 where nothing has moved.

    Args:
      params: the params in training.
      before: those at its beginning.
      where: the leaves that count; default: all, biases and norms too.

    Raises:
      ValueError: trees that do not fit.

    Reference: as for `lt_sft`.

    >>> float(lt_sft_penalty({"w": jnp.array([1.0, -3.0])}, {"w": jnp.zeros(2)}))
    2.0
    """
    tree.check_like(params, before, "other params")
    where = tree.every(params) if where is tree.every else where
    now, then = tree.chosen(params, where), tree.chosen(before, where)
    moved = [tree.float32(now[path]) - tree.float32(then[path]) for path in now]
    # (the slope of jnp.abs is 1 at 0, and would push what has not moved)
    moved = [(jax.lax.stop_gradient(jnp.sign(d)) * d).sum() for d in moved]
    return sum(moved, jnp.zeros(())) / max(1, sum(w.size for w in now.values()))


def _where_or_none(params: PyTree, where: tree.Where) -> PyTree[bool]:
    """Choose as `tree.select` does; a function may choose nothing."""
    if not callable(where):
        return tree.select(params, where)
    bits = [tree.is_inexact(w) and bool(where(p, w)) for p, w in tree.flatten(params).items()]
    return jax.tree.unflatten(jax.tree.structure(params), bits)


# ---------------------------------------------------------------------------- what is nearly zero


def small(params: PyTree, threshold: float | Array, *, where: tree.Where = tree.every) -> Mask:
    """Mark the entries with |w| < threshold, compared in float32, and no entry of other leaves.

    Args:
      params: any tree.
      threshold: a number or a traced scalar.
      where: the leaves to choose from; default: all, biases and norms too.

    Warns:
      If every entry of the chosen leaves is marked: the threshold is above all weights (eagerly).

    >>> small({"w": jnp.array([[0.001, -0.5]])}, 0.01)["w"].tolist()
    [[True, False]]
    """
    chosen = tree.select(params, tree.every(params) if where is tree.every else where)
    marked = lambda w: jnp.abs(tree.float32(w)) < threshold
    none = lambda w: jnp.zeros_like(w, bool) if tree.is_array(w) else w
    mask = jax.tree.map(lambda bit, w: marked(w) if bit else none(w), chosen, params)
    if tree.concrete(mask, threshold):
        pairs = zip(jax.tree.leaves(chosen), jax.tree.leaves(mask), strict=True)
        found = [np.asarray(m) for bit, m in pairs if bit and m.size]
        if found and all(m.all() for m in found):
            warnings.warn(
                f"threshold={threshold} is above every weight: density 1 of "
                f"{sum(m.size for m in found)} entries would train",
                stacklevel=2,
            )
    return mask


def sara(
    tx: optax.GradientTransformation,
    threshold: float | Array,
    *,
    reselect: int | Array | None = None,
    where: tree.Where = tree.every,
) -> optax.GradientTransformationExtraArgs:
    """SaRA: train the weights that are nearly zero, |w_0| < threshold, and freeze all others.

    Midway, what has grown is frozen where it is: at step `reselect` the mask becomes
    mask & (|w| < threshold), and the optimizer state of what leaves starts anew. (One of the
    authors' two codes does this, the other selects afresh.) Add `sara_penalty` to the loss. For
    the memory that it saves, train `reparam.compact` of the mask instead, to the same result.

    Args:
      tx: in the paper AdamW with learning rate 1e-3 exp(-350 threshold), cosine decay, and weight
        decay 0.01, which acts on the trained entries.
      threshold: of the absolute value; 2e-3 for Stable Diffusion 1.5. Those below should be 10 or
        20 % of the weights, which a model can do without: check it (`apply` of the complement).
      reselect: the step before which the mask narrows, half way in the paper; None: never.
      where: the leaves to choose from; default: all, biases and norms too.

    Raises:
      ValueError: update without params.

    Reference: T. Hu et al., "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive
    Sparse Low-Rank Adaptation", arXiv:2409.06633.

    >>> params = {"w": jnp.array([[0.001, -0.5]])}
    >>> tx = sara(optax.sgd(0.1), 0.01)
    >>> updates, _ = tx.update({"w": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["w"].tolist()[0][1]
    -0.5
    """
    mask = lambda params: small(params, threshold, where=where)
    if reselect is None:
        return constrain(tx, mask)

    def rule(key, now, params, grads, step):
        below = lambda m, w: m & (jnp.abs(tree.float32(w)) < threshold)
        return jax.tree.map(lambda m, w: below(m, w) if tree.is_inexact(w) else m, now, params)

    return constrain(tx, mask, update=rule, begin=reselect, end=reselect)


@jax.custom_jvp
def _nuclear(w: Float[Array, "m n"]) -> Float[Array, ""]:
    """Return the sum of the singular values, with the smallest of its subgradients, U_r V_r^T."""
    return jnp.linalg.svd(w, compute_uv=False).sum()


@_nuclear.defjvp
def _nuclear_jvp(primals, tangents):
    (w,), (dw,) = primals, tangents
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    # directions without a singular value are not pushed: at w = 0 the gradient is 0
    rank = s > s.max(initial=0) * max(w.shape) * jnp.finfo(w.dtype).eps
    return s.sum(), jnp.sum(((u * rank) @ vt) * dw)


def sara_penalty(
    key: PRNGKeyArray,
    params: PyTree,
    mask: Mask,
    *,
    min_size: int = 64,
    min_count: int = 100,
    where: tree.Where = None,
) -> Float[Array, ""]:
    """Return SaRA's low-rank penalty: the nuclear norm of w * mask for one leaf drawn at random.

    The leaf is drawn uniformly among the chosen matrices with more than `min_size` rows and
    columns, a new one with every key; one with at most `min_count` entries in the mask counts 0.
    The gradient is U_r V_r^T, masked, with r the numerical rank: finite wherever singular values
    are equal or zero. Add 5e-4 times it to the loss. (What is penalized is the values, not their
    change; below a small threshold they are nearly the same.)

    Raises:
      ValueError: no chosen leaf is such a matrix.
      TypeError: a legacy uint32 key.

    >>> params, mask = {"w": jnp.eye(3)}, {"w": jnp.eye(3, dtype=bool)}
    >>> float(sara_penalty(jax.random.key(0), params, mask, min_size=2, min_count=2))
    3.0
    """
    tree.check_key(key)
    tree.check_like(params, mask, "mask")
    fits = lambda w: len(w.shape) == 2 and min(w.shape) > min_size
    leaves = {path: w for path, w in tree.chosen(params, where).items() if fits(w)}
    if not leaves:
        raise ValueError(f"no chosen leaf is a matrix of more than {min_size} rows and columns")
    marks = tree.flatten(mask)

    def norm(w, m):
        masked = lambda: _nuclear(tree.float32(jnp.where(m, w, 0)))
        return lambda: jnp.where(jnp.sum(m) > min_count, masked(), 0.0)

    norms = [norm(w, marks[path]) for path, w in leaves.items()]
    return jax.lax.switch(jax.random.randint(key, (), 0, len(norms)), norms)


# --------------------------------------------------------------------------- half of the matrices


def hft(
    key: PRNGKeyArray,
    params: PyTree,
    categories: Mapping[str, Sequence[tree.Where]],
    *,
    share: float = 0.5,
    stacked: bool = False,
) -> Mask:
    """Half fine-tuning: in every layer and category a random half of the matrices trains.

    A category of m matrices in each of L layers trains round(share m L) of them in all, spread
    evenly: floor(share m) in every layer, and one more in as many layers, drawn at random, as are
    due. So of {Wq, Wk, Wv, Wo} two in every layer; of {W_up, W_gate, W_down} one in half of the
    layers and two in the others. Draw again, with another key, for the next stage or task. Leaves
    of no category train (norms, embeddings and the head).

    With ``constrain(tx, mask)`` a new draw compiles nothing anew. To save the moments and the
    backward pass of frozen leaves, make labels of it outside jit:
    ``optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)``, with
    ``labels = jax.tree.map(lambda m: "train" if m.all() else "freeze", mask)``.

    Args:
      key: a typed key.
      params: any tree.
      categories: by name, one `where` for each matrix of a layer, such as
        ``{"attention": ["**/query/kernel", "**/key/kernel", ...]}``. Each matches one leaf a layer;
        the i-th matches of all of them are one layer.
      share: of the matrices, in [0, 1]; 1 is full fine-tuning.
      stacked: each `where` matches one leaf that holds all layers in its first axis, as scan makes
        it; the mask is then by row of that axis.

    Returns:
      A mask like params, for `constrain`: True at what trains.

    Raises:
      ValueError: a category of fewer than two matrices, or two that match the same leaf (q, k and v
        in one leaf are no leaves to choose among: split them first); a matrix that has not as many
        layers as the others.
      TypeError: a legacy uint32 key.

    Reference: T. Hui et al., "HFT: Half Fine-Tuning for Large Language Models", arXiv:2404.18466.

    >>> params = {"layers": [{"up": jnp.ones((2, 3)), "down": jnp.ones((3, 2))} for _ in range(2)]}
    >>> mask = hft(jax.random.key(0), params, {"mlp": ["layers/*/up", "layers/*/down"]})
    >>> [sum(bool(m.all()) for m in layer.values()) for layer in mask["layers"]]
    [1, 1]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}, and a number in [0, 1] is due")
    keys = tree.keys(key, dict.fromkeys(categories, 0), "jaxkit.masks.hft")
    leaves = tree.flatten(params)
    bits: dict[str, Array] = {}
    for name, matrices in categories.items():
        found = [list(tree.chosen(params, where)) for where in matrices]
        for path in (every := [path for paths in found for path in paths]):
            if every.count(path) > 1 or path in bits:
                raise ValueError(
                    f"{path!r} holds two matrices to choose among; split it into one leaf each"
                )
        if len(found) < 2:
            raise ValueError(
                f"category {name!r} has {len(found)} matrix a layer; 2 or more are due"
            )
        if stacked:
            for paths in found:
                if len(paths) != 1:
                    raise ValueError(f"{paths} are to hold all layers of {name!r}; 1 leaf is due")
            depths = [leaves[path].shape[0] for (path,) in found]
        else:
            depths = [len(paths) for paths in found]
        if len({*depths}) != 1:
            raise ValueError(f"the matrices of category {name!r} have {depths} layers: not equal")
        drawn = _halves(keys[name], depths[0], len(found), share)  # (layers, matrices)
        for i, paths in enumerate(found):
            bits |= (
                {paths[0]: drawn[:, i]} if stacked else dict(zip(paths, drawn[:, i], strict=True))
            )

    def leaf(path, w):
        if path not in bits:
            return jnp.ones_like(w, bool) if tree.is_array(w) else w
        bit = bits[path]
        return jnp.broadcast_to(bit.reshape(bit.shape + (1,) * (w.ndim - bit.ndim)), w.shape)

    return jax.tree.map(leaf, tree.paths(params), params)


def _halves(key: PRNGKeyArray, layers: int, n: int, share: float) -> Bool[Array, "layers n"]:
    """Mark round(share n layers) of the matrices, as evenly as can be over the layers."""
    base = int(share * n)
    more = round(share * n * layers) - base * layers
    first, second = jax.random.split(key)
    extra = jax.random.permutation(first, layers) < more
    ranks = jnp.argsort(jax.random.uniform(second, (layers, n)), axis=1)
    return ranks < (base + extra)[:, None]
