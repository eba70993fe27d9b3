"""The tree initializer: re-draw the chosen leaves of any model."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxkit import tree

Initializer = Callable[[PRNGKeyArray, Sequence[int], jnp.dtype], Array]
TreeInitializer = Callable[[PRNGKeyArray, PyTree], PyTree]

__all__ = ["Initializer", "TreeInitializer", "rules"]


def rules(*pairs: tuple[tree.Where, Initializer]) -> TreeInitializer:
    """Compose initializers into one for whole trees: each leaf is drawn by the first rule it meets.

    ``rules((where, initializer), ...)`` returns ``init(key, params) -> params`` with
    ``initializer(key_of_the_leaf, shape, dtype)`` at every leaf that a `where` chooses. Leaves that
    no rule chooses are the same objects as before. A leaf's draw depends on the key and on its path
    alone: other leaves, other rules, and sharding do not change it.

    Only shapes and dtypes of `params` are read, so that abstract params do, and params larger than
    a device are born sharded::

        abstract = jax.eval_shape(model.init, key, x)
        params = jax.jit(lambda key: init(key, abstract), out_shardings=shardings)(key)

    Args:
      pairs: ``(where, initializer)`` with any ``(key, shape, dtype) -> Array``: those of
        ``jax.nn.initializers``, jaxkit's, or your own.

    Raises:
      ValueError: a `where` that matches nothing, or an initializer that returns another shape.
      TypeError: a legacy uint32 key.

    >>> init = rules(
    ...     ("**/kernel", jax.nn.initializers.orthogonal()), ("**", jax.nn.initializers.zeros)
    ... )
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "steps": 7}
    >>> new = init(jax.random.key(0), params)
    >>> bool(jnp.allclose(new["kernel"] @ new["kernel"].T, jnp.eye(2), atol=1e-6))
    True
    >>> new["bias"].tolist(), new["steps"]
    ([0.0, 0.0], 7)
    """

    def init(key: PRNGKeyArray, params: PyTree) -> PyTree:
        tree.check_key(key)
        choices = [jax.tree.leaves(tree.select(params, where)) for where, _ in pairs]
        leaf_keys = jax.tree.leaves(tree.keys(key, params, "jaxkit.init.rules"))
        out = []
        for i, (path, leaf) in enumerate(tree.flatten(params).items()):
            rule = next((n for n, chosen in enumerate(choices) if chosen[i]), None)
            if rule is not None:
                initializer = pairs[rule][1]
                shape, dtype = leaf.shape, leaf.dtype
                leaf = initializer(leaf_keys[i], shape, dtype)
                if leaf.shape != shape:
                    raise ValueError(
                        f"the initializer of rule {rule} returned shape {leaf.shape} for {path!r}, "
                        f"and {shape} was due"
                    )
                leaf = leaf.astype(dtype)
            out.append(leaf)
        return jax.tree.unflatten(jax.tree.structure(params), out)

    return init
