"""One HTML file with everything in it: no scripts, no links to other files, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --ink: #1f2933; --soft: #5f6c7b; --line: #d9e0e7; --ground: #ffffff;
          --card: #f6f8fa; --accent: #2563eb; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e6eaef; --soft: #9aa7b4; --line: #323c47; --ground: #14191f; --card: #1c232b; --accent: #7aa7ff; }
  }
  body { margin: 0 auto; max-width: 1080px; padding: 2.5rem 1.25rem 4rem; background: var(--ground); color: var(--ink);
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { margin: 3rem 0 .4rem; font-size: 1.35rem; }
  p { color: var(--soft); max-width: 46rem; margin: .4rem 0 1rem; }
  .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem; margin: 1.4rem 0; }
  .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: .9rem 1.1rem; }
  .card b { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--accent);
            font-variant-numeric: tabular-nums; }
  .card span { color: var(--soft); font-size: .9rem; }
  table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums; }
  th, td { padding: .35rem 1.1rem .35rem 0; border-bottom: 1px solid var(--line); text-align: right; }
  th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
  img { width: 100%; border-radius: 10px; background: #fff; border: 1px solid var(--line); box-sizing: border-box; }
  code, pre { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, monospace; }
  pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
        overflow-x: auto; }
  footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ introduction }}</p>
<div class="cards">
{% for label, value in headline %}  <div class="card"><b>{{ value }}</b><span>{{ label }}</span></div>
{% endfor %}</div>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>{% endif %}
{% if section.table %}<table>
<tr>{% for cell in section.table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.table[1:] %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for picture in section.pictures %}<img alt="{{ picture.stem }}" src="{{ inlined(picture) }}">
{% endfor %}{% if section.commands %}<pre>{{ section.commands }}</pre>{% endif %}
</section>
{% endfor %}
<footer>{{ footer }}</footer>
</body>
</html>
"""


@dataclass(frozen=True)
class Section:
    """One part of the page; what is empty is left out.

    Attributes:
        title: Heading.
        text: A paragraph.
        table: Rows of cells, the header first.
        pictures: PNG files, which are copied into the page.
        commands: Preformatted text.
    """

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Path] = ()
    commands: str = ""


def write_page(
    path: Path,
    title: str,
    introduction: str,
    headline: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    footer: str,
) -> None:
    """Writes the page; every text is escaped.

    Args:
        path: File to write.
        title: Of the page.
        introduction: A paragraph below the title.
        headline: Label and value of the numbers to show large.
        sections: The body.
        footer: The last line.
    """
    page = Environment(autoescape=True).from_string(TEMPLATE)
    path.write_text(
        page.render(
            title=title,
            introduction=introduction,
            headline=headline,
            sections=sections,
            footer=footer,
            inlined=_inlined,
        ),
        encoding="utf-8",
    )


def _inlined(picture: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
