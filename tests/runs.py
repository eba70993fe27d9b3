"""Run an experiment to its end, without the runner's files."""

from experiments import Run


def all_rows(run: Run) -> list[dict]:
    """Return the rows of all steps of a run."""
    state, rows = run.init(), []
    for i in range(run.steps):
        state, new = run.step(i, state)
        rows += new
    return rows
