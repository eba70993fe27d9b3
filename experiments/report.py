"""One HTML page of all results, with nothing outside it: the figures and the style are inside."""

import base64
import dataclasses
import html
import re
import time
from pathlib import Path
from typing import Any

from experiments.runner import Problem, read_json, write_file


@dataclasses.dataclass(frozen=True)
class Options:
    """Write one HTML page of all results."""

    out: Path = Path("results")
    """The folder with the results; the page is OUT/report.html."""


def write(out: Path) -> Path:
    """Write ``OUT/report.html`` and return its path.

    Raises:
      Problem: no result in `out`, one that cannot be read, or a page that cannot be written.
    """
    results = [
        (folder, read_json(folder / "settings.json"), _finished(folder))
        for folder in sorted(out.iterdir() if out.is_dir() else [])
        if (folder / "settings.json").exists()
    ]
    if not results:
        raise Problem(f"{out} holds no results; `python -m experiments run NAME` makes some")
    try:
        page = _page(results).encode()
    except KeyError as error:
        raise Problem(f"a result in {out} lacks {error}") from error
    write_file(out / "report.html", page)
    return out / "report.html"


def _finished(folder: Path) -> dict[str, Any] | None:
    """Return what `claims.json` says, and the figure; None for a run that is not finished."""
    if not ((folder / "claims.json").exists() and (folder / "figure.png").exists()):
        return None
    try:
        image = (folder / "figure.png").read_bytes()
    except OSError as error:
        raise Problem(f"cannot read {folder / 'figure.png'}: {error.strerror}") from error
    return read_json(folder / "claims.json") | {"image": base64.b64encode(image).decode()}


def _page(results) -> str:
    done = [(folder, asked, found) for folder, asked, found in results if found]
    overview = "\n".join(_overview_row(*result) for result in results)
    sections = "\n".join(_section(*result) for result in done)
    total = [claim["holds"] for *_, found in done for claim in found["claims"]]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>jaxkit: experiments</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>jaxkit: experiments</h1>
<p>{sum(total)} of {len(total)} claims hold, in {_count(len(done), "experiment")}.
Written {time.strftime("%Y-%m-%d %H:%M")}.</p>
</header>
<main>
<div class="scroll"><table class="overview">
<thead><tr><th>experiment</th><th>folder</th><th>claims that hold</th><th>time</th></tr></thead>
<tbody>
{overview}
</tbody>
</table></div>
{sections}
</main>
</body>
</html>
"""


def _overview_row(folder: Path, asked: dict[str, Any], found: dict[str, Any] | None) -> str:
    name = html.escape(folder.name)
    if not found:
        return (
            f"<tr><td>{html.escape(asked['experiment'])}</td><td><code>{name}</code></td>"
            '<td colspan="2">not finished; the same command goes on with it</td></tr>'
        )
    held = [claim["holds"] for claim in found["claims"]]
    dots = "".join(f'<i class="{"yes" if holds else "no"}"></i>' for holds in held)
    return (
        f'<tr><td><a href="#{name}">{html.escape(found["title"])}</a></td>'
        f"<td><code>{name}</code></td>"
        f'<td><span class="dots" aria-hidden="true">{dots}</span> {sum(held)} of {len(held)}</td>'
        f"<td>{_duration(found['seconds'])}</td></tr>"
    )


def _section(folder: Path, asked: dict[str, Any], found: dict[str, Any]) -> str:
    paragraphs = [_prose(text) for text in re.split(r"\n\s*\n", found["about"]) if text.strip()]
    claims = "\n".join(
        f"<tr><td>{html.escape(claim['statement'])}</td><td>{html.escape(claim['expected'])}</td>"
        f"<td>{html.escape(claim['measured'])}</td><td>{_verdict(claim['holds'])}</td></tr>"
        for claim in found["claims"]
    )
    settings = "\n".join(
        f"<tr><td><code>{html.escape(key)}</code></td><td>{html.escape(str(value))}</td></tr>"
        for key, value in asked["settings"].items()
    )
    versions = ", ".join(f"{key} {value}" for key, value in asked["versions"].items())
    return f"""<section id="{html.escape(folder.name)}">
<h2>{html.escape(found["title"])}</h2>
{"".join(paragraphs)}
<figure><img alt="{html.escape(found["title"])}: figure"
src="data:image/png;base64,{found["image"]}"></figure>
<div class="scroll"><table class="claims">
<thead><tr><th>statement</th><th>expected</th><th>measured</th><th>holds?</th></tr></thead>
<tbody>
{claims}
</tbody>
</table></div>
<pre><code>{html.escape(asked["command"])}</code></pre>
<p class="meta">Finished {html.escape(found["finished"])}, after {_duration(found["seconds"])}.
Data: {html.escape(asked["data"])}. {html.escape(versions)}.</p>
<details><summary>Settings</summary><div class="scroll"><table>
<tbody>
{settings}
</tbody>
</table></div></details>
</section>"""


def _prose(text: str) -> str:
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"``(.+?)``", r"<code>\1</code>", text)
    text = re.sub(r"\*(\w[^*]*)\*", r"<em>\1</em>", text)
    text = re.sub(
        r"arXiv (\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', text
    )
    return f"<p>{text}</p>\n"


def _verdict(holds: bool) -> str:
    return f'<span class="{"yes" if holds else "no"}">{"✓ yes" if holds else "✗ no"}</span>'


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


_STYLE = """
:root {
  --page: #f6f7f9; --card: #fff; --text: #1c2430; --soft: #5b6675; --line: #dfe3e8;
  --link: #0b62a3; --yes: #117a4f; --yes-back: #e2f4ea; --no: #b3361b; --no-back: #fde8e1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2129; --text: #e6e9ee; --soft: #9aa5b4; --line: #313a46;
    --link: #77bdf2; --yes: #6fd6a3; --yes-back: #163527; --no: #ff9b80; --no-back: #43211a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 0 0 0.75rem; }
header p, .meta { color: var(--soft); margin: 0.4rem 0 1.5rem; }
a { color: var(--link); }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 1.75rem; margin: 1.75rem 0;
}
section > p { max-width: 46rem; }
figure { margin: 1.25rem 0; background: #fff; border-radius: 8px; padding: 0.75rem; }
@media (prefers-color-scheme: light) { figure { padding: 0.25rem 0; } }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.94rem; }
th, td {
  text-align: left; vertical-align: top; padding: 0.55rem 0.9rem 0.55rem 0;
  border-bottom: 1px solid var(--line);
}
th { color: var(--soft); font-weight: 600; font-size: 0.82rem; }
th:last-child, td:last-child { padding-right: 0; }
.claims td:first-child { width: 38%; font-weight: 550; }
.claims td:last-child { white-space: nowrap; }
span.yes, span.no { border-radius: 99px; padding: 0.1rem 0.6rem; font-weight: 600; }
span.yes { color: var(--yes); background: var(--yes-back); }
span.no { color: var(--no); background: var(--no-back); }
.overview td:nth-child(n+2) { white-space: nowrap; }
.dots { display: inline-flex; gap: 3px; margin-right: 0.35rem; }
.dots i { width: 9px; height: 9px; border-radius: 50%; background: var(--yes); }
.dots i.no { background: none; border: 2px solid var(--no); }
pre {
  overflow-x: auto; background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  padding: 0.7rem 0.9rem; margin: 1.25rem 0 0.75rem; font-size: 0.88rem;
}
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
p code, td code { font-size: 0.9em; }
@media (min-width: 40rem) { p code { white-space: nowrap; } }
details { font-size: 0.94rem; }
summary { cursor: pointer; color: var(--link); }
@media print { section { break-inside: avoid; border: 0; padding: 0; } }
"""
