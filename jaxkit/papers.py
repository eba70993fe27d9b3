"""The papers behind jaxkit: which function implements which paper, and which experiment shows it.

The list is ``papers.toml`` beside this file; ``python -m jaxkit papers`` prints it.
"""

import tomllib
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["SPARSE", "Paper", "grep", "load", "parse"]

# The axes on which a method that masks declares itself, and what can stand on each. Survivors are
# the entries of the final mask: rewound to earlier values, drawn anew, trained on as they are, or
# frozen; "revive" trains on and lets the others come back from zero.
SPARSE = {
    "granularity": ("unstructured", "block", "structured"),
    "start": ("dense", "sparse"),
    "mask": ("static", "dynamic"),
    "when": ("before", "during", "after"),
    "data": ("free", "dependent"),
    "survivors": ("rewind", "reinit", "keep", "freeze", "revive"),
}


class Paper(NamedTuple):
    """One paper.

    Attributes:
      title: as printed.
      authors: full names, in the paper's order.
      year: the year of its first version.
      arxiv: its arXiv id, without a version.
      implements: the dotted names of the functions that implement it or a part of it.
      experiment: the name of the experiment that shows its finding, or None.
      sparse: of a method that masks, its value on each of the axes `SPARSE`, or None: what it
        removes; whether training begins dense or sparse; whether the mask then stands still; when
        it is made (before, during or after the training of what it masks); whether that needs data;
        and what becomes of the survivors.
    """

    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str
    implements: tuple[str, ...]
    experiment: str | None = None
    sparse: dict[str, str] | None = None


def load() -> tuple[Paper, ...]:
    """Return the papers of the package's own list.

    >>> [paper.arxiv for paper in load() if "Finding Sparse" in paper.title]
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
    due = dict.fromkeys(("title", "arxiv", "experiment"), str) | {"year": int, "sparse": dict}
    for name, value in entry.items():
        kind = due.get(name, list)
        strings = kind is not list or (value and all(isinstance(item, str) for item in value))
        if type(value) is not kind or not strings:
            what = "list of strings" if kind is list else kind.__name__
            raise ValueError(f"papers: {title!r}: {name} is {value!r}, due is a {what}")
    sparse = entry.get("sparse")
    if sparse is not None:
        wrong = {k: v for k, v in sparse.items() if v not in SPARSE.get(k, ())}
        lacks = [k for k in SPARSE if k not in sparse]
        if wrong or lacks:
            raise ValueError(
                f"papers: {title!r}: sparse has {wrong} and lacks {lacks}; due is {SPARSE}"
            )
    return Paper(
        title=title,
        authors=tuple(entry["authors"]),
        year=entry["year"],
        arxiv=entry["arxiv"],
        implements=tuple(entry["implements"]),
        experiment=entry.get("experiment"),
        sparse=sparse,
    )


def grep(papers: tuple[Paper, ...], word: str) -> tuple[Paper, ...]:
    """Return the papers that have `word` in any field, whatever its case.

    >>> papers = load()
    >>> [paper.title[:4] for paper in grep(papers, "snip: ")]
    ['SNIP']
    >>> grep(papers, "zyzzyva")
    ()
    """

    def text(paper: Paper) -> str:
        fields = [paper.title, *paper.authors, str(paper.year), f"arxiv:{paper.arxiv}"]
        fields += [*paper.implements, paper.experiment or "", *(paper.sparse or {}).values()]
        return "\n".join(fields).casefold()

    return tuple(paper for paper in papers if word.casefold() in text(paper))
