"""Memory that was freed goes back to the system, and before large systems of equations it does."""

import sys
from unittest.mock import patch

import pytest
import torch
from quick_benchmarks import MIB

from armour_surgery import freed
from armour_surgery.benchmarking.memory import _status
from armour_surgery.initialize import moments
from armour_surgery.initialize.moments import Regression


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_holes_between_blocks_go_back_to_the_system() -> None:
    # Of 64 KiB, which are too small for the C library to take each from the system by itself.
    kept = [torch.ones(2**14) for _ in range(40 * 16)]
    before = _status("VmRSS")
    del kept[::2]
    assert freed.give_back()
    after = _status("VmRSS")
    assert before is not None
    assert after is not None
    assert before - after > 10 * MIB


def test_where_the_system_has_no_such_thing_nothing_happens() -> None:
    with patch.object(freed.ctypes, "CDLL", side_effect=OSError):
        assert not freed.give_back()


@pytest.mark.parametrize("large", [False, True])
def test_large_systems_are_given_room(large: bool) -> None:
    size = 8 * 5**2
    with patch.object(moments, "_LARGE", size if large else size + 1), patch.object(moments, "give_back") as asked:
        regression = Regression(torch.zeros(5, 2, dtype=torch.float64), biases=False)
        for held_out in (False, True):
            regression.add(torch.randn(8, 5), torch.randn(8, 2), held_out)
        regression.solve()
    assert asked.call_count == (2 if large else 0)
