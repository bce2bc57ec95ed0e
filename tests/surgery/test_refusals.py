"""A site whose channels something else has to see in full is refused, with the reason."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomize
from own_attentions import Pieces, Plain, UsesPacked
from shared_hosts import built
from tiny_hosts import CASES
from torch import nn

from armour_surgery import convert
from armour_surgery.errors import NothingToConvertError, UsageError
from armour_surgery.surgery.perform import surgery_of


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit-qk-norm", "basis of queries and keys"),
        ("eva02", "rotary"),
        ("hf-dinov3", "rotary"),
        ("levit", "takes concat-half"),
        ("hf-levit", "takes concat-half"),
    ],
)
def test_sites_without_a_free_basis_are_left_alone(name: str, words: str) -> None:
    host = CASES[name]
    model, sites = built(name)
    with pytest.raises(NothingToConvertError, match=words):
        convert(model, rank=5, example_input=host.example())
    fqns = [found.site.fqn for found in sites if host.auto in found.site.modes]
    rest = convert(model, rank={fqns[0]: 5}, example_input=host.example())
    refused = {site.fqn: site.reason for site in surgery_of(rest).refused}
    assert words in refused[fqns[0]]
    assert [site.fqn for site in surgery_of(rest).sites] == fqns[1:]


class NormBefore(Plain):
    """A LayerNorm over all heads' channels, before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(y))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.after(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Activation(NormBefore):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.out(y.tanh())


class Gate(NormBefore):
    """Each channel times a number of its own: linear, and still in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3, 1))

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.out((y.unflatten(-1, (3, 4)) * self.gate).flatten(2))


class KeepsResult(NormBefore):
    def after(self, y: torch.Tensor) -> Any:
        return self.out(y), y


class ScalesByWidth(NormBefore):
    """Takes the scale from the number of channels that are there."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.out(y)


class CountsChannels(ScalesByWidth):
    """Reshapes by the number of channels after it acted on them."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention((q * 0.5).reshape(len(q), 3, -1, 4), k, v)


class Checks(ScalesByWidth):
    """Makes sure that heads have the number of channels that it was built for."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.shape[-1] != 4:
            raise ValueError("wrong width")
        return F.scaled_dot_product_attention(q, k, v)


class Twice(ScalesByWidth):
    def after(self, y: torch.Tensor) -> torch.Tensor:
        return self.out(y) + self.out(y.flip(1))


class Outside(nn.Module):
    """The output projection is not in the module that attends."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ScalesByWidth()
        self.inner.out = nn.Identity()
        self.out = nn.Linear(12, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.inner(x))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (NormBefore, "out.weight stands something that is not linear"),
        (Activation, "out.weight stands something that is not linear"),
        (Gate, "between its heads and out.weight stands mul"),
        (KeepsResult, "between its heads and out.weight stands the module's output"),
        (ScalesByWidth, "depends on the number of channels a head has"),
        (CountsChannels, "counts on 4 channels a head"),
        (Checks, "counts on 4 channels a head"),
        (Twice, "uses out.weight 2 times"),
        (Outside, "not inside this module"),
        (UsesPacked, "basis of queries and keys"),
        (Pieces, "output of its projections"),
    ],
)
def test_what_needs_all_channels_is_refused(kind: type[nn.Module], words: str) -> None:
    model = randomize(kind())
    with pytest.raises(NothingToConvertError, match=words) as caught:
        convert(model, "qv", rank=3, example_input={"x": torch.randn(2, 6, 20)})
    assert "leave out rank" in str(caught.value)
    assert convert(model, "qv", example_input={"x": torch.randn(2, 6, 20)}) is not None


@pytest.mark.parametrize("rank", [13, 64])
def test_more_channels_than_there_are(rank: int) -> None:
    model = CASES["vit"].build()
    with pytest.raises(UsageError, match=rf"rank {rank} does not fit blocks.0.attn, .* have 12 channels \(key_dim\)"):
        convert(model, "qv", rank=rank, example_input=CASES["vit"].example())
    with pytest.raises(UsageError, match="blocks.1.attn"):
        convert(model, "qv", rank={"blocks.1.attn": rank}, example_input=CASES["vit"].example())
