"""The README says what works: its example runs, its commands are the ones that exist."""

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.S)


def test_the_two_commands():
    run, test = (block.strip() for block in blocks("sh")[:2])
    assert run == 'pip install -e ".[experiments]" && python -m experiments run random-labels'
    assert test == 'pip install -e ".[test]" && pytest'


@pytest.mark.parametrize("i", range(len(blocks("python"))))
def test_examples_run(i, tmp_path, capsys):
    script = tmp_path / "example.py"
    script.write_text(blocks("python")[i])
    found = runpy.run_path(str(script))
    if i == 0:
        mask = found["masks"].current(found["state"])
        params = found["masks"].apply(found["params"], mask)
        x, y = found["x"], found["y"]
        assert found["loss_fn"](params, (x, y)) < 0.2 * float(y.var())
        assert "90.00 %" in capsys.readouterr().out


def test_relative_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (README.parent / link).exists(), link
