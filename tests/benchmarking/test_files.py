"""What is written about a benchmark shows every model and every comparison once."""

import pytest
from quick_benchmarks import Spy, quick

from armour_surgery.benchmarking.figure import speed_figure
from armour_surgery.benchmarking.files import markdown

pytestmark = pytest.mark.usefixtures("short_turns")


def test_the_figure_has_a_dot_for_each_model() -> None:
    figure = speed_figure(["a$", "b"], [2_000_000, 1_000_000], [100.0, 110.0], [None, (105.0, 115.0)], "where")
    (axes,) = figure.axes
    lines = [line.get_xydata().tolist() for line in axes.get_lines()]  # type: ignore[union-attr]
    assert lines == [[[2.0, 100.0]], [[1.0, 105.0], [1.0, 115.0]], [[1.0, 110.0]]]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 115


def test_markdown_of_several_benchmarks_has_one_table_of_pairs() -> None:
    found = [quick({"a|b": Spy()}, example_input=(2, 3, 5, 8), dtype=dtype) for dtype in ("fp32", "bf16")]
    text = markdown(found)
    assert text.count("| comparison |") == 1
    assert "| a\\|b again over a\\|b | bf16, eager | 3 |" in text
