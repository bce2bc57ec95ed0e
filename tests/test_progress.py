"""`progress=True` shows a bar and takes it away again; a function is called; nothing is silent."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from small_models import refused, vit

from armour_surgery import benchmark, convert, redundancy, sensitivities
from armour_surgery.errors import UsageError
from armour_surgery.progress import told

pytestmark = pytest.mark.usefixtures("short_turns")

Work = Callable[..., Any]
WORK: dict[str, Work] = {
    "convert": lambda **given: convert(vit(depth=1), init="calibrated", calibration_images=8, **given),
    "convert within a budget": lambda **given: convert(
        vit(depth=1), init="calibrated", calibration_images=8, max_loss=0.5, **given
    ),
    "sensitivities": lambda **given: sensitivities(vit(depth=1), calibration_images=8, **given),
    "redundancy": lambda **given: redundancy(vit(depth=1), **given),
    "benchmark": lambda **given: benchmark({"a": vit(depth=1)}, batch_sizes=(2,), rounds=2, budget_s=0.1, **given),
}
STAGES = {
    "convert": "calibrating",
    "convert within a budget": "measuring sites",
    "sensitivities": "measuring sites",
    "redundancy": "finding the best shared weights",
    "benchmark": "timing, batch 2",
}


@pytest.mark.parametrize("name", WORK)
def test_true_shows_a_bar_and_none_shows_nothing(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = threading.active_count()
    WORK[name](progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{STAGES[name]}: " in shown.err
    assert "it/s" in shown.err or "?it" in shown.err
    # What is left of a bar is an empty line.
    assert shown.err.rsplit("\r", 1)[-1].strip() == ""
    assert threading.active_count() == threads  # nothing redraws it while a model is timed
    for silent in (None, False):
        WORK[name](progress=silent)
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", WORK)
def test_a_function_is_called_as_before(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int, int]] = []
    WORK[name](progress=lambda what, done, total: calls.append((what, done, total)))
    assert STAGES[name] in {what for what, _, _ in calls}
    assert all(0 <= done <= total for _, done, total in calls)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("given", ["yes", 3, 1])
def test_anything_else_is_refused(name: str, given: Any) -> None:
    assert f"progress is {given!r}; pass True" in refused(UsageError, lambda: WORK[name](progress=given))


def test_the_bar_goes_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with told(True) as tell:
            assert tell is not None
            tell("first", 1, 3)
            tell("second", 0, 2)
            tell("second", 2, 2)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fails()
    shown = capsys.readouterr().err
    assert "first" in shown
    assert shown.rsplit("\r", 1)[-1].strip() == ""
