"""Loss and accuracy are drawn on axes of their own, and begin where training began."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from armour_surgery.recover.curves import curves_figure
from armour_surgery.recover.log import draw_curves

STEPS = [{"step": step, "loss": 1.0 / step} for step in range(1, 9)]
EPOCHS: list[dict[str, Any]] = [
    {"epoch": 1, "step": 4, "loss": 0.5},
    {"epoch": 2, "step": 8, "loss": 0.2, "top1": 80.0, "ema_top1": 75.0, "cosine": 0.97, "agreement": 90.0},
]
START = {"top1": 60.0, "top5": 90.0, "cosine": 0.9, "agreement": 70.0}


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    drawn = {}
    for line in axes.get_lines():
        drawn[str(line.get_label())] = [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
    return drawn


def test_every_unit_has_axes_of_its_own() -> None:
    loss, accuracy, cosine = curves_figure(STEPS, EPOCHS, START).axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, cosine)] == [
        "training loss",
        "held-out images, %",
        "cosine to the teacher",
    ]
    assert lines(loss)["of a step"] == [(line["step"], line["loss"]) for line in STEPS]
    assert lines(loss)["mean of an epoch"] == [(4, 0.5), (8, 0.2)]
    drawn = lines(accuracy)
    assert drawn["top-1"] == [(0, 60.0), (8, 80.0)]
    assert drawn["top-1, moving average"] == [(0, 60.0), (8, 75.0)]
    assert drawn["same first choice as the teacher"] == [(0, 70.0), (8, 90.0)]
    assert lines(cosine)["cosine"] == [(0, 0.9), (8, 0.97)]
    assert [text.get_text() for text in accuracy.texts] == ["start 60", "start 70"]


@pytest.mark.parametrize(
    ("start", "epochs", "panels"),
    [({}, EPOCHS[1:], 3), ({}, EPOCHS[:1], 1), ({"top1": 50.0}, EPOCHS[:1], 2), ({}, [], 1)],
)
def test_what_was_not_measured_is_not_drawn(start: dict[str, float], epochs: list[dict[str, Any]], panels: int) -> None:
    figure = curves_figure(STEPS, epochs, start)
    figure.draw_without_rendering()
    assert len(figure.axes) == panels
    assert sum(len(axes.texts) for axes in figure.axes) == len(start)


def test_without_a_step_there_is_no_picture(tmp_path: Path) -> None:
    assert draw_curves(tmp_path, [], {}) is None
