"""Intervals keep their promise: two runs agree as often as they say."""

from typing import Any

import pytest
import torch

from armour_surgery.benchmarking import intervals
from armour_surgery.benchmarking.intervals import FASTER, NO_DIFFERENCE, SLOWER, TOO_FEW, median_interval, verdict


def ratios(rounds: int, generator: torch.Generator) -> list[float]:
    """Around a true 1.07: rounds that are alike for a while, a drift, and one in eight hit by somebody else's work."""
    steps = torch.randn(rounds, generator=generator)
    logs = [float(steps[0])]
    for step in steps[1:].tolist():
        logs.append(0.8 * logs[-1] + 0.6 * step)
    hits = (torch.rand(rounds, generator=generator) < 0.125) * torch.randn(rounds, generator=generator)
    drift = torch.linspace(-0.01, 0.01, rounds)
    found = 0.015 * torch.tensor(logs) + 0.02 * torch.randn(rounds, generator=generator) + 0.3 * hits + drift
    return (1.07 * found.exp()).tolist()


def kept_promises(rounds: int) -> tuple[float, float, float]:
    """Of 100 pairs of runs: how often an interval holds the truth, two overlap, and one holds the other's median."""
    generator = torch.Generator().manual_seed(7)
    true = overlap = inside = 0.0
    for _ in range(100):
        runs = [ratios(rounds, generator) for _ in range(2)]
        (low, high), (other_low, other_high) = ends = [median_interval(run) or (0.0, 0.0) for run in runs]
        medians = [float(torch.tensor(run).quantile(0.5)) for run in runs]
        true += sum(a <= 1.07 <= b for a, b in ends) / 2
        overlap += low <= other_high and other_low <= high
        inside += (low <= medians[1] <= high) / 2 + (other_low <= medians[0] <= other_high) / 2
    return true / 100, overlap / 100, inside / 100


@pytest.mark.parametrize("rounds", [40, 100])
def test_two_runs_agree_nine_times_out_of_ten(rounds: int) -> None:
    true, overlap, inside = kept_promises(rounds)
    assert true >= 0.96
    assert overlap >= 0.98
    assert inside >= 0.9


def test_rounds_taken_for_independent_would_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_BLOCKS", 30)
    assert kept_promises(60)[2] < 0.9


def test_an_interval_depends_on_the_ratios_alone() -> None:
    found = ratios(60, torch.Generator().manual_seed(1))
    low, high = median_interval(found) or (0.0, 0.0)
    assert median_interval(found) == (low, high)
    assert low < float(torch.tensor(found).quantile(0.5)) < high
    assert median_interval([1 / ratio for ratio in found]) == pytest.approx((1 / high, 1 / low))
    assert median_interval([1.5] * 12) == pytest.approx((1.5, 1.5))
    assert median_interval([1.5] * 10) is None


def test_the_quantile_of_student() -> None:
    # From the table in every textbook, at 99.5 %.
    for freedom, value in ((5, 4.032), (7, 3.499), (10, 3.169), (30, 2.750)):
        assert intervals._student(0.995, freedom) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("speedup", "interval", "noise", "said"),
    [
        (1.07, (1.05, 1.09), (0.99, 1.01), FASTER),
        (0.93, (0.91, 0.95), (0.99, 1.01), SLOWER),
        (1.07, (0.99, 1.16), (0.99, 1.01), NO_DIFFERENCE),
        (1.07, (1.05, 1.09), (0.99, 1.08), NO_DIFFERENCE),
        (1.07, (1.05, 1.09), (0.92, 1.01), NO_DIFFERENCE),
        (0.93, (0.91, 0.95), (0.99, 1.08), NO_DIFFERENCE),
        (1.07, None, (0.99, 1.01), TOO_FEW),
        (1.07, (1.05, 1.09), None, TOO_FEW),
    ],
)
def test_a_difference_inside_the_noise_is_not_called(speedup: float, interval: Any, noise: Any, said: str) -> None:
    assert verdict(speedup, interval, noise) == said
