"""Fira and GaLore: Adam in a few directions of the gradient, and the rest of it scaled alike."""

import warnings
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jaxkit import tree
from jaxkit.optim.basis import Basis, in_basis, row_major

__all__ = ["fira", "galore"]


class Directions(NamedTuple):
    """Orthonormal directions of the short side, as rows, and the norm of the last residual."""

    rows: Float[Array, "rank short"]
    residual: Float[Array, ""]


def fira(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    rank: int = 128,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-6,
    every: int | Array = 200,
    scale: float | Array = 1.0,
    weight_decay: float | Array = 0.0,
    limit: float | Array = 1.01,
    residual: Literal["paper", "official"] = "paper",
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """Fira: Adam on a low-rank projection of the gradient, plus what the projection leaves out.

    P holds the first `rank` singular vectors of the short side of the gradient, renewed every few
    updates; R = G P^T (of a matrix with as many rows as columns or more, else P G) has Adam's
    moments, and n = mu / (sqrt(nu) + eps). The update is -lr times the bias correction of

        scale n P + phi (G - R P),   phi_j = |n_j| / |R_j|  for each slice j of the long side,

    whose second term S may not grow faster than by the factor `limit` from one update to the next:
    S <- S / max(|S| / (limit |S_before|), 1).

    State of an (m, n) leaf, in float32: 2 rank max(m, n) for the moments, rank min(m, n) for P.

    Args:
      learning_rate: a number or a schedule.
      rank: of the projection; where it exceeds the short side, the short side (with a warning).
      b1, b2, eps: Adam's; eps is added before the bias correction.
      every: updates between two projections; the moments are not turned along.
      scale: of the low-rank part (alpha; 0.25 in some of the authors' runs).
      weight_decay: decoupled: -lr weight_decay w.
      limit: the largest growth of |S|.
      residual: "paper" as above; "official" multiplies R P in the residual by `scale` too, as the
        authors' code does.
      where: the matrices to project; default: the weights of two dimensions. The others get Adam.

    Raises:
      ValueError: rank or every below 1, b1 or b2 outside [0, 1), another residual, a chosen leaf
        that is no matrix (reshape a convolution first), or weight decay without params in update.

    Reference: X. Chen, K. Feng, C. Li, X. Lai, X. Yue, Y. Yuan, G. Wang, "Fira: Can We Achieve
    Full-rank Training of LLMs Under Low-rank Constraint?", arXiv:2410.01623.

    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> tx = fira(0.1, rank=2)
    >>> tx.init(params)[0].mu["kernel"].shape
    (4, 2)
    """
    bases = _low_rank(rank, scale, where, residual, limit)
    tx = in_basis(bases, b1=b1, b2=b2, eps=eps, every=every, weight_decay=weight_decay)
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))


def galore(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    rank: int = 128,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-6,
    every: int | Array = 200,
    scale: float | Array = 0.25,
    weight_decay: float | Array = 0.0,
    where: tree.Where = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on a low-rank projection of the gradient; `fira` without its residual.

    The short side of each matrix is projected, so that each moment has rank max(m, n) entries.
    (``optax.contrib.galore`` projects the long side: another subspace, rank min(m, n) entries.)

    Args:
      learning_rate, rank, b1, b2, eps, every, scale, weight_decay, where: as for `fira`.

    Reference: J. Zhao, Z. Zhang, B. Chen, Z. Wang, A. Anandkumar, Y. Tian, "GaLore:
    Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507.

    >>> galore(0.1, rank=1).init({"kernel": jnp.ones((4, 3))})[0].nu["kernel"].shape
    (4, 1)
    """
    bases = _low_rank(rank, scale, where, None, 1.0)
    tx = in_basis(bases, b1=b1, b2=b2, eps=eps, every=every, weight_decay=weight_decay)
    return optax.chain(tx, optax.scale_by_learning_rate(learning_rate))


def _low_rank(rank: int, scale: Any, where: tree.Where, residual: str | None, limit: Any):
    if residual not in (None, "paper", "official"):
        raise ValueError(f"residual={residual!r}, and 'paper' or 'official' was due")
    if rank < 1:
        raise ValueError(f"rank={rank}, and 1 or more was due")

    def basis(path: str, shape: tuple[int, ...]) -> Basis:
        if len(shape) != 2:
            raise ValueError(f"{path!r} has shape {shape}, and a matrix was due: reshape it first")
        short, tall = min(shape), shape[0] >= shape[1]
        r = min(rank, short)
        if rank > short:
            warnings.warn(f"{path!r} has shape {shape}: its rank is {r}, not {rank}", stacklevel=2)

        def init(w: Array) -> Directions:
            return Directions(jnp.zeros((r, short), w.dtype), jnp.zeros((), w.dtype))

        def before(s: Directions, g: Array) -> Directions:
            u, _, v = jnp.linalg.svd(row_major(g), full_matrices=False)
            return s._replace(rows=row_major(v[:r] if tall else u[:, :r].T))

        project = lambda s, g: g @ s.rows.T if tall else s.rows @ g
        back = lambda s, x: x @ s.rows if tall else s.rows.T @ x
        lift = lambda s, x: scale * back(s, x)

        def rest(s: Directions, g: Array, x: Array, n: Array) -> tuple[Array, Directions]:
            norm = lambda x: jnp.linalg.norm(x, axis=1 if tall else 0, keepdims=True)
            left = g - (lift if residual == "official" else back)(s, x)
            phi = norm(n) / (norm(x) + 1e-8)
            size = jnp.linalg.norm(phi * norm(left))
            over = jnp.maximum(size / (s.residual + 1e-8), limit) / limit
            over = jnp.where((s.residual > 1e-8) & jnp.isfinite(size), over, 1.0)
            more = jnp.where(jnp.isfinite(size), left * (phi / over), 0.0)
            # the first norm that is more than rounding starts the limit
            now = jnp.where(jnp.isfinite(size), size / over, s.residual)
            return more, s._replace(residual=now)

        full = Basis(init, project, lift, before=before)
        return full if residual is None else full._replace(residual=rest)

    whole = Basis(lambda w: (), lambda s, g: g, lambda s, x: x)

    def bases(params: PyTree) -> dict[str, Basis]:
        chosen = tree.chosen(params, where)
        if where is None:
            chosen = {path for path, leaf in chosen.items() if len(leaf.shape) == 2}
        shapes = {path: jnp.shape(leaf) for path, leaf in tree.flatten(params).items()}
        some = lambda path, shape: path in chosen and 0 not in shape
        return {p: basis(p, s) if some(p, s) else whole for p, s in shapes.items()}

    return bases
