"""The command line: ``python -m jaxkit --help``."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from typing import Any

from jaxkit._cli import text

_EXAMPLES = """\
examples:
  python -m jaxkit papers                    the papers that jaxkit implements
  python -m jaxkit papers --grep lottery     those that mention a word
  python -m jaxkit inspect model.safetensors
  python -m jaxkit inspect checkpoints/7 --where "**/kernel"
  python -m jaxkit inspect model.safetensors --json | jq .total.sparsity
  python -m jaxkit diff base.safetensors tuned.safetensors
  python -m jaxkit merge --method ties --base base.safetensors \\
      a.safetensors b.safetensors -o merged.safetensors
  python -m jaxkit prune model.safetensors --sparsity 0.9 -o sparse.safetensors
"""

_INSPECT = (
    "Print the shape, dtype, L2 norm and sparsity (the fraction of entries that are exactly zero) "
    "of every leaf of a checkpoint, and the totals. The leaves are read one after another: it "
    "takes memory for the largest leaf, not for the checkpoint. Pickle (.pt, .bin) is never read."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 1: `papers --grep` found nothing; 2: a bad argument or an unreadable file, with one
    line on stderr that says which.

    >>> main(["papers", "--grep", "1803.03635", "--json"])  # doctest: +ELLIPSIS
    [
      {
        "title": "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
    ...
    0
    """
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that lacks a character of a name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = import_module(f"jaxkit._cli.{args.command}").run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        # What is left in the buffer would fail once more when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program ended by SIGPIPE
    except KeyboardInterrupt:
        return 128 + 2
    except (OSError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        print(f"python -m jaxkit: error: {text.printable(reason)}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxkit",
        description="Research on neural-network weights in JAX.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxkit {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    papers = commands.add_parser(
        "papers",
        help="list the papers that jaxkit implements",
        description="List the papers that jaxkit implements, with the functions that do.",
        epilog="exit status: 1 if --grep finds no paper",
    )
    papers.add_argument("--grep", metavar="WORD", help="only papers with WORD in any field")
    papers.add_argument("--json", action="store_true", help="print JSON")
    papers.set_defaults(command="papers")

    inspect = commands.add_parser(
        "inspect",
        help="show what a checkpoint holds, leaf by leaf",
        description=_INSPECT,
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        help="a .safetensors file, a model.safetensors.index.json, or the folder of an orbax "
        "checkpoint (one step of a CheckpointManager)",
    )
    inspect.add_argument(
        "--where",
        metavar="GLOB",
        action="append",
        help="only leaves whose path matches: * stays within one component of the path, ** spans "
        "any number; may be given more than once",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(command="inspect")

    diff = commands.add_parser(
        "diff",
        help="show how two checkpoints differ, leaf by leaf",
        description="Print, for every leaf of both checkpoints, the fraction of entries that "
        "differ, the norm of the difference and its ratio to that of A, the cosine between the "
        "two, and the fraction of entries of equal sign. Reads one leaf of each at a time.",
        epilog="exit status: 1 if some leaves are not in both or have another shape",
    )
    diff.add_argument("a", metavar="A", help="a checkpoint, as for inspect")
    diff.add_argument("b", metavar="B", help="another one")
    diff.add_argument("--where", metavar="GLOB", action="append", help="as for inspect")
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.set_defaults(command="diff")
    _add_merge(commands)
    _add_prune(commands)
    return parser


def _add_merge(commands: Any) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge checkpoints into a new one",
        description="Merge fine-tuned checkpoints, leaf by leaf: the memory of a few leaves, "
        "whatever their size. Leaves are merged as base + scale * combined deltas, keep their "
        "dtypes, and appear under the output's name when all are written. With --config FILE, a "
        "TOML file gives base, models, output, method and options, and [[rules]] with `where`, "
        "`method` and options for some leaves: the first that matches applies.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""\
methods and their options:
  average            --weights (also without a base)
  task-arithmetic    --weights
  ties               --weights --sparsity --scope
  dare, dare-ties    --weights --drop-rate --q --seed
  breadcrumbs        --weights --sparsity --outliers --scope
  model-stock
  copy               (in rules) the leaf of the base

example:
  python -m jaxkit merge --method ties --base base.safetensors a.safetensors b.safetensors \\
      --sparsity 0.8 --scale 0.4 -o merged.safetensors""",
    )
    merge.add_argument("models", nargs="*", metavar="MODEL", help="a checkpoint, as for inspect")
    merge.add_argument("--base", metavar="FILE", help="what the models were fine-tuned from")
    merge.add_argument("--method", metavar="NAME", help="see below")
    merge.add_argument("--config", metavar="FILE", help="a TOML file; options here go before it")
    merge.add_argument("--scale", type=float, metavar="X", help="of the merged delta (1)")
    merge.add_argument("--weights", type=float, nargs="+", metavar="X", help="one number a model")
    merge.add_argument("--sparsity", type=float, metavar="X", help="the fraction of zeros")
    merge.add_argument("--outliers", type=float, metavar="X", help="of them, the largest entries")
    merge.add_argument("--drop-rate", type=float, metavar="X", help="the probability to drop")
    merge.add_argument("--q", type=float, metavar="X", help="the divisor (1 - drop rate)")
    merge.add_argument("--seed", type=int, metavar="N", help="of random draws (0)")
    merge.add_argument("--scope", choices=["leaf", "tree"], help="what is ranked together")
    merge.add_argument("--where", metavar="GLOB", action="append", help="leaves to merge (all)")
    _add_output(merge)
    merge.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="X", help="the size of a shard (5)"
    )
    merge.set_defaults(command="merge")


def _add_prune(commands: Any) -> None:
    prune = commands.add_parser(
        "prune",
        help="set the smallest weights of a checkpoint to zero",
        description="Keep the weights with the largest magnitudes and set the others to zero, "
        "exactly as many as the sparsity asks for, one leaf at a time.",
    )
    prune.add_argument("file", metavar="FILE", help="a checkpoint, as for inspect")
    prune.add_argument(
        "--sparsity", type=float, required=True, metavar="X", help="zeros, in [0, 1)"
    )
    prune.add_argument(
        "--allocation",
        choices=["global", "uniform", "erk"],
        default="global",
        help="rank all chosen leaves together, each by itself, or with Erdos-Renyi-Kernel ratios",
    )
    prune.add_argument("--where", metavar="GLOB", action="append", help="leaves (the weights)")
    _add_output(prune)
    prune.set_defaults(command="prune")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="a .safetensors file, or a .safetensors.index.json for shards beside it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")


def _version() -> str:
    try:
        return metadata.version("jaxkit")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
