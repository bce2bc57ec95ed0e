"""Numbers whose axes do not depend on each other: one line along each axis stands for all elements."""

from collections.abc import Callable

import pytest
import torch

from armour_surgery.discover.separable import Separable, are_separable

# Channels last, as a Linear makes them, and first, as a convolution does: 3 roles of 2 heads of 5 dimensions.
LAST = torch.arange(4 * 6 * 30).reshape(4, 6, 30)
FIRST = torch.arange(4 * 30 * 3 * 2).reshape(4, 30, 3, 2)
Layout = Callable[[torch.Tensor], torch.Tensor]


def channels(numbers: torch.Tensor, inner: int) -> torch.Tensor:
    return torch.where(numbers < 0, -1, numbers // inner % 30)


@pytest.mark.parametrize(
    ("start", "inner", "layout", "left"),
    [
        (LAST, 1, lambda x: x, 30),
        (LAST, 1, lambda x: x.reshape(4, 6, 3, 2, 5).permute(2, 0, 3, 1, 4)[1], 10),
        (LAST, 1, lambda x: x.reshape(4, 6, 3, 2, 5).permute(2, 0, 3, 1, 4).reshape(3, 8, 6, 5)[0], 4 * 10),
        (LAST, 1, lambda x: x.roll(2, 1).reshape(4, 3, 2, 30).transpose(1, 2), 30),
        (LAST, 1, lambda x: x.roll(7, 2), 30),
        (LAST, 1, lambda x: x.expand(2, -1, -1, -1), 30),
        (LAST, 1, lambda x: x.reshape(24, 30)[:, 5:6], 1),
        (FIRST, 6, lambda x: x, 30),
        (FIRST, 6, lambda x: x.flatten(2).transpose(1, 2).reshape(4, 6, 3, 10), 30),
        (FIRST, 6, lambda x: x.reshape(4, 3, 2, 5, 6)[:, 2], 10),
        (FIRST, 6, lambda x: x.flatten(2).roll(1, 2), 30 * 6),
        (FIRST, 6, lambda x: x.reshape(8, 15 * 6), 8 * 15 * 6),
    ],
)
def test_channels_are_those_of_one_element_along_axes_that_keep_them(
    start: torch.Tensor, inner: int, layout: Layout, left: int
) -> None:
    numbers = layout(start)
    kept = Separable(start).one_of_each(numbers, inner, 30)
    assert kept.numel() == left
    assert torch.equal(channels(kept, inner).expand(numbers.shape), channels(numbers, inner))


def test_a_view_of_the_start_is_not_gone_over_and_a_copy_is() -> None:
    for layout in (LAST.transpose(1, 2), LAST.transpose(1, 2).contiguous()):
        assert are_separable(layout)
        assert Separable(LAST)(layout)
    mixed = LAST.flatten()[torch.randperm(LAST.numel(), generator=torch.Generator().manual_seed(0))].reshape(4, 6, 30)
    assert not are_separable(mixed)
    assert Separable(LAST).one_of_each(mixed, 1, 30) is mixed
    # What another tensor holds is not known from where it lies.
    assert not Separable(LAST)(mixed)


@pytest.mark.parametrize(
    "numbers",
    [
        torch.cat([torch.full((4, 1, 30), -1), LAST], 1),
        # Both are sums of steps along their axes all the same.
        torch.cat([torch.full((4, 1, 1), -1), LAST[..., 29:]], 1)[:1],
        torch.tensor([[30, 15], [14, -1]]),
    ],
)
def test_what_holds_elements_of_nobody_is_left_whole(numbers: torch.Tensor) -> None:
    assert Separable(LAST).one_of_each(numbers, 1, 30) is numbers


def test_nothing_is_left_out_of_nothing() -> None:
    empty = LAST[:, :0]
    assert Separable(LAST).one_of_each(empty, 1, 30) is empty
