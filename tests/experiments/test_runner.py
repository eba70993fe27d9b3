"""A run that is stopped anywhere ends as one that was not, and nothing else is touched."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from experiments import Claim, Run, runner


@dataclass(frozen=True)
class Settings:
    steps: int = 6
    seed: int = 0


class Killed(BaseException):
    """Stands for the end of the process: nothing in the runner handles it."""


def experiment(kill_at=None, data="none"):
    """A random walk whose step `kill_at` never ends."""
    module = ModuleType("walk", "A random walk.\n\nIt is about *nothing*, see arXiv 1611.03530.")

    @jax.jit
    def walk(i, state):
        key = jax.random.fold_in(jax.random.key(state["seed"]), i)
        x = 0.9 * state["x"] + jax.random.normal(key, (3,))
        return {"x": x, "half": x.astype(jnp.bfloat16), "seed": state["seed"]}

    def run(settings, folder):
        if folder is not None:
            raise ValueError(f"{folder}/x.bin is truncated")

        def init():
            x = jnp.zeros(3)
            return {"x": x, "half": x.astype(jnp.bfloat16), "seed": jnp.int32(settings.seed)}

        def step(i, state):
            if i == kill_at:
                raise Killed
            state = walk(i, state)
            return state, [{"step": i, "x": x} for x in state["x"].tolist()]

        return Run(init, step, settings.steps, data)

    def claims(settings, rows):
        assert len(rows) == 3 * settings.steps
        return [Claim("it moves", "not 0", f"{rows[-1]['x']}", rows[-1]["x"] != 0)]

    module.Settings, module.run, module.claims = Settings, run, claims
    module.plot = lambda settings, rows: Figure(figsize=(1, 1))
    return module


def go(out, module=None, name="walk", settings=None, **options):
    console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        return runner.execute(
            name,
            module or experiment(),
            settings or Settings(),
            runner.Options(out=out, **({"save_every": 0.0} | options)),
            "python -m experiments run walk",
            console,
        )


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 1.7e9 for row in rows)
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    claims = go(out)
    return metrics(out / "walk"), claims


def test_what_a_run_leaves(tmp_path, whole):
    assert go(tmp_path) == whole[1]
    folder = tmp_path / "walk"
    names = ["checkpoint", "claims.json", "figure.png", "metrics.jsonl", "settings.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in (folder / "checkpoint").iterdir()] == ["6"]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    claims = json.loads((folder / "claims.json").read_text())
    assert claims["title"] == "A random walk"
    assert claims["claims"][0]["holds"] is True
    asked = json.loads((folder / "settings.json").read_text())
    assert asked["settings"] == {"steps": 6, "seed": 0}
    assert asked["versions"]["jax"] == jax.__version__
    assert len(metrics(folder)) == 18


@pytest.mark.parametrize("save_every", [0.0, 1e9])
@pytest.mark.parametrize("kill_at", [0, 1, 5])
def test_killed_between_steps(tmp_path, whole, kill_at, save_every):
    with pytest.raises(Killed):
        go(tmp_path, experiment(kill_at), save_every=save_every)
    assert go(tmp_path, save_every=save_every) == whole[1]
    assert metrics(tmp_path / "walk") == whole[0]


@pytest.mark.parametrize("torn", [b"", b'{"step": 2, "x"', b'{"step": 2, "x": 1.0, "time": 2}\n'])
def test_killed_after_metrics_and_before_the_checkpoint(tmp_path, whole, monkeypatch, torn):
    save, saved = runner._save, []

    def kill(*args):
        saved.append(1)
        if len(saved) == 3:
            with (tmp_path / "walk/metrics.jsonl").open("ab") as file:
                file.write(torn)
            raise Killed
        save(*args)

    monkeypatch.setattr(runner, "_save", kill)
    with pytest.raises(Killed):
        go(tmp_path)
    assert len((tmp_path / "walk/metrics.jsonl").read_bytes().splitlines()) >= 9
    monkeypatch.setattr(runner, "_save", save)
    assert go(tmp_path) == whole[1]
    assert metrics(tmp_path / "walk") == whole[0]


def test_killed_within_the_writing_of_a_checkpoint(tmp_path, whole):
    with pytest.raises(Killed):
        go(tmp_path, experiment(3))
    draft = tmp_path / "walk/checkpoint/4.orbax-checkpoint-tmp"
    draft.mkdir()
    (draft / "half").write_text("a part")
    (tmp_path / "walk/.settings.json.tmp").write_text("{")
    assert go(tmp_path) == whole[1]
    assert metrics(tmp_path / "walk") == whole[0]


@pytest.mark.parametrize("lost", ["figure.png", "claims.json"])
def test_killed_at_the_end_and_finished_again(tmp_path, whole, lost):
    go(tmp_path)
    (tmp_path / "walk" / lost).unlink()
    before = (tmp_path / "walk/metrics.jsonl").read_bytes()
    assert go(tmp_path, experiment(kill_at=0)) == whole[1]  # no step is taken
    assert (tmp_path / "walk" / lost).exists()
    assert (tmp_path / "walk/metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_shown_and_left_alone(tmp_path, whole):
    go(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert go(tmp_path, experiment(kill_at=0)) == whole[1]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_restart_keeps_the_earlier_run(tmp_path):
    go(tmp_path)
    first = metrics(tmp_path / "walk")
    go(tmp_path, settings=Settings(seed=1), restart=True)
    go(tmp_path, settings=Settings(seed=2), restart=True)
    assert metrics(tmp_path / "walk.1") == first
    walks = [metrics(tmp_path / name) for name in ("walk", "walk.1", "walk.2")]
    assert len({json.dumps(walk) for walk in walks}) == 3


SCRIPT = """
import importlib.util, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("helper", sys.argv[1])
helper = importlib.util.module_from_spec(spec)
sys.modules["helper"] = helper
spec.loader.exec_module(helper)
module = helper.experiment()
run = module.run

def slowly(settings, folder):
    plan = run(settings, folder)
    def step(i, state):
        time.sleep(0.01)
        return plan.step(i, state)
    return plan._replace(step=step)

module.run = slowly
helper.go(Path(sys.argv[2]), module, settings=helper.Settings(steps=80))
"""


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    """Killed again and again, at times that the clock chooses, until it gets through."""
    go(tmp_path / "whole", settings=Settings(steps=80))
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), __file__, str(tmp_path / "killed")]
    folder = tmp_path / "killed/walk"
    kills = 0
    for pause in (0.03, 0.3, None):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        if pause is not None:
            file = folder / "metrics.jsonl"
            size, due = file.stat().st_size if file.exists() else 0, time.time() + 60
            while process.poll() is None and time.time() < due:
                if file.exists() and file.stat().st_size != size:
                    break
                time.sleep(0.005)
            time.sleep(pause)
            kills += process.poll() is None
            process.kill()
        _, stderr = process.communicate(timeout=60)
        assert pause is not None or process.returncode == 0, stderr.decode()
    assert kills
    assert metrics(folder) == metrics(tmp_path / "whole/walk")


def refuse(match, *args, **kwargs):
    with pytest.raises(runner.Problem, match=match) as caught:
        go(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_something_else(tmp_path):
    go(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refuse("steps is 6 there, and 7 here", tmp_path, settings=Settings(steps=7))
    refuse("data is 'none' there, and 'other' here", tmp_path, experiment(data="other"))
    (tmp_path / "walk").rename(tmp_path / "run")
    refuse(
        "holds another run .the experiment is 'walk' there, and 'run' here", tmp_path, name="run"
    )
    (tmp_path / "run").rename(tmp_path / "walk")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    other = tmp_path / "other/walk"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("all I have")
    refuse("holds files but no run .thesis.tex", tmp_path / "other")
    (other / "settings.json").write_text("[1]")
    refuse("is no settings file of a run", tmp_path / "other")
    (other / "settings.json").write_text("{")
    refuse("cannot read .*settings.json", tmp_path / "other")
    assert (other / "thesis.tex").read_text() == "all I have"


def test_checkpoints_that_do_not_fit(tmp_path):
    with pytest.raises(Killed):
        go(tmp_path, experiment(3))
    module = experiment()
    run = module.run

    def changed(settings, folder):
        plan = run(settings, folder)
        return plan._replace(init=lambda: {**plan.init(), "more": jnp.zeros(2)})

    module.run = changed
    refuse("cannot read the checkpoint .*; --restart starts over", tmp_path, module)
    lines = (tmp_path / "walk/metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "walk/metrics.jsonl").write_bytes(b"".join(lines[:4]))
    refuse("has 4 of the 9 rows", tmp_path)
    (tmp_path / "walk/metrics.jsonl").write_bytes(b"?\n" + b"".join(lines[1:]))
    refuse("a line that is no JSON", tmp_path)


def test_bad_data_is_one_line(tmp_path):
    refuse("x.bin is truncated", tmp_path, data=Path("somewhere"))
    assert not (tmp_path / "walk").exists()


def test_a_second_process_is_kept_out(tmp_path):
    with runner._locked(tmp_path / "walk"):
        refuse("another process is at work", tmp_path)
        refuse("another process is at work", tmp_path, restart=True)
    go(tmp_path)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    refuse("cannot write .*file/walk: Not a directory", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    refuse("cannot write .*walk: Permission denied", tmp_path)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["metrics.jsonl", "figure.png", "claims.json", "settings.json"])
def test_a_full_disk(tmp_path, whole, monkeypatch, what):
    """Half a line or half a file is written before the disk is full."""
    opened, replaced = Path.open, os.replace

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            self.file.write(bytes(content)[: len(content) // 2])
            self.file.flush()
            full_disk()

    def fill(path, mode="r", *rest, **options):
        file = opened(path, mode, *rest, **options)
        late = what != "metrics.jsonl" or (path.exists() and path.stat().st_size > 300)
        return Full(file) if what in path.name and mode in ("ab", "wb") and late else file

    monkeypatch.setattr(Path, "open", fill)
    refuse(f"cannot write .*{what}: No space left on device. What was saved before", tmp_path)
    assert not list((tmp_path / "walk").glob(".*.tmp"))
    monkeypatch.setattr(Path, "open", opened)
    assert replaced is os.replace
    assert go(tmp_path) == whole[1]
    assert metrics(tmp_path / "walk") == whole[0]


def test_a_full_disk_at_a_checkpoint(tmp_path, whole, monkeypatch):
    save = runner.ocp.CheckpointManager.save
    monkeypatch.setattr(
        runner.ocp.CheckpointManager,
        "save",
        lambda self, step, **rest: full_disk() if step == 4 else save(self, step, **rest),
    )
    refuse("cannot write .*checkpoint: No space left on device", tmp_path)
    monkeypatch.setattr(runner.ocp.CheckpointManager, "save", save)
    assert go(tmp_path) == whole[1]
    assert metrics(tmp_path / "walk") == whole[0]


def test_ctrl_c_stops_after_the_step(tmp_path, whole):
    module = experiment()
    run = module.run

    def interrupted(settings, folder):
        plan = run(settings, folder)

        def step(i, state):
            if i == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return plan.step(i, state)

        return plan._replace(step=step)

    module.run = interrupted
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(runner.Stopped, match="after step 3 of 6"):
        go(tmp_path, module, save_every=1e9)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(metrics(tmp_path / "walk")) == 9
    assert go(tmp_path, experiment(kill_at=1)) == whole[1]  # steps 0 to 2 are not taken again
    assert metrics(tmp_path / "walk") == whole[0]


def test_the_state_comes_back_as_it_was(tmp_path):
    plan = experiment().run(Settings(), None)
    state, _ = plan.step(0, plan.init())
    folder = tmp_path / "walk"
    folder.mkdir()
    with runner._checkpoints(folder) as manager:
        runner._save(folder, manager, 1, state, 0, 1.5)
        done, back, rows, seconds = runner._restore(manager, plan, folder / "metrics.jsonl")
    assert (done, rows, seconds) == (1, [], 1.5)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype and not a.weak_type
        np.testing.assert_array_equal(a, b)


def test_more_steps_are_another_run(tmp_path):
    go(tmp_path, settings=replace(Settings(), steps=2))
    refuse("steps is 2 there, and 3 here", tmp_path, settings=replace(Settings(), steps=3))
