import gc
from collections.abc import Iterator

import pytest
import torch

# Processes are forked best from one that has not done much yet: torch refuses gradients in a fork of a process whose
# autograd has threads. And what takes a minute to set up should not be where the tests are divided among workers, or it
# is set up twice.
FIRST = ("test_trainer_distributed.py", "test_cli.py", "test_measure.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


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
