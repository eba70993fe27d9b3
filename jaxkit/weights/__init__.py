"""Whole sets of weights: merge many into one, and read them from checkpoints leaf by leaf."""

from jaxkit.weights import files
from jaxkit.weights.align import Learned, align, align_activations, align_by_gradient
from jaxkit.weights.competition import pcb
from jaxkit.weights.consensus import agree, gossip, majority, phash, tree_digest
from jaxkit.weights.darex import adamr, analytic_q, output_change, search_q
from jaxkit.weights.diff import Difference, difference
from jaxkit.weights.edit import SecondMoment, confine, edit_directions, rewrite, second_moment
from jaxkit.weights.fisher import fisher, fisher_average
from jaxkit.weights.merge import Method, combine, deltas, interpolate, merge
from jaxkit.weights.methods import (
    average,
    breadcrumbs,
    dare,
    model_stock,
    task_arithmetic,
    ties,
)
from jaxkit.weights.soup import (
    GreedySoup,
    LearnedSoup,
    flips,
    greedy_soup,
    learned_soup,
    running_mean,
)
from jaxkit.weights.stream import Rule, Task, merge_files, plan
from jaxkit.weights.write import writing

__all__ = [
    "Difference",
    "GreedySoup",
    "Learned",
    "LearnedSoup",
    "Method",
    "Rule",
    "SecondMoment",
    "Task",
    "adamr",
    "agree",
    "align",
    "align_activations",
    "align_by_gradient",
    "analytic_q",
    "average",
    "breadcrumbs",
    "combine",
    "confine",
    "dare",
    "deltas",
    "difference",
    "edit_directions",
    "files",
    "fisher",
    "fisher_average",
    "flips",
    "gossip",
    "greedy_soup",
    "interpolate",
    "learned_soup",
    "majority",
    "merge",
    "merge_files",
    "model_stock",
    "output_change",
    "pcb",
    "phash",
    "plan",
    "rewrite",
    "running_mean",
    "search_q",
    "second_moment",
    "task_arithmetic",
    "ties",
    "tree_digest",
    "writing",
]
