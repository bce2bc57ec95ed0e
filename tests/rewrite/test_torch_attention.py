"""torch's encoder layers compute with a rewritten `nn.MultiheadAttention` what they compute with their own."""

import copy
from functools import cache

import pytest
import torch
from oracle import merge, randomize
from torch import nn

from armour_surgery import convert, deploy
from armour_surgery.errors import SpecializationError

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")

TOKENS, WIDTH = 7, 24
MODES = ("qv", "qk", "qk-diag", "kv")


class Encoder(nn.Module):
    """Two layers of torch's, which go past the attention's forward in eval without gradients, and pad by nesting."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 40, dropout=0.1, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.head(self.layers(x, src_key_padding_mask=padding))


class Attends(nn.Module):
    """Self-attention of a module that is given."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x)[0]


def sequences(padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Three sequences of up to seven tokens, and which of these are padding."""
    x = torch.randn(3, TOKENS, WIDTH)
    return x, torch.arange(TOKENS) >= torch.tensor([[TOKENS], [5], [3]]) if padded else None


@cache
def pair(mode: str, norm_first: bool = False) -> tuple[nn.Module, nn.Module]:
    """Shared by tests: a model in which the mode changes nothing (but for `qk-diag`), and what it is converted to."""
    model = randomize(Encoder(norm_first)).eval()
    merge(model, mode, {"x": torch.empty(2, TOKENS, WIDTH, device="meta")})
    return model, convert(model, mode, example_input=torch.empty(2, TOKENS, WIDTH))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_an_encoder_layer_takes_no_way_of_its_own(mode: str, norm_first: bool, padded: bool) -> None:
    model, converted = pair(mode, norm_first)
    x, padding = sequences(padded)
    with torch.no_grad():
        got = converted(x, padding)
        expected = model(x, padding)
    # With gradients torch takes the slow way; nested, what stands at padding is no result.
    slow = converted(x, padding).detach()
    tokens = slice(None) if padding is None else ~padding
    assert torch.allclose(got[tokens], slow[tokens], atol=1e-5)
    assert torch.allclose(got, expected, atol=1e-5) is (mode != "qk-diag")


def test_training_is_what_it_was() -> None:
    model, converted = pair("qv")
    x, padding = sequences(padded=True)
    results = []
    for one in (model, converted):
        torch.manual_seed(1)
        results.append(copy.deepcopy(one).train()(x, padding))
    assert torch.allclose(*results, atol=1e-5)
    assert not torch.allclose(results[1], converted(x, padding), atol=1e-2)


@pytest.mark.parametrize("padded", [False, True])
def test_copies_and_deployed_models_answer_the_same(padded: bool) -> None:
    model, converted = pair("kv")
    x, padding = sequences(padded)
    deployed = deploy(converted, example_input=torch.empty(2, TOKENS, WIDTH))
    original = deploy(model, example_input=torch.empty(2, TOKENS, WIDTH))
    with torch.no_grad():
        for one in (copy.deepcopy(converted), deployed, original):
            assert torch.allclose(one(x, padding), model(x, padding), atol=1e-5)


def test_nested_tensors_are_taken_as_the_encoder_hands_them_on() -> None:
    model, converted = pair("qv")
    x, padding = sequences(padded=True)
    nested = torch.nested.as_nested_tensor([x[0], x[1, :5], x[2, :3]])
    with torch.no_grad():
        got, expected = (one.layers.layers[0](nested) for one in (converted, model))
        for ours, theirs in zip(got.unbind(), expected.unbind(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        attention = converted.layers.layers[0].self_attn
        with pytest.raises(SpecializationError, match="pass a padded tensor and its key_padding_mask"):
            attention(nested, nested, nested, key_padding_mask=padding)
        with pytest.raises(SpecializationError, match="nested tensors in self-attention"):
            attention(nested, copy.copy(nested), nested)


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("given", ["attn_mask", "key_padding_mask", "both"])
def test_masks_of_one_attention(given: str, floating: bool) -> None:
    model, converted = pair("qv")
    x, padding = sequences(padded=True)
    masks = {"attn_mask": torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), "key_padding_mask": padding}
    if floating:
        masks = {name: torch.zeros(mask.shape).masked_fill(mask, -9.0) for name, mask in masks.items()}
    chosen = masks if given == "both" else {given: masks[given]}
    with torch.no_grad():
        # Without masks alone the attention weights are followed: with them torch adds and multiplies in one step.
        both = [one.layers.layers[1].self_attn for one in (model, converted)]
        expected, got = (attention(x, x, x, need_weights=False, **chosen)[0] for attention in both)
        assert torch.allclose(got, expected, atol=1e-5)
        (_, expected), (_, got) = (attention(x, x, x) for attention in both)
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("named", ["padding", "mask"])
def test_a_mask_may_be_in_the_example(named: str) -> None:
    class Masked(Encoder):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.head(self.layers(x, mask=mask, is_causal=False))

    model = randomize(Encoder() if named == "padding" else Masked()).eval()
    x, padding = sequences(padded=True)
    assert padding is not None
    mask = padding if named == "padding" else torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    example = {"x": x, named: mask}
    merge(model, "qk", {name: value.to("meta") for name, value in example.items()})
    converted = convert(model, "qk", example_input=example)
    with torch.no_grad():
        assert torch.allclose(converted(x, mask), model(x, mask), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_drawn_anew(mode: str) -> None:
    drawn = nn.MultiheadAttention(WIDTH, 4, add_bias_kv=mode == "qk", batch_first=True)
    converted = convert(nn.Sequential(Attends(drawn)), mode, example_input=torch.empty(2, TOKENS, WIDTH))
    attention = converted[0].attention
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.fill_(torch.nan)
    attention._reset_parameters()
    attention.out_proj.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in attention.parameters())
    assert not attention.in_proj_bias.any()
