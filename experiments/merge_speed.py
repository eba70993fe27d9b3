"""What merging checkpoints on disk costs, beside mergekit.

Files shaped like a language model and a few fine-tunings of it are merged by ``python -m jaxkit
merge`` and by mergekit, by TIES and by averaging, as whole processes that read the same files and
write one. All are measured in turn, in rounds, so that the ratios hold on a machine that does other
things too; the processors' time, of all threads together, depends on those less. A merge of a few
thousand numbers tells how much of it is the start: Python, imports, and what is compiled. mergekit
is not part of jaxkit: name a Python that has it by ``--mergekit``; without one, jaxkit is measured
alone.

mergekit's TIES ranks the entries of each leaf, by sorting them; jaxkit's with ``--scope leaf`` does
the same, by counting. With ``--scope tree``, as in the paper, all leaves are ranked together.

Charles Goddard, Shamane Siriwardhana, Malikeh Ehghaghi, Luke Meyers, Vladimir Karpukhin, Brian
Benedict, Mark McQuade, Jacob Solawetz, "Arcee's MergeKit: A Toolkit for Merging Large Language
Models", arXiv 2403.13257.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from experiments import Claim, Row, Run, figures

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}
# what is merged: the method, and the options of each tool
METHODS = {"TIES": "leaf", "TIES, whole tree": "tree", "average": None}
SPARSITY, SCALE = 0.8, 0.4
MERGEKIT = "from mergekit.scripts.merge_raw_pytorch import main; main()"
SMALL = (64, 64)  # the one leaf of a merge that only starts


@dataclass(frozen=True)
class Settings:
    """What is merged."""

    width: int = 1024
    """The width of the language model; 1024 and four layers are 68 million parameters."""
    layers: int = 4
    """Its layers."""
    models: int = 2
    """Its fine-tunings."""
    dtype: str = "bfloat16"
    """What the files hold: bfloat16, float16 or float32."""
    rounds: int = 3
    """How often each merge is measured; the median counts."""
    mergekit: str = ""
    """A Python that has mergekit; default: this one, if it has."""
    seed: int = 0
    """The seed."""


def run(settings: Settings, folder: Path | None) -> Run:
    """Write the files and merge them in every way, once a step."""
    if settings.dtype not in DTYPES:
        raise ValueError(f"dtype={settings.dtype!r}: one of {', '.join(DTYPES)} was due")
    tools = ["jaxkit", "mergekit"] if python(settings) else ["jaxkit"]

    def step(i, state):
        rows = []
        with tempfile.TemporaryDirectory() as place:
            small, large = Path(place) / "small", Path(place) / "large"
            write(small, {"leaf": SMALL}, np.dtype(np.float32), settings)
            write(large, shapes(settings), np.dtype(DTYPES[settings.dtype]), settings)
            for method in METHODS:
                for tool in tools if METHODS[method] != "tree" else ["jaxkit"]:
                    row = {"round": i, "method": method, "tool": tool}
                    rows.append(row | {"size": "whole"} | merge(tool, method, large, settings))
            for tool in tools:
                found = merge(tool, "TIES", small, settings)
                rows.append({"round": i, "method": "TIES", "tool": tool, "size": "start"} | found)
            if len(tools) > 1:
                rows.append({"round": i, "difference": difference(small)})
        return state, rows

    return Run(lambda: jnp.zeros(()), step, settings.rounds)


def python(settings: Settings) -> str:
    """Return the Python that has mergekit, or nothing."""
    return settings.mergekit or (sys.executable if importlib.util.find_spec("mergekit") else "")


def shapes(settings: Settings) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the leaves, by the names that Llama's have."""
    d = settings.width
    hidden = 11 * d // 4
    found = {"model.embed_tokens.weight": (8 * d, d), "lm_head.weight": (8 * d, d)}
    for i in range(settings.layers):
        layer = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
        layer |= {"mlp.gate_proj": (hidden, d), "mlp.up_proj": (hidden, d)}
        layer |= {"mlp.down_proj": (d, hidden)}
        layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (d,)}


def write(folder: Path, leaves: dict, dtype: np.dtype, settings: Settings) -> None:
    """Write a base and its fine-tunings."""
    rng = np.random.default_rng(settings.seed)
    draw = lambda shape: rng.standard_normal(shape, dtype=np.float32)
    folder.mkdir()
    base = {name: (0.02 * draw(shape)).astype(dtype) for name, shape in leaves.items()}
    save_file(base, folder / "base.safetensors")
    for i in range(settings.models):
        moved = lambda x: (x.astype(np.float32) + 0.002 * draw(x.shape)).astype(dtype)
        tuned = {name: moved(x) for name, x in base.items()}
        save_file(tuned, folder / f"tuned{i}.safetensors")


def merge(tool: str, method: str, folder: Path, settings: Settings) -> Row:
    """Merge the files of a folder by one tool, and return what it took."""
    base, scope = str(folder / "base.safetensors"), METHODS[method]
    tuned = [str(folder / f"tuned{i}.safetensors") for i in range(settings.models)]
    out = folder / f"{tool}-{method}"
    if tool == "jaxkit":
        command = [sys.executable, "-m", "jaxkit", "merge", *tuned, "--overwrite"]
        command += ["-o", f"{out}.safetensors", "--method", "ties" if scope else "average"]
        if scope:
            command += ["--base", base, "--sparsity", str(SPARSITY), "--scale", str(SCALE)]
            command += ["--scope", scope]
    else:
        each = {"weight": 1.0} | ({"density": 1 - SPARSITY} if scope else {})
        config = {"merge_method": "ties" if scope else "linear"}
        config |= {"models": [{"model": path, "parameters": each} for path in tuned]}
        if scope:
            config |= {"base_model": base, "parameters": {"normalize": True, "lambda": SCALE}}
        out.with_suffix(".yaml").write_text(json.dumps(config))  # YAML reads JSON
        command = [python(settings), "-c", MERGEKIT, f"{out}.yaml", str(out), "--quiet"]
    return timed(command)


def timed(command: list[str]) -> Row:
    """Run a command, and return the seconds that it took, and those of all its processors.

    Raises:
      ValueError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryFile() as log:
        before, start = os.times(), time.perf_counter()
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        seconds, after = time.perf_counter() - start, os.times()
        if status:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().splitlines()[-1:]
            raise ValueError(f"{command[0]} failed: {''.join(last)}")
    cpu = sum(getattr(after, k) - getattr(before, k) for k in ("children_user", "children_system"))
    return {"seconds": seconds, "cpu": cpu}


def difference(folder: Path) -> float:
    """Return how far the two merges by TIES are apart, as a part of how far they moved."""
    base = load_file(folder / "base.safetensors")["leaf"]
    ours = load_file(folder / "jaxkit-TIES.safetensors")["leaf"]
    theirs = load_file(folder / "mergekit-TIES" / "model.safetensors")["leaf"]
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - base))


# ------------------------------------------------------------------------------------- the findings


def times(rows: list[Row], method: str, tool: str, size: str, what: str = "seconds") -> np.ndarray:
    """Return what a merge took in every round."""
    want = {"method": method, "tool": tool, "size": size}
    return np.array([row[what] for row in rows if want.items() <= row.items()])


def ratios(rows: list[Row], method: str, what: str = "seconds") -> np.ndarray:
    """Return mergekit's time over jaxkit's, in every round."""
    theirs, ours = (times(rows, method, tool, "whole", what) for tool in ("mergekit", "jaxkit"))
    return theirs / ours if theirs.size else theirs


def beyond(rows: list[Row], method: str, tool: str) -> float:
    """Return the median seconds of the processors for a merge without its start."""
    start = np.median(times(rows, "TIES", tool, "start", "cpu"))
    return float(np.median(times(rows, method, tool, "whole", "cpu")) - start)


def claims(settings: Settings, rows: list[Row]) -> list[Claim]:
    """Compare the times with those of mergekit, if it was there."""
    there = ratios(rows, "TIES").size > 0
    apart = [row["difference"] for row in rows if "difference" in row]
    size = sum(int(np.prod(shape)) for shape in shapes(settings).values()) / 1e6
    what = f"{settings.models} fine-tunings of {size:.0f} million parameters, {settings.dtype}"

    def claim(statement: str, expected: str, measured, holds) -> Claim:
        if not there:
            return Claim(statement, expected, "not measured: there was no mergekit", False)
        return Claim(statement, expected, measured(), bool(holds()))

    def whole(method, invert):
        found, cpu = ratios(rows, method), np.median(ratios(rows, method, "cpu"))
        found, cpu = (1 / found, 1 / cpu) if invert else (found, cpu)
        return (
            f"{np.median(found):.2f} times (rounds from {found.min():.2f} to {found.max():.2f}); "
            f"{cpu:.2f} times by the processors' time"
        )

    def later(method):
        ours, theirs = (beyond(rows, method, tool) for tool in ("jaxkit", "mergekit"))
        return f"{ours:.2f} s, and {theirs:.2f} s"

    return [
        claim(
            f"TIES has a higher throughput than mergekit's ({what})",
            "at least 3 times",
            lambda: whole("TIES", False),
            lambda: np.median(ratios(rows, "TIES")) >= 3,
        ),
        claim(
            f"Linear merging takes no longer than mergekit's ({what})",
            "at most 1.1 times the time",
            lambda: whole("average", True),
            lambda: np.median(ratios(rows, "average")) >= 1 / 1.1,
        ),
        claim(
            "TIES is as much faster without the start of both programs",
            "at least 3 times less of the processors' time",
            lambda: later("TIES"),
            lambda: beyond(rows, "TIES", "mergekit") >= 3 * beyond(rows, "TIES", "jaxkit"),
        ),
        claim(
            "Linear merging takes no longer without the start of both programs",
            "at most 1.1 times the processors' time",
            lambda: later("average"),
            lambda: beyond(rows, "average", "jaxkit") <= 1.1 * beyond(rows, "average", "mergekit"),
        ),
        claim(
            "Both compute the same TIES merge, where no magnitudes are equal",
            "a difference of less than 0.00001 of the change",
            lambda: f"{max(apart):.1e}",
            lambda: max(apart) < 1e-5,
        ),
    ]


def plot(settings: Settings, rows: list[Row]) -> Figure:
    """Draw the times of all merges, and the ratios of every round."""
    figure, (a, b) = figures.panels(1, 2, (11, 3.4))
    labels, starts, wholes, cpus, colors = [], [], [], [], []
    for method in METHODS:
        for tool, color in (("mergekit", figures.GREY), ("jaxkit", figures.BLUE)):
            if times(rows, method, tool, "whole").size:
                labels.append(f"{method}, {tool}")
                wholes.append(float(np.median(times(rows, method, tool, "whole"))))
                starts.append(float(np.median(times(rows, "TIES", tool, "start"))))
                cpus.append(float(np.median(times(rows, method, tool, "whole", "cpu"))))
                colors.append(color)
    a.bar_label(a.barh(labels, wholes, 0.6, color=colors), fmt="%.1f", padding=5)
    a.barh(labels, np.minimum(starts, wholes), 0.6, color="white", alpha=0.55)
    a.plot(cpus, labels, "|", color="#222", ms=13, mew=1.6, label="processors' time")
    a.invert_yaxis()
    a.grid(axis="y", visible=False)
    a.margins(x=0.1)
    a.legend(fontsize=8, loc="lower right")
    a.set(title="a  Whole processes (pale: the start)", xlabel="seconds (median of the rounds)")

    colors = {"seconds": figures.BLUE, "cpu": figures.GREEN}
    for place, method in enumerate(("TIES", "average")):
        for what, mark, shift in (("seconds", "o", -0.09), ("cpu", "d", 0.09)):
            found = ratios(rows, method, what)
            label = {"seconds": "time", "cpu": "processors' time"}[what] if not place else None
            b.plot(np.full(found.size, place + shift), found, mark, color=colors[what], label=label)
    for place, due in ((0, 3), (1, 1 / 1.1)):
        b.plot([place - 0.3, place + 0.3], [due, due], color=figures.RED, linestyle="--",
               label=None if place else "due: above")  # fmt: skip
    b.set_xticks([0, 1], ["TIES", "average"])
    b.set_xlim(-0.5, 1.5)
    b.set_ylim(0, None)
    b.grid(axis="x", visible=False)
    b.legend(fontsize=8)
    b.set(title="b  How many times as fast as mergekit, by round", ylabel="mergekit / jaxkit")
    return figure
