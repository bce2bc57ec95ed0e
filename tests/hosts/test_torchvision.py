"""torchvision's attention: `torch.nn.MultiheadAttention`, and a function that fx is told not to look into."""

import pytest
import torch
from oracle import check, randomize
from torchvision_hosts import swin, vit


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
@pytest.mark.parametrize(("build", "size"), [(vit, 32), (swin, 64)])
def test_surgery_changes_nothing_where_the_projections_are_equal(build, size: int, mode: str) -> None:
    torch.manual_seed(0)
    model = randomize(build().double()).eval()
    batches = [{"x": torch.randn(count, 3, size, size, dtype=torch.float64)} for count in (2, 5)]
    assert max(check(model, mode, batches).values()) <= 1e-12
