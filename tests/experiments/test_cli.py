"""The command line as it is used: killed, interrupted, out of space, misspelt."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from experiments.__main__ import main, names

SMALL = "--train 128 --test 50 --seeds 2 --epochs 30 --epochs-per-step 1 --depth 1 --width 256"


def start(*args, **options):
    environment = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "200"}
    command = [sys.executable, "-m", "experiments", *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        **options,
    )  # fmt: skip


def finish(process, timeout=240):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def random_labels(out, **options):
    return start(
        "run", "random-labels", *SMALL.split(), "--save-every", "0", "--out", out, **options
    )


def metrics(out):
    lines = (out / "random-labels/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert all(row.pop("time") for row in rows)
    return rows


def wait_for_rows(out, count, process):
    file, due = out / "random-labels/metrics.jsonl", time.time() + 120
    while process.poll() is None and time.time() < due:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"the run ended early: {finish(process)}")


@pytest.mark.slow
def test_the_same_command_goes_on_whatever_happened(tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    status, text, err = finish(random_labels(whole))
    assert status == 0, err
    assert "30/30" in text
    claims = json.loads((whole / "random-labels/claims.json").read_text())["claims"]

    # the first checkpoint is larger than a file may be
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    status, _, err = finish(random_labels(out, preexec_fn=limit))
    assert status == 1
    # (a thread of the checkpointer may print a trace of its own)
    assert f"error: cannot write {out}/random-labels/checkpoint: File too large." in err

    process = random_labels(out)
    wait_for_rows(out, 100, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL

    process = random_labels(out)
    wait_for_rows(out, 200, process)
    process.send_signal(signal.SIGINT)
    status, text, err = finish(process)
    assert (status, err) == (130, "")
    assert "of 30. The same command goes on from there." in text
    assert not (out / "random-labels/claims.json").exists()

    status, text, _ = finish(random_labels(out))
    assert status == 0
    assert "Resuming at step" in text
    assert metrics(out) == metrics(whole)
    assert json.loads((out / "random-labels/claims.json").read_text())["claims"] == claims

    again = ["run", "random-labels", *SMALL.split(), "--save-every", "0", "--out", str(out)]
    assert main(again) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "random-labels is finished" in text and "holds?" in text
    assert main([*again, "--lr", "1"]) == 1
    err = capsys.readouterr().err
    assert "lr is 0.1 there, and 1.0 here" in err and "--restart" in err


def test_the_list_names_every_experiment():
    assert {"random-labels", "lottery-ticket"} <= set(names())
    assert not {"data", "runner", "report", "figures", "perceptron"} & set(names())


def test_commands(capsys):
    assert main(["list"]) == 0
    assert "random-labels           Networks fit random labels\n" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert main(["run"]) == 2
    assert "random-labels" in capsys.readouterr().out
    assert main(["run", "random-lables"]) == 2
    assert "did you mean 'random-labels'?" in capsys.readouterr().err
    assert main(["play"]) == 2
    assert "no command 'play'" in capsys.readouterr().err


def test_options_come_from_the_settings(capsys):
    with pytest.raises(SystemExit) as end:
        main(["run", "random-labels", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for option in ("--weight-decay", "--epochs", "--out", "--data", "--restart", "--save-every"):
        assert option in text
    with pytest.raises(SystemExit) as end:
        main(["run", "random-labels", "--epochs", "many"])
    assert end.value.code == 2


def test_problems_are_one_line(tmp_path, capsys):
    run = ["run", "random-labels", "--out", str(tmp_path)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.bin").write_bytes(b"x" * 100)
    for args, text in (
        (["--data", f"{tmp_path}/data"], f"{tmp_path}/data/train.bin: 100 bytes are no IDX file"),
        (["--train", "2000"], "digits holds 1797 images"),
        (["--epochs", "7"], "epochs=7 is no multiple"),
        (["--batch", "4000"], "batch=4000 is more than train=1408"),
    ):
        assert main([*run, *args]) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ") and text in err and err.count("\n") == 1
    assert main(["report", "--out", str(tmp_path / "nothing")]) == 1
    assert "holds no results" in capsys.readouterr().err
