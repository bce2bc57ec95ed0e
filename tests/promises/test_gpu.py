"""On a GPU a calibration finds what it finds on the CPU, and leaves the model where it was; skipped where none is."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import document
from processes import in_torchrun
from small_models import VIT, surgery_of, vit
from timm.models import save_for_hf
from torch import Tensor, nn

from armour_surgery import benchmark, convert, load, sensitivities

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")

GOALS: dict[str, dict[str, Any]] = {
    "qv": {"mode": "qv"},
    "kv": {"mode": "kv"},
    "fixed gauge": {"mode": "qv", "gauge": "fixed"},
    "ranks and MLPs": {"mode": "auto", "params": "-20%", "mlp": True, "rank": "auto"},
    "steps": {"mode": "qv", "reconstruct": 3},
}
CALIBRATED = ("--init", "calibrated", "--calib", "synthetic", "--calib-images", "64")


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """The patches' convolution computes as a CPU does: by default it may round to TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's folder, to name on a command line in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    save_for_hf(vit(), "model", model_args=dict(VIT), safe_serialization=True)
    return str(tmp_path / "model")


def images(count: int = 96) -> list[Tensor]:
    """Batches of noise."""
    return list(torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(8))


def calibrated(model: nn.Module, goal: str, **more: Any) -> nn.Module:
    return convert(model, init="calibrated", calibration=images(), **GOALS[goal], **more).eval()


def devices_of(model: nn.Module) -> set[str]:
    """The kinds of devices on which a model's tensors are."""
    return {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Of the outputs on the CPU, relative to the largest."""
    batch = images(16)[0]
    wanted = one.cpu()(batch)
    return float((other.cpu()(batch) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_gpu_finds_what_the_cpu_does(goal: str, home: str) -> None:
    wanted = calibrated(vit(), goal, device="cpu")
    converted = calibrated(vit().to(home), goal, device="cuda")
    assert devices_of(converted) == {home}
    assert surgery_of(converted).mode == surgery_of(wanted).mode
    assert surgery_of(converted).params_after == surgery_of(wanted).params_after
    assert largest_difference(wanted, converted) < 1e-3


def test_half_precision_at_home_is_calibrated_in_single_precision() -> None:
    model = vit().to(torch.bfloat16)
    converted = calibrated(copy.deepcopy(model), "ranks and MLPs", device="cuda")
    assert devices_of(converted) == {"cpu"}
    assert {tensor.dtype for tensor in converted.parameters()} == {torch.bfloat16}
    wanted = calibrated(model, "ranks and MLPs", device="cpu")
    assert largest_difference(wanted.float(), converted.float()) < 0.05


def test_sites_cost_what_they_cost_on_the_cpu() -> None:
    found, wanted = [
        {(one.fqn, one.mode): one.loss for one in sensitivities(vit(), calibration=images(), mlp=True, device=device)}
        for device in ("cuda", "cpu")
    ]
    assert found == pytest.approx(wanted, rel=0.02, abs=1e-6)


def test_the_command_line_runs_images_on_the_gpu(saved: str, tmp_path: Path) -> None:
    on_gpu = document("convert", saved, *CALIBRATED, "--device", "cuda", "--out", "cuda")
    on_cpu = document("convert", saved, *CALIBRATED, "--device", "cpu", "--out", "cpu")
    assert on_gpu["fidelity"]["cosine"] == pytest.approx(on_cpu["fidelity"]["cosine"], abs=1e-3)
    assert largest_difference(load("cpu"), load("cuda")) < 1e-3
    costs = document("inspect", saved, "--calib", "synthetic", "--device", "cuda")["sensitivities"]
    assert [one["loss"] > 0 for one in costs if one["mode"] == "qv"] == [True] * 3


def test_two_processes_on_one_gpu_find_what_one_does(saved: str) -> None:
    """Moments are summed on the CPU, so that processes may share a GPU, which NCCL forbids."""
    document("convert", saved, *CALIBRATED, "--device", "cuda", "--out", "one")
    in_torchrun("convert", saved, *CALIBRATED, "--device", "cuda:0", "--out", "two")
    two, one = load("two").state_dict(), load("one").state_dict()
    for name, tensor in one.items():
        assert float((two[name] - tensor).abs().max()) < 1e-5, name


def test_the_recipe_recover_trains_there(saved: str) -> None:
    document("convert", saved, *CALIBRATED, "--mlp", "--params", "-20%", "--device", "cuda", "--out", "small")
    settings = []
    for setting in ("schedule.epochs=2", "data.images_per_epoch=64", "data.holdout=16", "run.device=cuda"):
        settings += ["--set", setting]
    told = document("finetune", "small", "--recipe", "recover", "--out", "tuned", *settings)
    assert told["steps"] == 16
    assert all(bool(tensor.isfinite().all()) for tensor in load("tuned").parameters())


@pytest.mark.parametrize("runtime", ["torch", "compile"])
def test_benchmarks_take_turns_there(runtime: str) -> None:
    models = {"original": vit(), "converted": convert(vit(), "qv")}
    found = benchmark(models, batch_sizes=(4,), device="cuda", dtype="bf16", runtime=runtime, budget_s=0.5)
    assert found.largest.pairs[0].speedup > 0
    assert all(model.images_per_s > 0 for model in found.largest.models)
