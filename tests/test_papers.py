import importlib
import inspect
import re
from pathlib import Path

import pytest

from jaxkit import papers

PAPERS = papers.load()
ROOT = Path(__file__).parents[1]


def resolve(name):
    """The object of a dotted name, as Python finds it: a function before a module of its name."""
    package, *parts = name.split(".")
    found = importlib.import_module(package)
    for i, part in enumerate(parts):
        if not hasattr(found, part):
            importlib.import_module(".".join([package, *parts[: i + 1]]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", sorted({name for p in PAPERS for name in p.implements}))
def test_every_name_is_a_public_function_that_says_what_it_is(name):
    found = resolve(name)
    assert callable(found)
    assert inspect.getdoc(found)
    module, _, attribute = name.rpartition(".")
    assert attribute in resolve(module).__all__


@pytest.mark.parametrize("name", sorted({p.experiment for p in PAPERS if p.experiment}))
def test_every_experiment_is_a_file(name):
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)
    assert (ROOT / "experiments" / f"{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.arxiv)
def test_entries(paper):
    year, month = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.\d{4,5}", paper.arxiv).groups()
    assert paper.year == 2000 + int(year), month  # an arXiv id begins with year and month
    assert all(" " in author and author == author.strip() for author in paper.authors)
    assert len(set(paper.implements)) == len(paper.implements)


def test_no_paper_is_listed_twice():
    for field in ("title", "arxiv"):
        values = [getattr(paper, field).casefold() for paper in PAPERS]
        assert len(set(values)) == len(values)


def test_methods_that_mask_lie_where_they_should_on_the_axes():
    place = {p.arxiv: tuple(p.sparse[axis] for axis in papers.SPARSE) for p in PAPERS if p.sparse}
    lottery = ("unstructured", "dense", "static", "after", "dependent", "rewind")
    random = ("unstructured", "sparse", "static", "before", "free", "keep")
    rigl = ("unstructured", "sparse", "dynamic", "during", "dependent", "keep")
    assert place["1803.03635"] == place["1903.01611"] == lottery
    assert place["2202.02643"] == place["2210.02412"] == random
    assert place["1911.11134"] == place["1707.04780"] == rigl
    assert place["2303.10464"] == (*random[:5], "revive")  # dense fine-tuning
    assert place["1810.02340"] == (*random[:4], "dependent", "keep")
    # what changes its mask does so while it trains, and what masks before needs no dense training
    for _, start, mask, when, data, survivors in place.values():
        assert (mask == "dynamic") <= (when == "during")
        assert (when == "before") <= (start == "sparse" and survivors != "rewind")
        assert (survivors == "rewind") <= (when == "after" and data == "dependent")
    assert {
        axis: {p[i] for p in place.values()} <= set(values)
        for i, (axis, values) in enumerate(papers.SPARSE.items())
    } == dict.fromkeys(papers.SPARSE, True)


ENTRY = {
    "title": '"A title"',
    "authors": '["A. Author", "B. Author"]',
    "year": "2020",
    "arxiv": '"2001.00001"',
    "implements": '["jaxkit.tree.quantile"]',
    "experiment": '"a-name"',
    "sparse": '{ granularity = "block", start = "dense", mask = "static", when = "after", '
    'data = "free", survivors = "keep" }',
}


def toml(entry):
    return "[[paper]]\n" + "\n".join(f"{name} = {value}" for name, value in entry.items())


def test_parse():
    expected = papers.Paper(
        "A title",
        ("A. Author", "B. Author"),
        2020,
        "2001.00001",
        ("jaxkit.tree.quantile",),
        "a-name",
        dict(
            zip(papers.SPARSE, ("block", "dense", "static", "after", "free", "keep"), strict=True)
        ),
    )
    assert papers.parse(toml(ENTRY)) == (expected,)
    without = {k: v for k, v in ENTRY.items() if k not in ("experiment", "sparse")}
    both = toml(ENTRY) + "\n" + toml(without)
    assert papers.parse(both) == (expected, expected._replace(experiment=None, sparse=None))
    assert papers.parse("") == ()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"year": '"2020"'}, "'A title': year is '2020', due is a int"),
        ({"year": "true"}, "year is True"),
        ({"authors": '"A. Author"'}, "authors is 'A. Author', due is a list of strings"),
        ({"authors": "[]"}, r"authors is \[\]"),
        ({"implements": "[3]"}, r"implements is \[3\]"),
        ({"arxiv": "2001.00001"}, "arxiv is 2001.00001, due is a str"),
        ({"experiment": "[1]"}, "experiment is"),
        ({"sparse": '"yes"'}, "sparse is 'yes', due is a dict"),
        ({"sparse": '{ when = "later" }'}, r"{'when': 'later'} and lacks \['granularity'"),
        ({"colour": '"blue"'}, r"'A title' has unknown fields \['colour'\]"),
    ],
)
def test_a_wrong_entry_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        papers.parse(toml(ENTRY | changed))


def test_a_missing_field_is_named():
    for name in ENTRY.keys() - {"experiment", "sparse"}:
        with pytest.raises(ValueError, match=rf"lacks \['{name}'\]"):
            papers.parse(toml({k: v for k, v in ENTRY.items() if k != name}))
    with pytest.raises(ValueError, match="unknown tables"):
        papers.parse("[[papers]]\n")
    with pytest.raises(ValueError, match=r"line 1"):
        papers.parse("no toml")


def test_grep_looks_in_every_field_whatever_the_case():
    found = papers.parse(toml(ENTRY))
    words = [
        "a TITLE",
        "b. author",
        "2020",
        "arXiv:2001.00001",
        "tree.quantile",
        "A-NAME",
        "Block",
        "",
    ]
    assert all(papers.grep(found, word) == found for word in words)
    assert papers.grep(found, "another") == ()
