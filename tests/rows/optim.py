"""Rows of optim and nn."""

import jax
import jax.numpy as jnp
import optax

from jaxkit import nn, optim, tree
from tests.rows.base import KEY, MLP, Row, axis_or_none, loss_fn, mlp


def stacked(params):
    """Two objectives' gradients."""
    both = lambda w: jnp.stack([w, jnp.cos(w)]) if tree.is_inexact(w) else jnp.stack([w, w])
    return jax.tree.map(both, params)


def example_loss(params, x):
    return jnp.sum(jnp.tanh(mlp(params, x)))


def parabola(x, y, batch):
    return 0.5 * jnp.sum((y - 2 * x) ** 2) + 0.1 * jnp.sum(x**2) + jnp.mean(batch) * jnp.sum(y)


def lower(x, y, batch):
    return 0.5 * jnp.sum((y - jnp.sin(x)) ** 2)


ROWS = [
    Row(
        "optim.gram",
        lambda key, params, batch, n: optim.gram(stacked(params)),
        local=False,
        keeps=False,  # an empty tree has no number of objectives
        smooth=True,
        tol=1e-4,
    ),
    Row(
        "optim.weigh",
        lambda key, params, batch, n: optim.weigh(stacked(params), jnp.array([1.0, n])),
        number=0.5,
        smooth=True,
    ),
    Row(
        "optim.min_norm",
        lambda key, params, batch, n: optim.min_norm(jnp.array([[2.0, n], [n, 3.0]])),
        number=0.5,
        shards=False,
    ),
    Row(
        "optim.epo_weights",
        lambda key, params, batch, n: optim.epo_weights(
            jnp.array([[2.0, 0.3], [0.3, 3.0]]), jnp.array([n, 1.0]), jnp.ones(2)
        ),
        number=2.0,
        shards=False,
    ),
    Row(
        "optim.pareto_direction",
        lambda key, params, batch, n: optim.pareto_direction(stacked(params), params),
        local=False,
        keeps=False,  # an empty tree has no number of objectives
        tol=1e-3,
    ),
    Row(
        "optim.hypergradient",
        lambda key, params, batch, n: optim.hypergradient(
            parabola, lower, jnp.float32(n), jnp.ones(2), jnp.ones(2), (batch, batch)
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "optim.fed_hyper_client",
        lambda key, params, batch, n: optim.fed_hyper_client(
            n, batch, jnp.sin(batch), jnp.cos(batch), steps=4, start=0.5
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "optim.regularized_gradient",
        lambda key, params, batch, n: optim.regularized_gradient(
            lambda p, x: loss_fn(p, x), MLP, batch.reshape(2, 8, 2), learning_rate=n
        ),
        number=0.1,
        shards=False,
    ),
    Row(
        "optim.mixture_log_loss",
        lambda key, params, batch, n: optim.mixture_log_loss(-batch * n),
        number=2.0,
        shards=False,
    ),
    Row(
        "optim.regret_bound",
        lambda key, params, batch, n: optim.regret_bound(
            jnp.ravel(batch) + 0.1, jnp.zeros(batch.size), n
        ),
        number=20.0,
        shards=False,
    ),
    Row(
        "optim.example_norms",
        lambda key, params, batch, n: optim.example_norms(example_loss, MLP, batch),
        shards=False,
    ),
    Row(
        "optim.clipped_sum",
        lambda key, params, batch, n: optim.clipped_sum(
            example_loss, MLP, batch, clip=n, axis_name=axis_or_none()
        ),
        number=0.5,
    ),
    Row(
        "optim.dp_gradient",
        lambda key, params, batch, n: optim.dp_gradient(
            key,
            example_loss,
            MLP,
            batch,
            clip=0.5,
            noise_multiplier=n,
            lot_size=16,
            axis_name=axis_or_none(),
        ),
        number=1.0,
        random=True,
    ),
    Row(
        "optim.poisson_lot",
        lambda key, params, batch, n: optim.poisson_lot(key, 40, n, size=30),
        number=0.3,
        random=True,
    ),
    Row(
        "optim.odds",
        lambda key, params, batch, n: optim.odds(batch / 4, n),
        number=2.0,
        shards=False,
    ),
    Row(
        "optim.uba",
        lambda key, params, batch, n: jax.vmap(optim.uba(1.0, 10, phi=n, warmup=2))(jnp.arange(12)),
        number=1.5,
    ),
    Row(
        "optim.cosine_power",
        lambda key, params, batch, n: jax.vmap(optim.cosine_power(1.0, 10, power=n))(
            jnp.arange(12)
        ),
        number=4.0,
    ),
    Row(
        "optim.decay_from_half_life",
        lambda key, params, batch, n: optim.decay_from_half_life(100.0, n),
        number=3.0,
    ),
    Row(
        "optim.half_life",
        lambda key, params, batch, n: optim.half_life(jnp.float32(n)),
        number=0.9,
    ),
    Row(
        "optim.stochastic_round",
        lambda key, params, batch, n: optim.stochastic_round(key, params),
        random=True,
    ),
    Row(
        "optim.tract",
        lambda key, params, batch, n: optim.tract(jnp.ones((2, 3)), batch, damping=n),
        number=0.1,
        shards=False,
    ),
    Row(
        "nn.stochastic_depth",
        lambda key, params, batch, n: [
            nn.stochastic_depth(key, lambda x: 2 * x + 1, batch, n, mode="row"),
            nn.stochastic_depth(key, lambda x: (x, x.mean(0)), batch, n, state=jnp.ones(2)),
        ],
        number=0.5,
        random=True,
        shards=False,
    ),
    Row(
        "nn.fold_depth",
        lambda key, params, batch, n: nn.fold_depth(batch, None, n),
        number=0.5,
        shards=False,
    ),
    Row(
        "nn.ghost_batch_norm",
        lambda key, params, batch, n: nn.ghost_batch_norm(batch, size=2, momentum=n),
        number=0.9,
        shards=False,
        tol=1e-4,
    ),
]

# An eps that is not small, or directions without a gradient would have steps made of rounding; and
# the factors of a matrix that is not square have a null space, whose basis is rounding too: SOAP on
# eight devices is compared in optim/test_soap.py. Decompositions gather a leaf.
OPTIMIZERS = [
    Row(
        "optim.soap",
        lambda params, n: optim.soap(n, every=2, eps=0.1),
        number=0.1,
        shards=False,
        local=False,
        tol=1e-3,
    ),
    Row(
        "optim.scale_by_soap",
        lambda params, n: optim.scale_by_soap(b1=n, every=2, eps=0.1),
        number=0.9,
        shards=False,
        local=False,
        tol=1e-3,
    ),
    Row(
        "optim.fira",
        lambda params, n: optim.fira(n, rank=2, every=2, eps=0.1),
        number=0.1,
        local=False,
        tol=1e-3,
    ),
    Row(
        "optim.galore",
        lambda params, n: optim.galore(n, rank=2, every=2, eps=0.1),
        number=0.1,
        local=False,
        tol=1e-3,
    ),
    Row("optim.lookahead", lambda params, n: optim.lookahead(optax.adam(n), every=2), number=0.1),
    Row("optim.adamax", lambda params, n: optim.adamax(n), number=0.1),
    Row("optim.langevin", lambda params, n: optim.langevin(n, key=KEY, num_data=9), number=0.1),
]

LAW = "theory or a fit, on the host in float64; tested in optim/test_laws.py"
EXEMPT = {
    **{
        f"optim.{name}": LAW
        for name in (
            "critical_batch",
            "fit_asymptote",
            "fit_power_law",
            "lr_sensitivity",
            "near_best",
            "rescale_decay",
            "step_law",
        )
    },
    **{
        f"optim.{name}": "a type"
        for name in (
            "Asymptote",
            "Basis",
            "BasisState",
            "BatchLaw",
            "BilevelState",
            "Direction",
            "FedHyperState",
            "LangevinState",
            "LookaheadState",
            "Lot",
            "PowerLaw",
            "Stage",
            "TimeToResult",
        )
    },
    **{
        f"optim.{name}": "host-side: times of finished runs; tested in optim/test_score.py"
        for name in ("algoperf", "calibrate_jointly", "reached")
    },
    **{
        f"optim.{name}": "host-side accounts; tested in optim/test_private.py"
        for name in ("dp_epsilon", "dp_noise_multiplier", "dp_steps")
    },
    **{
        f"optim.{name}": "a loop on the host; tested in optim/test_host.py"
        for name in ("autolrs", "forecast", "phased", "stacked", "successive_keep")
    },
    "optim.bo_rep": "makes functions; tested in optim/test_dynamics.py",
    "optim.fed_hyper": "makes functions; tested in optim/test_dynamics.py",
    "optim.in_basis": "the primitive of soap, fira and galore, which are rows",
    "optim.refined": "a table made on the host; tested in optim/test_schedules.py",
    "optim.rewarm": "a schedule of optax",
    "nn.GhostStats": "a type",
    "nn.linear_decay": "constants; tested in nn/test_nn.py",
}
