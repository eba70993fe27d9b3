"""Numbers that are known, be they Python's, numpy's or jax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def check_known(call, good, bad, message):
    """Assert that a bad number is an error in every form, and a good one no obstacle to jit."""
    for number in (bad, np.asarray(bad), jnp.asarray(bad)):
        with pytest.raises(ValueError, match=message):
            call(number)
    known = jnp.asarray(good)
    inside = jax.jit(lambda: jax.lax.scan(lambda c, _: (c, call(known)), 0, None, length=1)[1])()
    traced = jax.jit(call)(known)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-6), inside, traced)
