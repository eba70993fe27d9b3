"""The reparametrization: theta in, params out."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree

Theta = Mapping[str, PyTree]

__all__ = ["Reparam", "Theta", "install", "leafwise", "matched"]


class Reparam(NamedTuple):
    """A pair of pure functions: what is trained, and the params it stands for.

    init: ``init(key, params) -> theta``, a flat dict by path of the chosen leaves: what is trained.
    apply: ``apply(theta, params) -> params``, the params of the model. Leaves that were not chosen
      are the same objects as before, the others keep their dtype.

    Differentiate with respect to theta and what `params` holds stays frozen, bit by bit:
    ``grads = jax.grad(lambda theta: loss_fn(reparam.apply(theta, params), batch))(theta)``.
    """

    init: Callable[[PRNGKeyArray, PyTree], Theta]
    apply: Callable[[Theta, PyTree], PyTree]


def matched(params: PyTree, theta: Theta) -> dict[str, Array]:
    """Return the leaves of params that theta has a piece for, by path.

    Raises:
      ValueError: a path that params does not have.

    >>> list(matched({"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.zeros(2)}))
    ['w']
    """
    own = tree.flatten(params)
    if lost := [path for path in theta if path not in own]:
        raise ValueError(f"theta has {lost[0]!r}, which is no leaf of params: {list(own)[:5]} ...")
    return {path: own[path] for path in theta}


def install(params: PyTree, leaves: Mapping[str, Array]) -> PyTree:
    """Return params with the given leaves in place of its own, cast to their dtypes.

    Args:
      params: any tree.
      leaves: arrays by path.

    Raises:
      ValueError: a path that params does not have, or a leaf of another shape.

    >>> install({"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.zeros(2)})["w"].tolist()
    [0.0, 0.0]
    """
    for path, own in matched(params, leaves).items():
        if jnp.shape(leaves[path]) != jnp.shape(own):
            raise ValueError(
                f"{path!r} became {jnp.shape(leaves[path])}, and its shape {jnp.shape(own)} was due"
            )
    own = matched(params, leaves)
    return tree.replace(params, {path: x.astype(own[path].dtype) for path, x in leaves.items()})


def leafwise(
    init: Callable[[PRNGKeyArray, str, Array], Any],
    apply: Callable[[Any, Array], Array],
    *,
    where: tree.Where = None,
    tag: str = "jaxkit.reparam",
) -> Reparam:
    """Return the `Reparam` that treats each chosen leaf for itself.

    Args:
      init: ``init(key, path, leaf) -> piece``; the key depends on the path alone (see `tree.keys`).
      apply: ``apply(piece, leaf) -> leaf``, of the same shape.
      where: the leaves that are reparametrized; default: the weights.
      tag: tells the draws of this method from those of others.

    Raises:
      ValueError: a `where` that matches nothing; a piece that belongs to no leaf, or makes a leaf
        of another shape.
      TypeError: a legacy uint32 key.

    >>> import jax
    >>> shift = leafwise(lambda key, path, w: jnp.zeros(w.shape[1]), lambda b, w: w + b)
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> theta = shift.init(jax.random.key(0), params)
    >>> jax.tree.map(jnp.shape, theta)
    {'kernel': (3,)}
    >>> bool((shift.apply(theta, params)["kernel"] == params["kernel"]).all())
    True
    """

    def init_tree(key: PRNGKeyArray, params: PyTree) -> Theta:
        keys = tree.flatten(tree.keys(key, params, tag))
        return {path: init(keys[path], path, w) for path, w in tree.chosen(params, where).items()}

    def apply_tree(theta: Theta, params: PyTree) -> PyTree:
        pieces = matched(params, theta).items()
        return install(params, {path: apply(theta[path], w) for path, w in pieces})

    return Reparam(init_tree, apply_tree)
