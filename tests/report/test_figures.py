"""Figures show every site and point, follow the page, and keep names apart."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from page_by_hand import Page, frontier, sensitivities

from armour_surgery.records import Sensitivity
from armour_surgery.report.figures import frontier_figure, sensitivity_figure
from armour_surgery.report.style import inline_svg
from armour_surgery.spelled import short_names


def svg(figure: Figure) -> Page:
    return Page(inline_svg(figure, "a label"))


def test_a_figure_follows_the_page() -> None:
    text = inline_svg(sensitivity_figure(sensitivities(), "a title"), "a label")
    assert text.startswith("<svg ")
    assert 'aria-label="a label"' in text
    assert not re.search(r"(?<!, )#[0-9a-f]{6}", text), "a color that the page cannot change"
    for name in ("--ink", "--muted", "--rule", "--series-1", "--series-2"):
        assert f"var({name}, #" in text


def test_sensitivities_have_a_bar_for_each_site_and_mode_and_a_line_for_each_rank() -> None:
    figure = sensitivity_figure(sensitivities(4), "cost $of$ each")
    upper, lower = figure.axes
    for axes, name in ((upper, "loss"), (lower, "residual")):
        assert [len(bars) for bars in axes.containers] == [4, 4]
        wanted = [getattr(one, name) for one in sensitivities(4) if (one.mode, one.rank) == ("qk", None)]
        assert [patch.get_height() for patch in axes.containers[1]] == wanted
        [line] = axes.get_lines()
        assert list(line.get_ydata()) == [getattr(one, name) for one in sensitivities(4) if one.rank == 16]
    # From 0.001 to 0.027 is less than a factor of thirty, from 0.001 to 0.081 is more.
    assert (upper.get_yscale(), lower.get_yscale()) == ("linear", "linear")
    assert sensitivity_figure(sensitivities(5), "").axes[0].get_yscale() == "log"
    text = svg(figure).text
    for part in ("cost $of$ each", "blocks.*.attn", "qv, rank 16", "loss of the model", "error of the site's output"):
        assert part in text


def test_sites_that_were_not_tried_in_a_way_have_a_gap() -> None:
    some = [one for one in sensitivities(3) if (one.fqn, one.rank) != ("blocks.1.attn", 16)]
    [line] = sensitivity_figure(some, "").axes[0].get_lines()
    values = list(line.get_ydata())
    assert values[1] != values[1]
    assert values[::2] == [0.001, 0.001 * 9]


def test_what_cannot_be_told_from_nothing_has_no_bar_and_says_so() -> None:
    losses = (1e-9, -2e-9, 0.0, 9e-8, 2e-5, 0.004)
    some = [Sensitivity(f"b.{place}", "qv", None, 1, 10 * loss, loss) for place, loss in enumerate(losses)]
    figure = sensitivity_figure(some, "")
    upper, lower = figure.axes
    assert [text.get_text() for text in upper.texts] == ["no loss"] * 4
    assert [text.get_text() for text in lower.texts] == ["no error"] * 3
    assert [round(text.xy[0]) for text in upper.texts] == [0, 1, 2, 3]
    heights = [bar.get_height() for bar in upper.patches]
    assert heights[4:] == [2e-5, 0.004]
    assert all(height != height for height in heights[:4])
    # The axis is about what was lost, and its smallest bar can be seen.
    assert 1e-6 < upper.get_ylim()[0] < 2e-5
    nothing = sensitivity_figure([Sensitivity("b.0", "qv", None, 1, 0.0, 0.0)], "")
    nothing.draw_without_rendering()
    assert [text.get_text() for axes in nothing.axes for text in axes.texts] == ["no loss", "no error"]


@pytest.mark.parametrize("sites", [1, 12, 48])
def test_names_of_sites_do_not_overlap(sites: int) -> None:
    figure = sensitivity_figure(
        [Sensitivity(f"layers.{n // 6}.blocks.{n % 6}.attn", "qv", None, 1, 0.1, 0.1) for n in range(sites)], "t"
    )
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[1].get_xticklabels()]
    assert len(boxes) == sites
    assert all(a.x1 <= b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    bottom = figure.axes[1].xaxis.label.get_window_extent()
    assert all(box.y0 >= bottom.y1 for box in boxes)


def test_figures_of_nothing_and_of_values_that_have_no_place() -> None:
    svg(sensitivity_figure([], ""))
    svg(frontier_figure([], 5_000_000, None))
    odd = [
        Sensitivity("a.0", "qv", None, 1, float("nan"), 0.0),
        Sensitivity("a.1", "qv", None, 1, float("inf"), -1e-9),
        Sensitivity("a.2", "qv", None, 1, 0.2, 1e-5),
        Sensitivity("a.3", "qv", None, 1, 0.3, 0.5),
    ]
    svg(sensitivity_figure(odd, ""))


def test_the_frontier_shows_prediction_measurement_budget_and_choice() -> None:
    figure = frontier_figure(frontier(), 1_234_567, 0.05, frontier()[2])
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    predicted = lines["predicted: sum of the sites alone"]
    assert list(predicted.get_xdata()) == [1.234567, 1.2, 1.15, 1.111111]
    assert list(predicted.get_ydata()) == [0.0, 0.01, 0.03, 0.09]
    measured = lines["measured on held-out images"]
    assert list(measured.get_ydata()) == [0.0, 0.02, 0.06]
    assert set(lines["budget 0.05"].get_ydata()) == {0.05}
    chosen = lines["chosen: 1.150 M"]
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([1.15], [0.02])
    assert set(lines["the original"].get_xdata()) == {1.234567}
    untried = frontier_figure(frontier(), 1_234_567, 0.05, frontier()[1])
    [dot] = [line for line in untried.axes[0].get_lines() if line.get_label() == "chosen: 1.200 M"]
    assert list(dot.get_ydata()) == [0.01]
    assert "change, %" in svg(untried).text
    assert "chosen" not in svg(frontier_figure(frontier(), 1_234_567, None)).text


@pytest.mark.parametrize(
    ("fqns", "labels", "pattern"),
    [
        (["blocks.0.attn", "blocks.1.attn", "blocks.10.attn"], ["0", "1", "10"], "blocks.*.attn"),
        (["s.0.b.1.attn", "s.0.b.2.attn"], ["1", "2"], "s.0.b.*.attn"),
        (["s.0.b.0.a", "s.1.b.2.a"], ["0.0", "1.2"], "s.*.b.*.a"),
        (["enc.early.attn", "enc.late.attn"], ["early", "late"], "enc.*.attn"),
        (["enc.a.self.attn", "enc.b.attn"], ["a.self", "b"], "enc.*.attn"),
        (["one", "two"], ["one", "two"], "attention"),
        (["blocks.3.attn"], ["blocks.3.attn"], "attention"),
        ([], [], "attention"),
    ],
)
def test_short_names(fqns: list[str], labels: list[str], pattern: str) -> None:
    assert short_names(fqns) == (labels, pattern)


@given(st.lists(st.text("ab.01", min_size=1), unique=True, max_size=6))
def test_short_names_tell_names_apart(fqns: list[str]) -> None:
    labels, _ = short_names(fqns)
    assert len(set(labels)) == len(labels) == len(fqns)
