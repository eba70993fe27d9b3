"""The papers behind jaxkit: which function implements which paper, and which experiment shows it.

The list is ``papers.toml`` beside this file; ``python -m jaxkit papers`` prints it.
"""

import tomllib
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["Paper", "grep", "load", "parse"]


class Paper(NamedTuple):
    """One paper.

    Attributes:
      title: as printed.
      authors: full names, in the paper's order.
      year: the year of its first version.
      arxiv: its arXiv id, without a version.
      implements: the dotted names of the functions that implement it or a part of it.
      experiment: the name of the experiment that shows its finding, or None.
    """

    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    implements: tuple[str, ...]
    experiment: str | None = None


def load() -> tuple[Paper, ...]:
    """Return the papers of the package's own list.

    >>> [paper.arxiv for paper in load() if "Lottery Ticket" in paper.title]
    ['1803.03635']
    """
    text = resources.files("jaxkit").joinpath("papers.toml").read_text(encoding="utf-8")
    return parse(text)


def parse(text: str) -> tuple[Paper, ...]:
    """Return the papers of a text in TOML: one ``[[paper]]`` table each, fields as in `Paper`.

    Raises:
      ValueError: the text is not TOML, or an entry lacks a field, has an unknown one or has one
        of another type. The message names the paper.

    >>> parse('''
    ... [[paper]]
    ... title = "A title"
    ... authors = ["A. Author"]
    ... year = 2020
    ... arxiv = "2001.00001"
    ... implements = ["jaxkit.tree.quantile"]
    ... ''')[0].implements
    ('jaxkit.tree.quantile',)
    """
    tables = tomllib.loads(text)
    if set(tables) - {"paper"}:
        raise ValueError(f"papers: unknown tables {sorted(set(tables) - {'paper'})}")
    return tuple(_paper(entry) for entry in tables.get("paper", []))


def _paper(entry: dict[str, Any]) -> Paper:
    title = entry.get("title", "a paper without a title")
    unknown = sorted(set(entry) - set(Paper._fields))
    missing = [name for name in Paper._fields if name not in {*entry, *Paper._field_defaults}]
    if unknown or missing:
        raise ValueError(f"papers: {title!r} has unknown fields {unknown} and lacks {missing}")
    due = {"title": str, "authors": list, "year": int, "arxiv": str, "implements": list}
    for name, value in entry.items():
        kind = due.get(name, str)
        strings = kind is not list or (value and all(isinstance(item, str) for item in value))
        if type(value) is not kind or not strings:
            what = "list of strings" if kind is list else kind.__name__
            raise ValueError(f"papers: {title!r}: {name} is {value!r}, due is a {what}")
    return Paper(
        title=title,
        authors=tuple(entry["authors"]),
        year=entry["year"],
        arxiv=entry["arxiv"],
        implements=tuple(entry["implements"]),
        experiment=entry.get("experiment"),
    )


def grep(papers: tuple[Paper, ...], word: str) -> tuple[Paper, ...]:
    """Return the papers that have `word` in any field, whatever its case.

    >>> papers = load()
    >>> [paper.title[:4] for paper in grep(papers, "torr")]
    ['SNIP']
    >>> grep(papers, "zyzzyva")
    ()
    """

    def text(paper: Paper) -> str:
        fields = [paper.title, *paper.authors, str(paper.year), f"arxiv:{paper.arxiv}"]
        return "\n".join([*fields, *paper.implements, paper.experiment or ""]).casefold()

    return tuple(paper for paper in papers if word.casefold() in text(paper))
