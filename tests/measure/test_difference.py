"""The difference between outputs is relative, and infinite wherever they cannot be compared."""

import math

import pytest
import torch

from armour_surgery.measure.difference import largest_difference

BASE = torch.tensor([[1.0, -4.0], [0.5, 2.0]])
MASKED = torch.tensor([1.0, -math.inf])


def test_it_is_the_largest_of_all_outputs_in_parts_of_each() -> None:
    other = BASE.clone()
    other[0, 0] += 0.2
    assert largest_difference([BASE, BASE * 100], [other, BASE * 100 + 1.0]) == pytest.approx(0.05)
    assert largest_difference([BASE * 100, BASE], [BASE * 100 + 8.0, other]) == pytest.approx(0.05)


def test_whole_numbers_and_empty_outputs_say_nothing() -> None:
    assert largest_difference([torch.tensor([3]), torch.empty(0)], [torch.tensor([4]), torch.empty(0)]) == 0.0


def test_what_is_masked_in_both_is_equal() -> None:
    assert largest_difference([MASKED], [MASKED + 0.5]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        (BASE, BASE[:1]),
        (BASE, torch.full_like(BASE, math.nan)),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.inf])),
        (MASKED, torch.tensor([1.0, 2.0])),
        (MASKED, -MASKED),
        (torch.full((2,), -math.inf), torch.full((2,), -math.inf)),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan])),
    ],
    ids=["shapes", "all NaN", "a NaN", "infinite", "no mask", "the other infinity", "nothing finite", "NaN in both"],
)
def test_what_cannot_be_compared_is_infinitely_far(wanted: torch.Tensor, got: torch.Tensor) -> None:
    assert largest_difference([BASE, wanted], [BASE, got]) == math.inf
