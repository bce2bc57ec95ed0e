"""How fast models are beside each other: paired timing on a machine that may be noisy.

On shared machines the same model's median moves by half from one second to the next, and the spread within
one block of runs says nothing about it. So the models take turns, and what is reported is the distribution
of the ratios within rounds, each of which saw the same machine.
"""

import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from armour_surgery.errors import UsageError

__all__ = ["Environment", "ModelSpeed", "PairSpeed", "SpeedReport", "compare", "environment", "keep_memory"]

# Warm-up is over when this many calls in a row took the same time, within the tolerance.
_STEADY_CALLS = 3
_TOLERANCE = 0.05
# Of glibc's mallopt: when to give memory back to the system, and how many blocks to take from it one by one.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Environment:
    """Where something was measured. `threads` is how many threads torch uses inside an operator."""

    device: str
    processor: str
    cores: int
    threads: int
    torch: str
    timm: str
    python: str
    system: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class ModelSpeed:
    """One model: the median time of a batch in milliseconds, and the images per second it comes to."""

    name: str
    latency_ms: float
    images_per_s: float


@dataclass(frozen=True)
class PairSpeed:
    """How many times faster `b` is than `a`: median and quartiles of time(a) / time(b) over the rounds."""

    a: str
    b: str
    speedup: float
    speedup_iqr: tuple[float, float]
    rounds: int


@dataclass(frozen=True)
class SpeedReport:
    """What `compare` measured. Every pair has the first model as its `a`."""

    models: tuple[ModelSpeed, ...]
    pairs: tuple[PairSpeed, ...]
    batch_size: int
    rounds: int
    warmup_calls: int
    environment: Environment

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the keys of the `bench` contract, and how it was measured."""
        return {
            "environment": self.environment.to_dict(),
            "batch_size": self.batch_size,
            "rounds": self.rounds,
            "warmup_calls": self.warmup_calls,
            "models": [asdict(model) for model in self.models],
            "pairs": [{**asdict(pair), "speedup_iqr": list(pair.speedup_iqr)} for pair in self.pairs],
        }


def compare(
    models: Mapping[str, Callable[[Tensor], Any]],
    make_input: Callable[[], Tensor],
    *,
    rounds: int = 30,
    budget_s: float = 120.0,
    max_warmup: int = 20,
    warmup_s: float = 10.0,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedReport:
    """Time `models` against the first of them, in turns, under `torch.inference_mode`.

    A round makes one input and gives it to every model once; the order is reversed from round to round (A
    B, B A), so that what drifts falls on both alike. Rounds stop at `rounds`, or at the first complete pair
    of rounds after `budget_s` seconds. Before that each model is called until three calls in a row take the
    same time, at most `max_warmup` calls or, compilation in the first call aside, `warmup_s` seconds.

    The callables should be in eval mode and have had the same treatment (folding, compilation, dtype,
    device); the first axis of the input is the batch. `clock` returns seconds.

    Raises:
        UsageError: there is no model, or `rounds` is not an even number of at least 2.
    """
    if not models:
        raise UsageError("nothing to time: no model was given")
    if rounds < 2 or rounds % 2:
        raise UsageError(
            f"rounds must be an even number of at least 2, so that every order occurs as often; got {rounds}"
        )
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        batch = make_input()
        warmup_calls = sum(_warm_up(models[name], batch, max_warmup, warmup_s, clock) for name in names)
        started = clock()
        for number in range(rounds):
            if number and number % 2 == 0 and clock() - started >= budget_s:
                break
            batch = make_input()
            for name in names if number % 2 == 0 else reversed(names):
                times[name].append(_time_call(models[name], batch, clock))
    return SpeedReport(
        models=tuple(_model_speed(name, times[name], batch.shape[0]) for name in names),
        pairs=tuple(_pair_speed(names[0], times[names[0]], name, times[name]) for name in names[1:]),
        batch_size=batch.shape[0],
        rounds=len(times[names[0]]),
        warmup_calls=warmup_calls,
        environment=environment(batch.device),
    )


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, from now on; whether its C library can be told so.

    By default glibc gives large blocks back to the system and gets them anew, zeroed page by page. How often depends
    on what ran before, and it costs 0 to 10 % of a forward pass: more than what is to be measured. For processes that
    time models and end.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_M_MMAP_MAX, 0))


def environment(device: torch.device | str = "cpu") -> Environment:
    """This machine and the versions that matter, for whoever reads the numbers later."""
    device = torch.device(device)
    return Environment(
        device=device.type,
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=_version("timm"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
    )


def _warm_up(
    model: Callable[[Tensor], Any], batch: Tensor, max_calls: int, max_s: float, clock: Callable[[], float]
) -> int:
    """Call the model until its time settles; how many calls that took."""
    _time_call(model, batch, clock)
    started = clock()
    recent: list[float] = []
    for number in range(1, max_calls):
        steady = len(recent) == _STEADY_CALLS and max(recent) <= (1 + _TOLERANCE) * min(recent)
        if steady or clock() - started >= max_s:
            return number
        recent = [*recent, _time_call(model, batch, clock)][-_STEADY_CALLS:]
    return max_calls


def _time_call(model: Callable[[Tensor], Any], batch: Tensor, clock: Callable[[], float]) -> float:
    _synchronize(batch.device)
    started = clock()
    model(batch)
    _synchronize(batch.device)
    return clock() - started


def _synchronize(device: torch.device) -> None:
    # An accelerator's calls return before they are done.
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def _model_speed(name: str, times: Sequence[float], batch_size: int) -> ModelSpeed:
    typical = median(times)
    return ModelSpeed(name=name, latency_ms=1000 * typical, images_per_s=batch_size / typical)


def _pair_speed(a: str, times_a: Sequence[float], b: str, times_b: Sequence[float]) -> PairSpeed:
    ratios = [time_a / time_b for time_a, time_b in zip(times_a, times_b, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return PairSpeed(a=a, b=b, speedup=middle, speedup_iqr=(low, high), rounds=len(ratios))


def _cpu_name() -> str:
    """The processor's marketing name where Linux tells it, else whatever Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
