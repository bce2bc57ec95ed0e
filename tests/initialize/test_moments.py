"""Regressions weigh rows as if they were repeated, and take rounding for no error."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armour_surgery.initialize.moments import Regression


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(6, 12), st.booleans(), st.integers(0, 2**16))
def test_a_row_of_weight_n_counts_like_n_rows(inputs: int, outputs: int, rows: int, biases: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(rows, inputs, dtype=torch.float64), torch.randn(rows, outputs, dtype=torch.float64)
    times = torch.randint(1, 4, (rows,))
    present = torch.randn(inputs + biases, outputs, dtype=torch.float64)
    weighted, repeated = Regression(present, biases), Regression(present, biases)
    for held_out in (False, True):
        weighted.add(x, y, held_out, weights=times[:, None])
        repeated.add(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), held_out)
    for found, wanted in zip(weighted.solve(), repeated.solve(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_where_all_targets_are_alike_rounding_is_no_error() -> None:
    torch.manual_seed(0)
    regression = Regression(torch.tensor([[0.0], [0.0], [3.0]], dtype=torch.float64), biases=True)
    for held_out in (False, True):
        targets = 3.0 + 1e-7 * torch.randn(7, 1, dtype=torch.float64)
        regression.add(torch.randn(7, 2, dtype=torch.float64), targets, held_out)
    assert regression.solve()[1] < 1e-3
