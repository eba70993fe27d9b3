"""Run an experiment so that nothing is lost: metrics, checkpoints, resuming, figure, claims.

A run lives in one folder, ``OUT/NAME``::

    settings.json    what was asked for: the experiment, its settings, the data, the versions
    metrics.jsonl    one JSON object a line, each with the time it was written
    checkpoint/      the state after the last step that was saved (orbax)
    figure.png       written at the end, and again by the same command if it is deleted
    claims.json      the same; a run that has it is finished

The same command continues a run from its checkpoint, however it ended: rows that were written
after the checkpoint are cut off and computed again, so the metrics are those of a run that never
stopped (but for the times). A folder that holds anything else is left as it is, with an error.
"""

import contextlib
import dataclasses
import errno
import io
import json
import logging
import os
import platform
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from matplotlib import rc_context
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import jaxkit
from experiments import Claim, Row, Run, figures


class Problem(Exception):
    """Something that the user can put right, said in one line."""


class Stopped(Exception):
    """The user stopped a run; what is done is saved."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that every experiment has."""

    out: Path = Path("results")
    """The folder for results; the run goes to OUT/NAME."""
    data: Path | None = None
    """A folder with MNIST (IDX) or CIFAR (binary) files, instead of scikit-learn's digits."""
    restart: bool = False
    """Start over. An earlier run is kept: its folder is renamed to OUT/NAME.1, .2, and so on."""
    save_every: float = 5.0
    """Seconds between checkpoints."""


def execute(
    name: str, module: ModuleType, settings: Any, options: Options, command: str, console: Console
) -> list[Claim]:
    """Start, continue or show one run, and return its claims.

    Raises:
      Problem: a folder that holds something else or cannot be written, a full disk, bad data.
      Stopped: the user pressed Ctrl-C.
    """
    folder = options.out / name
    if options.restart:
        _set_aside(folder, console)
    try:
        run: Run = module.run(settings, options.data)
    except (ValueError, OSError) as error:
        raise Problem(str(error)) from error
    with _locked(folder):
        _claim_folder(folder, _manifest(name, settings, run, command), console)
        if (folder / "claims.json").exists() and (folder / "figure.png").exists():
            saved = read_json(folder / "claims.json")
            console.print(
                f"[bold]{name}[/] is finished ({saved['finished']}); --restart computes it anew."
            )
            claims = [Claim(**claim) for claim in saved["claims"]]
        else:
            rows, seconds = _compute(folder, run, options.save_every, console)
            claims = _conclude(folder, name, module, settings, rows, seconds)
        console.print(table(module, claims))
        console.print(f"Figure: {folder / 'figure.png'}", soft_wrap=True)
    return claims


def title(module: ModuleType) -> str:
    """Return the first line of the module's docstring, without its full stop."""
    return (module.__doc__ or module.__name__).strip().splitlines()[0].rstrip(".")


def table(module: ModuleType, claims: list[Claim]) -> Table:
    """Lay out claims as a table for the terminal."""
    out = Table(title=title(module), title_justify="left", show_lines=True)
    for column in ("statement", "expected", "measured"):
        out.add_column(column, overflow="fold")
    out.add_column("holds?", justify="center")
    for claim in claims:
        verdict = "[green]yes[/]" if claim.holds else "[bold red]no[/]"
        out.add_row(claim.statement, claim.expected, claim.measured, verdict)
    return out


# ------------------------------------------------------------------------------- the folder


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed.

    Raises:
      Problem: the file cannot be written; what was there before is there still.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise _cannot_write(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
      Problem: the file cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Problem(f"cannot read {path}: {error}") from error


def _cannot_write(path: Path, error: Exception) -> Problem:
    text = str(error.strerror if isinstance(error, OSError) else error) or type(error).__name__
    known = re.search(
        "No space left on device|File too large|Disk quota exceeded|Read-only file system|"
        "Permission denied|Input/output error",
        text,
    )
    return Problem(
        f"cannot write {path}: {known[0] if known else text.splitlines()[0][:300]}. "
        "What was saved before is kept: put it right, and the same command goes on from there."
    )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it against a second process for as long as this one lives."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl

            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Problem(f"another process is at work in {folder}") from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(handle)


def _set_aside(folder: Path, console: Console) -> None:
    if not folder.exists():
        return
    with _locked(folder):
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        try:
            folder.rename(kept)
        except OSError as error:
            raise _cannot_write(folder, error) from error
    console.print(f"The earlier run is kept in {kept}.", soft_wrap=True)


def _manifest(name: str, settings: Any, run: Run, command: str) -> dict[str, Any]:
    versions = {
        "jaxkit": getattr(jaxkit, "__version__", ""),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    value = {
        "experiment": name,
        "settings": dataclasses.asdict(settings),
        "data": run.data,
        "command": command,
        "versions": {key: version for key, version in versions.items() if version},
    }
    return json.loads(json.dumps(value, default=str))


def _claim_folder(folder: Path, manifest: dict[str, Any], console: Console) -> None:
    """Write the settings into an empty folder, or check that they are those of this run."""
    path = folder / "settings.json"
    advice = "give another --out, or --restart to start over (the folder is kept, renamed)"
    if not path.exists():
        foreign = [p.name for p in folder.iterdir() if not re.fullmatch(r"\..*\.tmp", p.name)]
        if foreign:
            raise Problem(f"{folder} holds files but no run ({', '.join(foreign[:3])}): {advice}")
        write_json(path, manifest)
        return
    there = read_json(path)
    try:
        before, now = there["settings"], manifest["settings"]
        pairs = [("the experiment", there["experiment"], manifest["experiment"])]
        pairs += [(key, before.get(key), now.get(key)) for key in sorted({*before, *now})]
        pairs += [("the data", there["data"], manifest["data"])]
        differences = [f"{what} is {a!r} there, and {b!r} here" for what, a, b in pairs if a != b]
        versions = there["versions"]
    except (KeyError, TypeError, AttributeError):
        raise Problem(f"{path} is no settings file of a run: {advice}") from None
    if differences:
        raise Problem(f"{folder} holds another run ({'; '.join(differences[:4])}): {advice}")
    if versions.get("jax") != manifest["versions"]["jax"]:
        console.print(
            f"[yellow]The run began with jax {versions.get('jax')}; what jax "
            f"{manifest['versions']['jax']} adds may differ in the last digits.[/]"
        )


# ----------------------------------------------------------------------------- the computation


def _compute(
    folder: Path, run: Run, save_every: float, console: Console
) -> tuple[list[Row], float]:
    """Run the steps that are left, and return all rows of metrics and the seconds it took."""
    metrics = folder / "metrics.jsonl"
    with _checkpoints(folder) as manager:
        done, state, rows, before = _restore(manager, run, metrics)
        if 0 < done < run.steps:
            console.print(f"Resuming at step {done} of {run.steps}.")
        start = saved = time.monotonic()

        def seconds():
            return before + time.monotonic() - start

        if done == run.steps:
            return rows, before
        with _progress(console) as progress, _patience(console) as stop:
            bar = progress.add_task("compiling", total=run.steps, completed=done)
            for i in range(done, run.steps):
                state, new = run.step(i, state)
                rows += [json.loads(json.dumps(row)) for row in new]
                _append(metrics, new)
                progress.update(bar, advance=1, description="running")
                if stop or i + 1 == run.steps or time.monotonic() - saved >= save_every:
                    _save(folder, manager, i + 1, state, len(rows), seconds())
                    saved = time.monotonic()
                if stop and i + 1 < run.steps:
                    raise Stopped(f"Stopped after step {i + 1} of {run.steps}.")
        return rows, seconds()


def _append(path: Path, rows: list[Row]) -> None:
    now = time.time()
    lines = "".join(json.dumps({**row, "time": round(now, 3)}) + "\n" for row in rows)
    try:
        with path.open("ab") as file:
            file.write(lines.encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


@contextlib.contextmanager
def _checkpoints(folder: Path) -> Iterator[ocp.CheckpointManager]:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    try:
        manager = ocp.CheckpointManager((folder / "checkpoint").absolute(), options=options)
    except OSError as error:
        raise _cannot_write(folder / "checkpoint", error) from error
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)  # threads of orbax log what it raises as well
    with contextlib.closing(manager):
        yield manager
    log.setLevel(level)  # but not after an error: they may be at it still


def _save(folder: Path, manager, step: int, state: Any, rows: int, seconds: float) -> None:
    tree = {"state": state, "rows": np.array(rows), "seconds": np.array(seconds)}
    try:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        if shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with contextlib.redirect_stderr(io.StringIO()):  # for their traces
            manager.save(step, args=ocp.args.StandardSave(tree))
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise _cannot_write(folder / "checkpoint", error) from error


def _restore(manager, run: Run, metrics: Path) -> tuple[int, Any, list[Row], float]:
    """Return the steps done, the state, the rows up to it, and the seconds it took.

    What `metrics` holds beyond these rows is cut off.
    """
    done = manager.latest_step()
    if done is None:
        done, state, rows, seconds = 0, run.init(), 0, 0.0
    else:
        target = {"state": jax.eval_shape(run.init), "rows": np.array(0), "seconds": np.array(0.0)}
        try:
            tree = manager.restore(done, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise Problem(
                f"cannot read the checkpoint {manager.directory / str(done)}: "
                f"{str(error).splitlines()[0][:300]}; --restart starts over"
            ) from error
        state, rows, seconds = tree["state"], int(tree["rows"]), float(tree["seconds"])
    try:
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        kept = [json.loads(line) for line in lines[:rows]]
        if len(kept) < rows:
            raise Problem(
                f"{metrics} has {len(kept)} of the {rows} rows that the checkpoint counts; "
                "--restart starts over"
            )
        if len(lines) > rows:
            os.truncate(metrics, sum(len(line) for line in lines[:rows]))
    except ValueError as error:
        raise Problem(f"{metrics} holds a line that is no JSON ({error})") from error
    except OSError as error:
        raise _cannot_write(metrics, error) from error
    return done, state, kept, seconds


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        console=console,
    )


@contextlib.contextmanager
def _patience(console: Console) -> Iterator[list[int]]:
    """Take the first Ctrl-C as a wish to stop after the step; the second stops at once."""
    wishes: list[int] = []

    def wish(number, frame):
        if wishes:
            raise KeyboardInterrupt
        wishes.append(number)
        console.print("Stopping after this step (Ctrl-C again: at once).")

    before = signal.signal(signal.SIGINT, wish)
    try:
        yield wishes
    finally:
        signal.signal(signal.SIGINT, before)


# --------------------------------------------------------------------------------- the end


def _conclude(
    folder: Path, name: str, module: ModuleType, settings: Any, rows: list[Row], seconds: float
) -> list[Claim]:
    image = io.BytesIO()
    with rc_context(figures.STYLE):
        module.plot(settings, rows).savefig(image, format="png", dpi=160, facecolor="white")
    write_file(folder / "figure.png", image.getvalue())
    claims: list[Claim] = module.claims(settings, rows)
    _, _, about = (module.__doc__ or "").strip().partition("\n")
    summary = {
        "experiment": name,
        "title": title(module),
        "about": about.strip(),
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "seconds": round(seconds, 1),
        "claims": [claim._asdict() | {"holds": bool(claim.holds)} for claim in claims],
    }
    write_json(folder / "claims.json", summary)
    return claims
