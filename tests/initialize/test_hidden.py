"""Which hidden channels stay: those that the others cannot make up for; and the second layer of least squares."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armour_surgery.initialize.hidden import eliminate


def _layer(hidden: int, outputs: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Activations on tokens `[T, n]`, and a second layer `[n, E]`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, dtype=torch.float64, generator=generator)
    inputs = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator) @ mixing
    return inputs.relu(), torch.randn(hidden, outputs, dtype=torch.float64, generator=generator)


def _moment(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def _lost(moment: Tensor, weight: Tensor, kept: tuple[int, ...]) -> float:
    """The share of the squared output that least squares on these channels leave out."""
    places = torch.tensor(kept)
    new = torch.linalg.solve(moment[places][:, places], moment[places] @ weight)
    error = weight - torch.zeros_like(weight).index_copy(0, places, new)
    return float((error * (moment @ error)).sum() / (weight * (moment @ weight)).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(9, 40), st.integers(1, 6), st.integers(0, 1000))
def test_what_is_lost_grows_as_channels_go_and_is_what_least_squares_lose(hidden: int, outputs: int, seed: int) -> None:
    inputs, weight = _layer(hidden, outputs, 4 * hidden, seed)
    moment = _moment(inputs)
    found = eliminate(moment, weight)
    assert sorted(found.order) == list(range(hidden))
    counts = sorted(found.lost, reverse=True)
    assert counts[0] == hidden
    assert counts[1:] == list(range(8 * ((hidden - 1) // 8), 0, -8))
    lost = [found.lost[count] for count in counts]
    assert lost[0] == 0
    assert lost == sorted(lost)
    for count in counts[1:]:
        kept = found.kept(count)
        assert len(kept) == count
        assert kept == tuple(sorted(kept))
        # Least squares without the ridge lose at most as much.
        assert _lost(moment, weight, kept) <= found.lost[count] + 1e-9


def test_channels_that_others_make_up_for_go_first_and_cost_nothing() -> None:
    inputs, weight = _layer(16, 5, 400, 0)
    copies = torch.cat([inputs, inputs @ torch.randn(16, 8, dtype=torch.float64)], dim=1)
    weight = torch.cat([weight, torch.randn(8, 5, dtype=torch.float64)])
    found = eliminate(_moment(copies), weight)
    # The ridge weighs in a little: no combination of channels is quite the same as another.
    assert found.lost[16] < 0.02 < found.lost[8]


def test_channels_that_nothing_reads_go_first() -> None:
    inputs, weight = _layer(24, 5, 400, 1)
    unread = [1, 5, 6, 10, 11, 17, 20, 23]
    weight[unread] = 0
    assert set(eliminate(_moment(inputs), weight).order[:8]) == set(unread)


def test_it_is_near_the_best_choice_of_all() -> None:
    """Against every choice of eight of twelve channels."""
    shares = []
    for seed in range(12):
        inputs, weight = _layer(12, 4, 300, seed)
        moment = _moment(inputs)
        every = sorted(_lost(moment, weight, kept) for kept in combinations(range(12), 8))
        found = _lost(moment, weight, eliminate(moment, weight).kept(8))
        shares.append(sum(other < found - 1e-12 for other in every) / len(every))
    assert sorted(shares)[len(shares) // 2] < 0.02  # in the middle of all seeds, better than 98 % of the choices
    assert max(shares) < 0.15


def test_outputs_that_count_more_decide() -> None:
    inputs, weight = _layer(16, 2, 300, 3)
    weight[:8, 1] = weight[8:, 0] = 0  # the first half makes one output, the second half the other
    moment = torch.eye(16, dtype=torch.float64)
    for output, half in ((0, range(8)), (1, range(8, 16))):
        scale = torch.full((2,), 0.1, dtype=torch.float64)
        scale[output] = 1
        assert eliminate(moment, weight * scale).kept(8) == tuple(half)


@pytest.mark.parametrize("hidden", [8, 5])
def test_an_mlp_as_narrow_as_a_step_keeps_what_it_has(hidden: int) -> None:
    inputs, weight = _layer(hidden, 3, 50, 0)
    assert eliminate(_moment(inputs), weight).lost == {hidden: 0.0}
