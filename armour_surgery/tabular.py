"""A table that shows itself anywhere: as lines of text in a Python session, as HTML in a notebook."""

import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from html import escape
from itertools import zip_longest
from typing import SupportsIndex, TypeVar, overload

from armour_surgery.spelled import shortened

__all__ = ["Layout", "Listing", "Table", "Tabular"]

# What fits a terminal of 80 columns, and a screen beside whatever else is on it.
WIDTH, LINES = 79, 20
# Letters that a column of names keeps, however little room there is, and what stands between columns.
_NARROWEST, _GAP = 8, "  "
# What a column of lists wraps at rather than that names lose letters.
_LISTS = 12
# Letters of a header that stays in one line above a column of numbers that is less wide, and of a word in a longer one.
_TITLE, _HEADER = 13, 16
# Lines that remarks get, however many rows there are.
_NOTES = 4
# Nothing but gray, which is seen on white and on black; text keeps the color that the notebook gives it.
_RULE = "border-bottom:1px solid rgba(128,128,128,.35);"
_CELL = "padding:.25em .9em .25em 0;background:transparent;vertical-align:top;"

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Layout:
    """A table laid out for a width: the lines of its headers, those of each row, and how wide its columns are."""

    head: list[str]
    rows: list[list[str]]
    widths: list[int]

    def rule(self, letter: str) -> str:
        """The line between headers and rows."""
        return _GAP.join(letter * wide for wide in self.widths)


@dataclass(frozen=True)
class Table:
    """Headers and rows of plain text; `right` are the columns that hold numbers. `notes` stand below, a line each.

    `whole` are columns that are never broken, though they hold no numbers; the `spare` ones among them, at the end, are
    left out where there is no room.
    """

    caption: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    right: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    whole: frozenset[int] = frozenset()
    spare: int = 0

    def text(self, width: int = WIDTH, lines: int = LINES) -> str:
        """So many lines at most, none longer than `width` but where numbers alone are wider.

        Rows and remarks that there is no room for are counted.
        """
        shown = _wrapped(self.caption, width)
        notes = [_wrapped(note, width) for note in self.notes]
        if self.rows:
            layout = self.laid_out(width)
            shown += [*layout.head, layout.rule("-")]
            room = lines - len(shown) - min(_NOTES, sum(map(len, notes)))
            shown += _fitting(layout.rows, room, "row")
        return "\n".join([*shown, *_fitting(notes, lines - len(shown), "remark")])

    def laid_out(self, width: int) -> Layout:
        """All rows in lines of at most so many letters; numbers stay whole, even where they alone are wider.

        Cells wrap at spaces, and a word that is still too long loses its middle.
        """
        widths = self._widths(width)
        if self.spare and sum(widths) + len(_GAP) * (len(widths) - 1) > width:
            rows = [row[: -self.spare] for row in self.rows]
            return replace(self, headers=self.headers[: -self.spare], rows=rows, spare=0).laid_out(width)
        return Layout(self._lines(self.headers, widths), [self._lines(row, widths) for row in self.rows], widths)

    def _widths(self, width: int) -> list[int]:
        """How wide each column is; those of names give way where the line would be too long."""
        widths, least, giving = [], [], []
        for place, header in enumerate(self.headers):
            cells = [row[place] for row in self.rows]
            longest = max(map(len, cells), default=0)
            if place in self.right or place in self.whole:
                head = len(header) if len(header) <= _TITLE else max(min(len(w), _HEADER) for w in header.split(" "))
                widths.append(max(longest, head))
                least.append(0)
            else:
                giving.append(place)
                widths.append(max(longest, len(header)))
                words = [len(word) for cell in (header, *cells) for word in cell.split(" ")]
                least.append(max(max(words), _LISTS))
        while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
            # What wraps at its spaces loses nothing; only then do words get shorter.
            wrapping = [place for place in giving if widths[place] > least[place]]
            shrinking = wrapping or [place for place in giving if widths[place] > _NARROWEST]
            if not shrinking:
                break
            widths[max(shrinking, key=lambda place: widths[place])] -= 1
        return widths

    def _lines(self, row: tuple[str, ...], widths: Sequence[int]) -> list[str]:
        """A row, as many lines as its longest cell has."""
        cells = [_wrapped(cell, wide) for cell, wide in zip(row, widths, strict=True)]
        lines = []
        for parts in zip_longest(*cells, fillvalue=""):
            line = ""
            for place, (part, wide) in enumerate(zip(parts, widths, strict=True)):
                line += (part.rjust(wide) if place in self.right else part.ljust(wide)) + _GAP
            lines.append(line.rstrip())
        return lines

    def html(self) -> str:
        """All of it as a piece of HTML that needs nothing around it; every text is escaped."""
        head = "".join(self._cell("th", place, title) for place, title in enumerate(self.headers))
        body = ""
        for row in self.rows:
            cells = "".join(self._cell("td", place, cell) for place, cell in enumerate(row))
            body += f"<tr>{cells}</tr>"
        notes = "".join(f'<div style="opacity:.75">{escape(note)}</div>' for note in self.notes)
        return (
            f'<div style="overflow-x:auto"><div style="font-weight:600">{escape(self.caption)}</div>'
            f'<table style="border-collapse:collapse;color:inherit;font-variant-numeric:tabular-nums">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}</div>"
        )

    def _cell(self, tag: str, place: int, text: str) -> str:
        side = "text-align:right;white-space:nowrap;" if place in self.right else "text-align:left;"
        return f'<{tag} style="{_CELL}{_RULE}{side}">{escape(text)}</{tag}>'


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most so many letters, broken at spaces alone; a word that is longer loses its middle."""
    width = max(width, 1)  # of a column without a header and without a cell
    words = " ".join(shortened(word, width) for word in text.split(" "))
    return textwrap.wrap(words, width, break_long_words=False, break_on_hyphens=False) or [""]


def _fitting(entries: Sequence[Sequence[str]], room: int, left_out: str) -> list[str]:
    """The lines of the first entries, as many as there is room for, and how many are left out."""
    if sum(map(len, entries)) <= room:
        return [line for entry in entries for line in entry]
    lines: list[str] = []
    for number, entry in enumerate(entries):
        if len(lines) + len(entry) >= room:
            left = len(entries) - number
            return [*lines, f"... {left} more {left_out}{'s' if left > 1 else ''}"]
        lines += entry
    return lines


class Tabular(ABC):
    """What shows itself as its `table()`: as text in a Python session, as HTML in a notebook."""

    @abstractmethod
    def table(self) -> Table:
        """The table that it is shown as."""

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


class Listing(Tabular, list[Entry]):
    """A list that shows itself as a table, and so do its slices; in all else it is a list like any other."""

    @overload
    def __getitem__(self, place: SupportsIndex) -> Entry: ...
    @overload
    def __getitem__(self, place: slice) -> "list[Entry]": ...
    def __getitem__(self, place: SupportsIndex | slice) -> Entry | list[Entry]:
        if isinstance(place, slice):
            part = copy(self)  # with whatever else the table needs
            part[:] = super().__getitem__(place)
            return part
        return super().__getitem__(place)
