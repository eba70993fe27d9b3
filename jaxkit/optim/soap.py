"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import block_diag, solve_triangular
from jaxtyping import Array, Float

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.optim.basis import Basis, in_basis, row_major

__all__ = ["scale_by_soap", "soap"]


class Kronecker(NamedTuple):
    """One factor per axis and its eigenvectors, as columns; None where the axis has no factor."""

    factors: tuple[Array | None, ...]
    vectors: tuple[Array | None, ...]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def orthonormal(x: Float[Array, "n n"], block: int = 256) -> Float[Array, "n n"]:
    """Return the Q of ``jnp.linalg.qr``, by products of blocks where x is large.

    The reflections of the first columns are one product with I - V T V'. LAPACK does the same in
    much narrower blocks, at half the speed or less.
    """
    if len(x) <= 2 * block:
        return jnp.linalg.qr(x)[0]
    with jax.default_matmul_precision("highest"):  # what accelerators round is not orthogonal
        eye = jnp.eye(len(x), block, dtype=x.dtype)
        raw, tau = jnp.linalg.qr(x[:, :block], mode="raw")
        v = jnp.tril(raw.T, -1) + eye
        inverse = eye[:block] + tau[:, None] * jnp.triu(v.T @ v, 1)
        t = solve_triangular(inverse, jnp.diag(tau), unit_diagonal=True)
        rest = x[block:, block:] - v[block:] @ (t.T @ (v.T @ x[:, block:]))
        q = block_diag(eye[:block], orthonormal(rest, block))
        return q - v @ (t @ (v.T @ q))


@orthonormal.defjvp
def _derivative(block: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jax.jvp(lambda x: jnp.linalg.qr(x)[0], primals, tangents)


def scale_by_soap(
    *,
    b1: float | Array = 0.95,
    b2: float | Array = 0.95,
    factor_decay: float | Array = 0.95,
    eps: float | Array = 1e-8,
    every: int | Array = 10,
    max_size: int = 10_000,
    weight_decay: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Precondition as `soap` does, without its learning rate; multiply by -lr after it."""
    if violates(lambda d: (d >= 0) & (d < 1), factor_decay):
        raise ValueError(f"factor_decay={factor_decay}, and a number in [0, 1) was due")

    def basis(leaf: Any) -> Basis:
        shape = jnp.shape(leaf)
        axes = [d for d, n in enumerate(shape) if len(shape) > 1 and 1 < n <= max_size]

        def init(w: Array) -> Kronecker:
            square = lambda make: tuple(
                make(n, dtype=w.dtype) if d in axes else None for d, n in enumerate(w.shape)
            )
            return Kronecker(square(lambda n, dtype: jnp.zeros((n, n), dtype)), square(jnp.eye))

        def gram(g: Array, d: int) -> Array:
            rest = tuple(i for i in range(g.ndim) if i != d)
            return jnp.tensordot(g, g, (rest, rest))

        def turn(x: Array, vectors: tuple[Array | None, ...], side: int) -> Array:
            for d, q in enumerate(vectors):
                if q is not None and d == 0:
                    x = jnp.tensordot(q, x, ((side,), (0,)))
                elif q is not None:
                    x = jnp.moveaxis(jnp.tensordot(x, q, ((d,), (side,))), -1, d)
            return x

        project = lambda s, g: turn(g, s.vectors, 0)
        lift = lambda s, x: turn(x, s.vectors, 1)

        def learn(s: Kronecker, g: Array) -> Kronecker:
            mix = lambda d, f: (
                None if f is None else factor_decay * f + (1 - factor_decay) * gram(g, d)
            )
            return s._replace(factors=tuple(mix(d, f) for d, f in enumerate(s.factors)))

        def first(s: Kronecker) -> Kronecker:
            tiny = lambda f: row_major(f + 1e-30 * jnp.eye(len(f), dtype=f.dtype))
            vectors = lambda f: row_major(jnp.linalg.eigh(tiny(f))[1][:, ::-1])
            return s._replace(vectors=tuple(None if f is None else vectors(f) for f in s.factors))

        def after(s: Kronecker, mu: Array, nu: Array) -> tuple[Kronecker, Array, Array]:
            mu, vectors = lift(s, mu), []
            for d, (f, q) in enumerate(zip(*s, strict=True)):
                if f is not None and q is not None:
                    towards = jnp.matmul(f, q, precision="highest")
                    order = jnp.argsort(-jnp.sum(q * towards, axis=0))
                    nu = jnp.take(nu, order, axis=d)
                    q = row_major(orthonormal(row_major(towards[:, order])))
                vectors.append(q)
            s = s._replace(vectors=tuple(vectors))
            return s, project(s, mu), row_major(nu)

        if not axes:
            return Basis(init, project, lift)
        return Basis(init, project, lift, after=after, learn=learn, first=first)

    bases = lambda params: {path: basis(leaf) for path, leaf in tree.flatten(params).items()}
    return in_basis(
        bases, b1=b1, b2=b2, eps=eps, every=every, weight_decay=weight_decay, skip_first=True
    )


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    *,
    b1: float | Array = 0.95,
    b2: float | Array = 0.95,
    factor_decay: float | Array = 0.95,
    eps: float | Array = 1e-8,
    every: int | Array = 10,
    max_size: int = 10_000,
    weight_decay: float | Array = 0.01,
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the slowly turning eigenbasis of Shampoo's Kronecker factors.

    For a matrix with gradient G: L <- d L + (1 - d) G G^T and R <- d R + (1 - d) G^T G, with
    eigenvectors Q_L, Q_R by falling eigenvalue; Adam runs on Q_L^T G Q_R, and its step N goes back
    as Q_L N Q_R^T. Every few updates Q <- qr(L Q), one step of the power iteration, with columns
    and second moments permuted to the order of the eigenvalues and the first moment turned along.
    The gradient is projected by the bases of earlier gradients alone, so that the first update is
    zero and only starts the factors.

    A tensor of more axes has one factor for each; vectors and scalars, and axes of size 1 or above
    `max_size`, have none (then it is Adam there).

    State: for a leaf of shape (m, n) the moments 2 m n, and 2 (m^2 + n^2) for factors and vectors,
    in float32. `eigh` and `qr` need a whole factor: shard the factors' state by leaf, not within.
    On a CPU they are OpenBLAS's, whose threads wait for each other actively: on a busy machine one
    (``OPENBLAS_NUM_THREADS=1``) is faster than several. To train many networks at once on a CPU,
    `jax.lax.map` is safer than `jax.vmap`: on two cores, the batched decompositions of several
    leaves have been seen to wait for each other without end.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, eps: Adam's; eps is added before the bias correction.
      factor_decay: d.
      every: updates between two turns of the bases.
      max_size: the largest axis with a factor; one of 10 000 takes 800 MB.
      weight_decay: decoupled: -lr weight_decay w. (The authors' code decays what it has updated,
        which differs by lr^2.)

    Raises:
      ValueError: every below 1, b1, b2 or factor_decay outside [0, 1), or weight decay without
        params in update.

    Reference: N. Vyas, D. Morwani, R. Zhao, M. Kwun, I. Shapira, D. Brandfonbrener, L. Janson,
    S. Kakade, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321.

    >>> params = {"kernel": jnp.ones((2, 3))}
    >>> tx = soap(0.1)
    >>> state = tx.init(params)
    >>> grads = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    >>> updates, state = tx.update(grads, state, params)
    >>> float(jnp.abs(updates["kernel"]).max())  # it has looked at the gradient, no more
    0.0
    """
    return optax.chain(
        scale_by_soap(
            b1=b1,
            b2=b2,
            factor_decay=factor_decay,
            eps=eps,
            every=every,
            max_size=max_size,
            weight_decay=weight_decay,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
