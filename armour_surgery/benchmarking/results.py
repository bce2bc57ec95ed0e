"""What a benchmark is: records of how models were treated, what they cost and how fast they were, and their JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any

from armour_surgery.benchmarking.environment import Environment
from armour_surgery.benchmarking.intervals import CONFIDENCE, verdict
from armour_surgery.benchmarking.operators import Profile
from armour_surgery.benchmarking.speed import ModelSpeed, PairSpeed
from armour_surgery.benchmarking.table import benchmark_table
from armour_surgery.tabular import Table, Tabular

__all__ = ["BatchSpeed", "Benchmark", "ModelCost", "Settings"]


@dataclass(frozen=True)
class Settings:
    """How all models were treated, the first one and its double included.

    `freed_memory_kept` is whether the process kept the memory that it freed; see `speed.keep_memory`. `runtime` is what
    ran them: `torch` (compiled or not), `onnx` (ONNX Runtime) or `openvino`.
    """

    dtype: str
    compiled: bool
    deployed: bool
    rounds: int
    budget_s: float
    freed_memory_kept: bool
    runtime: str = "torch"

    @property
    def ran(self) -> str:
        """What ran them, for people."""
        if self.runtime == "torch":
            return "compiled" if self.compiled else "eager"
        return {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[self.runtime]

    @property
    def way(self) -> str:
        """How the models were run: `fp32, deployed, compiled`, say."""
        kinds = (self.dtype, "deployed" if self.deployed else "", self.ran)
        return ", ".join(filter(None, kinds))


@dataclass(frozen=True)
class ModelCost:
    """What a model costs wherever it runs, as it was timed; `macs` for one image."""

    name: str
    params: int
    macs: int


@dataclass(frozen=True)
class BatchSpeed:
    """All models at one batch size.

    `peak_mib` by name: what parameters and buffers hold, and the most that a forward pass took beyond that; None where
    the system does not tell. `compile_s` by name: seconds of the first call, compilation and all; empty if nothing was
    compiled. `noise` holds the first model against its double.
    """

    batch_size: int
    models: tuple[ModelSpeed, ...]
    pairs: tuple[PairSpeed, ...]
    noise: PairSpeed
    peak_mib: dict[str, float | None]
    compile_s: dict[str, float]

    def verdict(self, pair: PairSpeed) -> str:
        """What may be said about a pair; see `intervals.verdict`."""
        return verdict(pair.speedup, pair.speedup_interval, self.noise.speedup_interval)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        models = []
        for speed in self.models:
            extra = {"peak_mib": self.peak_mib[speed.name], "compile_s": self.compile_s.get(speed.name)}
            models.append({**asdict(speed), **extra})
        return {
            "batch_size": self.batch_size,
            "models": models,
            "pairs": [{**pair.to_dict(), "verdict": self.verdict(pair)} for pair in self.pairs],
            "noise": self.noise.to_dict(),
        }


@dataclass(frozen=True, repr=False)
class Benchmark(Tabular):
    """What was measured, where, and how. Batch sizes ascend from 1; the first model is `a` of every pair."""

    environment: Environment
    settings: Settings
    costs: tuple[ModelCost, ...]
    batches: tuple[BatchSpeed, ...]
    profiles: tuple[Profile, ...] = field(default=())

    @property
    def largest(self) -> BatchSpeed:
        """The largest batch size: what throughput, speed-ups and peak memory are told of."""
        return self.batches[-1]

    def table(self) -> Table:
        """What a session and a notebook show of it."""
        return benchmark_table(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary: the contract's keys, and per batch size everything that was measured."""
        largest = self.largest.to_dict()
        models = []
        # Throughput is that of the largest batch, latency that of one image alone: what each is asked for.
        for cost, alone, together in zip(self.costs, self.batches[0].models, largest["models"], strict=True):
            model = {
                **asdict(cost),
                "images_per_s": together["images_per_s"],
                "latency_ms": alone.latency_ms,
                "p90_ms": alone.p90_ms,
                "peak_mib": together["peak_mib"],
                "compile_s": together["compile_s"],
            }
            models.append(model)
        document = {
            "environment": self.environment.to_dict(),
            "settings": {**asdict(self.settings), "confidence": CONFIDENCE},
            "batch_size": self.largest.batch_size,
            "models": models,
            "pairs": largest["pairs"],
            "noise": largest["noise"],
            "batches": [batch.to_dict() for batch in self.batches],
        }
        if self.profiles:
            document["profile"] = [profile.to_dict() for profile in self.profiles]
        return document
