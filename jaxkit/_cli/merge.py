"""``python -m jaxkit merge`` and ``prune``: new checkpoints from old ones, leaf by leaf."""

import argparse
import math
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxkit._cli import text

# the options of a method, by name; `copy` leaves a leaf as it is
METHODS = {
    "average": ("weights",),
    "task-arithmetic": ("weights",),
    "ties": ("weights", "sparsity", "scope"),
    "dare": ("weights", "drop_rate", "q", "seed"),
    "dare-ties": ("weights", "drop_rate", "q", "seed"),
    "breadcrumbs": ("weights", "sparsity", "outliers", "scope"),
    "model-stock": (),
    "copy": (),
}
_RULE = {"where", "method", "scale"} | {name for names in METHODS.values() for name in names}
_FILE = {"base", "models", "output", "rules"}


def run(args: argparse.Namespace) -> int:
    from jaxkit.weights import stream

    config = _config(args.config) if args.config else {}
    given = {name: getattr(args, name) for name in _RULE if getattr(args, name, None) is not None}
    base = args.base or config.get("base")
    models, out = args.models or config.get("models", []), args.output or config.get("output")
    own = {name: value for name, value in config.items() if name in _RULE} | given
    rules = [_rule(each, f"rule {i + 1}") for i, each in enumerate(config.get("rules", []))]
    if "method" in own or not rules:
        rules.append(_rule(own, "the command"))
    if not models:
        raise ValueError("give the models to merge")
    tasks = stream.plan(base, models, rules)
    if args.dry_run:
        table(tasks)
        return 0
    if not out:
        raise ValueError("give the output, -o FILE.safetensors (or --dry-run)")
    options = {"overwrite": args.overwrite, "shard_bytes": int(args.shard_gb * 1e9)}
    with bar(tasks) as progress:
        stream.merge_files(out, base, models, rules, progress=progress, **options)
    summary(tasks)
    print(f"wrote {out}")
    return 0


def _config(file: str) -> dict[str, Any]:
    """Read a config, whose paths are relative to it."""
    try:
        config = tomllib.loads(Path(file).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: not TOML: {error}") from None
    if unknown := sorted(config.keys() - _RULE - _FILE):
        raise ValueError(f"{file}: {unknown[0]!r} is no key; those are {sorted(_RULE | _FILE)}")
    beside = lambda path: str(Path(file).parent / path)
    for name in config.keys() & {"base", "output"}:
        config[name] = beside(config[name])
    config["models"] = [beside(path) for path in config.get("models", [])]
    return config


def _rule(options: dict[str, Any], where: str) -> Any:
    from jaxkit.weights.stream import Rule

    name = options.get("method")
    if name not in METHODS:
        raise ValueError(f"{where}: method {name!r}; one of {', '.join(METHODS)} was due")
    unknown = options.keys() - {*METHODS[name], "method", "where", "scale"}
    if unknown:
        fits = ", ".join(METHODS[name]) or "none"
        raise ValueError(f"{where}: {name} has no option {min(unknown)!r} (its options: {fits})")
    method = _method(name, {k: v for k, v in options.items() if k in METHODS[name]})
    return Rule(options.get("where", "**"), method, float(options.get("scale", 1.0)), name)


def _method(name: str, options: dict[str, Any]) -> Any:
    import jax

    from jaxkit import weights

    if name == "copy":
        return None
    if name == "model-stock":
        return weights.model_stock()
    if name == "average":
        return weights.average(**options)
    if name == "task-arithmetic":
        return weights.task_arithmetic(**options)
    if name == "ties":
        return weights.ties(**options)
    coefficients = {"weights": options.pop("weights", None)}
    if name == "breadcrumbs":
        return weights.breadcrumbs(**options, then=weights.task_arithmetic(**coefficients))
    key = jax.random.key(options.pop("seed", 0))
    signs = weights.ties(sparsity=0, **coefficients)
    then = signs if name == "dare-ties" else weights.task_arithmetic(**coefficients)
    return weights.dare(key, **options, then=then)


def table(tasks: list[Any]) -> None:
    shapes = {t.path: "x".join(map(str, t.leaf.shape)) or "scalar" for t in tasks}
    width = max([5, *map(len, shapes.values())])
    kinds = max([5, *(len(t.leaf.dtype.name) for t in tasks)])
    columns = [("shape", width, ">"), ("dtype", kinds, "<"), ("what is done", 12, "<")]
    show = text.table([t.path for t in tasks], columns)
    for t in tasks:
        show(t.path, [shapes[t.path], t.leaf.dtype.name, t.note])
    summary(tasks)


def summary(tasks: list[Any]) -> None:
    counts = Counter(t.rule.name if t.rule else "copied" for t in tasks)
    size = sum(math.prod(t.leaf.shape) for t in tasks)
    parts = ", ".join(f"{n} {name}" for name, n in counts.items())
    print(f"{text.count_leaves(len(tasks))}, {size:,} parameters: {parts}")


@contextmanager
def bar(tasks: list[Any]) -> Iterator[Callable[[int], None]]:
    """Show a bar over the entries on a terminal."""
    if not sys.stderr.isatty():
        yield lambda entries: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        whole = shown.add_task("writing", total=sum(math.prod(t.leaf.shape) for t in tasks))
        yield lambda entries: shown.advance(whole, entries)
