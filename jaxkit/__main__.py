"""The command line: ``python -m jaxkit --help``."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from jaxkit._cli import text

_EXAMPLES = """\
examples:
  python -m jaxkit papers                    the papers that jaxkit implements
  python -m jaxkit papers --grep lottery     those that mention a word
  python -m jaxkit inspect model.safetensors
  python -m jaxkit inspect checkpoints/7 --where "**/kernel"
  python -m jaxkit inspect model.safetensors --json | jq .total.sparsity
  python -m jaxkit diff base.safetensors tuned.safetensors
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
    return parser


def _version() -> str:
    try:
        return metadata.version("jaxkit")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
