"""A change of basis keeps what heads compute, and makes the block that was asked for the identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armour_surgery.initialize.gauge import Heads, best_block, changed, relative_error

# What K is made of, and V, in the modes.
MODES = {
    "qv": ("q", "k", (("q", 0, 5),)),
    "kv": ("k", "k", (("k", 0, 5),)),
    "qk": ("v", "q", (("v", 0, 7),)),
    "concat-half": ("q", "k", (("q", 0, 5), ("v", 0, 2))),
    "concat-full": ("q", "k", (("q", 0, 5), ("k", 0, 5), ("v", 0, 1))),
    "concat-key": ("k", "k", (("k", 0, 5), ("v", 0, 2))),
    "grouped": ("q", "k", (("q", 0, 5), ("grouped", 0, 3))),
}


def heads_of(mode: str, channels: int, seed: int) -> Heads:
    _, key, value = MODES[mode]
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = {"q": 5, key: 5} | {name: stop for name, _, stop in value if name != "grouped"}
    roles = {name: noise(3, channels + 1, width) for name, width in widths.items()}
    return Heads(roles, key, value, noise(3, sum(stop - start for _, start, stop in value), 6))


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(sorted(MODES)), channels=st.integers(8, 20), seed=st.integers(0, 2**20))
def test_another_basis_computes_the_same(mode: str, channels: int, seed: int) -> None:
    heads, letter = heads_of(mode, channels, seed), MODES[mode][0]
    start, condition = best_block(heads.roles[letter])
    other = changed(heads, letter, start)
    width = heads.roles[letter].shape[-1]
    block = other.roles[letter][:, start : start + width]
    assert torch.allclose(block, torch.eye(width, dtype=torch.float64).expand_as(block), atol=1e-9)
    # Grouped channels have no matrix here, and what the output reads of them stays.
    assert relative_error(other, heads, torch.float64) < 1e-12 * condition
    # Without the identity's rows, which the block of the tokens stands for.
    assert relative_error(other, heads, torch.float64, (letter, start)) < 1e-12 * condition
    assert not torch.equal(other.out, heads.out)
    for name in heads.roles.keys() - {"q", "k", letter}:
        assert torch.equal(other.roles[name], heads.roles[name])


def test_the_best_block_is_the_one_whose_worst_head_is_best() -> None:
    matrix = torch.full((2, 41, 4), 0.3, dtype=torch.float64)
    matrix[0, 8:12] = torch.diag(torch.tensor([1.0, 1, 1, 2]))
    matrix[1, 8:12] = torch.diag(torch.tensor([3.0, 1, 1, 1]))
    matrix[0, 16:20] = torch.eye(4)
    matrix[1, 16:20] = torch.diag(torch.tensor([9.0, 1, 1, 1]))
    assert best_block(matrix) == (8, pytest.approx(3))


def test_blocks_begin_at_multiples_of_eight_and_at_the_last_that_there_is() -> None:
    for place in (0, 16, 21):
        matrix = torch.zeros(1, 26, 4, dtype=torch.float64)
        matrix[0, place : place + 4] = torch.eye(4)
        assert best_block(matrix) == (place, pytest.approx(1))


def test_of_many_channels_not_every_block_is_tried() -> None:
    # 75 begin at multiples of 8, which is too many; half of them begin at multiples of 16.
    for place, found in ((592, True), (584, False)):
        matrix = torch.full((1, 601, 4), 0.1, dtype=torch.float64)
        matrix[0, place : place + 4] = torch.eye(4)
        assert (best_block(matrix)[1] == pytest.approx(1)) is found


def test_the_last_row_is_a_bias_and_no_channel() -> None:
    matrix = torch.zeros(1, 9, 4, dtype=torch.float64)
    matrix[0, 5:9] = torch.eye(4)
    assert best_block(matrix)[1] == float("inf")


def test_coarser_types_err_more() -> None:
    heads = heads_of("qv", 16, 0)
    errors = [relative_error(heads, heads, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    assert errors[0] == 0
    assert 1e-9 < errors[1] < 1e-5 < errors[2] < 0.1
