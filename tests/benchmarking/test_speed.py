"""Models take turns so that neither drift nor order favors one, and medians and ratios follow from the times."""

import json
from functools import partial

import pytest
import timm
import torch
from torch import Tensor

from armour_surgery.benchmarking.speed import compare
from armour_surgery.errors import UsageError

pytestmark = pytest.mark.usefixtures("short_turns")

# In whose turn


def test_each_model_follows_every_other_and_itself_as_often() -> None:
    log: list[str] = []
    clock = [0.0]

    def model(name: str, _: Tensor) -> None:
        clock[0] += 1
        log.append(name)

    shares: list[float] = []
    compare(
        {name: partial(model, name) for name in "abc"},
        lambda: torch.zeros(1, 1),
        rounds=60,
        budget_s=10**6,
        clock=lambda: clock[0],
        before_block=shares.append,
    )
    timed = "".join(log[-180:])
    follows = [first + second for first, second in zip(timed, timed[1:], strict=False)]
    assert all(9 <= follows.count(name * 2) <= 10 for name in "abc")
    assert all(19 <= follows.count(pair) <= 30 for pair in ("ab", "ba", "bc", "cb", "ca", "ac"))
    assert {name: timed[::3].count(name) for name in "abc"} == dict.fromkeys("abc", 20)
    assert shares[0] == 0
    assert 14 <= len(shares) <= 16


def test_a_fast_model_is_called_until_its_turn_is_over() -> None:
    clock, calls = [0.0], []

    def model(_: Tensor) -> None:
        clock[0] += 0.0004 * (1 + len(calls) % 5 // 4)
        calls.append(1)

    report = compare({"a": model, "b": model}, lambda: torch.zeros(2, 1), rounds=4, clock=lambda: clock[0])
    assert len(calls) - report.warmup_calls == 4 * 2 * 5
    # The slow call of a turn moves the percentile, and neither median.
    assert report.models[0].latency_ms == pytest.approx(0.4)
    assert report.models[0].p90_ms == pytest.approx(0.8)
    assert report.pairs[0].speedup == pytest.approx(1)


def test_there_must_be_time() -> None:
    with pytest.raises(UsageError, match="more than 0 seconds, and it is 0"):
        compare({"a": print}, lambda: torch.zeros(1), budget_s=0)


def batch_of_one() -> Tensor:
    return torch.zeros(1, 1)


class Clock:
    """Time that passes only when a model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float, log: list[str] | None = None, name: str = ""):
        calls = iter(range(10**9))

        def model(_: Tensor) -> None:
            self.now += seconds[min(next(calls), len(seconds) - 1)]
            if log is not None:
                log.append(name)

        return model


# What a report says


def test_models_take_turns_and_the_order_alternates() -> None:
    clock, log = Clock(), []
    models = {name: clock.takes(1.0, log=log, name=name) for name in "ab"}
    report = compare(models, lambda: torch.zeros(8, 1), rounds=4, clock=clock)
    assert "".join(log[-8:]) == "abbabaab"
    assert log[:-8] == ["a"] * 4 + ["b"] * 4
    assert (report.warmup_calls, report.rounds) == (8, 4)


def test_medians_ratios_and_quartiles() -> None:
    clock = Clock()
    # Four calls of each are warm-up.
    models = {"a": clock.takes(4, 4, 4, 4, 4, 4, 6, 8), "b": clock.takes(2, 2, 2, 2, 4, 2, 2, 2)}
    report = compare(models, lambda: torch.zeros(8, 1), rounds=4, clock=clock)
    a, b = report.models
    assert (a.latency_ms, b.latency_ms) == (5000.0, 2000.0)
    assert b.images_per_s == 4.0
    (pair,) = report.pairs
    assert (pair.a, pair.b, pair.rounds) == ("a", "b", 4)
    assert pair.speedup == 2.5  # of 1, 2, 3, 4
    assert pair.speedup_iqr == (1.75, 3.25)
    assert report.times == {"a": [4, 4, 6, 8], "b": [4, 2, 2, 2]}
    assert report.pair("b", "a").speedup == pytest.approx((1 / 2 + 1 / 3) / 2)
    data = json.loads(json.dumps(report.to_dict()))
    contract = {"a": "a", "b": "b", "speedup": 2.5, "speedup_iqr": [1.75, 3.25], "rounds": 4}
    assert data["pairs"] == [{**contract, "speedup_interval": None}]
    assert data["environment"]["threads"] == torch.get_num_threads()
    assert data["environment"]["torch"] == torch.__version__
    assert data["environment"]["timm"] == timm.__version__
    assert data["environment"]["device"] == "cpu"
    assert data["environment"]["processor"]


def test_drift_does_not_favor_whoever_goes_first() -> None:
    clock = Clock()

    def slowing(_: Tensor) -> None:
        clock.now += 1 + clock.now / 1000

    report = compare({"a": slowing, "b": slowing}, batch_of_one, rounds=20, clock=clock)
    assert report.pairs[0].speedup == pytest.approx(1.0, abs=1e-4)
    assert report.pairs[0].speedup_iqr[1] > 1.0005


def test_warm_up_waits_until_steady_and_no_longer_than_it_may() -> None:
    clock = Clock()
    settling = compare({"a": clock.takes(60, 3, 2, 1)}, batch_of_one, rounds=2, warmup_s=100, clock=clock)
    assert settling.warmup_calls == 6
    restless = [1.0, 2.0] * 50
    by_count = compare({"a": clock.takes(*restless)}, batch_of_one, rounds=2, max_warmup=7, clock=clock)
    assert by_count.warmup_calls == 7
    by_time = compare({"a": clock.takes(60.0, *restless)}, batch_of_one, rounds=2, warmup_s=5, clock=clock)
    assert by_time.warmup_calls == 5


def test_the_budget_ends_after_a_complete_pair_of_rounds() -> None:
    clock = Clock()
    models = {name: clock.takes(1.0) for name in "abc"}
    report = compare(models, batch_of_one, rounds=100, budget_s=7.0, clock=clock)
    assert report.rounds == 4
    assert [(pair.a, pair.b) for pair in report.pairs] == [("a", "b"), ("a", "c")]


def test_models_run_in_inference_mode_on_one_input_a_round() -> None:
    seen: list[tuple[bool, int]] = []

    def model(x: Tensor) -> None:
        seen.append((torch.is_inference_mode_enabled(), int(x[0])))

    numbers = iter(range(100))
    compare({"a": model, "b": model}, lambda: torch.tensor([next(numbers)]), rounds=2, max_warmup=1)
    assert all(inference for inference, _ in seen)
    assert sorted({number for _, number in seen}) == [0, 1, 2]
    assert [number for _, number in seen] == sorted(number for _, number in seen)


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_must_be_even_and_models_must_be_given(rounds: int) -> None:
    with pytest.raises(UsageError, match="even"):
        compare({"a": lambda _: None}, batch_of_one, rounds=rounds)
    with pytest.raises(UsageError, match="no model"):
        compare({}, batch_of_one)
