"""Examine many architectures in several processes: one that hangs, or takes all memory, costs itself alone."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch import Tensor, nn

from armour_surgery.coverage.examine import Examiner
from armour_surgery.coverage.outcome import Outcome
from armour_surgery.records import Progress

__all__ = ["Load", "survey"]

# Builds an architecture from its library's name and its own, with an example of what it is fed. It crosses to other
# processes, so it is a function of a module.
Load = Callable[[str, str], tuple[nn.Module, dict[str, Tensor]]]

# Memory that a process may have. One that still holds half of it after an architecture starts anew.
_MEMORY_GIB = 12
# Its sixth number is the pages of data (man 5 proc), which are what is limited.
_MEMORY = Path("/proc/self/statm")


@dataclass
class _Worker:
    """A process and what it is busy with."""

    process: BaseProcess
    connection: Connection
    task: tuple[str, str] = ("", "")
    deadline: float = 0.0
    finished: bool = False


def survey(
    names: Sequence[tuple[str, str]],
    load: Load,
    *,
    jobs: int = 1,
    timeout: float = 120.0,
    grace: float = 60.0,
    progress: Progress | None = None,
) -> list[Outcome]:
    """The outcome of every (library, architecture), in their order.

    What cannot be built or run, runs longer than `timeout` seconds, or brings its process down, has an `error`. The
    first of a process has `grace` more, while the libraries are imported.
    """
    waiting = deque(dict.fromkeys(names))
    outcomes: dict[tuple[str, str], Outcome] = {}
    total = len(waiting)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_start(load))
                _give(workers[-1], waiting.popleft(), timeout + grace)
            for worker in _finished(workers):
                outcomes[worker.task] = _result_of(worker, timeout)
                if progress is not None:
                    progress("architectures", len(outcomes), total)
                if waiting and not worker.finished:
                    _give(worker, waiting.popleft(), timeout)
                else:
                    _stop(worker)
                    workers.remove(worker)
    finally:
        for worker in workers:
            _stop(worker)
    return [outcomes[name] for name in dict.fromkeys(names)]


def _start(load: Load) -> _Worker:
    # Spawned: a forked copy of a process that has run torch may hang in its threads.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, load), daemon=True)
    process.start()
    theirs.close()  # or the end of the process would not end the connection
    return _Worker(process, ours)


def _give(worker: _Worker, task: tuple[str, str], timeout: float) -> None:
    worker.task = task
    worker.deadline = time.monotonic() + timeout
    worker.connection.send(task)


def _finished(workers: Sequence[_Worker]) -> list[_Worker]:
    """Those that have an answer, are dead, or have had their time; waits until there is one."""
    while True:
        nearest = min(worker.deadline for worker in workers)
        ready = wait([worker.connection for worker in workers], max(0.0, nearest - time.monotonic()))
        now = time.monotonic()
        finished = [worker for worker in workers if worker.connection in ready or worker.deadline <= now]
        if finished:
            return finished


def _result_of(worker: _Worker, timeout: float) -> Outcome:
    library, name = worker.task
    if not worker.connection.poll():
        worker.finished = True  # to be stopped, whatever it would answer later
        return Outcome(library, name, error=f"it took longer than {timeout:g} s", seconds=timeout)
    try:
        outcome: Outcome
        outcome, worker.finished = worker.connection.recv()
    except (EOFError, OSError):
        worker.finished = True
        worker.process.join(5.0)
        code = worker.process.exitcode
        return Outcome(library, name, error=f"its process died (exit code {code}), out of memory most likely")
    return outcome


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def _work(connection: Connection, load: Load) -> None:
    """What a process does until it is stopped."""
    torch.set_num_threads(1)  # the processes share the cores
    _limit_memory()
    examiner = Examiner()
    while True:
        try:
            library, name = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        connection.send((_examine(examiner, load, library, name), _holds_much()))


def _holds_much() -> bool:
    """Whether this process still holds half of what it may have; never where the system does not tell (not Linux)."""
    try:
        pages = int(_MEMORY.read_text(encoding="ascii").split()[5])
    except OSError:
        return False
    return pages * os.sysconf("SC_PAGE_SIZE") > _MEMORY_GIB << 29


def _limit_memory() -> None:
    """Too much memory is to be an error of the architecture, before it is one of the machine."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_GIB << 30, most))


def _examine(examiner: Examiner, load: Load, library: str, name: str) -> Outcome:
    started = time.perf_counter()
    try:
        model, example = load(library, name)
        outcome = examiner.examine(library, name, model, example)
    except Exception as error:
        # Whatever a library's code raises is this architecture's outcome, and the others go on.
        outcome = Outcome(library, name, error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    return replace(outcome, seconds=round(time.perf_counter() - started, 2))
