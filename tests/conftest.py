"""What every test finds set up, and which tests go first."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_paper import SMALL

from armour_surgery.paper import reproduction
from armour_surgery.paper.reproduction import Reproduction, regenerate

TESTS = Path(__file__).parent
# Processes are forked best from one that has not done much yet: torch refuses gradients in a fork of a process whose
# autograd has threads. And what takes a minute to set up should not be where the tests are divided among workers, or it
# is set up twice.
FIRST = ("recover/test_distributed.py", "cli/test_demo.py", "paper/test_reproduction.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(TESTS).as_posix()
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, and their numbers do not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _what_is_imported_stays() -> Iterator[None]:
    """The collector need not look through the million objects of all libraries again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns and profiles of tiny models are as good when they are short."""
    monkeypatch.setattr("armour_surgery.benchmarking.speed._TURN_S", 0.002)
    monkeypatch.setattr("armour_surgery.benchmarking.operators._SECONDS", 0.02)


@pytest.fixture(scope="session")
def timed() -> Reproduction:
    """The paper's tables with a few small networks in them, which were timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduction, "ROWS", SMALL)
        return regenerate(budget_s=0.5, devices=("cpu",))
