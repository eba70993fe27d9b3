"""Rows of init."""

import jax
import jax.numpy as jnp

from jaxkit import init, tree
from tests.rows.base import (
    ATTENTION,
    MAMBA,
    MLP,
    RESIDUAL,
    STATE_SPACE,
    Row,
    axis_or_none,
    bounds,
    draw,
    mlp,
    square,
)

ROWS = [
    Row(
        "init.rules",
        lambda key, params, batch, n: init.rules((None, jax.nn.initializers.normal(n)))(
            key, params
        ),
        number=0.1,
        random=True,
        like_params=True,
    ),
    Row(
        "init.calibrate",
        lambda key, params, batch, n: init.calibrate(
            mlp, MLP, batch, target=n, warn=False, axis_name=axis_or_none()
        ),
        number=1.0,
        tol=1e-4,
    ),
    Row(
        "init.lsuv",
        lambda key, params, batch, n: init.lsuv(
            key, mlp, MLP, batch, target=n, warn=False, axis_name=axis_or_none()
        ),
        number=1.0,
        random=True,
        tol=1e-4,
    ),
    Row(
        "init.signals",
        lambda key, params, batch, n: (
            init.signals(mlp, MLP, batch, axis_name=axis_or_none()).layers
        ),
        tol=1e-4,
    ),
    Row(
        "init.transplant",
        lambda key, params, batch, n: init.transplant(params, params, where=tree.every(params))[0],
        like_params=True,
        keeps=False,  # an empty tree has nothing to load
    ),
    Row(
        "init.sample_prior",
        lambda key, params, batch, n: init.sample_prior(
            key, jax.tree.map(lambda w: n, params), params
        ),
        number=0.5,
        random=True,
        like_params=True,
    ),
    # losses and masks of warm starts
    Row(
        "init.span_mask",
        lambda key, params, batch, n: init.span_mask(key, (2, 12), span=3),
        random=True,
    ),
    Row(
        "init.hide",
        lambda key, params, batch, n: init.hide(square(batch), square(batch)[..., 0] > 1),
        shards=False,
    ),
    Row(
        "init.masked_loss",
        lambda key, params, batch, n: init.masked_loss(
            square(batch), jnp.sin(square(batch)), square(batch)[..., 0] > 1
        ),
        shards=False,
    ),
    Row(
        "init.triplet_loss",
        lambda key, params, batch, n: init.triplet_loss(
            batch, jnp.sin(batch), jnp.cos(batch), 2 * (jnp.arange(16) % 2) - 1, margin=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.contrastive_loss",
        lambda key, params, batch, n: init.contrastive_loss(
            jnp.sin(batch), jnp.cos(batch), temperature=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.count_foreground",
        lambda key, params, batch, n: init.count_foreground(
            (batch - 1).astype(int), axis_name=axis_or_none()
        ),
    ),
    Row("init.class_prior", lambda key, params, batch, n: init.class_prior(n, 10.0), number=2.0),
    Row(
        "init.prior_bias",
        lambda key, params, batch, n: init.prior_bias(n)(key, (3,)),
        number=0.1,
    ),
    Row(
        "init.sampling_free_loss",
        lambda key, params, batch, n: init.sampling_free_loss(batch, (batch > 1).astype(int), n),
        number=4.0,
        shards=False,
    ),
    Row(
        "init.guided_loss",
        lambda key, params, batch, n: init.guided_loss(n**2, n + 1),
        number=2.0,
    ),
    # array initializers
    Row("init.zero", draw(lambda n: init.zero()), like_params=True),
    Row("init.idi", draw(lambda n: init.idi(tau=n)), number=1.0, random=True, like_params=True),
    Row("init.idiz", draw(lambda n: init.idiz(eps=n)), number=1.0, like_params=True),
    Row("init.convaware", draw(lambda n: init.convaware()), random=True, like_params=True),
    Row(
        "init.orthogonal",
        draw(lambda n: init.orthogonal(n)),
        number=1.0,
        random=True,
        like_params=True,
    ),
    Row(
        "init.low_rank",
        draw(lambda n: init.low_rank(0.5, n)),
        number=1.0,
        random=True,
        like_params=True,
        keeps=False,  # a kernel without entries has no rank
    ),
    Row(
        "init.block_sparse",
        draw(lambda n: init.block_sparse(1, n)),
        number=1.0,
        random=True,
        like_params=True,
    ),
    # (the next four are jax.nn.initializers.variance_scaling, which refuses a fan of zero)
    Row(
        "init.vi3nr",
        draw(lambda n: init.vi3nr(jnp.sin)),
        random=True,
        like_params=True,
        keeps=False,
    ),
    Row("init.maxout", draw(lambda n: init.maxout(1)), random=True, like_params=True, keeps=False),
    Row("init.ibp", draw(lambda n: init.ibp()), random=True, like_params=True, keeps=False),
    Row(
        "init.architecture_aware",
        draw(lambda n: init.architecture_aware(2)),
        random=True,
        like_params=True,
        keeps=False,
    ),
    Row(
        "init.last_tap",
        lambda key, params, batch, n: init.last_tap(key, (3, 1, 4)),
    ),
    Row(
        "init.orthonormal_rows",
        lambda key, params, batch, n: init.orthonormal_rows(key, 3, 5),
        random=True,
    ),
    # tree initializers
    Row(
        "init.mimetic_attention",
        lambda key, params, batch, n: init.mimetic_attention(qk=(0.7, n))(key, ATTENTION),
        number=0.7,
        random=True,
        tol=1e-3,  # singular vectors, of gaps that are no larger
    ),
    Row(
        "init.mimetic_ssm",
        lambda key, params, batch, n: init.mimetic_ssm(8, state=2, noise=n, **MAMBA)(
            key, STATE_SPACE
        ),
        number=0.1,
        random=True,
    ),
    Row("init.rezero", lambda key, params, batch, n: init.rezero()(key, RESIDUAL)),
    Row(
        "init.standardized",
        lambda key, params, batch, n: init.standardized(
            init.unit_gains(params, where=None), params, where=None
        ),
        like_params=True,
        smooth=True,
    ),
    Row(
        "init.unit_gains",
        lambda key, params, batch, n: init.unit_gains(params, where=None),
    ),
    # arrays
    Row("init.standardize", lambda key, params, batch, n: init.standardize(batch), shards=False),
    Row(
        "init.signal_moments",
        lambda key, params, batch, n: init.signal_moments(batch),
        shards=False,
    ),
    Row("init.relu_one", lambda key, params, batch, n: init.relu_one(batch - 1), shards=False),
    Row(
        "init.shaped_attention",
        lambda key, params, batch, n: init.shaped_attention(square(batch), identity=n),
        number=1.0,
        shards=False,
    ),
    Row(
        "init.shaped_relu", lambda key, params, batch, n: init.shaped_relu(batch, 16), shards=False
    ),
    Row(
        "init.residual",
        lambda key, params, batch, n: init.residual(jnp.sin, batch, init.Wire(n, n, n)),
        number=0.5,
        shards=False,
    ),
    Row("init.convex_wire", lambda key, params, batch, n: init.convex_wire(3, n), number=0.5),
    Row(
        "init.deepscale_wire", lambda key, params, batch, n: init.deepscale_wire(3, k=n), number=0.5
    ),
    Row("init.nf_wire", lambda key, params, batch, n: init.nf_wire((2, 1), alpha=n), number=0.5),
    Row(
        "init.deepscale",
        lambda key, params, batch, n: init.deepscale(16, 3, dropout=n),
        number=0.5,
    ),
    Row(
        "init.relu_covariance",
        lambda key, params, batch, n: init.relu_covariance(n),
        number=0.5,
    ),
    Row(
        "init.relu_correlation",
        lambda key, params, batch, n: init.relu_correlation(n),
        number=0.5,
    ),
    Row(
        "init.factor_pair",
        lambda key, params, batch, n: jnp.matmul(*init.factor_pair(square(batch)[0], 2)),
        shards=False,
    ),
    Row(
        "init.input_gain",
        lambda key, params, batch, n: init.input_gain(batch, n),
        0.5,
        shards=False,
    ),
    Row(
        "init.affine_bounds",
        lambda key, params, batch, n: init.affine_bounds(*bounds(batch), jnp.eye(2)),
        shards=False,
    ),
    Row(
        "init.ibp_regularizer",
        lambda key, params, batch, n: init.ibp_regularizer(
            bounds(batch), [bounds(batch - 1)], eps_ratio=n
        ),
        number=0.5,
        shards=False,
    ),
    Row(
        "init.width_fluctuation",
        lambda key, params, batch, n: init.width_fluctuation(batch.reshape(8, 4)),
        shards=False,
    ),
    Row(
        "init.mode_strength",
        lambda key, params, batch, n: init.mode_strength(jnp.arange(4.0), 2.0, n),
        number=0.1,
    ),
    Row(
        "init.linear_modes",
        lambda key, params, batch, n: init.linear_modes(2 * jnp.eye(4), batch.reshape(4, 8)).s,
        shards=False,
    ),
    Row(
        "init.aligned",
        lambda key, params, batch, n: init.aligned(key, batch[:4], 2, u0=n),
        number=0.25,
        random=True,
        shards=False,
    ),
    Row(
        "init.class_fractions",
        lambda key, params, batch, n: init.class_fractions(
            jnp.sin(7 * batch), axis_name=axis_or_none()
        ),
    ),
]

EXEMPT = {
    "init.Activation": "a type",
    "init.Bounds": "a type",
    "init.Advice": "a type",
    "init.Calibration": "a type",
    "init.FunctionalPrior": "a type",
    "init.Signals": "a type",
    "init.Transplanted": "a type",
    "init.advise": "host-side: a verdict in words; its numbers are those of init.signals",
    "init.crop": "a rule for init.transplant",
    "init.functional_prior": "a training loop; tested in init/test_prior.py",
    "init.gaussian_process": "makes a function; tested in init/test_prior.py",
    "init.resize": "a rule for init.transplant",
    "init.Critical": "a type",
    "init.DeepScale": "a type",
    "init.FiniteWidth": "a type",
    "init.Guessing": "a type",
    "init.Initializer": "a type",
    "init.Modes": "a type",
    "init.Moments": "a type",
    "init.Susceptibilities": "a type",
    "init.Trajectory": "a type",
    "init.Wire": "a type",
    "init.TreeInitializer": "a type",
}

THEORY = "theory, on the host in float64; its numbers are constants of a program"
EXEMPT |= {
    f"init.{name}": THEORY
    for name in [
        "balanced_sigma",
        "correlation_map",
        "correlation_rate",
        "criticality",
        "edge_of_chaos",
        "expect",
        "finite_width",
        "fluctuation",
        "gain",
        "guessing_bias",
        "hadamard",
        "in_degrees",
        "learning_rate_scale",
        "learning_time",
        "maxout_range",
        "moments",
        "path_lengths",
        "pool_moment",
        "propagate",
        "shaped_relu_moment",
        "shaped_scale",
        "sincos_2d",
        "susceptibilities",
        "variance_map",
    ]
}
