"""The parts of a self-contained HTML page: no script, no external resource, light and dark, narrow and wide."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from megalrps.evaluation.tables import Cell, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --card: #f6f8fa;
  --accent: #0b63a5; --best: #e3f1e6; --warn: #fff4d6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e9f0; --soft: #9aa6b5; --line: #313a46; --paper: #12161c; --card: #1a2029; --accent: #6db6f0;
    --best: #1d3a28; --warn: #3b3115; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead { color: var(--soft); font-size: 1.05rem; }
.warning { background: var(--warn); padding: .6rem .9rem; border-radius: .4rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1.2rem 0 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .55rem .8rem; }
.facts dt { color: var(--soft); font-size: .82rem; }
.facts dd { margin: 0; font-size: 1.12rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: .8rem 0 1.2rem; }
img { display: block; width: 100%; height: auto; }
figcaption, .note { color: var(--soft); font-size: .88rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
.scroll img { min-width: 36rem; }
.beside { display: flex; flex-wrap: wrap; gap: 0 1.5rem; }
.beside > div { max-width: 100%; }
.beside .note { max-width: 27rem; }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 .3rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { padding: .38rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; }
thead th { color: var(--soft); font-size: .88rem; vertical-align: bottom; }
.text { text-align: left; }
tr > :first-child { padding-left: .2rem; }
abbr { text-decoration: none; }
td.best { background: var(--best); font-weight: 650; }
.paths dt { font-weight: 600; margin-top: .9rem; }
.paths dd { margin: .15rem 0 0; }
code { font: .9em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Picture:
    """A drawing for each colour scheme, as PNG bytes, with what it shows in words for those who do not see it."""

    file_name: str
    light: bytes
    dark: bytes
    title: str
    description: str
    caption: str


def picture_html(picture: Picture) -> str:
    """The picture in a region that scrolls by itself where the screen is too narrow to read its words."""
    dark, light = (_data_address(image) for image in (picture.dark, picture.light))
    return (
        f'<figure><div class="scroll" role="region" tabindex="0" aria-label="{escape(picture.title)}">'
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(picture.description)}"></picture></div>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def table_html(table: Table) -> str:
    """``table`` with a caption and scoped headers, in a region that scrolls by itself on a narrow screen."""
    head = "".join(
        f'<th scope="col"{_text_class(table, index)}>{escape(name)}</th>' for index, name in enumerate(table.header)
    )
    body = "\n".join(_row_html(table, row) for row in table.rows)
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(table.caption)}">'
        f"<table><caption>{escape(table.caption)}</caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>{note}"
    )


def side_by_side(pieces: Iterable[str]) -> str:
    """Pieces of HTML beside one another where the page is wide enough, else below one another."""
    return '<div class="beside">' + "".join(f"<div>{piece}</div>" for piece in pieces) + "</div>"


def facts_html(facts: Sequence[tuple[str, str]]) -> str:
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{cards}</dl>'


def paths_html(paths: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A description list: each path's name with its sentences."""
    items = "".join(
        f"<dt>{escape(name)}</dt>" + "".join(f"<dd>{escape(sentence)}</dd>" for sentence in sentences)
        for name, sentences in paths
    )
    return f'<dl class="paths">{items}</dl>'


def page_html(
    title: str, lead: str, warnings: Sequence[str], sections: Sequence[tuple[str, Sequence[str]]], footer: str
) -> str:
    """The whole page; ``sections`` are (heading, pieces of HTML), the heading empty for what follows the title.

    All else is plain text and is escaped here.
    """
    notes = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)
    body = "\n".join(_section_html(heading, pieces) for heading, pieces in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{notes}\n{body}\n</main>\n'
        f"<footer>{escape(footer)}</footer>\n</body>\n</html>\n"
    )


def _section_html(heading: str, pieces: Sequence[str]) -> str:
    title = f"<h2>{escape(heading)}</h2>\n" if heading else ""
    return f"<section>{title}" + "\n".join(pieces) + "</section>"


def _row_html(table: Table, row: Sequence[Cell]) -> str:
    first, *others = row
    head = f'<tr><th scope="row" class="text">{escape(first.text)}</th>'
    return head + "".join(_cell_html(cell, _text_class(table, i)) for i, cell in enumerate(others, start=1)) + "</tr>"


def _cell_html(cell: Cell, text_class: str) -> str:
    if not cell.best:
        return f"<td{text_class}>{escape(cell.text)}</td>"
    return f'<td class="best">{escape(cell.text)}&nbsp;<abbr title="best of the column">★</abbr></td>'


def _text_class(table: Table, column: int) -> str:
    return ' class="text"' if table.is_text(column) else ""


def _data_address(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")
