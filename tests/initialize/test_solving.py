"""Systems are solved on a GPU that is fast in float64, and on the CPU otherwise."""

import pytest
import torch

from armour_surgery.initialize.solving import solves_on


@pytest.mark.parametrize(("capability", "fast"), [((9, 0), True), ((8, 0), True), ((8, 9), False), ((12, 0), False)])
def test_where_float64_is_fast(capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert solves_on(gpu) == (gpu if fast else torch.device("cpu"))
    assert solves_on(torch.device("cpu")) == torch.device("cpu")
