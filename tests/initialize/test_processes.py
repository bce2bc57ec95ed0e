"""Processes that calibrate together end with the weights that one process finds on all images."""

from pathlib import Path

import pytest
import torch
from processes import in_processes
from small_models import vit
from tiny_hosts import case
from torch import nn

from armour_surgery import convert, sensitivities
from armour_surgery.errors import CalibrationError, UsageError
from armour_surgery.initialize.processes import Processes
from armour_surgery.recover.distributed import Process
from armour_surgery.surgery.perform import surgery_of

GOALS = {
    "qv": {},
    "ranks and MLPs": {"params": "-20%", "mlp": True, "rank": "auto"},
    "steps": {"reconstruct": 3},
}


def _converted(goal: str, *, distributed: bool, batches: int = 12) -> nn.Module:
    images = torch.randn(8 * batches, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(8)
    return convert(vit(depth=2), init="calibrated", calibration=images, distributed=distributed, **GOALS[goal])


@pytest.mark.parametrize("goal", GOALS)
def test_two_processes_find_what_one_does(goal: str, tmp_path: Path) -> None:
    def work(process: Process) -> None:
        converted = _converted(goal, distributed=True)
        torch.save((converted.state_dict(), surgery_of(converted).fidelity), tmp_path / f"{process.rank}.pt")

    in_processes(work)
    converted = _converted(goal, distributed=False)
    (first, fidelity), (second, other) = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert fidelity == other
    for name, tensor in converted.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        assert float((first[name] - tensor).abs().max()) < 1e-6, name


def test_a_site_s_cost_is_measured_by_one_of_them_and_known_to_all(tmp_path: Path) -> None:
    host = case("levit")
    images = torch.randn(96, 3, 96, 96, generator=torch.Generator().manual_seed(0)).split(8)

    def measured(distributed: bool) -> list[tuple[str, str, float]]:
        found = sensitivities(host.build(), calibration=images, example_input=host.example(), distributed=distributed)
        return [(one.fqn, one.mode, one.loss) for one in found]

    in_processes(lambda process: torch.save(measured(True), tmp_path / f"{process.rank}.pt"))
    first, second = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert first == second
    for (fqn, mode, loss), (other, as_mode, alone) in zip(first, measured(False), strict=True):
        assert (fqn, mode) == (other, as_mode)
        assert loss == pytest.approx(alone, rel=1e-3, abs=1e-7)


def test_each_process_needs_a_batch() -> None:
    def work(_: Process) -> None:
        with pytest.raises(CalibrationError, match="2 batches for 3 processes"):
            _converted("qv", distributed=True, batches=2)

    in_processes(work, world=3)


def test_one_that_saw_nothing_adds_nothing() -> None:
    def work(process: Process) -> None:
        with Processes.together(True) as processes:
            mine = (
                torch.full((2, 3), 2.0, dtype=torch.float64) if process.rank else torch.zeros((), dtype=torch.float64)
            )
            assert torch.equal(processes.sum(mine), torch.full((2, 3), 2.0, dtype=torch.float64))
            assert processes.union({str(process.rank): 1.0}) == {"0": 1.0, "1": 1.0}
            assert processes.first(process.rank) == 0

    in_processes(work)


def test_without_a_group_there_is_nobody_to_share_with() -> None:
    with pytest.raises(UsageError, match="no process group; call torch.distributed.init_process_group"):
        _converted("qv", distributed=True)


@pytest.mark.parametrize("given", [{"distributed": True}, {"device": "cpu"}])
def test_they_are_for_images(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(given))} says where images are run, and init 'wq' runs none"):
        convert(vit(depth=1), "qv", **given)  # type: ignore[arg-type]


def test_a_device_that_is_not_here() -> None:
    with pytest.raises(UsageError, match="device 'tpu' cannot be used here"):
        convert(vit(depth=1), "qv", init="calibrated", device="tpu")
