"""Throughput of the paper's networks on this machine: each in the same rounds as the one it is held against."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from armour_surgery.benchmarking.environment import Environment
from armour_surgery.benchmarking.speed import compare

__all__ = ["Network", "RowSpeed", "devices", "time_group"]

Network = tuple[str, str]  # model and mode, "" where nothing is converted

# What one call may cost on a CPU, in multiply-accumulates: a third of a second or so on two cores.
_CALL_MACS = 16e9
_LARGEST = {"cpu": 16, "cuda": 256}
_ROUNDS = 100
# Of a group's time, what each of its networks may take to warm up, and what the rounds have together.
_WARMUP, _TIMING = 0.2, 0.75
_LEAST = 1e-3


@dataclass(frozen=True)
class RowSpeed:
    """One network, timed in eager mode, float32, BatchNorm not folded, random weights.

    `images_per_s` and `latency_ms` are medians over the rounds. `ratio` is how many times faster it was than `against`
    in the same round: the median over the `rounds`, with its quartiles; None for the network that others are held
    against.
    """

    batch_size: int
    images_per_s: float
    latency_ms: float
    against: str
    ratio: float | None
    ratio_iqr: tuple[float, float] | None
    rounds: int


def devices() -> tuple[str, ...]:
    """The CPU always, and CUDA where it is there."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def time_group(
    networks: Mapping[Network, nn.Module], image: tuple[int, ...], macs: int, device: str, budget_s: float
) -> tuple[dict[Network, RowSpeed], Environment]:
    """Time networks against the first of them, in turns, for about `budget_s` seconds (two rounds at least).

    `image` is the shape of one, and `macs` what one costs the first network: the batch is the largest power of two with
    which a call stays short on a CPU. Parameters on the meta device get random values, and stay on the device.
    """
    batch = _LARGEST[device]
    while device == "cpu" and batch > 1 and batch * macs > _CALL_MACS:
        batch //= 2
    for model in networks.values():
        _fill(model)
        model.to(device).eval()
    report = compare(
        {" ".join(network).strip(): model for network, model in networks.items()},
        lambda: torch.randn(batch, *image, device=device),
        rounds=_ROUNDS,
        # Where nothing is left, two rounds are.
        budget_s=max(_TIMING * budget_s, _LEAST),
        warmup_s=_WARMUP * budget_s / len(networks),
    )
    pairs = {pair.b: pair for pair in report.pairs}
    speeds = {}
    # A report has its models in the order in which they were given.
    for network, measured in zip(networks, report.models, strict=True):
        pair = pairs.get(measured.name)
        speeds[network] = RowSpeed(
            batch_size=report.batch_size,
            images_per_s=measured.images_per_s,
            latency_ms=measured.latency_ms,
            against=report.models[0].name,
            ratio=pair.speedup if pair else None,
            ratio_iqr=pair.speedup_iqr if pair else None,
            rounds=report.rounds,
        )
    return speeds, report.environment


def _fill(model: nn.Module) -> None:
    """Give parameters without numbers some that keep activations in a normal range: the time depends on no others."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter.ndim > 1:
                values = torch.empty(parameter.shape).normal_(0, 0.02, generator=generator)
            else:
                values = torch.full(parameter.shape, float(name == "weight"))
            module._parameters[name] = nn.Parameter(values.to(parameter.dtype), parameter.requires_grad)
