"""The tracer that runs a module on stand-ins for tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armour_surgery.discover.recorded import trace_by_running
from armour_surgery.traced import Call


class Sampling(nn.Module):
    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return 2 * F.grid_sample(x, grid, align_corners=False)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Sampling()

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return 1 + self.inner(x, grid)


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("sizes", [(4, 6), (3, 4, 6)])
def test_shapes_that_are_told_without_asking_torch_are_those_that_torch_makes(
    sizes: tuple[int, ...], leaf: bool
) -> None:
    x, grid = torch.rand(2, 5, *(size + 1 for size in sizes)), torch.rand(2, *sizes, len(sizes))
    inputs = (x.to("meta"), grid.to("meta"))
    trace = trace_by_running(Around(), Call(inputs, {}), lambda *_: leaf)
    (result,) = [node for node in trace.graph.nodes if node.op == "output"][0].all_input_nodes
    wanted = Around()(x, grid)
    assert tuple(map(int, result.meta["value"].shape)) == wanted.shape
    assert result.meta["value"].dtype == wanted.dtype
