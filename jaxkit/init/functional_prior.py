"""What functions look like before any data: a prior over weights that matches one over functions.

Reference: B.-H. Tran, S. Rossi, D. Milios, M. Filippone, "All You Need is a Good Functional Prior
for Bayesian Deep Learning", arXiv:2011.12829.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jaxkit import tree

__all__ = ["FunctionalPrior", "functional_prior", "gaussian_process", "sample_prior"]

Draw = Callable[[PRNGKeyArray, int], Float[Array, "count ..."]]


class FunctionalPrior(NamedTuple):
    """What `functional_prior` fits.

    Attributes:
      std: a tree like params of one number per leaf, for `sample_prior`: the last iterate.
      history: the same after every step, stacked; average its tail, as steps are noisy.
      distance: the estimate of the Wasserstein distance at every step.
    """

    std: PyTree[Float[Array, ""]]
    history: PyTree[Float[Array, " steps"]]
    distance: Float[Array, " steps"]


def gaussian_process(
    kernel: Callable[[Array, Array], Float[Array, "n m"]], *, jitter: float = 1e-4
) -> Callable[[Array], Draw]:
    """Return ``process(x)(key, count) -> (count, n)``: draws of a centred Gaussian process at x.

    Args:
      kernel: ``kernel(x, x) -> (n, n)``.
      jitter: of the diagonal, relative to its mean: without one the factorization of a smooth
        kernel fails in float32 (draws are NaN).

    >>> process = gaussian_process(lambda x, y: x[:, None] * y[None])
    >>> process(jnp.array([1.0, 2.0]))(jax.random.key(0), 5).shape
    (5, 2)
    """

    def process(x):
        covariance = kernel(x, x)
        n = covariance.shape[0]
        size = jnp.trace(covariance) / n
        factor = jnp.linalg.cholesky(covariance + jitter * size * jnp.eye(n, dtype=size.dtype))

        def draw(key, count):
            noise = jax.random.normal(key, (count, n), factor.dtype)
            return jnp.matmul(noise, factor.T, precision="highest")

        return draw

    return process


def sample_prior(
    key: PRNGKeyArray,
    std: PyTree[Float[Array, ""]],
    params: PyTree,
    *,
    where: tree.Where = None,
) -> PyTree:
    """Draw params from independent Gaussians: std * N(0, 1), over sqrt(fan_in) for weights.

    Args:
      std: a tree like params of one positive number per leaf (not the raw number in a softplus).
      params: of these only shapes and dtypes are read; leaves that are no float arrays stay.
      where: the leaves that are divided by sqrt(fan_in), the product of all dimensions but the
        last; default: the weights.

    Raises:
      TypeError: a legacy key.
      ValueError: a `std` of another structure.

    >>> params = {"kernel": jnp.zeros((400, 50)), "bias": jnp.zeros(1000)}
    >>> drawn = sample_prior(jax.random.key(0), {"kernel": 2.0, "bias": 0.5}, params)
    >>> round(float(drawn["kernel"].std()), 1), round(float(drawn["bias"].std()), 1)
    (0.1, 0.5)
    """
    structure = jax.tree.structure(params)
    if jax.tree.structure(std) != structure:
        raise ValueError(f"std is to be a tree like params, {structure}: {std} came")
    keys = tree.keys(key, params, "jaxkit.init.prior")

    def draw(weight, key, size, leaf):
        if not tree.is_inexact(leaf):
            return leaf
        fan_in = math.prod(leaf.shape[:-1]) if weight else 1
        noise = jax.random.normal(key, leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        return (size * noise / math.sqrt(max(fan_in, 1))).astype(leaf.dtype)

    return jax.tree.map(draw, tree.select(params, where), keys, std, params)


def functional_prior(
    key: PRNGKeyArray,
    apply_fn: Callable[[PyTree, Array], Float[Array, "n *outputs"]],
    params: PyTree,
    inputs: Callable[[PRNGKeyArray], Array],
    process: Callable[[Array], Draw],
    *,
    steps: int = 200,
    rate: float = 0.01,
    functions: int = 128,
    critic_steps: int = 200,
    critic_rate: float = 0.01,
    critic_width: int = 200,
    penalty: float = 10.0,
    one_sided: bool = False,
    tolerance: float = 0.01,
    where: tree.Where = None,
) -> FunctionalPrior:
    """Fit the deviations of a weight prior so that the network's functions look like a process's.

    Every step draws a measurement set X and fits a critic c from scratch (Adagrad; softplus MLP
    n-width-width-1 of the function's values at X) to

        max  E c(f_net) - E c(f_process) - penalty * E (|grad c(f_mix)| - 1)^2,

    the Wasserstein-1 distance of the two laws of f(X), with fresh draws each time; then takes one
    RMSprop step on the deviations against ``E c(f_net)``, through the draw. Deviations are softplus
    of trained numbers that start at 1 (so at 1.3133). Outputs are compared one by one and summed.
    It is one program of nested loops: jit it.

    Args:
      apply_fn: ``apply_fn(params, x) -> (n, ...)``, the function of one draw of params.
      params: shapes and dtypes; one deviation per float leaf is learned.
      inputs: ``inputs(key) -> x``, a new measurement set every step.
      process: ``process(x)(key, count) -> (count, n, ...)``, such as `gaussian_process`; what
        depends on x alone is computed once a step.
      steps, rate: of RMSprop (decay 0.99).
      functions: draws of each side per critic and per prior step.
      critic_steps, critic_rate, critic_width: of the critic; it stops early where the norm of its
        gradient is below `tolerance`.
      penalty, one_sided: weight of the gradient penalty; one-sided punishes only norms above 1.
      where: as in `sample_prior`.

    Raises:
      TypeError: a legacy key.
      ValueError: draws of the process and of the network of different shapes; not under jit,
        functions that are not finite (a process without jitter), where NaN comes out otherwise.

    Reference: B.-H. Tran et al., arXiv:2011.12829.

    >>> fit = functional_prior(
    ...     jax.random.key(0),
    ...     lambda params, x: x * params["w"],
    ...     {"w": jnp.zeros(())},
    ...     lambda key: jax.random.uniform(key, (4,)),
    ...     gaussian_process(lambda x, y: 9 * x[:, None] * y[None]),
    ...     steps=3, critic_steps=5, critic_width=4, rate=0.1,
    ... )
    >>> fit.history["w"].shape, bool(fit.std["w"] > 0)
    ((3,), True)
    """
    tree.check_key(key)
    zero = lambda leaf: jnp.ones(()) if tree.is_inexact(leaf) else jnp.zeros(())
    raw = jax.tree.map(zero, params)
    positive = lambda raw: jax.tree.map(jax.nn.softplus, raw)
    prior_tx = optax.rmsprop(rate, decay=0.99, eps=1e-8, eps_in_sqrt=False)
    critic_tx = optax.adagrad(critic_rate, initial_accumulator_value=0.0, eps=1e-10)

    def networks(key, raw, x):
        draw = lambda key: apply_fn(sample_prior(key, positive(raw), params, where=where), x)
        return _by_output(jax.vmap(draw)(jax.random.split(key, functions)))

    def fit_critic(key, raw, x, draw):
        def loss(critic, key):
            net_key, process_key, mix_key = jax.random.split(key, 3)
            net, target = networks(net_key, raw, x), _by_output(draw(process_key, functions))
            if net.shape != target.shape:
                raise ValueError(
                    f"the network draws (functions, outputs, points) = {net.shape}, and the "
                    f"process {target.shape}"
                )
            mix = jax.random.uniform(mix_key, (functions, 1, 1))
            mix = mix * net + (1 - mix) * target
            slope = jax.vmap(jax.vmap(jax.grad(_critic, 1), (None, 0)), (None, 0))(critic, mix)
            return -_gap(critic, net, target) + penalty * _penalty(slope, one_sided)

        def step(carry):
            i, critic, state, _ = carry
            grads = jax.grad(loss)(critic, jax.random.fold_in(key, i))
            updates, state = critic_tx.update(grads, state)
            norm = optax.tree.norm(grads)
            return i + 1, optax.apply_updates(critic, updates), state, norm

        critic = _draw_critic(jax.random.fold_in(key, critic_steps), x.shape[0], critic_width)
        start = (0, critic, critic_tx.init(critic), jnp.array(jnp.inf))
        going = lambda carry: (carry[0] < critic_steps) & (carry[3] >= tolerance)
        return lax.while_loop(going, step, start)[1]

    def step(carry, key):
        raw, state = carry
        x_key, critic_key, net_key, process_key = jax.random.split(key, 4)
        x = inputs(x_key)
        draw = process(x)
        critic = fit_critic(critic_key, raw, x, draw)
        target = _by_output(draw(process_key, functions))
        gap = lambda raw: _gap(critic, networks(net_key, raw, x), target)
        distance, grads = jax.value_and_grad(gap)(raw)
        updates, state = prior_tx.update(grads, state)
        raw = optax.apply_updates(raw, updates)
        return (raw, state), (positive(raw), distance)

    keys = jax.random.split(key, steps)
    (raw, _), (history, distance) = lax.scan(step, (raw, prior_tx.init(raw)), keys)
    if tree.concrete(distance) and not (finite := np.isfinite(np.asarray(distance))).all():
        raise ValueError(
            f"the distance is not finite from step {int(finite.argmin())} on: the draws of the "
            "process (a larger jitter of its covariance?) or of the network are not"
        )
    return FunctionalPrior(positive(raw), history, distance)


def _by_output(f: Array) -> Float[Array, "functions outputs n"]:
    return jnp.moveaxis(f.reshape(*f.shape[:2], -1), 1, 2)


def _draw_critic(key: PRNGKeyArray, n: int, width: int) -> list[tuple[Array, Array]]:
    sizes, xavier = (n, width, width, 1), jax.nn.initializers.glorot_normal()
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        w_key, b_key = jax.random.split(jax.random.fold_in(key, i))
        layers.append((xavier(w_key, (a, b)), jax.random.normal(b_key, (b,))))
    return layers


def _critic(critic: Any, f: Float[Array, " n"]) -> Float[Array, ""]:
    *hidden, (w, b) = critic
    for kernel, bias in hidden:
        f = jax.nn.softplus(f @ kernel + bias)
    return (f @ w + b)[0]


def _gap(critic: Any, net: Array, target: Array) -> Float[Array, ""]:
    """E c(net) - E c(target), summed over outputs."""
    score = jax.vmap(jax.vmap(lambda f: _critic(critic, f)))
    return (score(net).mean(0) - score(target).mean(0)).sum()


def _penalty(slope: Float[Array, "functions outputs n"], one_sided: bool) -> Float[Array, ""]:
    excess = jnp.sqrt(jnp.square(slope).sum(-1) + 1e-24) - 1
    return jnp.square(jnp.maximum(excess, 0) if one_sided else excess).mean(0).sum()
