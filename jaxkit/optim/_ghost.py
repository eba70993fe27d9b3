"""Kernels that enter one dense product as they are, and the norms of gradients never formed.

On its way a kernel may be reordered, reshaped and widened: its gradient has the same entries then,
in another order. Whatever else becomes of it (a mask, a product, a custom derivative, a loop, a
cast that rounds, a second reader) is not followed, and the leaf is none of these kernels.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float

from jaxkit import tree
from jaxkit.trace import Op, _jaxpr

MOVES = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "copy_p", "name"})


class Product(NamedTuple):
    """A dense product: the axes of x that are contracted, and where the others (positions) go.

    The output has the positions and then the kernel's other axes, or, if the kernel is the left
    operand, first those.
    """

    contracted: tuple[int, ...]
    kernel_left: bool


Reader = tuple[core.JaxprEqn | None, int]  # an equation (None: the end) and which operand


def kernels(closed: core.ClosedJaxpr, paths: Iterable[str]) -> dict[str, Product]:
    """Return the kernels whose norm is cheaper without their gradient, and their products.

    Args:
      closed: the loss of an example.
      paths: of the leaves, which are its first arguments.
    """
    readers: dict[str, list[Reader]] = {path: [] for path in paths}
    leaf = dict(zip(closed.jaxpr.invars, readers, strict=False))
    out = _follow(closed.jaxpr, leaf, readers)
    for i, path in enumerate(out):
        if path is not None:
            readers[path].append((None, i))
    found = {path: _product(*who[0]) for path, who in readers.items() if len(who) == 1}
    return {path: product for path, product in found.items() if product is not None}


def _follow(jaxpr: core.Jaxpr, leaf: dict, readers: dict[str, list[Reader]]) -> list[str | None]:
    """Note who reads the leaves that variables hold; return the leaves that the outputs are."""
    held = lambda v: None if _jaxpr.is_literal(v) else leaf.get(v)
    for eqn in jaxpr.eqns:
        paths = [held(v) for v in eqn.invars]
        if not any(paths):
            continue
        if eqn.primitive.name in _jaxpr.INLINED:
            inner = _jaxpr.called(eqn).jaxpr
            out = _follow(inner, dict(zip(inner.invars, paths, strict=True)), readers)
            leaf.update(zip(eqn.outvars, out, strict=True))
        elif _moves(eqn):
            leaf[eqn.outvars[0]] = paths[0]
        else:
            for i, path in enumerate(paths):
                if path is not None:
                    readers[path].append((eqn, i))
    return [held(v) for v in jaxpr.outvars]


def _moves(eqn: core.JaxprEqn) -> bool:
    """Whether the output holds every entry of the only input once, as precisely."""
    if len(eqn.invars) != 1 or len(eqn.outvars) != 1:
        return False
    old, new = _jaxpr.aval(eqn.invars[0]), _jaxpr.aval(eqn.outvars[0])
    if eqn.primitive.name == "convert_element_type":
        if not (_is_real(old) and _is_real(new)):
            return False
        a, b = jnp.finfo(old.dtype), jnp.finfo(new.dtype)
        return a.nmant <= b.nmant and a.minexp >= b.minexp and a.maxexp <= b.maxexp
    return eqn.primitive.name in MOVES and old.size == new.size


def _is_real(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _product(eqn: core.JaxprEqn | None, operand: int) -> Product | None:
    """Return what a kernel enters, if that is a product whose ghost is cheaper than a gradient."""
    if eqn is None or eqn.primitive.name != "dot_general":
        return None
    contracted, batch = (axes[1 - operand] for axes in eqn.params["dimension_numbers"])
    x, w = (_jaxpr.aval(eqn.invars[i]) for i in (1 - operand, operand))
    if batch or not all(map(_is_real, (x, w, _jaxpr.aval(eqn.outvars[0])))):
        return None
    positions = math.prod(n for a, n in enumerate(x.shape) if a not in contracted)
    return Product(tuple(contracted), operand == 0) if 2 * positions**2 <= w.size else None


def observed(product: Product) -> Callable[[Op, Array, Array, Array], Array]:
    """Return the operation of a kernel with an input z = 0, whose gradient is |the kernel's|^2."""

    @jax.custom_vjp
    def observe(y: Array, x: Array, z: Array) -> Array:
        return y

    def backward(kept: tuple[Array, Array], dy: Array) -> tuple[Array, None, Array]:
        x, z = kept
        return dy, None, (z + _squared_norm(product, x, dy)).astype(z.dtype)

    observe.defvjp(lambda y, x, z: (y, (x, z)), backward)
    return lambda op, x, w, z: observe(op.run(x, w), x, z)


def _squared_norm(product: Product, x: Array, dy: Array) -> Float[Array, ""]:
    """Return |x' dy|^2 = sum_ts (x_t . x_s) (dy_t . dy_s) over pairs of positions.

    Where positions cancel, the rounding of the sum stays, a part of 1e-7 of (sum_t |x_t| |dy_t|)^2.
    So much is added: what is clipped by the norm must not be longer than it says.
    """
    free = [a for a in range(x.ndim) if a not in product.contracted]
    n = math.prod(x.shape[a] for a in free)
    if not x.size or not dy.size:
        return jnp.zeros(())
    rows = jnp.transpose(tree.float32(x), [*free, *product.contracted]).reshape(n, -1)
    errors = tree.float32(dy)
    errors = errors.reshape(-1, n).T if product.kernel_left else errors.reshape(n, -1)
    a, b = (jnp.matmul(z, z.T, precision="highest") for z in (rows, errors))
    total = jnp.sum(a * b)
    if n > 1:
        lengths = jnp.sqrt(jnp.diagonal(a) * jnp.diagonal(b))
        total = jnp.maximum(total, 0.0) + jnp.finfo(total.dtype).eps * jnp.sum(lengths) ** 2
    return total
