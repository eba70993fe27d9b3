r"""Masks over tokens: each is global, local or seen through a window, and leaves the cache in time.

Query i sees key j <= i as long as j lives, one mask per key-value head:

* a *global* token lives on;
* a *local* one until the next global token, which still sees it;
* a *window* one for the next `window` tokens.

`visible` is the mask of given types, `soft_visible` the same as a polynomial in their indicators:
through it `attention` differentiates with respect to the types, hidden keys included.

Reference: Deng, Lindauer, "Neural Attention Search", arXiv:2502.13251. Its kernel approximates the
gradient of the mask; here it is that of the formula.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxkit import tree
from jaxkit._known import violates

__all__ = [
    "Cache",
    "attention",
    "cache",
    "decide",
    "decode",
    "draw",
    "life",
    "next_global",
    "soft_visible",
    "visible",
]

GLOBAL, LOCAL, WINDOW = range(3)


def _with_global(z: Array, places: tuple[int, ...]) -> Array:
    """Return the one-hot types with global tokens in some places, which have no gradient."""
    forced = np.zeros(z.shape[-2], bool)
    forced[list(places)] = True
    return jnp.where(forced[:, None], jnp.eye(3, dtype=z.dtype)[GLOBAL], z)


def draw(
    key: PRNGKeyArray, logits: Float[Array, "*heads n 3"], *, temperature: float | Array = 1.0
) -> Float[Array, "*heads n 3"]:
    """Draw the types of tokens to train with: one-hot, with the gradient of a Gumbel-softmax.

    The first token (the sink) and the last are global.

    Args:
      key: a typed key.
      logits: of (global, local, window) for each head and token: a linear map of the layer's input,
        without a bias and with `stop_gradient` before it.
      temperature: of the softmax that gives the gradient.

    Raises:
      TypeError: a legacy uint32 key.

    >>> draw(jax.random.key(0), jnp.zeros((4, 3)))[0].tolist()
    [1.0, 0.0, 0.0]

    Reference: as for the module; Jang, Gu, Poole, "Categorical Reparameterization with
    Gumbel-Softmax", arXiv:1611.01144.
    """
    tree.check_key(key)
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    soft = jax.nn.softmax(noisy / temperature)
    hard = jax.nn.one_hot(noisy.argmax(-1), 3, dtype=logits.dtype)
    return _with_global(hard + (soft - jax.lax.stop_gradient(soft)), (0, -1))


def decide(
    logits: Float[Array, "*heads n 3"], *, bonus: float | Array = 0.1
) -> Int[Array, "*heads n"]:
    """Decide the types of tokens at inference: 0 global, 1 local, 2 window; the first is global.

    Args:
      logits: as for `draw`.
      bonus: added to those of global: in doubt a token stays.

    >>> decide(jnp.array([[0.0, 9.0, 0.0], [0.0, 0.05, 0.0], [0.0, 0.0, 1.0]])).tolist()
    [0, 0, 2]
    """
    logits = logits + bonus * jnp.eye(3, dtype=logits.dtype)[GLOBAL]
    return logits.argmax(-1).at[..., 0].set(GLOBAL)


def next_global(types: Int[Array, "*heads n"]) -> Int[Array, "*heads n"]:
    """Return the place of the first global token from each token on, itself included.

    Where none follows, the last token takes its place.

    >>> next_global(jnp.array([1, 0, 2, 1])).tolist()
    [1, 1, 3, 3]
    """
    n = types.shape[-1]
    own = jnp.where(types == GLOBAL, jnp.arange(n), n - 1)
    return jax.lax.cummin(own, axis=own.ndim - 1, reverse=True)


def visible(types: Int[Array, "*heads n"], window: int | Array = 4) -> Bool[Array, "*heads n n"]:
    """Return which keys (last axis) each query sees.

    Args:
      types: 0 global, 1 local, 2 window.
      window: for how many following tokens a window token lives; 0: for itself alone.

    Raises:
      ValueError: a negative window.

    >>> visible(jnp.array([0, 1, 2, 0, 0]), window=1).astype(int)[4].tolist()
    [1, 0, 0, 1, 1]
    """
    _check_window(window)
    n = types.shape[-1]
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    until = jnp.where(types == LOCAL, next_global(types), n)
    until = jnp.where(types == WINDOW, j + window, until)
    return (j <= i) & (i <= until[..., None, :])


def _check_window(window: int | Array) -> None:
    if violates(lambda w: w >= 0, window):
        raise ValueError(f"window={window}: a number from 0 is due")


def soft_visible(
    z: Float[Array, "*heads n 3"], window: int | Array = 4
) -> Float[Array, "*heads n n"]:
    r"""Return the mask as a polynomial in the indicators of the types, equal to `visible` at 0 / 1.

    .. math:: M_{ij} = z_j^G + z_j^L \prod_{k=j+1}^{i-1} (1 - z_k^G) + z_j^W [i \le j + w],
        \quad j \le i

    Args:
      z: one-hot types, from `draw`, or anything between.
      window: w.

    Raises:
      ValueError: a negative window.

    >>> soft_visible(jnp.eye(3)[jnp.array([0, 1, 2])], window=1)[2].tolist()
    [1.0, 1.0, 1.0]
    """
    _check_window(window)
    n = z.shape[-2]
    i, j = jnp.arange(n)[:, None], jnp.arange(n)
    factors = jnp.where(i > j, 1 - z[..., :, None, GLOBAL], 1)  # row k, column j
    ones = jnp.ones_like(factors[..., :1, :])
    before = jnp.concatenate([ones, jnp.cumprod(factors, -2)[..., :-1, :]], -2)
    own = z[..., None, :, :]
    mask = own[..., GLOBAL] + own[..., LOCAL] * before + own[..., WINDOW] * (i <= j + window)
    return jnp.where(j <= i, mask, 0)


def attention(
    q: Float[Array, "n heads d"],
    k: Float[Array, "n kv_heads d"],
    v: Float[Array, "n kv_heads size"],
    mask: Float[Array, "kv_heads n n"] | Bool[Array, "kv_heads n n"],
    *,
    scale: float | Array | None = None,
    bounded: bool = False,
) -> Float[Array, "n heads size"]:
    r"""Attend through a mask that has a gradient: P_ij = M_ij exp(s_ij) / sum_k M_ik exp(s_ik).

    The derivative with respect to M_ij does not vanish at hidden keys, M_ij = 0: from it types
    learn what they miss. Exponentials are taken of s minus its maximum over all keys j <= i, the
    hidden ones included, so that it stays finite; where hidden scores lie more than 70 above all
    visible ones the output is still right, and that derivative is capped at exp(70).

    Args:
      q: queries; groups of ``heads / kv_heads`` consecutive heads share a key-value head.
      k: keys.
      v: values.
      mask: from `visible` or `soft_visible`, in which a token always sees itself. A query that sees
        no key has 0 / 0: NaN, where it cannot be checked (under jit).
      scale: of the scores; default: d^-1/2.
      bounded: divide the derivative with respect to M_ij by the sum over all keys j <= i, as the
        published kernel does, in place of the visible ones. The exact derivative (False) is
        exp(s_ij) / sum_k M_ik exp(s_ik) large at hidden keys with large scores: a few such steps
        stall Adam for a long time.

    Raises:
      ValueError: heads that are no multiple of kv_heads, a mask of another shape, a query that
        sees no key (if the mask is known).

    >>> x = jnp.ones((3, 2, 4))
    >>> attention(x, x[:, :1], x[:, :1], visible(jnp.zeros((1, 3), int))).shape
    (3, 2, 4)
    """
    n, heads, d = q.shape
    kv_heads = _check_heads(heads, k.shape[1])
    if jnp.shape(mask) != (kv_heads, n, n):
        raise ValueError(f"the mask has shape {jnp.shape(mask)}, and {(kv_heads, n, n)} was due")
    _check_rows(mask)
    factor = d**-0.5 if scale is None else scale
    grouped = q.reshape(n, kv_heads, heads // kv_heads, d)
    scores = tree.float32(jnp.einsum("nhgd,mhd->hgnm", grouped, k)) * factor
    scores = jnp.where(jnp.tri(n, dtype=bool), scores, -jnp.inf)
    mask = jnp.asarray(mask, scores.dtype)[:, None]
    seen = scores.max(-1, keepdims=True, where=mask != 0, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.minimum(scores.max(-1, keepdims=True), seen + 30))
    powers = jnp.exp(jnp.minimum(scores - top, 40))
    if bounded:
        part = (mask * powers).sum(-1, keepdims=True) / powers.sum(-1, keepdims=True)
        still = jax.lax.stop_gradient
        mask = still(mask) + still(part) * (mask - still(mask))  # the value of mask, part of d mask
    weights = mask * powers
    weights = weights / weights.sum(-1, keepdims=True)
    out = jnp.einsum("hgnm,mhe->nhge", weights.astype(v.dtype), v)
    return out.reshape(n, heads, -1)


def _check_rows(mask: Array) -> None:
    if tree.concrete(mask):
        seen = (np.tril(np.asarray(mask)) != 0).any(-1)
        if not seen.all():
            head, query = np.argwhere(~seen)[0]
            raise ValueError(f"query {query} sees no key (head {head}), and one or more were due")


def _check_heads(heads: int, kv_heads: int) -> int:
    if heads % kv_heads:
        raise ValueError(f"{heads} heads of queries cannot share {kv_heads} of keys and values")
    return kv_heads


def life(z: Float[Array, "*heads n 3"]) -> Float[Array, "*heads"]:
    r"""Sum how long tokens stay in the cache, in units of n: the regularizer of the types.

    .. math:: \frac1n \sum_j z_j^G (n - j) + z_j^L (g(j) - j)

    with g(j) the next global token, held fixed. Window tokens cost nothing. Add it to the loss with
    a small factor.

    Args:
      z: one-hot types, from `draw`.

    >>> life(jnp.eye(3)[jnp.array([0, 1, 2, 0])])
    Array(1.75, dtype=float32)
    """
    n = z.shape[-2]
    j = jnp.arange(n)
    until = next_global(jax.lax.stop_gradient(z).argmax(-1))
    return (z[..., GLOBAL] * (n - j) + z[..., LOCAL] * (until - j)).sum(-1) / n


# ---------------------------------------------------------------------------------- decoding


class Cache(NamedTuple):
    """Keys and values that are still needed, in slots per key-value head.

    k, v: what is stored.
    types: of the stored tokens.
    position: of the stored tokens.
    live: which slots are in use.
    step: how many tokens were decoded.
    lost: how many tokens were overwritten because all slots were in use; not 0: too small.
    """

    k: Float[Array, "kv_heads slots d"]
    v: Float[Array, "kv_heads slots size"]
    types: Int[Array, "kv_heads slots"]
    position: Int[Array, "kv_heads slots"]
    live: Bool[Array, "kv_heads slots"]
    step: Int[Array, ""]
    lost: Int[Array, " kv_heads"]


def cache(slots: int, kv_heads: int, d: int, size: int | None = None, dtype=jnp.float32) -> Cache:
    """Return an empty cache of a fixed number of slots per head.

    Args:
      slots: at least as many as the live tokens at any time: `visible` of a typical text, summed
        over keys, tells.
      kv_heads: heads of keys and values.
      d: size of a key.
      size: size of a value; default: d.
      dtype: of keys and values.

    Raises:
      ValueError: no slots.

    >>> int(cache(8, 2, 4).live.sum())
    0
    """
    if slots < 1:
        raise ValueError(f"slots={slots}: at least one is due")
    ints = jnp.zeros((kv_heads, slots), jnp.int32)
    k = jnp.zeros((kv_heads, slots, d), dtype)
    v = jnp.zeros((kv_heads, slots, d if size is None else size), dtype)
    zero = jnp.zeros((), jnp.int32)
    return Cache(k, v, ints, ints, ints > 0, zero, jnp.zeros(kv_heads, jnp.int32))


def decode(
    state: Cache,
    q: Float[Array, "heads d"],
    k: Float[Array, "kv_heads d"],
    v: Float[Array, "kv_heads size"],
    types: Int[Array, " kv_heads"],
    window: int | Array = 4,
    *,
    scale: float | Array | None = None,
) -> tuple[Float[Array, "heads size"], Cache]:
    """Attend from one more token to the cache, store it, and drop what no later token will see.

    A global token drops the local ones before it after it has seen them; a window token goes when
    its window has passed. Token by token it gives the rows of `attention` with `visible`.

    Args:
      state: the cache.
      q, k, v: of the new token.
      types: of the new token.
      window: as for `visible`.
      scale: as for `attention`.

    Returns:
      The output, and the cache to go on with.

    Raises:
      ValueError: heads that are no multiple of kv_heads, a negative window.

    >>> out, state = decode(cache(4, 1, 2), jnp.ones((2, 2)), jnp.ones((1, 2)),
    ...                     jnp.full((1, 2), 5.0), jnp.array([0]))
    >>> out.tolist()
    [[5.0, 5.0], [5.0, 5.0]]
    """
    _check_window(window)
    heads, d = q.shape
    kv_heads = _check_heads(heads, k.shape[0])
    rows, slot = jnp.arange(kv_heads), jnp.argmin(state.live, -1)  # the first free one, or 0
    lost = state.lost + state.live.all(-1)
    put = lambda old, new: old.at[rows, slot].set(jnp.asarray(new).astype(old.dtype))
    now = state.step
    keys, values, live = put(state.k, k), put(state.v, v), put(state.live, True)
    kinds, position = put(state.types, types), put(state.position, now)

    grouped = q.reshape(kv_heads, heads // kv_heads, d)
    factor = d**-0.5 if scale is None else scale
    scores = tree.float32(jnp.einsum("hgd,hsd->hgs", grouped, keys)) * factor
    weights = jax.nn.softmax(jnp.where(live[:, None], scores, -jnp.inf))
    out = jnp.einsum("hgs,hse->hge", weights.astype(values.dtype), values).reshape(heads, -1)

    closed = (kinds == LOCAL) & (jnp.asarray(types) == GLOBAL)[:, None]
    passed = (kinds == WINDOW) & (position + window <= now)
    return out, Cache(keys, values, kinds, position, live & ~closed & ~passed, now + 1, lost)
