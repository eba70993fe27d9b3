"""Do many agree? Gossip between models, votes, perceptual hashes, and a digest of the bits."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree

from jaxkit import tree

__all__ = ["agree", "gossip", "majority", "phash", "tree_digest"]


def gossip(stack: PyTree, mixing: Float[Array, "models models"]) -> PyTree:
    r"""Let models that train apart take from each other: theta_i <- sum_j A_ij theta_j.

    With A doubly stochastic the mean of the models stays, and their distance from it shrinks at
    each call at least by the second largest singular value of A (for a symmetric A, the second
    largest eigenvalue in size). A = 11' / N is full synchronization: each becomes the mean, which
    across devices that hold a model each is ``jax.lax.pmean``.

    Args:
      stack: a tree with a leading axis of N models on every leaf. What is no float stays.
      mixing: A. Call it every s steps of training.

    Returns:
      A tree like `stack`, computed in float32 or wider.

    Raises:
      ValueError: A that is not doubly stochastic, with its sums (if it is known), or leaves that
        are not stacks of N models.

    Reference: E. Kim, I. Isozaki, N. Sirkin, M. Robson, "Generative Artificial Intelligence
    Consensus in a Trustless Network", arXiv:2307.01898.

    >>> mixing = jnp.array([[0.75, 0.25], [0.25, 0.75]])
    >>> gossip({"w": jnp.array([0.0, 4.0])}, mixing)["w"].tolist()
    [1.0, 3.0]
    """
    a = jnp.asarray(mixing)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"a square matrix is due, and {a.shape} came")
    if tree.concrete(a):
        known = np.asarray(a, np.float64)
        sums = np.stack([known.sum(1), known.sum(0)])
        if not (np.abs(sums - 1) < 1e-4).all() or (known < 0).any():
            raise ValueError(
                "a doubly stochastic matrix is due (no entry below 0, rows and columns that sum to "
                f"1): the rows sum to {sums[0].tolist()}, the columns to {sums[1].tolist()}, and "
                f"the least entry is {known.min()}"
            )

    def mix(path: str, leaf: Array) -> Array:
        if leaf.shape[:1] != a.shape[:1]:
            raise ValueError(f"{path!r} is {leaf.shape}, and a stack of {len(a)} models was due")
        wide = tree.float32(leaf)
        mixed = jnp.einsum("ij,j...->i...", a.astype(wide.dtype), wide, precision="highest")
        return mixed.astype(leaf.dtype)

    return tree.map(mix, stack, where=tree.every(stack))


def majority(q: float | Float[Array, "..."], m: int) -> Float[Array, "..."]:
    r"""Return the probability that most of m verifiers are right, each of them with probability q.

    .. math:: \sum_{j > m/2} \binom{m}{j} q^j (1 - q)^{m - j} = I_q(\tfrac{m+1}2, \tfrac{m+1}2),

    which is 3 q^2 - 2 q^3 of three that judge independently.

    Raises:
      ValueError: m even (there would be ties) or below 1, or q outside [0, 1] (if it is known).

    Reference: E. Kim et al., "Generative Artificial Intelligence Consensus in a Trustless Network",
    arXiv:2307.01898.

    >>> round(majority(0.98073, 3).item(), 4)
    0.9989
    """
    if m < 1 or m % 2 == 0:
        raise ValueError(f"m={m}, and an odd number of verifiers was due: they have no ties")
    q = jnp.asarray(q, float)
    inside = ((q >= 0) & (q <= 1)).all()
    if tree.concrete(inside) and not inside:
        raise ValueError(f"q={q} is no probability")
    half = (m + 1) / 2
    return jax.scipy.special.betainc(half, half, q)


def agree(
    a: Num[Array, "*batch n"] | Bool[Array, "*batch n"],
    b: Num[Array, "*batch n"] | Bool[Array, "*batch n"],
    *,
    tolerance: int | Array = 0,
) -> Bool[Array, "*batch"]:
    """Tell whether two outputs differ in at most `tolerance` places of the last axis.

    For the bits of two hashes (`phash`) that is their Hamming distance; for the tokens of a text
    that was decoded greedily or by beam search, tolerance 0 is due.

    Raises:
      ValueError: lengths that differ.

    Reference: E. Kim et al., "Generative Artificial Intelligence Consensus in a Trustless Network",
    arXiv:2307.01898.

    >>> agree(jnp.array([1, 0, 1]), jnp.array([1, 1, 1]), tolerance=1).item()
    True
    """
    if jnp.shape(a)[-1:] != jnp.shape(b)[-1:] or not jnp.ndim(a):
        raise ValueError(f"outputs of one length are due, and {jnp.shape(a)}, {jnp.shape(b)} came")
    return jnp.sum(jnp.asarray(a) != jnp.asarray(b), -1) <= tolerance


def phash(image: Num[Array, "height width *rgb"], *, size: int = 8) -> Bool[Array, " bits"]:
    """Return the perceptual hash of an image: the signs of its slowest waves, about their median.

    The image is made grey (0.299 R + 0.587 G + 0.114 B) and resized to (4 size, 4 size); a bit is
    true where one of the first size x size coefficients of its cosine transform (DCT-II) is above
    their median. Scaling the image by a positive number changes no bit, nor does adding a constant
    that leaves the first coefficient on its side of the median. An image without structure has no
    hash to speak of: its bits are those of rounding.

    Args:
      image: (height, width) or (height, width, 3). vmap it over many of one size.
      size: the hash has size^2 bits.

    Returns:
      Bits row by row, the first coefficient (the mean) first.

    Raises:
      ValueError: another shape, or a size below 2.

    Reference: the hash is C. Zauner's pHash as the package imagehash has it, up to the rounding of
    its resized images to bytes. It is our choice for E. Kim et al., "Generative Artificial
    Intelligence Consensus in a Trustless Network", arXiv:2307.01898.

    >>> image = jax.random.uniform(jax.random.key(0), (40, 50))
    >>> brighter, mirrored = phash(1.5 * image + 0.1), phash(image[:, ::-1])
    >>> agree(phash(image), brighter).item(), agree(phash(image), mirrored, tolerance=16).item()
    (True, False)
    """
    if jnp.ndim(image) not in (2, 3) or jnp.shape(image)[2:] not in ((), (3,)):
        raise ValueError(f"(height, width) or (height, width, 3) was due, not {jnp.shape(image)}")
    if size < 2:
        raise ValueError(f"size={size}, and 2 or more was due")
    x = jnp.asarray(image, float)
    if x.ndim == 3:
        x = jnp.matmul(x, jnp.array([0.299, 0.587, 0.114], x.dtype), precision="highest")
    n = 4 * size
    if x.shape != (n, n):
        x = jax.image.resize(x, (n, n), "lanczos3")
    angle = np.pi * np.outer(np.arange(size), np.arange(n) + 0.5) / n
    waves = jnp.asarray(np.cos(angle), x.dtype)
    low = jnp.matmul(jnp.matmul(waves, x, precision="highest"), waves.T, precision="highest")
    return (low > jnp.median(low)).ravel()


def tree_digest(params: PyTree) -> str:
    """Return the SHA-256 of all leaves, in hexadecimal: equal if and only if every bit is.

    Two runs that should be the same are the same if their digests are. That is to be expected on
    the same backend, with the same versions of JAX and XLA and the same sharding, and not between
    CPU, GPU and TPU, whose sums round differently: then compare values, not digests.

    It is over the leaves in the order of their paths: the path, the dtype and the shape as text,
    then the little-endian bytes in C order; lengths go before texts. Keys are the words of their
    data. So it does not depend on the kind of the containers. This is a file format: it does not
    change between versions. It runs on the host, leaf by leaf, and gathers sharded ones.

    Raises:
      TypeError: a leaf that is neither a number nor an array of them, naming its path.

    Reference: on reproducing what others computed, E. Kim et al., "Generative Artificial
    Intelligence Consensus in a Trustless Network", arXiv:2307.01898.

    >>> tree_digest({"w": jnp.zeros(2)})[:16]
    '229475a094b63405'
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(tree.flatten(params).items()):
        kind, x = _raw(path, leaf)
        for text in (path, kind, str(x.shape)):
            digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        digest.update(x.astype(x.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _raw(path: str, leaf: Any) -> tuple[str, np.ndarray]:
    if tree.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf))
    x = np.asarray(leaf)
    if x.dtype.kind in "OSU":
        raise TypeError(f"{path!r} is a {type(leaf).__name__}, and an array of numbers was due")
    return x.dtype.name, x
