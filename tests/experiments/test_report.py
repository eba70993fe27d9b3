import base64
import json
import re
from html.parser import HTMLParser

import pytest

from experiments import report
from experiments.runner import Problem

PNG = b"\x89PNG and the rest"


def result(out, name, holds=(True, False), finished=True, **more):
    folder = out / name
    folder.mkdir(parents=True)
    asked = {
        "experiment": "walk",
        "settings": {"steps": 6, "name": "<b>"},
        "data": "none",
        "command": "python -m experiments run walk --name '<b>'",
        "versions": {"jax": "1.2.3"},
    }
    (folder / "settings.json").write_text(json.dumps(asked | more))
    if finished:
        (folder / "figure.png").write_bytes(PNG)
        claims = [
            {"statement": f"a < b {i}", "expected": "1 & 2", "measured": "3", "holds": h}
            for i, h in enumerate(holds)
        ]
        found = {
            "title": "A <random> walk",
            "about": "It is *not* a\nrun of ``x --y``.\n\nA. Author, arXiv 1611.03530.",
            "finished": "2026-01-02 03:04",
            "seconds": 75.2,
            "claims": claims,
        }
        (folder / "claims.json").write_text(json.dumps(found))
    return folder


class Page(HTMLParser):
    """Check that tags match, and gather what the page refers to."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.refers, self.ids, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.refers += [value for key, value in attrs if key in ("src", "href")]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything(tmp_path):
    result(tmp_path, "walk")
    result(tmp_path, "walk.1", holds=(True,))
    result(tmp_path, "begun", finished=False)
    (tmp_path / "notes.txt").write_text("not a result")
    path = report.write(tmp_path)
    assert path == tmp_path / "report.html"
    source = path.read_text()
    page = Page(source)
    text = " ".join(page.text)
    assert "2 of 3 claims hold, in 2 experiments" in text
    assert page.ids == ["walk", "walk.1"]
    for part in ("A <random> walk", "a < b 0", "1 & 2", "✓ yes", "✗ no", "1 min 15 s", "jax 1.2.3",
                 "not finished", "python -m experiments run walk --name '<b>'"):  # fmt: skip
        assert part in text
    assert "<em>not</em>" in source and "<code>x --y</code>" in source
    images = [r for r in page.refers if r.startswith("data:image/png;base64,")]
    assert [base64.b64decode(image.partition(",")[2]) for image in images] == [PNG, PNG]
    others = set(page.refers) - set(images)
    assert others == {"#walk", "#walk.1", "https://arxiv.org/abs/1611.03530"}
    assert not re.search(r"@import|url\(|<script|<link", source)
    assert "prefers-color-scheme: dark" in source


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(Problem, match="holds no results"):
        report.write(tmp_path)
    folder = result(tmp_path, "walk")
    (folder / "settings.json").write_text("{}")
    with pytest.raises(Problem, match=r"lacks '\w+'"):
        report.write(tmp_path)
    (folder / "claims.json").write_text("{")
    with pytest.raises(Problem, match=r"cannot read .*claims.json"):
        report.write(tmp_path)
    assert not (tmp_path / "report.html").exists()
