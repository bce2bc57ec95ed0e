"""Half of a sum of products is kept, and all of it is there."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes

from armour_surgery.initialize import gram
from armour_surgery.initialize.gram import Gram
from armour_surgery.initialize.processes import Processes
from armour_surgery.recover.distributed import Process


@pytest.fixture(autouse=True)
def few_rows():
    """So many rows of blocks that some are full, and the last one is not."""
    with patch.object(gram, "_ROWS", 4):
        yield


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.integers(1, 3), st.integers(0, 2**16))
def test_it_is_the_whole_sum(width: int, batches: int, seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randn(5, width, dtype=torch.float64) for _ in range(batches)]
    found, other = Gram(), Gram()
    for one in inputs:
        found.add(one)
        other.add(2 * one)
    every = torch.cat(inputs)
    wanted = every.mT @ every
    matrix = torch.randn(width, 3, dtype=torch.float64)
    assert len(found) == width
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(found.diagonal(), wanted.diagonal())
    torch.testing.assert_close(found.times(matrix), wanted @ matrix)
    torch.testing.assert_close((found + other).dense(), 5 * wanted)
    lower = found.lower(torch.device("cpu"))
    torch.testing.assert_close(lower.tril(), wanted.tril())
    assert lower.mT.is_contiguous()


def test_half_of_it_takes_memory() -> None:
    found = Gram()
    found.add(torch.randn(7, 64))
    assert sum(row.numel() for row in found.rows) < 0.55 * 64**2
    assert {row.dtype for row in found.rows} == {torch.float64}


def test_processes_have_what_all_have_seen() -> None:
    inputs = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def work(process: Process) -> None:
        found = Gram()
        if process.rank == 0:  # the other one has seen nothing
            found.add(inputs)
        with Processes.together(True) as processes:
            torch.testing.assert_close(found.gathered(processes).dense(), inputs.mT @ inputs)

    in_processes(work)
