"""Parameter competition balancing: coefficients by magnitude and by agreement."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxkit import tree
from jaxkit._known import violates
from jaxkit.weights.merge import Deltas, Method, combine
from jaxkit.weights.methods import Weights, given
from jaxkit.weights.sparsify import Scope, scoped

__all__ = ["pcb"]


class _Ranks(NamedTuple):
    """Order statistics of each model: of the magnitudes, and of the scores."""

    low: Float[Array, " models"]
    high: Float[Array, " models"]
    cut: Float[Array, " models"]
    top: Float[Array, " models"]


def pcb(
    *,
    keep: float | Array = 0.1,
    clip: float = 1e-4,
    inter: str = "raw",
    weights: Weights = None,
    scope: Scope = "tree",
) -> Method:
    r"""Let the entries of the tasks compete, and merge those that win (PCB-Merging).

    With T_i the delta of model i of N, over all d entries: its magnitudes are clamped,
    T'_i = sign(T_i) clamp(\|T_i\|), between their order statistics int(clip d) and
    int((1 - clip) d - 1) from below, and brought to n_i in [0, 1], linearly. The score

    .. math:: S_i = e^{N n_i^2}\, \tanh(T_i \textstyle\sum_j T_j)

    is large where an entry is large in its task and the tasks agree. The coefficient
    c_i = (S_i - q) / (max S_i - q), at least 0, with q the order statistic int((1 - keep) d) from
    below, is above 0 for fewer than keep of the entries; and tau = sum_i c_i w_i T'_i / sum_i c_i.

    Args:
      keep: the paper's mask ratio r in (0, 1]: the fraction of the entries of each task that win.
      clip: the fraction of the smallest and of the largest magnitudes that are clamped, in [0, .5).
      inter: how the tasks are compared, which differs between the authors' files: "raw", as above;
        "mixed", tanh(T_i sum_j U_j); "normalized", sum_j tanh(U_i U_j), with U_j = sign(T_j) n_j.
        (The last two are from their vision code, with clip=0.01.) Only the last does not depend on
        the unit of the deltas.
      weights: the lambda_i, as for `average`; 1 by default. The authors search 0.8 to 2.2.
      scope: "tree", as in the paper (two passes over the leaves), or "leaf", which is another
        method: the winners of every leaf.

    Raises:
      ValueError: a keep or clip out of range, an `inter` or scope that there is not; (when merging)
        magnitudes or scores of a model that are all equal, so that nothing can be ranked (under jit
        its coefficients are 0 or 1 then).

    Reference: G. Du, J. Lee, J. Li, R. Jiang, Y. Guo, S. Yu, H. Liu, S. K. Goh, H.-K. Tang, D. He,
    M. Zhang, "Parameter Competition Balancing for Model Merging", arXiv:2410.02396.

    >>> from jaxkit import weights
    >>> base = {"w": jnp.zeros(6)}
    >>> a = {"w": jnp.array([5.0, 4.0, 3.0, 0.2, 0.1, 0.0])}
    >>> b = {"w": jnp.array([4.0, -5.0, 0.1, 0.3, 0.1, 0.0])}
    >>> weights.merge(base, [a, b], pcb(keep=0.2, clip=0.0))["w"].tolist()
    [5.0, -5.0, 0.0, 0.0, 0.0, 0.0]
    """
    if inter not in ("raw", "mixed", "normalized"):
        raise ValueError(f"inter={inter!r}; 'raw', 'mixed' or 'normalized' was due")
    if violates(lambda r: (r > 0) & (r <= 1), keep):
        raise ValueError(f"keep is {keep}, and a number in (0, 1] was due")
    if not 0 <= clip < 0.5:
        raise ValueError(f"clip is {clip}, and a number in [0, 0.5) was due")
    weight = given(weights)

    def scores(t: Array, low: Array, high: Array) -> Array:
        low, high = _over(low, t), _over(high, t)
        spread = jnp.where(high > low, high - low, 1)
        share = (jnp.clip(jnp.abs(t), low, high) - low) / spread
        units = jnp.sign(t) * share
        if inter == "normalized":
            agree = jax.vmap(lambda u: jnp.tanh(u * units).sum(0))(units)
        else:
            agree = jnp.tanh(t * (t if inter == "raw" else units).sum(0))
        return jnp.exp(len(t) * jnp.square(share)) * agree

    def measure(deltas: Deltas) -> _Ranks:
        d = sum(t[0].size for t in deltas.values())
        every = dict.fromkeys(deltas, True)
        from_below = jax.vmap(lambda x, i: tree.kth_largest(x, d - i, where=every), (0, None))
        sizes = {path: jnp.abs(t) for path, t in deltas.items()}
        low = from_below(sizes, int(d * clip))
        high = from_below(sizes, max(int(d * (1 - clip) - 1), 0))
        s = {path: scores(t, low, high) for path, t in deltas.items()}
        lost = d * (1 - keep)
        below = math.floor(lost) if isinstance(lost, int | float) else jnp.floor(lost)
        cut, top = from_below(s, below), from_below(s, d - 1)
        for name, least, most in (("magnitudes", low, high), ("scores", cut, top)):
            flat = least >= most
            if tree.concrete(flat) and flat.any():
                raise ValueError(
                    f"the {name} of model {int(flat.argmax())} are all equal in "
                    f"{', '.join(map(repr, deltas))}: there is nothing to rank"
                )
        return _Ranks(low, high, cut, top)

    def balance(path: str, t: Array, ranks: _Ranks) -> Array:
        low, high, cut, top = (_over(x, t) for x in ranks)
        spread = jnp.where(top > cut, top - cut, 1)
        c = jnp.maximum(scores(t, ranks.low, ranks.high) - cut, 0) / spread
        clamped = jnp.sign(t) * jnp.clip(jnp.abs(t), low, high)
        return combine(_over(weight(path, t), t) * clamped, c)

    return Method(*scoped(scope, measure, balance))


def _over(numbers: Any, stack: Array) -> Array:
    """Let one number a model broadcast to the leaf."""
    return numbers.reshape(numbers.shape + (1,) * (stack.ndim - numbers.ndim))
