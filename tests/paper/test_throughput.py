"""The paper's throughput again, on small networks: who is timed against whom, and for how long."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from small_paper import SMALL
from torch import nn

from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts import build
from armour_surgery.paper import reproduction, throughput
from armour_surgery.paper.reproduction import Cell, Reproduction, regenerate
from armour_surgery.paper.throughput import RowSpeed, devices, time_group
from armour_surgery.records import Source


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "ROWS", SMALL)


def test_every_row_is_timed_with_what_it_is_held_against(timed: Reproduction) -> None:
    speeds = {row.name: row.speed["cpu"] for row in timed.rows}
    assert {name: speed.against for name, speed in speeds.items()} == {
        **dict.fromkeys(("A", "A base", "Else"), "test_vit"),
        **dict.fromkeys(("B", "B base"), "test_vit2"),
    }
    for name, speed in speeds.items():
        assert speed.images_per_s == pytest.approx(1000 * speed.batch_size / speed.latency_ms)
        assert speed.rounds >= 2
        assert speed.rounds % 2 == 0
        if name.endswith("base"):
            assert speed.ratio is speed.ratio_iqr is None
        else:
            assert speed.ratio is not None
            assert speed.ratio_iqr is not None
            assert 0 < speed.ratio_iqr[0] <= speed.ratio <= speed.ratio_iqr[1]
    # Rows of one group saw the same rounds.
    assert speeds["A"].rounds == speeds["A base"].rounds == speeds["Else"].rounds
    # The machine's load is another one by now.
    assert {name: replace(here, load=None) for name, here in timed.environments.items()} == {
        "cpu": replace(environment("cpu"), load=None)
    }


def test_what_was_measured_stands_in_the_papers_cell(timed: Reproduction) -> None:
    first = timed.rows[0]
    cells = {cell.column: cell for cell in first.cells}
    assert cells["cpu"] == Cell("cpu", "12.0", f"{first.speed['cpu'].images_per_s:,.1f}", "measured")
    assert (cells["gpu"].ours, cells["gpu"].status) == ("not run", "paper")  # no CPU's number goes there
    assert (cells["top1"].ours, cells["top1"].status) == ("not run", "paper")
    assert first.paper_ratio == pytest.approx({"gpu": 1.1, "cpu": 1.2})
    assert first.macs_ratio is not None
    assert first.macs_ratio > 1
    data = timed.to_dict()
    assert data["environment"]["cpu"]["threads"] == torch.get_num_threads()
    row = data["tables"][0]["rows"][0]
    assert {"batch_size", "images_per_s", "latency_ms", "against", "ratio", "ratio_iqr", "rounds"} == set(
        row["speed"]["cpu"]
    )


class Noted(Exception):
    """Ends a comparison once its arguments are known."""


@pytest.mark.parametrize(("macs", "batch"), [(10**6, 16), (10**9, 16), (1_100_000_000, 8), (5 * 10**9, 2), (10**12, 1)])
def test_large_networks_get_small_batches(macs: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def compare(models: Any, make_input: Any, **options: Any) -> None:
        seen.update(names=list(models), shape=make_input().shape, **options)
        raise Noted

    monkeypatch.setattr(throughput, "compare", compare)
    networks = {("a", ""): nn.Linear(2, 2), ("a", "qv"): nn.Linear(2, 2)}
    with pytest.raises(Noted):
        time_group(networks, (3, 5, 7), macs, "cpu", 100.0)
    assert seen["names"] == ["a", "a qv"]
    assert tuple(seen["shape"]) == (batch, 3, 5, 7)
    # Warming up and the rounds have less than the whole.
    assert len(networks) * seen["warmup_s"] + seen["budget_s"] == pytest.approx(95.0)


def test_time_is_shared_by_networks_and_what_is_left_goes_on(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[tuple[str, float]] = []

    def instead(networks: Any, image: Any, macs: int, device: str, budget_s: float) -> tuple[dict[Any, Any], Any]:
        shares.append((device, budget_s))
        speed = RowSpeed(16, 10.0, 1600.0, "x", None, None, 2)
        return dict.fromkeys(networks, speed), environment("cpu")

    monkeypatch.setattr(reproduction, "time_group", instead)
    monkeypatch.setattr(reproduction, "_build", lambda *_: (nn.Identity(), reproduction._Cost(1, 1, 1)))
    monkeypatch.setattr(reproduction, "_image", lambda _: (3, 8, 8))
    regenerate(budget_s=100.0, devices=("cpu", "cuda"))
    # Five networks, three of them first, on two devices; no time passes.
    assert [device for device, _ in shares] == ["cpu", "cuda"] * 2
    wanted = [100 * 3 / 10, 100 * 3 / 7, 100 * 2 / 4, 100 * 2 / 2]
    assert [share for _, share in shares] == pytest.approx(wanted, rel=0.01)


def test_networks_without_weights_get_some() -> None:
    model = build(Source("timm", "test_vit"))
    networks = {("test_vit", ""): model}
    found, _ = time_group(networks, (3, 160, 160), 10**7, "cpu", 0.1)
    assert found["test_vit", ""].images_per_s > 0
    assert not any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert bool(model(torch.randn(1, 3, 160, 160)).isfinite().all())


def test_the_cpu_is_always_timed() -> None:
    assert devices()[0] == "cpu"
    assert ("cuda" in devices()) is torch.cuda.is_available()
