"""MLPs are found by what flows where: in hosts of libraries and in attentionless blocks as engineers write them."""

import pytest
import torch
import torch.nn.functional as F
from tiny_hosts import CASES
from torch import Tensor, nn

from armour_surgery.discover.mlps import find_mlps

EXAMPLE = {"x": torch.empty(2, 6, 20)}


class _Block(nn.Module):
    """A stream of 20 channels with something that has 32 hidden ones."""

    def __init__(self, hidden: int = 32, into: int | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(20, into or hidden)
        self.down = nn.Linear(hidden, 20)


class Gelu(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Packed(_Block):
    """Gate and value from one projection, the gate last."""

    def __init__(self) -> None:
        super().__init__(into=64)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return x + self.down(value * F.silu(gate))


class Gated(_Block):
    """Gate and value from projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Normed(_Block):
    """A BatchNorm after the first projection, an activation in place."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x).flatten(0, 1)).reshape(len(x), -1, 32)
        return x + self.down(self.act(hidden))


class Pointwise(nn.Module):
    """Convolutions of one place, on an image."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(20, 32, 1)
        self.down = nn.Conv2d(32, 20, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.mT.reshape(len(x), 20, 2, -1)
        return x + self.down(self.up(image).relu()).flatten(2).mT


class Written(_Block):
    """GELU as some write it, and dropout."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        hidden = 0.5 * hidden * (1 + torch.tanh(0.8 * (hidden + 0.04 * torch.pow(hidden, 3))))
        return x + F.dropout(self.down(F.dropout(hidden, 0.1, self.training)), 0.1, self.training)


class Mixes(_Block):
    """A LayerNorm lets hidden channels meet."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.layer_norm(self.up(x).relu(), (32,)))


class ReadTwice(_Block):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden) + hidden.mean(-1, keepdim=True)


class Shared(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.down(self.up(x).relu())).relu())


class Softmaxed(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).softmax(-1))


class Shuffled(_Block):
    """Hidden channels are added in pairs."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return x + self.down(hidden + hidden.flip(-1))


@pytest.mark.parametrize(
    ("kind", "firsts", "pieces"),
    [(Gelu, 1, 1), (Packed, 1, 2), (Gated, 2, 1), (Normed, 1, 1), (Pointwise, 1, 1), (Written, 1, 1)],
)
def test_whatever_acts_on_single_channels_may_lie_between(kind: type[nn.Module], firsts: int, pieces: int) -> None:
    (mlp,) = find_mlps(nn.ModuleDict({"block": kind()})["block"], EXAMPLE)
    assert (mlp.hidden, len(mlp.firsts)) == (32, firsts)
    assert {len(first.pieces) for first in mlp.firsts} == {pieces}
    assert mlp.second == "down"
    for first in mlp.firsts:
        rows = [row for piece in first.pieces for row in piece]
        assert sorted(rows) == list(range(32 * pieces))


@pytest.mark.parametrize("kind", [Mixes, ReadTwice, Shared, Softmaxed, Shuffled])
def test_where_channels_meet_or_are_read_elsewhere_there_is_none(kind: type[nn.Module]) -> None:
    assert find_mlps(kind(), EXAMPLE) == []


def test_a_hook_or_a_parametrization_keeps_an_mlp_as_it_is() -> None:
    hooked, pruned = Gelu(), Gelu()
    hooked.up.register_forward_hook(lambda module, args, output: None)
    torch.nn.utils.parametrizations.weight_norm(pruned.down)
    assert find_mlps(hooked, EXAMPLE) == find_mlps(pruned, EXAMPLE) == []


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit", 2),
        ("swin", 2),
        ("levit", 3),
        ("levit-conv", 3),
        ("beit", 2),
        ("dinov2", 2),
        ("hf-vit", 2),
        ("hf-dinov2", 2),
    ],
)
def test_every_block_of_the_libraries_has_one(name: str, count: int) -> None:
    case = CASES[name]
    found = find_mlps(case.build(), case.example())
    assert len(found) == count
    assert len({mlp.fqn for mlp in found}) == count
