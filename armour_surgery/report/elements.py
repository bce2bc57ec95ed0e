"""The elements that a page of HTML is made of: sections, tables, tiles, bars.

What is passed in as content is HTML already; `code` escapes.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

__all__ = ["NONE", "Row", "bar", "code", "facts", "figure", "numbers", "section", "table", "tile"]

# What stands in a cell that has no value: an en dash, as wide as a digit.
NONE = "\u2013"


class Row(NamedTuple):
    """A row of a table: its cells as HTML, and its class."""

    cells: Sequence[str]
    kind: str = ""


def section(title: str, *content: str) -> str:
    """A part of the page under a heading."""
    return "\n".join(["<section>", f"<h2>{title}</h2>", *content, "</section>"])


def code(text: str) -> str:
    """Any text as code; it is escaped."""
    return f"<code>{escape(text)}</code>"


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A table; `columns` maps titles to classes. A row's first cell is its heading."""
    head = ""
    for title, kind in columns.items():
        head += f'<th scope="col"{_class(kind)}>{title}</th>'
    body = "\n".join(_row(row, list(columns.values())) for row in rows)
    # The frame is what scrolls where a screen is narrower than the table.
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _row(row: Row, kinds: Sequence[str]) -> str:
    first, *rest = zip(row.cells, kinds, strict=True)
    # The first cell is a heading, so that a screen reader says it with every other cell of the row.
    line = f'<th scope="row"{_class(first[1])}>{first[0]}</th>'
    for cell, kind in rest:
        line += f"<td{_class(kind)}>{cell}</td>"
    return f"<tr{_class(row.kind)}>{line}</tr>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def tile(label: str, value: str, below: str) -> str:
    """A number in large letters, with what it is above it and a remark below."""
    return f"<div><dt>{label}</dt><dd>{value}</dd><dd>{below}</dd></div>"


def facts(named: Iterable[tuple[str, str]]) -> str:
    """A list of names and what they stand for."""
    lines = [f"<dt>{name}</dt><dd>{value}</dd>" for name, value in named]
    return "\n".join(['<dl class="facts">', *lines, "</dl>"])


def bar(value: float | None, full: float) -> str:
    """A number and a bar, which is full at that value and beyond it; the scale is the same on every page."""
    if value is None:
        return NONE
    share = 100 * min(max(value / full, 0.0), 1.0)
    return f'{value:.4f}<span class="bar"><i style="width:{share:.1f}%"></i></span>'


def figure(svg: str) -> str:
    """A figure inside the page, from `style.inline_svg`."""
    return f"<figure>{svg}</figure>"


def numbers(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """The table behind a figure, folded away."""
    return f"<details><summary>Numbers</summary>{table(columns, rows)}</details>"
