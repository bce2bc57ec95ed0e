"""What calibrated conversion costs in time and memory, and how fast its result is beside low rank of equal size.

Called by `calibrated_conversion.py cost`; as a program it does one conversion and prints its peak memory in MiB:

    python benchmarks/calibration_cost.py vit_base_patch16_224 64
"""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rivals import feature_pca, in_blocks
from torch import nn

from armour_surgery import convert
from armour_surgery.benchmarking.environment import environment
from armour_surgery.benchmarking.speed import SpeedReport, compare
from armour_surgery.hosts import load_model
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.measure.cost import count_params

LARGE, LARGE_IMAGES = "vit_base_patch16_224", 64


@dataclass(frozen=True)
class Cost:
    """Seconds per round, in the order they were taken, and the peak resident memory of a process in MiB."""

    parameters: int
    images: int
    two_passes_s: tuple[float, ...]
    conversion_s: tuple[float, ...]
    ratio: float
    large_model: str
    large_images: int
    peak_mib: float
    before_mib: float
    speed: SpeedReport

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self) | {"speed": self.speed.to_dict()}

    def markdown(self) -> str:
        """The same for people."""
        here = environment()
        conversions, passes = (
            ", ".join(f"{one:.1f}" for one in times) for times in (self.conversion_s, self.two_passes_s)
        )
        return (
            f"{here.processor}, {here.threads} threads, torch {here.torch}; {len(self.conversion_s)} rounds in turns."
            "\n\n"
            f"- Calibrated conversion of a model of {self.parameters:,} parameters with {self.images} images: "
            f"{conversions} s; two plain forward passes over them: {passes} s; median ratio {self.ratio:.2f}.\n"
            f"- {self.large_model} with {self.large_images} images: peak resident memory {self.peak_mib:.0f} MiB, of "
            f"which {self.before_mib:.0f} MiB before the conversion (libraries and the model).\n"
            + "".join(
                f"- Speed of {pair.b} over {pair.a}, batch {self.speed.batch_size}: median {pair.speedup:.3f}, middle "
                f"half of {pair.rounds} rounds {pair.speedup_iqr[0]:.3f} to {pair.speedup_iqr[1]:.3f}.\n"
                for pair in self.speed.pairs
            )
        )


def measure_cost(model: nn.Module, images: int, rounds: int, say: Callable[[str], None]) -> Cost:
    """Convert in turns with passes over the same images, then a larger model in a process of its own."""
    batches = list(calibration_batches("synthetic", preprocessing(model), images=images))

    def passes() -> None:
        with torch.inference_mode():
            for batch in [*batches, *batches]:
                model(batch)

    def conversion() -> None:
        convert(model, "qv", init="calibrated", calibration=batches, calibration_images=images)

    with torch.inference_mode():
        model(batches[0])
    times: dict[str, list[float]] = {"passes": [], "conversion": []}
    tasks = [("passes", passes), ("conversion", conversion)]
    for index in range(rounds):
        for name, task in tasks if index % 2 == 0 else reversed(tasks):
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
            say(f"{name}: {times[name][-1]:.1f} s")
    converted = convert(model, "qv", init="wq").eval()
    low_rank = feature_pca(
        model, count_params(converted), batches[:4], lambda one, batch: one(batch), in_blocks, by_variance=True
    )[0]
    models: dict[str, nn.Module] = {
        "original": model,
        "original again": model,
        "qv": converted,
        "feature PCA of equal size": low_rank,
    }
    speed = compare(models, lambda: torch.randn_like(batches[0]), rounds=4 if rounds == 1 else 30, budget_s=300.0)
    command = [sys.executable, __file__, LARGE, str(LARGE_IMAGES)]
    peak, before = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    say(f"{LARGE}: {peak:.0f} MiB")
    ratio = median(a / b for a, b in zip(times["conversion"], times["passes"], strict=True))
    return Cost(
        count_params(model),
        images,
        tuple(times["passes"]),
        tuple(times["conversion"]),
        ratio,
        LARGE,
        LARGE_IMAGES,
        peak,
        before,
        speed,
    )


def peak_memory() -> float:
    """The most memory that this program has held so far, in MiB; unlike `getrusage`, without its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    name, images = sys.argv[1:]
    model = load_model(name, pretrained=False)[0].eval()
    before = peak_memory()
    convert(model, "qv", init="calibrated", calibration="synthetic", calibration_images=int(images))
    print(peak_memory(), before)


if __name__ == "__main__":
    main()
