"""Attention that is written out is brought to the fused kernel only where nothing was changed in between."""

import pytest
import torch
from oracle import outputs, randomize, relative_error
from own_attentions import D, H, K
from torch import Tensor, nn

from armour_surgery import deploy
from armour_surgery.errors import NothingToDeployError

TOKENS = torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class WrittenOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, H * K) for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(9, 9))
        self.out = nn.Linear(H * K, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (H, K)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.transpose(-2, -1)
        weights = self.edited(logits, q, k).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return logits + self.bias


class PartWritten(WrittenOut):
    """A part of the logits is replaced (MViTv2: all but the class token's)."""

    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logits[..., 1:, 1:] = logits[..., 1:, 1:] + self.bias[1:, 1:]
        return logits


class PartAddedTo(WrittenOut):
    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logits[..., 1:].add_(self.bias[:, 1:])
        return logits


class AddedTo(WrittenOut):
    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logits.add_(self.bias)
        return logits


class QueriesUsedUp(WrittenOut):
    """What the product has been taken of is overwritten."""

    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q.mul_(2.0)
        return logits + self.bias


class KeysUsedUp(WrittenOut):
    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        k[:, 0] = 0.0
        return logits + self.bias


class TermUsedUp(WrittenOut):
    def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
        term = self.bias * 2.0
        sums = logits + term
        term.zero_()
        return sums


def net(kind: type[nn.Module]) -> nn.Module:
    return randomize(nn.Sequential(nn.LayerNorm(D), kind())).double().eval()


@pytest.mark.parametrize("kind", [PartWritten, PartAddedTo, AddedTo, QueriesUsedUp, KeysUsedUp, TermUsedUp])
def test_what_is_changed_in_place_stays_as_it_is_written(kind: type[nn.Module]) -> None:
    with pytest.raises(NothingToDeployError, match="in between|in place|goes? through"):
        deploy(net(kind), example_input=TOKENS, passes="fuse-attention")


def test_what_is_not_changed_is_fused_also_where_sizes_of_the_logits_are_read() -> None:
    class ReadsSize(WrittenOut):
        def edited(self, logits: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return logits + self.bias[: logits.shape[-2], : logits.shape[-1]]

    model = net(ReadsSize)
    deployed = deploy(model, example_input=TOKENS, passes="fuse-attention")
    with torch.no_grad():
        assert relative_error(outputs(model, {"input": TOKENS}), outputs(deployed, {"input": TOKENS})) < 1e-12
