"""A table fits a screen whatever is in it, and a notebook shows all of it, escaped."""

import json
import pickle
from copy import copy, deepcopy
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armour_surgery.tabular import Listing, Table

WORDS = st.text("ab. \u00fc<&", max_size=200)


class Numbers(Listing[int]):
    def table(self) -> Table:
        return Table("numbers", ("n",), [(str(number),) for number in self], frozenset((0,)))


def test_rows_stand_below_their_headers() -> None:
    table = Table("caption", ("name", "count"), [("a", "1"), ("bcd", "1,000")], frozenset((1,)), ("a note",))
    assert table.text().splitlines() == [
        "caption",
        "name  count",
        "----  -----",
        "a         1",
        "bcd   1,000",
        "a note",
    ]


def test_long_names_lose_their_middle_lists_wrap_and_numbers_stay_whole() -> None:
    row = ("encoder.layers.0." + "x" * 90 + ".self_attn", "qv, qk, " * 20, "123,456,789.00")
    text = Table("", ("attention", "modes", "parameters"), [row], frozenset((2,))).text()
    assert all(len(line) <= 79 for line in text.splitlines())
    assert "123,456,789.00" in text
    assert "\u2026" in text
    assert text.count("qv,") == 20


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 18, 500])
def test_many_rows_are_counted(rows: int) -> None:
    text = Table("caption", ("n",), [(str(number),) for number in range(rows)], frozenset((0,))).text()
    lines = text.splitlines()
    assert len(lines) <= 20
    if rows > 17:
        shown = len(lines) - 4
        assert lines[-1] == f"... {rows - shown} more rows"
    elif rows:
        assert lines[-1].strip() == str(rows - 1)


def test_remarks_leave_room_for_rows() -> None:
    notes = tuple(f"note {number} " + "word " * 40 for number in range(30))
    lines = Table("caption", ("n",), [("1",)] * 30, frozenset(), notes).text().splitlines()
    assert len(lines) == 20
    assert sum(line == "1" for line in lines) == 12
    assert lines[-1].startswith("... ")
    assert lines[-1].endswith(" more remarks")


@given(st.lists(st.tuples(WORDS, WORDS, st.integers().map(str)), max_size=40), st.lists(WORDS, max_size=30), WORDS)
def test_any_text_fits(rows: list[tuple[str, ...]], notes: list[str], caption: str) -> None:
    table = Table(caption[:70], ("one", "two", "n"), rows, frozenset((2,)), tuple(notes))
    lines = table.text().splitlines()
    assert len(lines) <= 20
    assert all(len(line) <= 79 or max(len(row[2]) for row in rows) > 50 for line in lines)


def test_html_is_escaped_whole_and_has_no_color_of_its_own() -> None:
    class Reader(HTMLParser):
        open: list[str] = []
        text = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag in ("div", "table", "thead", "tbody", "tr", "th", "td")
            self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

        def handle_data(self, data: str) -> None:
            self.text += data

    evil = "<script>alert('1')</script>&\""
    html = Table(evil, (evil,), [(evil,)] * 50, frozenset(), (evil,)).html()
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert reader.text.count(evil) == 53
    assert "<script" not in html
    # Text has the notebook's color, dark or light, and lines are gray.
    colors = [part.split(";")[0] for part in html.split("color:")[1:]]
    assert set(colors) == {"inherit"}
    assert "#" not in html.replace("&#", "")
    assert "overflow-x:auto" in html


def test_a_listing_is_a_list() -> None:
    listing = Numbers([3, 1, 2])
    assert isinstance(listing, list)
    assert listing == [3, 1, 2]
    assert json.dumps(listing) == "[3, 1, 2]"
    for same in (pickle.loads(pickle.dumps(listing)), copy(listing), deepcopy(listing)):
        assert (type(same), same) == (Numbers, listing)
    assert (listing[0], listing[-1], len(listing), sorted(listing)) == (3, 2, 3, [1, 2, 3])
    assert (type(listing[1:]), listing[1:]) == (Numbers, [1, 2])
    assert listing == Numbers([3, 1, 2])
    listing.append(4)
    assert repr(listing).splitlines()[-1].strip() == "4"
    assert repr(Numbers()) == "numbers"
    assert "<td" in listing._repr_html_()
