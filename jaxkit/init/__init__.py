"""Initializers of arrays and of whole trees, and the theory that tells which to take."""

from jaxkit.init.advise import Advice, advise
from jaxkit.init.calibrate import Calibration, calibrate, lsuv
from jaxkit.init.criticality import (
    Critical,
    FiniteWidth,
    Susceptibilities,
    correlation_rate,
    criticality,
    edge_of_chaos,
    finite_width,
    fluctuation,
    susceptibilities,
    width_fluctuation,
)
from jaxkit.init.deepscale import DeepScale, deepscale, relu_correlation, relu_covariance
from jaxkit.init.dynamics import Modes, aligned, learning_time, linear_modes, mode_strength
from jaxkit.init.fourier import convaware, orthonormal_rows
from jaxkit.init.functional_prior import (
    FunctionalPrior,
    functional_prior,
    gaussian_process,
    sample_prior,
)
from jaxkit.init.gain import balanced_sigma, gain, input_gain, maxout, maxout_range, vi3nr
from jaxkit.init.gauss import Activation, Moments, expect, moments, pool_moment
from jaxkit.init.graph import architecture_aware, in_degrees, learning_rate_scale, path_lengths
from jaxkit.init.identity import hadamard, idi, idiz, relu_one, zero
from jaxkit.init.interval import Bounds, affine_bounds, ibp, ibp_regularizer
from jaxkit.init.kernel import (
    Guessing,
    Trajectory,
    class_fractions,
    correlation_map,
    guessing_bias,
    propagate,
    variance_map,
)
from jaxkit.init.mimetic import factor_pair, mimetic_attention, sincos_2d
from jaxkit.init.pretrain import (
    contrastive_loss,
    hide,
    masked_loss,
    span_mask,
    triplet_loss,
)
from jaxkit.init.prior import (
    class_prior,
    count_foreground,
    guided_loss,
    prior_bias,
    sampling_free_loss,
)
from jaxkit.init.pseudo_iid import block_sparse, low_rank, orthogonal
from jaxkit.init.residual import Wire, convex_wire, deepscale_wire, nf_wire, residual, rezero
from jaxkit.init.rules import Initializer, TreeInitializer, rules
from jaxkit.init.shaped import shaped_attention, shaped_relu, shaped_relu_moment, shaped_scale
from jaxkit.init.signals import Signals, signals
from jaxkit.init.standardize import signal_moments, standardize, standardized, unit_gains
from jaxkit.init.state_space import last_tap, mimetic_ssm
from jaxkit.init.transplant import Transplanted, crop, resize, transplant

__all__ = [
    "Activation",
    "Advice",
    "Bounds",
    "Calibration",
    "Critical",
    "DeepScale",
    "FiniteWidth",
    "FunctionalPrior",
    "Guessing",
    "Initializer",
    "Modes",
    "Moments",
    "Signals",
    "Susceptibilities",
    "Trajectory",
    "Transplanted",
    "TreeInitializer",
    "Wire",
    "advise",
    "affine_bounds",
    "aligned",
    "architecture_aware",
    "balanced_sigma",
    "block_sparse",
    "calibrate",
    "class_fractions",
    "class_prior",
    "contrastive_loss",
    "convaware",
    "convex_wire",
    "correlation_map",
    "correlation_rate",
    "count_foreground",
    "criticality",
    "crop",
    "deepscale",
    "deepscale_wire",
    "edge_of_chaos",
    "expect",
    "factor_pair",
    "finite_width",
    "fluctuation",
    "functional_prior",
    "gain",
    "gaussian_process",
    "guessing_bias",
    "guided_loss",
    "hadamard",
    "hide",
    "ibp",
    "ibp_regularizer",
    "idi",
    "idiz",
    "in_degrees",
    "input_gain",
    "last_tap",
    "learning_rate_scale",
    "learning_time",
    "linear_modes",
    "low_rank",
    "lsuv",
    "masked_loss",
    "maxout",
    "maxout_range",
    "mimetic_attention",
    "mimetic_ssm",
    "mode_strength",
    "moments",
    "nf_wire",
    "orthogonal",
    "orthonormal_rows",
    "path_lengths",
    "pool_moment",
    "prior_bias",
    "propagate",
    "relu_correlation",
    "relu_covariance",
    "relu_one",
    "residual",
    "resize",
    "rezero",
    "rules",
    "sample_prior",
    "sampling_free_loss",
    "shaped_attention",
    "shaped_relu",
    "shaped_relu_moment",
    "shaped_scale",
    "signal_moments",
    "signals",
    "sincos_2d",
    "span_mask",
    "standardize",
    "standardized",
    "susceptibilities",
    "transplant",
    "triplet_loss",
    "unit_gains",
    "variance_map",
    "vi3nr",
    "width_fluctuation",
    "zero",
]
