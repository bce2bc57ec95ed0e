import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# Processes are forked best from one that has not done much yet: torch refuses gradients in a fork of a process whose
# autograd has threads. And what takes a minute to set up should not be where the tests are divided among workers, or it
# is set up twice.
FIRST = ("test_trainer_distributed.py", "cli/test_convert.py", "paper/test_reproduction.py")


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
