"""What is written about a benchmark shows every model and every comparison once."""

from dataclasses import replace

import pytest
from quick_benchmarks import Spy, quick

from armour_surgery.benchmarking.figure import speed_figure
from armour_surgery.benchmarking.files import markdown

pytestmark = pytest.mark.usefixtures("short_turns")


def test_the_figure_has_a_dot_and_an_interval_for_each_model_and_batch() -> None:
    first = quick({"a$": Spy(), "b" * 60: Spy(), "c": Spy()}, example_input=(2, 3, 5, 8))
    pair = replace(first.batches[-1].pairs[0], speedup=1.25, speedup_interval=(1.2, 1.3))
    last = replace(first.batches[-1], pairs=(pair, first.batches[-1].pairs[1]))
    figure = speed_figure(replace(first, batches=(first.batches[0], last)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert [label.split("\n")[0] for label in labels] == ["b" * 16 + "\u2026" + "b" * 17, "c", "a copy of itself"]
    assert r"as fast as a\$" in axes.get_xlabel()
    drawn = [line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xydata())]  # type: ignore[union-attr, arg-type]
    dots = [points for points in drawn if len(points) == 1]
    assert len(dots) == 3 * 2
    [[(low, height), (high, same)]] = [points for points in drawn if len(points) == 2 and points[0][0] == 1.2]
    assert (high, same) == (1.3, height)
    assert [[1.25, height]] in dots
    assert "1.250  (1.200 to 1.300)" in [text.get_text() for text in axes.texts]
    # Without an interval a dot is empty.
    empty = [line for line in axes.get_lines() if line.get_markerfacecolor() == "none"]
    assert len(empty) == 5


def test_the_figure_of_one_model_shows_its_noise() -> None:
    (axes,) = speed_figure(quick({"a": Spy()}, example_input=(2, 3, 5, 8))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a copy of itself\n(noise)"]


def test_markdown_of_several_benchmarks_has_one_table_of_pairs() -> None:
    found = [quick({"a|b": Spy()}, example_input=(2, 3, 5, 8), dtype=dtype) for dtype in ("fp32", "bf16")]
    text = markdown(found)
    assert text.count("| comparison |") == 1
    assert "| a\\|b again over a\\|b | bf16, eager | 3 |" in text
