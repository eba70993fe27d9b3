import json
import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from jaxkit import papers
from jaxkit.__main__ import main


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    return status, *capsys.readouterr()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    kernel = np.zeros((4, 5), ml_dtypes.bfloat16)
    kernel[0, :2] = 3, 4
    leaves = {
        "params/Dense_0/kernel": kernel,
        "params/Dense_0/bias": np.full(3, -2, ml_dtypes.float8_e4m3fn),
        "params/broken": np.array([np.nan, 1, np.inf, np.nan], np.float32),
        "params/none": np.zeros((0, 7), np.float16),
        "step": np.array(12, np.int64),
        "mask": np.array([[True, False]]),
    }
    path = tmp_path / "model.safetensors"
    save_file(leaves, path)
    return path


# ------------------------------------------------------------------------------------ papers


def test_papers_prints_all_of_every_paper(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = run(capsys, "papers")
    assert (status, err) == (0, "")
    text = " ".join(out.split())
    for paper in papers.load():
        names = [*paper.authors, paper.title, f"arXiv:{paper.arxiv}", *paper.implements]
        assert all(name in text for name in names)
        assert not paper.experiment or f"experiments run {paper.experiment}" in text
    assert max(map(len, out.splitlines())) <= 80


def test_papers_as_json(capsys):
    status, out, _ = run(capsys, "papers", "--json")
    assert status == 0
    expected = [paper._asdict() for paper in papers.load()]
    assert json.loads(out) == json.loads(json.dumps(expected))


def test_papers_grep(capsys):
    assert run(capsys, "papers", "--grep", "FRANKLE")[1].startswith("The Lottery Ticket")
    found = json.loads(run(capsys, "papers", "--grep", "snip: ", "--json")[1])
    titles = [paper["title"] for paper in found]
    assert [title[:4] for title in titles] == ["SNIP"]
    assert run(capsys, "papers", "--grep", "xyzzy") == (1, "", "no paper mentions 'xyzzy'\n")
    assert run(capsys, "papers", "--grep", "xyzzy", "--json") == (1, "[]\n", "")


# ----------------------------------------------------------------------------------- inspect


def test_inspect_table(capsys, file):
    status, out, err = run(capsys, "inspect", file)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:-2]}
    assert rows == {
        "params/Dense_0/kernel": ["4x5", "bfloat16", "5", "0.9000"],
        "params/Dense_0/bias": ["3", "float8_e4m3fn", "3.464", "0"],
        "params/broken": ["4", "float32", "nan", "0"],
        "params/none": ["0x7", "float16", "0", "-"],
        "step": ["scalar", "int64", "12", "0"],
        "mask": ["1x2", "bool", "1", "0.5000"],
    }
    assert len({len(line) for line in lines[:-2]}) == 1  # aligned
    assert lines[-2] == "6 leaves, 30 parameters, 69 bytes, sparsity 0.6333"
    assert lines[-1] == "not finite: 2 NaN, 1 infinite in 1 leaf"


def test_inspect_as_json(capsys, file):
    status, out, _ = run(capsys, "inspect", file, "--json")
    assert status == 0

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    report = json.loads(out, parse_constant=no_constant)
    leaves = {leaf.pop("path"): leaf for leaf in report["leaves"]}
    assert leaves["params/Dense_0/kernel"] == {
        "shape": [4, 5],
        "dtype": "bfloat16",
        "parameters": 20,
        "bytes": 40,
        "norm": 5.0,
        "zeros": 18,
        "sparsity": 0.9,
        "nan": 0,
        "inf": 0,
    }
    broken = leaves["params/broken"]
    assert (broken["norm"], broken["nan"], broken["inf"]) == (None, 2, 1)
    assert leaves["params/none"]["sparsity"] is None
    assert leaves["params/Dense_0/bias"]["norm"] == pytest.approx(2 * math.sqrt(3))
    total = {"leaves": 6, "parameters": 30, "bytes": 69, "zeros": 19, "nan": 2, "inf": 1}
    assert report["total"] == total | {"sparsity": 19 / 30}
    assert report["file"] == str(file)


def test_inspect_where(capsys, file):
    paths = lambda *globs: [
        leaf["path"]
        for leaf in json.loads(
            run(capsys, "inspect", file, "--json", *(f"--where={glob}" for glob in globs))[1]
        )["leaves"]
    ]
    assert paths("**/kernel") == ["params/Dense_0/kernel"]
    assert set(paths("params/*", "step")) == {"params/broken", "params/none", "step"}
    assert set(paths("m*")) == {"mask"}  # leaves that are no floats, too
    assert "2 of 6 leaves, 23 parameters" in run(capsys, "inspect", file, "--where=**/Dense*/*")[1]
    status, out, err = run(capsys, "inspect", file, "--where", "**/kernels")
    assert (status, out) == (2, "")
    assert "matches no leaf; the nearest paths: 'params/Dense_0/kernel'" in err


def test_inspect_orbax(capsys, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        params = {"blocks": [{"w": jnp.eye(3, dtype=jnp.bfloat16)}], "step": 5}
        manager.save(2, args=ocp.args.StandardSave(params))
    status, out, _ = run(capsys, "inspect", tmp_path / "run" / "2")
    assert status == 0
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["blocks/0/w", "3x3", "bfloat16", "1.732", "0.6667"],
        ["step", "scalar", "int64", "5", "0"],
    ]
    status, _, err = run(capsys, "inspect", tmp_path / "run")
    assert status == 2 and err.endswith("/run/2\n")


def test_sparsity_is_exact_at_its_ends(capsys, tmp_path):
    one_zero, one_other = np.ones(100_000, np.float32), np.zeros(100_000, np.float32)
    one_zero[7], one_other[7] = 0, 1
    leaves = {"a": one_zero, "b": one_other, "c": one_zero * 0, "d": one_other + 1}
    save_file(leaves, tmp_path / "model.safetensors")
    out = run(capsys, "inspect", tmp_path / "model.safetensors")[1].splitlines()
    assert [line.split()[-1] for line in out[1:5]] == ["<0.0001", ">0.9999", "1", "0"]
    assert out[5] == "4 leaves, 400,000 parameters, 1.5 MiB, sparsity 0.5000"


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_table_fits_the_terminal(capsys, tmp_path, monkeypatch, columns):
    names = [f"model.layers.{i}.{part}" for i in (9, 10) for part in ("attention.q", "attention.k")]
    names += [f"{name}_projection.weight" for name in names]
    names += ["x" * 200 + "/a", "x" * 200 + "/b", "p/collision_1", "p/collision_2"]
    file = tmp_path / "model.safetensors"
    save_file({name: np.ones((64, 64), np.float32) for name in names}, file)
    monkeypatch.setenv("COLUMNS", str(columns))
    head, *lines = run(capsys, "inspect", file)[1].splitlines()
    assert len(head) <= columns
    first = []  # the path that each row shows: on its own line if there is no other way
    for line in lines[:-1]:
        if len(line.split()) == 1:
            first.append(line)
            continue
        assert len(line) == len(head)
        if len(line.split()) == 5:
            first.append(line.split()[0])
    assert len(set(first)) == len(names) == len(first)
    shown = {name: first[i] for i, name in enumerate(sorted(names))}
    for name, text in shown.items():  # each is the name, or a glob for it and for no other
        chosen = run(capsys, "inspect", file, "--json", "--where", text)[1]
        assert [leaf["path"] for leaf in json.loads(chosen)["leaves"]] == [name]
    if columns == 60:
        assert any("*" in text for text in first)


def test_names_cannot_command_the_terminal(capsys, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a\x1b[2Jb\nc": np.ones(1), "é": np.ones(1)}, file)
    out = run(capsys, "inspect", file)[1]
    assert "\x1b" not in out and r"a\x1b[2Jb\nc" in out and "é" in out


# ------------------------------------------------------------------------- arguments, failure


def test_bad_files_are_one_line_and_status_2(capsys, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff\x00\x00\x00\x00\x00\x00\x00{")
    (tmp_path / "x.index.json").write_text("{}")
    for name in ["gone.safetensors", "model.pt", "cut.safetensors", "x.index.json", ""]:
        status, out, err = run(capsys, "inspect", tmp_path / name)
        assert (status, out) == (2, "")
        assert err.startswith("python -m jaxkit: error: ") and err.count("\n") == 1
        assert str(tmp_path / name) in err


@pytest.mark.parametrize("args", [[], ["inspect"], ["nothing"], ["papers", "--word"], ["--ver"]])
def test_bad_arguments(capsys, args):
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "usage: python -m jaxkit" in capsys.readouterr().err


def test_help_and_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for args in (["--help"], ["papers", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(args)
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert out.startswith("usage: python -m jaxkit")
        assert max(map(len, out.splitlines())) <= 80
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("jaxkit ")


def test_a_reader_that_stops_early_gets_no_traceback(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({f"layer_{i:05}/kernel": np.ones(1, np.float32) for i in range(4000)}, file)
    command = [sys.executable, "-m", "jaxkit", "inspect", str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline().split()[0] == "path"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_status_2():
    command = [sys.executable, "-m", "jaxkit", "papers"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "python -m jaxkit: error: [Errno 28] No space left on device\n"


def test_diff(tmp_path, capsys):
    a = {"w": np.array([[3.0, 4.0]], np.float32), "n": np.arange(3), "old": np.zeros(1)}
    b = {"w": np.array([[3.0, -4.0]], np.float32), "n": np.arange(3), "v": np.zeros((2, 2))}
    a["v"] = np.zeros(4)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    command = ["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(command) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("w "))
    assert row.split() == ["w", "0.5000", "8", "1.6", "-0.28", "0.5"]
    assert "2 leaves, 5 parameters, changed 0.2000, |B - A| 8" in out
    assert "not compared: old: only in A" in out
    assert "not compared: v: shape [4] in A, [2, 2] in B" in out
    assert main([*command, "--where", "w", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_compared"] == {}
    assert found["leaves"]["w"]["norm"] == 8 and found["leaves"]["w"]["changed"] == 1
    assert main([*command, "--where", "zz"]) == 2
    assert "where" in capsys.readouterr().err
