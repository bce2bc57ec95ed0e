"""How fast models are beside each other: paired timing on a machine that may be noisy.

On shared machines the same model's median moves by half from one second to the next, and the spread within
one block of runs says nothing about it. So the models take turns, and what is reported is the distribution
of the ratios within rounds, each of which saw the same machine.
"""

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from armour_surgery.benchmarking.environment import Environment, environment
from armour_surgery.benchmarking.intervals import median_interval
from armour_surgery.errors import UsageError

__all__ = ["ModelSpeed", "PairSpeed", "SpeedReport", "compare", "keep_memory", "many_compiled"]

# Warm-up is over when this many calls in a row took the same time, within the tolerance.
_STEADY_CALLS = 3
_TOLERANCE = 0.05
_BLOCKS = 16
# A model's turn lasts about so many seconds, so that one that takes a millisecond is not judged by a lucky one.
_TURN_S = 0.05
# Of glibc's mallopt: when to give memory back to the system, and how many blocks to take from it one by one.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class ModelSpeed:
    """One model: median and 90th percentile of the time of a batch in milliseconds; images per second by the median."""

    name: str
    latency_ms: float
    p90_ms: float
    images_per_s: float


@dataclass(frozen=True)
class PairSpeed:
    """How many times faster `b` is than `a`: median and quartiles of time(a) / time(b) over the rounds.

    `speedup_interval` is where that median lies for as many rounds as one likes; see `intervals.median_interval`.
    """

    a: str
    b: str
    speedup: float
    speedup_iqr: tuple[float, float]
    rounds: int
    speedup_interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        interval = None if self.speedup_interval is None else list(self.speedup_interval)
        return {**asdict(self), "speedup_iqr": list(self.speedup_iqr), "speedup_interval": interval}


@dataclass(frozen=True)
class SpeedReport:
    """What `compare` measured. Every one of `pairs` has the first model as its `a`; `times` are seconds a round."""

    models: tuple[ModelSpeed, ...]
    pairs: tuple[PairSpeed, ...]
    times: Mapping[str, Sequence[float]]
    batch_size: int
    rounds: int
    warmup_calls: int
    environment: Environment

    def pair(self, a: str, b: str) -> PairSpeed:
        """Any two of the models, by their names."""
        return _pair_speed(a, self.times[a], b, self.times[b])

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the keys of the `bench` contract, and how it was measured."""
        return {
            "environment": self.environment.to_dict(),
            "batch_size": self.batch_size,
            "rounds": self.rounds,
            "warmup_calls": self.warmup_calls,
            "models": [asdict(model) for model in self.models],
            "pairs": [pair.to_dict() for pair in self.pairs],
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
    before_block: Callable[[float], None] | None = None,
) -> SpeedReport:
    """Time `models` against the first of them, in turns, under `torch.inference_mode`.

    A round makes one input and gives every model a turn: one call, or as many as fit into 0.05 seconds, of
    which the median counts. The order is reversed from round to round, so that what drifts falls on both
    alike, and every pair of rounds begins with the next model (A B C, C B A, B C A, A C B, ...), so that
    none follows itself, or another, more often than the rest do. Rounds stop at `rounds`, or at the first
    complete pair of rounds after `budget_s` seconds. Before that each model is called until three calls in a
    row take the same time, at most `max_warmup` calls or, compilation in the first call aside, `warmup_s`
    seconds.

    The rounds are cut into 16 blocks of about as many rounds or as much time. `before_block` is called
    before each, untimed, with the share of the rounds that is done.

    The callables should be in eval mode and have had the same treatment (folding, compilation, dtype,
    device); the first axis of the input is the batch. `clock` returns seconds.

    Raises:
        UsageError: there is no model, `rounds` is not an even number of at least 2, or `budget_s` is no time.
    """
    if not models:
        raise UsageError("nothing to time: no model was given")
    if not budget_s > 0:
        raise UsageError(f"the budget must be more than 0 seconds, and it is {budget_s}")
    if rounds < 2 or rounds % 2:
        raise UsageError(
            f"rounds must be an even number of at least 2, so that every order occurs as often; got {rounds}"
        )
    names = list(models)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    with torch.inference_mode():
        batch = make_input()
        calls: dict[str, int] = {}
        warmup_calls = 0
        for name in names:
            seconds = _warm_up(models[name], batch, max_warmup, warmup_s, clock)
            calls[name] = max(1, round(_TURN_S / median(seconds)))
            warmup_calls += len(seconds)
        started, blocks = clock(), 0
        for number in range(rounds):
            done = max(number / rounds, (clock() - started) / budget_s)
            # A pair of rounds is not cut apart: only both together give every model equal places.
            if number % 2 == 0:
                if number and done >= 1:
                    break
                if before_block is not None and done >= blocks / _BLOCKS:
                    before_block(done)
                    blocks = 1 + int(_BLOCKS * done)
            batch = make_input()
            for name in _order(names, number):
                turn = [_time_call(models[name], batch, clock) for _ in range(calls[name])]
                times[name].append(turn)
    typical = {name: list(map(median, turns)) for name, turns in times.items()}
    first, *others = names
    return SpeedReport(
        models=tuple(_model_speed(name, times[name], batch.shape[0]) for name in names),
        pairs=tuple(_pair_speed(first, typical[first], name, typical[name]) for name in others),
        times=typical,
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


@contextmanager
def many_compiled() -> Iterator[None]:
    """Models of one class share a limit of compiled variants, beyond which torch would quietly run them eagerly.

    Within this context the limit is high, and reaching it is an error.
    """
    from torch._dynamo import config

    with config.patch(recompile_limit=256, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True):
        yield


def _order(names: Sequence[str], number: int) -> list[str]:
    """Who comes when in a round; see `compare`."""
    first = number // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned if number % 2 == 0 else turned[::-1]


def _warm_up(
    model: Callable[[Tensor], Any], batch: Tensor, max_calls: int, max_s: float, clock: Callable[[], float]
) -> list[float]:
    """Call the model until its time settles; the time of each call."""
    times = [_time_call(model, batch, clock)]
    # From here: compiling may take longer than all of the warm-up may.
    started = clock()
    while len(times) < max_calls and clock() - started < max_s:
        # Without the first call, which compiles and sets up what later ones find there.
        recent = times[1:][-_STEADY_CALLS:]
        if len(recent) == _STEADY_CALLS and max(recent) <= (1 + _TOLERANCE) * min(recent):
            break
        times.append(_time_call(model, batch, clock))
    return times


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


def _model_speed(name: str, turns: Sequence[Sequence[float]], batch_size: int) -> ModelSpeed:
    times = [seconds for turn in turns for seconds in turn]
    typical = median(times)
    slow = quantiles(times, n=10, method="inclusive")[-1]
    return ModelSpeed(name=name, latency_ms=1000 * typical, p90_ms=1000 * slow, images_per_s=batch_size / typical)


def _pair_speed(a: str, times_a: Sequence[float], b: str, times_b: Sequence[float]) -> PairSpeed:
    ratios = [time_a / time_b for time_a, time_b in zip(times_a, times_b, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return PairSpeed(
        a=a,
        b=b,
        speedup=middle,
        speedup_iqr=(low, high),
        rounds=len(ratios),
        speedup_interval=median_interval(ratios),
    )
