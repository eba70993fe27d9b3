"""Findings of papers, reproduced: ``python -m experiments list | run NAME | report``.

An experiment is one file of this folder, and its name is the file's. It has four things:

* ``Settings``: a frozen dataclass; its fields are the options of the command line;
* ``run(settings, folder) -> Run``: what is to be computed, step by step. `folder` is None or the
  folder with the user's data;
* ``plot(settings, rows) -> matplotlib.figure.Figure``;
* ``claims(settings, rows) -> list[Claim]``: the statements of the paper, as predicates.

The file's docstring is its title and its description. The figure and the claims are functions of
the settings and of the rows of metrics alone. What every experiment gets (progress, metrics,
checkpoints, resuming, the table, the page) is in `experiments.runner` and `experiments.report`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

__all__ = ["Claim", "Row", "Run", "Settings"]

Row = dict[str, Any]
Settings = Any


class Run(NamedTuple):
    """A computation in steps, that can stop after any of them and go on later.

    Attributes:
      init: gives the state before the first step, a tree of arrays; it is traced by
        `jax.eval_shape`, so that a checkpoint can be read without computing it.
      step: ``step(i, state) -> (state, rows)`` computes step i and the rows of metrics that it
        adds: dicts of numbers, strings and lists. It is a function of i and `state` alone (draw
        with ``fold_in(key, i)``), and may donate `state`.
      steps: the number of steps; the best are seconds long.
      data: names the data, with a hash of the values: a run goes on only with the same.
    """

    init: Callable[[], PyTree]
    step: Callable[[int, PyTree], tuple[PyTree, list[Row]]]
    steps: int
    data: str = ""


class Claim(NamedTuple):
    """A statement of a paper, what it leads one to expect, what was measured, and the verdict."""

    statement: str
    expected: str
    measured: str
    holds: bool
