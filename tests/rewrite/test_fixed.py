"""A projection with a fixed gauge is the Linear that it says it is, wherever its block lies."""

import pytest
import torch
from torch import nn

from armour_surgery.rewrite import AddFixed, KeepRows, edits_left
from armour_surgery.rewrite.fixed import FixedProjection


def projection(start: int, bias: bool = True) -> FixedProjection:
    torch.manual_seed(0)
    return FixedProjection(nn.Linear(10, 8, bias=bias), 2, start)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("start", [0, 3, 10])
def test_it_is_the_whole_map(start: int, bias: bool) -> None:
    fixed = projection(start, bias).double()
    whole = fixed.matrix()
    assert whole.shape == (2, 15, 4)
    assert torch.equal(whole[:, start : start + 4], torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    x = torch.randn(3, 7, 14, dtype=torch.float64)
    wanted = torch.einsum("bnc,hcd->bnhd", torch.cat([x, x.new_ones(3, 7, 1)], -1), whole).flatten(-2)
    assert torch.allclose(fixed(x), wanted, atol=1e-12)
    assert fixed(x).is_contiguous()
    others = [channel for channel in range(14) if not start <= channel < start + 4]
    assert fixed.other_channels().tolist() == others


@pytest.mark.parametrize("start", [0, 10])
def test_at_an_end_nothing_is_copied(start: int) -> None:
    seen: list[torch.Tensor] = []
    fixed = projection(start)
    fixed.rest.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 14)
    fixed(x)
    assert seen[0].untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_under_autocast_it_hands_out_what_a_linear_does() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert projection(3)(torch.randn(2, 14)).dtype == torch.bfloat16


def test_it_says_where_its_block_is() -> None:
    assert "heads=2, block=3:7" in repr(projection(3))


def test_edits_are_counted_among_the_rows_that_stayed() -> None:
    tensors = ("qkv.weight", "qkv.bias")
    added = AddFixed("fixed_projection", "qkv.weight", 1, 2, True)
    done = [KeepRows(tensors, (), (4, 5, 0, 1))]
    wanted = [added, KeepRows(tensors, (), (0, 1)), KeepRows(("other",), (), (3,))]
    assert edits_left(done, wanted) == [added, KeepRows(tensors, (), (2, 3)), KeepRows(("other",), (), (3,))]
    assert edits_left(wanted, wanted) == []
