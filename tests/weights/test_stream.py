"""Merging on disk: equal to merging in memory, in little memory, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from jaxkit import masks, weights
from jaxkit.__main__ import main
from jaxkit.weights import _windows, files, stream
from jaxkit.weights.write import writing

KEY = jax.random.key(3)


def trees(n=3, dtype=np.float32, seed=0):
    """A base and models whose deltas have ties, zeros and negative zeros."""
    rng = np.random.default_rng(seed)
    shapes = {"a/kernel": (40, 31), "b/kernel": (5, 7, 3), "b/bias": (17,), "scale": ()}
    base = {p: np.asarray(rng.normal(size=s), dtype) for p, s in shapes.items()}
    base |= {"steps": np.arange(4, dtype=np.int32), "empty": np.zeros((0, 3), dtype)}
    step = lambda s: np.asarray(np.round(rng.normal(size=s), 1) / 8, np.float32)
    moved = lambda p, x: np.asarray(x.astype(np.float32) + step(x.shape), dtype)
    models = [{p: moved(p, x) if p in shapes else x for p, x in base.items()} for _ in range(n)]
    return base, models


@pytest.fixture
def saved(tmp_path):
    def save(base, models):
        paths = [tmp_path / f"{name}.safetensors" for name in ["base", *range(len(models))]]
        for path, leaves in zip(paths, [base, *models], strict=True):
            save_file(leaves, path, metadata={"format": "np", "of": path.stem})
        return paths[0], paths[1:], tmp_path / "out.safetensors"

    return save


METHODS = {
    "average": weights.average(),
    "weighted": weights.average([1.0, 2.0, 0.5]),
    "task arithmetic": weights.task_arithmetic([1.0, -1.0, 0.5]),
    "ties, leaf": weights.ties(sparsity=0.8, scope="leaf"),
    "ties, tree": weights.ties(sparsity=0.7, scope="tree"),
    "ties, untrimmed": weights.ties(sparsity=0),
    "breadcrumbs, leaf": weights.breadcrumbs(sparsity=0.6, outliers=0.1),
    "breadcrumbs, tree": weights.breadcrumbs(sparsity=0.6, outliers=0.1, scope="tree"),
    "dare": weights.dare(KEY, drop_rate=0.5),
    "dare, ties": weights.dare(KEY, drop_rate=0.5, then=weights.ties(sparsity=0)),
    "model stock": weights.model_stock(),
    "average, by leaf": weights.average(
        {path: i + np.array([1.0, 2.0, 0.5]) for i, path in enumerate(sorted(trees()[0]))}
    ),
    "of one's own": weights.Method(lambda path, d, aux: d[0] if "b" in path else d[1]),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_merge_on_disk_is_the_merge_in_memory(saved, name, dtype, monkeypatch):
    monkeypatch.setattr(stream, "_PIECE", 256)  # leaves of several pieces
    base, models = trees(dtype=dtype)
    start, tuned, out = saved(base, models)
    method = METHODS[name]
    stream.merge_files(out, start, tuned, [stream.Rule("**", method, 0.4)])
    want = jax.jit(lambda b, ms: weights.merge(b, ms, method, scale=0.4))(base, models)
    got = load_file(out)
    assert got.keys() == want.keys()
    for path, x in got.items():
        y = np.asarray(want[path])
        assert x.dtype == y.dtype and x.shape == y.shape
        tol = 2e-6 if dtype == np.float32 else 2**-7
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), rtol=tol, atol=tol)
    assert files.metadata(out) == {"format": "np", "of": "base"}


def pieces(size):
    """Return what visits the pieces of n entries, one after another."""
    return lambda fn, n: map(fn, [slice(i, min(i + size, n)) for i in range(0, n, size)])


def windowed(vectors, window, each, sample):
    """Return the vectors, flat and ranked together, with zeros outside of the window."""
    n = sum(x.size for x in vectors)
    at = lambda x: lambda places: x[places].copy()

    def count(brackets):
        totals = [None] * len(brackets[0])
        for x in vectors:
            totals = map(_windows.plus, totals, _windows.count(at(x), x.size, brackets[0], each))
        return [[*totals]]

    ranks = _windows.find(count, [_windows.image(sample)], n, _windows.counts(window, n))[0]
    left, out = [rank.place for rank in ranks], []
    for x in vectors:
        edges = []
        for i, rank in enumerate(ranks):
            edge, used = _windows.edge(rank, left[i], at(x), x.size, each)
            left[i] -= used
            edges.append(edge)
        places = slice(0, x.size)
        out.append(_windows.apply(x.copy(), places, *edges))
        # the same at indexes, as a sample looks at it
        mixed = np.random.default_rng(0).permutation(x.size)
        some = _windows.apply(x[mixed], mixed, *edges)
        np.testing.assert_array_equal(some, out[-1][mixed])
    return np.concatenate(out)


@pytest.mark.parametrize("sampled", ["all", "some", "wrong"])
def test_windows_are_exact_whatever_the_sample_says(sampled, monkeypatch):
    """Equal magnitudes in the order of the index; ranked together over vectors of any length."""
    monkeypatch.setattr(_windows, "_BINS", 16)  # several passes
    rng = np.random.default_rng(0)
    for n in (1, 2, 30, 999):
        for trial in range(20):
            x = rng.integers(-3, 4, size=n) if trial % 2 else rng.normal(size=n)
            x = x.astype(np.float32)
            sparsity = round(float(rng.uniform(0, 0.99)), 3)
            outliers = round(float(rng.uniform(0, sparsity)), 3)
            window = stream.Window(sparsity, outliers if trial % 3 else 0.0, "tree")
            start, stop = _windows.counts(window, n)
            order = np.argsort(-np.abs(x), kind="stable")
            want = np.zeros_like(x)
            want[order[start:stop]] = x[order[start:stop]]
            sample = {"all": x, "some": x[: max(1, n // 3)], "wrong": 100 + x[:1]}[sampled]
            vectors = np.split(x, sorted(rng.integers(0, n + 1, size=2)))
            got = windowed(vectors, window, pieces(64), sample)
            np.testing.assert_array_equal(got, want)


def test_infinite_deltas_are_the_largest():
    x = np.array([1.0, np.inf, 2.0, -np.inf, 3.0], np.float32)
    got = windowed([x], stream.Window(0.6, 0.4, "leaf"), pieces(2), x)
    np.testing.assert_array_equal(got, [0, 0, 2, 0, 3])


def test_rules_by_leaf_and_other_kinds_of_checkpoints(saved, tmp_path):
    base, models = trees(2)
    for leaves in (base, *models):
        del leaves["empty"]  # orbax has none of size 0
    start, tuned, _ = saved(base, models)
    specs = {p: (x.shape, x.dtype) for p, x in models[0].items()}
    sharded = tmp_path / "one.safetensors.index.json"
    with writing(sharded, specs, shard_bytes=2000) as put:
        for path, x in models[0].items():
            put(path, x)
    folder = tmp_path / "orbax"
    nested = {"a": {"kernel": models[1]["a/kernel"]}, "b": {}, "scale": models[1]["scale"]}
    nested["b"] = {"kernel": models[1]["b/kernel"], "bias": models[1]["b/bias"]}
    nested["steps"] = models[1]["steps"]
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder, nested)
    rules = [
        stream.Rule("b/*", None),
        stream.Rule("a/**", weights.task_arithmetic(), 0.5),
        stream.Rule("**", weights.average(), 1.0),
    ]
    index = tmp_path / "out.safetensors.index.json"
    stream.merge_files(index, start, [sharded, folder], rules, shard_bytes=3000)
    got = {path: leaf.read() for path, leaf in files.leaves(index).items()}
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 1
    for path in ("b/kernel", "b/bias", "steps"):
        np.testing.assert_array_equal(got[path], base[path])
    total = sum(m["a/kernel"] - base["a/kernel"] for m in models)
    np.testing.assert_allclose(got["a/kernel"], base["a/kernel"] + 0.5 * total, rtol=1e-5)
    np.testing.assert_allclose(got["scale"], np.mean([m["scale"] for m in models]), rtol=1e-6)
    half = tmp_path / "half.safetensors"
    stream.merge_files(half, None, tuned, [stream.Rule("**", weights.average())])
    np.testing.assert_allclose(
        load_file(half)["a/kernel"], np.mean([m["a/kernel"] for m in models], 0), rtol=1e-6
    )


def test_bad_input_says_which_leaf_and_file_and_leaves_the_output_alone(saved, tmp_path):
    base, models = trees(2)
    average = stream.Rule("**", weights.average(), name="average")
    ties = stream.Rule("**", weights.ties(), name="ties")
    start, tuned, out = saved(base, models)
    with pytest.raises(ValueError, match="no model"):
        stream.plan(start, [], [average])
    with pytest.raises(ValueError, match="'ties' is about deltas to a base, and none was given"):
        stream.plan(None, tuned, [ties])
    with pytest.raises(ValueError, match="'pcb' looks at all leaves together"):
        stream.plan(start, tuned, [stream.Rule("**", weights.pcb(), name="pcb")])
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        stream.merge_files(out, start, tuned, [average])

    def fails(change, match):
        other = dict(models[1])
        change(other)
        save_file(other, tuned[1])
        with pytest.raises(ValueError, match=match):
            stream.merge_files(out, start, tuned, [average], overwrite=True)
        assert out.read_bytes() == b"precious"
        assert not [p for p in tmp_path.iterdir() if "partial" in p.name]

    fails(lambda t: t.pop("b/bias"), r"leaf 'b/bias' of .*base\.safetensors is not in .*1\.safe")
    fails(lambda t: t.update(extra=np.ones(1)), r"leaf 'extra' of .*1\.safe.* is not in .*base")
    fails(lambda t: t.update({"b/bias": np.ones(3)}), r"'b/bias' is float32\[17\] .*float64\[3\]")
    fails(lambda t: t.update(steps=t["steps"] + 1), r"'steps' holds no floats .*1\.safetensors")
    nan = np.full((), np.nan, np.float32)
    fails(lambda t: t.update(scale=nan), r"'scale' of .*1\.safetensors holds NaN")
    tuned[1].write_bytes(tuned[0].read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"1\.safetensors: not a complete safetensors file"):
        stream.merge_files(out, start, tuned, [average], overwrite=True)
    assert out.read_bytes() == b"precious"


# -------------------------------------------------------------------------------- the commands


def test_the_commands(saved, tmp_path, capsys):
    base, models = trees(2)
    start, tuned, out = saved(base, models)
    command = ["merge", "--base", str(start), *map(str, tuned), "--method", "ties"]
    assert main([*command, "--scope", "leaf", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "no float: has to be the same everywhere" in text and not out.exists()
    assert main([*command, "--sparsity", "0.5", "--scale", "0.4", "-o", str(out)]) == 0
    want = weights.merge(base, models, weights.ties(sparsity=0.5), scale=0.4)
    np.testing.assert_allclose(load_file(out)["a/kernel"], want["a/kernel"], rtol=1e-5)
    assert main([*command, "-o", str(out)]) == 2
    assert "already" in capsys.readouterr().err
    assert main([*command, "--outliers", "0.1", "-o", str(out)]) == 2
    assert "ties has no option 'outliers'" in capsys.readouterr().err
    assert main(["merge", *map(str, tuned), "-o", "x.safetensors"]) == 2
    assert "one of average, task-arithmetic" in capsys.readouterr().err
    none = tmp_path / "none.safetensors"
    average = ["merge", "--method", "average", *map(str, tuned), "-o", str(none)]
    for options, message in (
        (["--scale", "0.5"], "there is no base"),
        (["--weights", "1", "-1"], "the weights sum to 0"),
        (["--weights", "1", "1", "1"], "weights of shape (3,) for 2 models"),
    ):
        assert main([*average, *options]) == 2
        assert message in capsys.readouterr().err and not none.exists()

    config = tmp_path / "merge.toml"
    config.write_text(
        'base = "base.safetensors"\nmodels = ["0.safetensors", "1.safetensors"]\n'
        'output = "c.safetensors"\nmethod = "average"\n'
        '[[rules]]\nwhere = "b/**"\nmethod = "copy"\n'
        '[[rules]]\nwhere = "a/*"\nmethod = "dare"\ndrop_rate = 0.5\nseed = 3\nscale = 0.5\n'
    )
    assert main(["merge", "--config", str(config)]) == 0
    got = load_file(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(got["b/kernel"], base["b/kernel"])
    dare = weights.merge(base, models, METHODS["dare"], scale=0.5)
    np.testing.assert_allclose(got["a/kernel"], dare["a/kernel"], rtol=1e-5, atol=1e-6)
    config.write_text('methd = "average"')
    assert main(["merge", "--config", str(config)]) == 2
    assert "'methd' is no key" in capsys.readouterr().err


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
def test_prune(saved, allocation, capsys):
    base, _ = trees(1)
    start, _, out = saved(base, [])
    command = ["prune", str(start), "--sparsity", "0.75", "--allocation", allocation]
    assert main([*command, "-o", str(out)]) == 0
    sparsity = {
        "global": 0.75,
        "uniform": masks.uniform(base, 0.75),
        "erk": masks.erk(base, 0.75),
    }[allocation]
    mask = masks.topk(masks.magnitude(base), sparsity=sparsity)
    got = load_file(out)
    for path, x in masks.apply(jax.tree.map(jnp.asarray, base), mask).items():
        np.testing.assert_array_equal(got[path], np.asarray(x).astype(got[path].dtype))
    assert main(["prune", str(start), "--sparsity", "1.5", "-o", str(out)]) == 2
    assert "in [0, 1)" in capsys.readouterr().err


# (getrusage's maximum is no less than what the process had that started this one)
PROGRAM = """
import sys
from pathlib import Path
from jaxkit import weights
from jaxkit.weights import stream
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.ones(3))
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
idle = peak()
if sys.argv[1] != "idle":
    out, base, *models = sys.argv[2:]
    ties, tree, average = weights.ties(scope="leaf"), weights.ties(), weights.average()
    method = {"ties": ties, "tree": tree, "average": average}[sys.argv[1]]
    stream.merge_files(out, base, models, [stream.Rule("**", method, 0.5)])
print(idle, peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peaks are read from /proc")
@pytest.mark.parametrize("method", ["average", "ties", "tree"])
def test_memory_is_that_of_a_few_leaves(saved, method):
    """At most (models + 3) leaves in float32, plus 100 MB: six leaves of 32 MB, two models."""
    rng = np.random.default_rng(0)
    leaf = lambda: rng.normal(size=(2048, 4096)).astype(np.float32)
    base = {f"{i}": leaf() for i in range(6)}
    start, tuned, out = saved(base, [{p: x + 0.1 * leaf() for p, x in base.items()} for _ in "ab"])
    program = [sys.executable, "-c", PROGRAM, method, str(out), str(start), *map(str, tuned)]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    idle, peak = (int(n) * 1024 for n in done.stdout.split())
    assert peak - idle > 2048 * 4096 * 4  # it was measured
    assert peak - idle <= 5 * 2048 * 4096 * 4 + 100e6, (peak - idle) / 2**20


@pytest.mark.slow
def test_a_killed_merge_leaves_no_output(saved):
    rng = np.random.default_rng(0)
    base = {f"{i}": rng.normal(size=(1024, 4096)).astype(np.float32) for i in range(12)}
    start, tuned, out = saved(base, [{p: x + 1 for p, x in base.items()}])
    arguments = ["merge", "--method", "ties", "--base", start, *tuned, "-o", out]
    run = subprocess.Popen([sys.executable, "-m", "jaxkit", *map(str, arguments)])
    deadline = time.monotonic() + 120
    while not list(out.parent.glob(".out*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not out.exists()
    assert main([*map(str, arguments)]) == 0
    assert len(load_file(out)) == 12
