"""The command line: ``python -m experiments list | run NAME [options] | report``."""

import ast
import dataclasses
import difflib
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

USAGE = """\
usage: python -m experiments COMMAND

  list                  the experiments
  run NAME [options]    run one, or go on with it; `run NAME --help` lists its options
  report [--out DIR]    one HTML page of all results in DIR (results)
"""


def names() -> dict[str, str]:
    """Return the title of every experiment, by name: the files here that define Settings."""
    out = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        source = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == "Settings" for node in source.body):
            doc = (ast.get_docstring(source) or "").splitlines() or [""]
            out[file.stem.replace("_", "-")] = doc[0].rstrip(".")
    return out


def main(args: list[str]) -> int:
    """Run one command and return the exit status."""
    match args:
        case [] | ["-h" | "--help"]:
            print(USAGE, end="")
            return 0 if args else 2
        case ["list"]:
            for name, title in names().items():
                print(f"{name:<24}{title}")
            return 0
        case ["run", name, *rest] if name in names():
            return run(name, rest)
        case ["run", name, *_] if not name.startswith("-"):
            near = difflib.get_close_matches(name, names(), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names())}"
            print(f"error: no experiment {name!r}; {hint}", file=sys.stderr)
        case ["run", *_]:
            print(f"usage: python -m experiments run NAME [options]\n\n{', '.join(names())}")
        case ["report", *rest]:
            return report(rest)
        case _:
            print(f"error: no command {args[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def run(name: str, args: list[str]) -> int:
    """Run one experiment."""
    import tyro
    from rich.console import Console

    from experiments import runner

    console = Console()
    module = importlib.import_module(f"experiments.{name.replace('-', '_')}")
    command = shlex.join(["python", "-m", "experiments", "run", name, *args])
    both = dataclasses.make_dataclass(
        "Command", [("experiment", module.Settings), ("runner", runner.Options)]
    )
    asked: Any = tyro.cli(
        tyro.conf.OmitArgPrefixes[both],
        args=args,
        prog=f"python -m experiments run {name}",
        description=runner.title(module) + ".",
    )
    try:
        runner.execute(name, module, asked.experiment, asked.runner, command, console)
    except runner.Stopped as stopped:
        console.print(f"{stopped} The same command goes on from there.")
        return 130
    except runner.Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


def report(args: list[str]) -> int:
    """Write the page of all results."""
    import tyro

    from experiments import runner
    from experiments.report import Options, write

    out = tyro.cli(Options, args=args, prog="python -m experiments report").out
    try:
        print(f"Written: {write(out)}")
    except runner.Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last checkpoint.")
        status = 130
    except ModuleNotFoundError as error:
        if error.name not in ("tyro", "rich", "matplotlib", "sklearn"):
            raise
        print(f'error: {error}; pip install -e ".[experiments]"', file=sys.stderr)
        status = 1
    sys.exit(status)
