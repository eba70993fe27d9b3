"""Whole sets of weights: merge many into one, and read them from checkpoints leaf by leaf."""

from jaxkit.weights import files
from jaxkit.weights.competition import pcb
from jaxkit.weights.darex import adamr, analytic_q, output_change, search_q
from jaxkit.weights.diff import Difference, difference
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
    "LearnedSoup",
    "Method",
    "Rule",
    "Task",
    "adamr",
    "analytic_q",
    "average",
    "breadcrumbs",
    "combine",
    "dare",
    "deltas",
    "difference",
    "files",
    "fisher",
    "fisher_average",
    "flips",
    "greedy_soup",
    "interpolate",
    "learned_soup",
    "merge",
    "merge_files",
    "model_stock",
    "output_change",
    "pcb",
    "plan",
    "running_mean",
    "search_q",
    "task_arithmetic",
    "ties",
    "writing",
]
