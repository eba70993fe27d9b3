"""The multilayer perceptron that the experiments on small images train."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree


def init(key: PRNGKeyArray, sizes: Sequence[int]) -> PyTree:
    """Return He-normal weights and zero biases for layers of `sizes` units, the input first."""
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer_{i}": {"kernel": he(k, (a, b)), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def logits(
    params: PyTree, images: Float[Array | np.ndarray, "n height width channels"]
) -> Float[Array, "n classes"]:
    """Bring every image to mean 0 and standard deviation 1, and apply the layers."""
    x = jnp.reshape(images, (images.shape[0], -1))
    x = (x - x.mean(1, keepdims=True)) / jnp.maximum(x.std(1, keepdims=True), 1e-3)
    return forward(params, x)


def forward(params: PyTree, x: Float[Array, "*n features"]) -> Float[Array, "*n classes"]:
    """Apply the layers, with ReLU between them."""
    for i in range(len(params)):
        layer = params[f"layer_{i}"]
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
    return x
