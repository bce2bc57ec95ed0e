"""What every test finds set up, and which tests go first."""

import atexit
import gc
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import Hub, point_at, running
from huggingface_hub import close_session
from shared_hosts import changed
from small_paper import SMALL

from armour_surgery.paper import reproduction
from armour_surgery.paper.reproduction import Reproduction, regenerate

TESTS = Path(__file__).parent
# Processes are forked best from one that has not done much yet: torch refuses gradients in a fork of a process whose
# autograd has threads. And what takes a minute to set up should not be where the tests are divided among workers, or it
# is set up twice.
FIRST = ("recover/test_distributed.py", "cli/test_demo.py", "paper/test_reproduction.py")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: the collector, which would look through it ten times, has a rest meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[int, str]:
    """The first files, then the promises host by host, then the others in their order.

    A host is converted once in every worker that needs it (shared_hosts.py), so its tests should be of one worker. A
    worker that has nothing left to do takes tests from the end of another's: those of whole hosts.
    """
    name = item.path.relative_to(TESTS).as_posix()
    if name in FIRST:
        return FIRST.index(name), ""
    if not name.startswith("promises/"):
        return len(FIRST) + 1, ""
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return len(FIRST), str(parameters.get("name", ""))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, and their numbers do not depend on the machine.

    So they are in the processes that tests start: there are as many workers as cores already.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> None:
    """Random inputs do not depend on which tests ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _what_is_imported_stays() -> None:
    """The collector need not look through the million objects of all libraries again and again.

    Not when the tests are over either, and pytest collects five times to see what they left behind. Python may, as it
    ends: libraries say which of their objects are still there then.
    """
    gc.collect()
    gc.freeze()
    # And the hosts that tests share stay too, so that looking for garbage often is looking through those.
    gc.set_threshold(10_000, 20, 50)
    atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="session")
def _shared_hosts_stay() -> Iterator[None]:
    """Nobody changes what other tests get too."""
    yield
    assert changed() == []


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that time tiny models: turns and profiles of those are as good when they are short."""
    monkeypatch.setattr("armour_surgery.benchmarking.speed._TURN_S", 0.002)
    monkeypatch.setattr("armour_surgery.benchmarking.operators._SECONDS", 0.02)
    # It would be for the whole suite.
    monkeypatch.setattr("armour_surgery.benchmarking.benchmark.keep_memory", lambda: True)
    # Before each measurement of memory the collector runs, and all hosts that tests have shared so far are not its
    # concern: looking through them took longer than timing.
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub on this machine, and a token that may write to it."""
    with running() as hub:
        point_at(hub.url, tmp_path_factory.mktemp("hub"), monkeypatch)
        yield hub
        close_session()


@pytest.fixture(scope="session")
def timed() -> Reproduction:
    """The paper's tables with a few small networks in them, which were timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "ROWS", SMALL)
        return regenerate(budget_s=0.5, devices=("cpu",))
