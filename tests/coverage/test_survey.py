"""What hangs, dies or raises costs itself alone."""

import sys

import pytest
from slow_architectures import load

from armour_surgery.coverage.survey import survey


def test_one_architecture_does_not_take_the_others_with_it() -> None:
    told: list[tuple[int, int]] = []
    names = ["fine", "raises", "hangs", "dies"]
    outcomes = survey(
        [("own", name) for name in names],
        load,
        jobs=1,
        timeout=2.0,
        grace=60.0,
        progress=lambda _, done, total: told.append((done, total)),
    )
    fine, raises, hangs, dies = outcomes
    assert [outcome.name for outcome in outcomes] == names
    assert fine.exact
    assert fine.error is None
    assert raises.error == "ValueError: no such thing"
    assert hangs.error == "it took longer than 2 s"
    assert dies.error == "its process died (exit code 9), out of memory most likely"
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.skipif(sys.platform != "linux", reason="where memory is not told, a process goes on")
def test_what_memory_one_does_not_give_back_is_not_the_next_ones_loss() -> None:
    outcomes = survey([("own", "holds"), ("own", "holds as much")], load, timeout=60.0)
    assert [outcome.error for outcome in outcomes] == [None, None]
