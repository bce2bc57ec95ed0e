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
        return sum(one.self_ms for one in self.operators)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        operators = [asdict(one) for one in self.operators]
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
    found = [
        OperatorTime(
            event.key,
            (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1000 / calls,
            event.count / calls,
        )
        for event in profiler.key_averages()
    ]
    busy = [one for one in found if one.self_ms > 0]
    return Profile(name, batch_size, tuple(sorted(busy, key=lambda one: (-one.self_ms, one.name))))


def side_by_side(profiles: Sequence[Profile], rows: int) -> list[tuple[str, list[float]]]:
    """Operators and their milliseconds in each profile, those that take most in any first.

    After `rows` operators the others share a row, and the last row is the sum.
    """
    times = [{one.name: one.self_ms for one in profile.operators} for profile in profiles]
    table = {name: [found.get(name, 0.0) for found in times] for found in times for name in found}
    ordered = sorted(table.items(), key=lambda row: (-max(row[1]), row[0]))
    others = [cells for _, cells in ordered[rows:]]
    if others:
        ordered[rows:] = [(f"{len(others)} others", [sum(column) for column in zip(*others, strict=True)])]
    return [*ordered, ("all", [profile.total_ms for profile in profiles])]
