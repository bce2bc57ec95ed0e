"""Errors weigh tokens as if they were repeated."""

import torch

from armour_surgery.measure.token_error import token_error


def test_a_token_of_weight_n_errs_like_n_tokens() -> None:
    torch.manual_seed(0)
    wanted, got = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    times = torch.tensor([3, 1, 2, 1, 4])
    repeated = token_error(got.repeat_interleave(times, 1), wanted.repeat_interleave(times, 1))
    torch.testing.assert_close(token_error(got, wanted, times[:, None]), repeated)
    assert not torch.isclose(token_error(got, wanted), repeated)
