"""Gradient transformations, schedules and laws that optax lacks."""

from jaxkit.optim.aggregate import (
    Direction,
    epo_weights,
    gram,
    min_norm,
    pareto_direction,
    weigh,
)
from jaxkit.optim.autolrs import Stage, autolrs, forecast
from jaxkit.optim.basis import Basis, BasisState, in_basis
from jaxkit.optim.bilevel import BilevelState, bo_rep, hypergradient
from jaxkit.optim.federated import FedHyperState, fed_hyper, fed_hyper_client
from jaxkit.optim.fira import fira, galore
from jaxkit.optim.fullbatch import regularized_gradient
from jaxkit.optim.langevin import LangevinState, langevin, mixture_log_loss, regret_bound
from jaxkit.optim.laws import (
    Asymptote,
    BatchLaw,
    PowerLaw,
    critical_batch,
    decay_from_half_life,
    fit_asymptote,
    fit_power_law,
    half_life,
    lr_sensitivity,
    near_best,
    one_epoch_parameters,
    rescale_decay,
    step_law,
    stochastic_round,
)
from jaxkit.optim.lookahead import LookaheadState, adamax, lookahead
from jaxkit.optim.noise import NoiseScale, gradient_noise, gradient_noise_scale, weight_noise
from jaxkit.optim.private import (
    Lot,
    clipped_sum,
    dp_epsilon,
    dp_gradient,
    dp_noise_multiplier,
    dp_steps,
    example_norms,
    poisson_lot,
)
from jaxkit.optim.schedules import cosine_power, odds, refined, rewarm, stretch, uba
from jaxkit.optim.score import TimeToResult, algoperf, calibrate_jointly, reached
from jaxkit.optim.soap import scale_by_soap, soap
from jaxkit.optim.tract import tract
from jaxkit.optim.triage import phased, stacked, successive_keep

__all__ = [
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
    "NoiseScale",
    "PowerLaw",
    "Stage",
    "TimeToResult",
    "adamax",
    "algoperf",
    "autolrs",
    "bo_rep",
    "calibrate_jointly",
    "clipped_sum",
    "cosine_power",
    "critical_batch",
    "decay_from_half_life",
    "dp_epsilon",
    "dp_gradient",
    "dp_noise_multiplier",
    "dp_steps",
    "epo_weights",
    "example_norms",
    "fed_hyper",
    "fed_hyper_client",
    "fira",
    "fit_asymptote",
    "fit_power_law",
    "forecast",
    "galore",
    "gradient_noise",
    "gradient_noise_scale",
    "gram",
    "half_life",
    "hypergradient",
    "in_basis",
    "langevin",
    "lookahead",
    "lr_sensitivity",
    "min_norm",
    "mixture_log_loss",
    "near_best",
    "odds",
    "one_epoch_parameters",
    "pareto_direction",
    "phased",
    "poisson_lot",
    "reached",
    "refined",
    "regret_bound",
    "regularized_gradient",
    "rescale_decay",
    "rewarm",
    "scale_by_soap",
    "soap",
    "stacked",
    "step_law",
    "stochastic_round",
    "stretch",
    "successive_keep",
    "tract",
    "uba",
    "weigh",
    "weight_noise",
]
