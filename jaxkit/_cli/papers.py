"""``python -m jaxkit papers``: what is implemented where."""

import argparse
import json
import sys
import textwrap
from typing import Any

from jaxkit._cli import text


def run(args: argparse.Namespace) -> int:
    from jaxkit import papers

    found = papers.load()
    if args.grep is not None:
        found = papers.grep(found, args.grep)
    if args.json:
        print(json.dumps([paper._asdict() for paper in found], indent=2, ensure_ascii=False))
    elif not found:
        print(f"no paper mentions {args.grep!r}", file=sys.stderr)
    else:
        print("\n\n".join(_describe(paper) for paper in found))
    return 0 if found else 1


def _describe(paper: Any) -> str:
    lines = {
        "": f"{', '.join(paper.authors)}, {paper.year}, arXiv:{paper.arxiv}",
        "functions: ": ", ".join(paper.implements),
        "experiment: ": paper.experiment and f"python -m experiments run {paper.experiment}",
        "sparsity: ": paper.sparse and ", ".join(f"{k} {v}" for k, v in paper.sparse.items()),
    }
    fill = lambda words, first, rest: textwrap.fill(
        words,
        text.width() or 100,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
    body = [fill(words, f"  {label}", "    ") for label, words in lines.items() if words]
    return "\n".join([fill(paper.title, "", "  "), *body])
