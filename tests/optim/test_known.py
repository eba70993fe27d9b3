"""Numbers that are known, but numpy's or jax's: checked outside jit, and no obstacle inside."""

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxkit import nn, optim
from tests.knowing import check_known

KEY = jax.random.key(0)
PARAMS = {"kernel": jnp.ones((3, 2))}


def step(tx):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]


CALLS = {
    "soap every": (lambda k: step(optim.soap(0.1, every=k)), 2, 0),
    "soap b1": (lambda b: step(optim.soap(0.1, b1=b)), 0.5, 1.5),
    "soap factor_decay": (lambda b: step(optim.soap(0.1, factor_decay=b)), 0.5, 1.0),
    "fira b2": (lambda b: step(optim.fira(0.1, rank=1, b2=b)), 0.5, 1.0),
    "galore every": (lambda k: step(optim.galore(0.1, rank=1, every=k)), 2, -3),
    "lookahead every": (lambda k: step(optim.lookahead(optax.sgd(0.1), every=k)), 2, 0),
    "slow_step": (lambda a: step(optim.lookahead(optax.sgd(0.1), slow_step=a)), 0.5, 7.0),
    "adamax": (lambda b: step(optim.adamax(0.1, b1=b)), 0.5, -0.1),
    "langevin": (lambda t: step(optim.langevin(0.1, key=KEY, num_data=9, temperature=t)), 0, -1),
    "gradient_noise": (lambda v: step(optim.gradient_noise(v, key=KEY)), 0.1, -0.1),
    "weight_noise": (lambda m: optim.weight_noise(KEY, 8, small=m), 4.0, 9.0),
    "gradient_noise_scale": (
        lambda b: optim.gradient_noise_scale(2.0, 1.0, small_batch=b, large_batch=8),
        4.0,
        8.0,
    ),
    "uba": (lambda phi: optim.uba(1.0, 9, phi=phi)(3), 2.0, 0.0),
    "cosine_power": (lambda p: optim.cosine_power(1.0, 9, power=p)(3), 2.0, 0.5),
    "stretch": (lambda f: optim.stretch(optim.uba(1.0, 9), f)(3), 2.0, -1.0),
    "tract": (lambda d: optim.tract(jnp.ones((2, 3)), jnp.ones((4, 2)), damping=d), 0.5, 0.0),
    "half_life": (lambda h: optim.decay_from_half_life(h, 1.0), 100.0, 1e10),
    "stochastic_depth": (lambda p: nn.stochastic_depth(KEY, jnp.sin, jnp.ones(2), p), 0.5, 1.5),
    "dropout_head": (lambda p: nn.dropout_head(jnp.eye(2), jnp.ones(2), rate=p), 0.5, 1.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_known_array_is_checked_and_does_not_stop_jit(name):
    check_known(*CALLS[name], r"due|nothing would decay")
