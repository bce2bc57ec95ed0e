"""Calls of another kind than the one that a deployed attention was traced for: slower, and as right as before."""

import copy

import pytest
import torch
from deployed import double
from oracle import outputs, randomize, relative_error
from own_attentions import D, H, K
from torch import Tensor, nn

from armour_surgery import convert, deploy

TOKENS = torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SHOWN = torch.ones(2, 9, dtype=torch.bool)
PADDED = torch.arange(9).expand(2, 9) < 7


class Padded(nn.Module):
    """Attention that scales its logits, masks those that it is told to mask, and hands out its weights if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, H * K) for _ in range(3))
        self.out = nn.Linear(H * K, D)

    def forward(self, x: Tensor, mask: Tensor | None = None, with_weights: bool = False) -> tuple[Tensor, ...]:
        q, k, v = (layer(x).unflatten(-1, (H, K)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        logits = q @ k.transpose(-2, -1) / 3
        if mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1)
        result = self.out((weights @ v).transpose(1, 2).flatten(2))
        return (result, weights) if with_weights else (result,)


class Looking(nn.Module):
    """Whether there is a mask is seen from the numbers, as transformers' SuperGlue sees it from its keypoints."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Padded()
        randomize(self)
        self.double().eval()

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        mask = None if shown.all() else torch.zeros_like(x[:, None, :1, 0:1]).masked_fill(~shown[:, None, None], -1e9)
        return self.attention(x, mask)[0]


def deployed_from(model: nn.Module, example: dict[str, Tensor], passes: list[str] | None = None) -> nn.Module:
    deployed = deploy(model, example_input=example, passes=passes)
    assert deployed.deployment.count("fold-scale") > 0
    return deployed


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("shown", [SHOWN, PADDED])
def test_whether_there_is_a_mask_may_change_from_call_to_call(shown: Tensor, converted: bool) -> None:
    example = {"x": TOKENS, "shown": shown}
    model = convert(Looking(), "qv", example_input=example).eval() if converted else Looking()
    deployed = deployed_from(model, example)
    for batch in ({"x": TOKENS, "shown": SHOWN}, {"x": TOKENS, "shown": PADDED}):
        for used in (deployed, copy.deepcopy(deployed)):
            with torch.no_grad():
                assert relative_error(outputs(model, batch), outputs(used, batch)) < 1e-12


@pytest.mark.parametrize("passes", [["fold-scale"], ["fold-scale", "drop-key-bias"]])
def test_attentions_may_hand_out_their_weights(passes: list[str]) -> None:
    model = Looking()
    deployed = deployed_from(model, {"x": TOKENS, "shown": SHOWN}, passes)
    with torch.no_grad():
        expected = model.attention(TOKENS, with_weights=True)
        assert relative_error(expected, deployed.attention(TOKENS, with_weights=True)) < 1e-12


def test_another_kind_of_call_leaves_the_module_as_it_is() -> None:
    deployed = deployed_from(Looking(), {"x": TOKENS, "shown": SHOWN}).float()  # the copy follows to another type
    before = {name: tensor.clone() for name, tensor in deployed.state_dict().items()}
    kind = type(deployed.attention)
    with torch.no_grad():
        deployed(TOKENS.float(), PADDED)
    assert type(deployed.attention) is kind
    assert all(torch.equal(tensor, before[name]) for name, tensor in deployed.state_dict().items())


def test_an_attention_in_training_mode_computes_what_it_did() -> None:
    model, example = double("levit", False)
    normed = deploy(model, example_input=example, passes="fold-batch-norm")
    scaled = deployed_from(model, example, ["fold-batch-norm", "fold-scale"])
    tokens = torch.randn(2, 36, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, second = (each.stages[0].blocks[0].attn for each in (normed, scaled))
    first.train()
    second.train()
    with torch.no_grad():
        assert relative_error([first(tokens)], [second(tokens)]) < 1e-12


def test_calls_of_both_kinds_compile() -> None:
    torch._dynamo.reset()
    model = Looking()
    attention = deployed_from(model, {"x": TOKENS, "shown": SHOWN}).attention
    compiled = torch.compile(attention, backend="eager")
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.float64).masked_fill(~PADDED[:, None, None], -1e9)
    with torch.no_grad():
        for given in (None, mask):
            assert relative_error(model.attention(TOKENS, given), compiled(TOKENS, given)) < 1e-12
