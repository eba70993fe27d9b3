import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import merge_speed
from tests.runs import all_rows

SETTINGS = replace(merge_speed.Settings(), width=32, layers=1, rounds=1)

# Stands in for a Python with mergekit: it is called as one is, and "merges" to the base.
STUB = """#!{python}
import json, pathlib, shutil, sys
flag, code, config, out, quiet = sys.argv[1:]
assert (flag, quiet) == ("-c", "--quiet") and "mergekit" in code
config = json.loads(pathlib.Path(config).read_text())
assert all(pathlib.Path(m["model"]).is_file() for m in config["models"])
pathlib.Path(out).mkdir()
source = config.get("base_model", config["models"][0]["model"])
shutil.copy(source, pathlib.Path(out) / "model.safetensors")
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    stub = tmp_path_factory.mktemp("stub") / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    return all_rows(merge_speed.run(replace(SETTINGS, mergekit=str(stub)), None))


def test_every_merge_is_measured(rows):
    measured = [(row["method"], row["tool"], row["size"]) for row in rows[:-1]]
    assert measured == [
        ("TIES", "jaxkit", "whole"),
        ("TIES", "mergekit", "whole"),
        ("TIES, whole tree", "jaxkit", "whole"),
        ("average", "jaxkit", "whole"),
        ("average", "mergekit", "whole"),
        ("TIES", "jaxkit", "start"),
        ("TIES", "mergekit", "start"),
    ]
    assert all(row["seconds"] > 0 and row["cpu"] >= 0 for row in rows[:-1])
    assert rows[-1]["difference"] == pytest.approx(1)  # the stand-in changes nothing
    assert isinstance(merge_speed.plot(SETTINGS, rows), Figure)


def made_up(ties, average, start=1.0, difference=1e-7):
    """Rows in which mergekit takes so many seconds, and jaxkit two."""
    out = []
    for i in range(3):
        for method, theirs in (("TIES", ties), ("average", average)):
            for tool, t in (("mergekit", theirs), ("jaxkit", 2.0)):
                row = {"round": i, "method": method, "tool": tool}
                out.append(row | {"size": "whole", "seconds": t, "cpu": t})
        for tool in ("mergekit", "jaxkit"):
            row = {"round": i, "method": "TIES", "tool": tool}
            out.append(row | {"size": "start", "seconds": start, "cpu": start})
        out.append({"round": i, "difference": difference})
    return out


def test_claims_can_fail():
    verdicts = lambda *args, **options: [
        claim.holds for claim in merge_speed.claims(SETTINGS, made_up(*args, **options))
    ]
    assert verdicts(6.1, 2.0) == [True] * 5
    assert verdicts(5.9, 1.7) == [False, False, True, False, True]
    assert verdicts(3.9, 1.95, difference=1e-3) == [False, True, False, True, False]


def test_without_mergekit_nothing_is_claimed():
    rows = [row for row in made_up(9, 9) if row.get("tool") == "jaxkit"]
    for claim in merge_speed.claims(SETTINGS, rows):
        assert not claim.holds and claim.measured == "not measured: there was no mergekit"
    assert isinstance(merge_speed.plot(SETTINGS, rows), Figure)


def test_bad_settings_and_commands_that_fail():
    with pytest.raises(ValueError, match="dtype='int8'"):
        merge_speed.run(replace(SETTINGS, dtype="int8"), None)
    with pytest.raises(ValueError, match="failed: the reason"):
        merge_speed.timed([sys.executable, "-c", "raise SystemExit('some\\nthe reason')"])


def test_the_files_are_those_of_a_small_language_model():
    shapes = merge_speed.shapes(merge_speed.Settings())
    assert sum(int(np.prod(s)) for s in shapes.values()) == pytest.approx(68e6, rel=0.01)
    assert len(shapes) == 3 + 9 * 4
