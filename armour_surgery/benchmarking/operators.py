"""Where the time of a model goes, operator by operator."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["OperatorTime", "Profile", "profile_call", "side_by_side"]

# As many calls as fit into so many seconds, within limits.
_SECONDS = 1.0
_FEWEST, _MOST = 5, 200


@dataclass(frozen=True)
class OperatorTime:
    """One operator of a forward pass: milliseconds in it, without what it calls, and how often it is called."""

    name: str
    self_ms: float
    calls: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one forward pass at a batch size went; `operators` in the order of their time, all of them.

    The profiler itself takes time at every call, so `total_ms` is more than what the pass takes without it.
    """

    name: str
    batch_size: int
    operators: tuple[OperatorTime, ...]

    @property
    def total_ms(self) -> float:
        """The sum over the operators."""
        return sum(operator.self_ms for operator in self.operators)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        operators = list(map(asdict, self.operators))
        return {"name": self.name, "batch_size": self.batch_size, "total_ms": self.total_ms, "operators": operators}


def profile_call(name: str, batch_size: int, call: Callable[[], Any], device: torch.device) -> Profile:
    """Run `call` for about a second under `torch.profiler`, 5 to 200 times; means over the calls.

    On an accelerator the time is that of its kernels, elsewhere that of the CPU.
    """
    # Kineto reports its own start and stop, and every CPU as a broken GPU, on stderr; it asks once, when it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_device = device.type != "cpu"
    activities = [ProfilerActivity.CPU]
    if on_device:
        activities.append(getattr(ProfilerActivity, device.type.upper()))
    with torch.inference_mode():
        started = time.perf_counter()
        call()
        calls = min(_MOST, max(_FEWEST, round(_SECONDS / (time.perf_counter() - started))))
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(calls):
                call()
            if on_device:
                torch.accelerator.synchronize(device)
    operators = []
    for event in profiler.key_averages():
        total_us = event.self_device_time_total if on_device else event.self_cpu_time_total
        # On an accelerator most entries are of the CPU, which only waits.
        if total_us > 0:
            operators.append(OperatorTime(event.key, total_us / 1000 / calls, event.count / calls))
    operators.sort(key=lambda operator: (-operator.self_ms, operator.name))
    return Profile(name, batch_size, tuple(operators))


def side_by_side(profiles: Sequence[Profile], rows: int) -> list[tuple[str, list[float]]]:
    """Operators and their milliseconds in each profile, those that take most in any first.

    After `rows` operators the others share a row, and the last row is the sum.
    """
    table: dict[str, list[float]] = {}
    for column, measured in enumerate(profiles):
        for operator in measured.operators:
            # An operator that a model does not call took no time there.
            cells = table.setdefault(operator.name, [0.0] * len(profiles))
            cells[column] = operator.self_ms
    ordered = sorted(table.items(), key=lambda row: (-max(row[1]), row[0]))
    shown, others = ordered[:rows], ordered[rows:]
    if others:
        columns = zip(*(cells for _, cells in others), strict=True)
        shown.append((f"{len(others)} others", list(map(sum, columns))))
    return [*shown, ("all", [measured.total_ms for measured in profiles])]
