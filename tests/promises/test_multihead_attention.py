"""`nn.MultiheadAttention`, however it is called, converts exactly where a mode fits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import check, merge, outputs, randomize, relative_error
from torch import Tensor, nn

from armour_surgery import convert, deploy, inspect, load, save
from armour_surgery.errors import NothingToConvertError

D, H, N, M = 24, 4, 5, 7  # channels, heads, tokens that ask, tokens that are asked
ALL_THREE = ("qv", "qk", "kv")


class Host(nn.Module):
    """Calls its attention in one of the usual ways (see `forward`), with fixed options."""

    def __init__(self, way: str, options: dict[str, Any] | None = None, **layer: Any) -> None:
        super().__init__()
        layer.setdefault("batch_first", True)
        self.attention = nn.MultiheadAttention(D, H, dropout=0.2, **layer)
        self.probe = nn.Parameter(torch.randn(1, 3, D)) if way == "probe" else None
        self.way, self.options = way, options or {}

    def forward(self, x: Tensor, y: Tensor | None = None, **masks: Tensor) -> Any:
        if self.way == "self":
            given = (x, x, x)
        elif self.way == "detr":  # positions are added to what asks and is asked, and not to the values
            asking = x + 1
            given = (asking, asking, x)
        elif self.way == "values":
            given = (x, x + 1, x)
        elif self.way == "probe":
            assert self.probe is not None
            given = (self.probe.expand(x.shape[0], -1, -1), x, x)
        else:
            given = (x, y, y)
        return self.attention(*given, **masks, **self.options)


FITTING = {"self": ALL_THREE, "detr": ("qk",), "values": ("qv",), "cross": ("kv",), "probe": ("kv",)}
EVERY = [(way, mode) for way, modes in FITTING.items() for mode in modes]


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def batch(way: str, images: int = 2, asking: int = N, asked: int = M, batch_first: bool = True) -> dict[str, Tensor]:
    sizes = (images, asking), (images, asked)
    x, y = (numbers(*(size if batch_first else size[::-1]), D) for size in sizes)
    return {"x": x, "y": y} if way == "cross" else {"x": x}


def batches(way: str, **options: Any) -> list[dict[str, Tensor]]:
    return [batch(way, **options), batch(way, 3, 6, 4, **options), batch(way, 1, 4, 6, **options)]


def host(way: str, *rest: Any, **layer: Any) -> nn.Module:
    return randomize(Host(way, *rest, **layer)).double().eval()


def assert_exact(model: nn.Module, mode: str, given: list[dict[str, Tensor]]) -> None:
    errors = check(model, mode, given)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("way", FITTING)
def test_the_modes_that_fit(way: str) -> None:
    (site,) = inspect(host(way), example_input=batch(way))
    assert tuple(mode for mode in site.modes if mode != "qk-diag") == FITTING[way]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("way", "mode"), EVERY)
def test_every_way_of_calling_it(way: str, mode: str, need_weights: bool) -> None:
    assert_exact(host(way, {"need_weights": need_weights}), mode, batches(way))


@pytest.mark.parametrize(("way", "mode"), [pair for pair in EVERY if pair[0] != "probe"])
def test_tokens_first(way: str, mode: str) -> None:
    assert_exact(host(way, batch_first=False), mode, batches(way, batch_first=False))


LAYERS: list[dict[str, Any]] = [
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
]


@pytest.mark.parametrize("layer", LAYERS, ids="+".join)
@pytest.mark.parametrize(("way", "mode"), [("self", "qv"), ("self", "kv"), ("detr", "qk"), ("cross", "kv")])
def test_keys_that_come_from_no_token_stay(layer: dict[str, Any], way: str, mode: str) -> None:
    assert_exact(host(way, **layer), mode, batches(way))


def test_keys_that_are_added_leave_no_diagonal() -> None:
    (site,) = inspect(host("self", add_bias_kv=True), example_input=batch("self"))
    assert "5 tokens ask 6 keys" in site.refused["qk-diag"]


@pytest.mark.parametrize("bias", [True, False])
def test_keys_and_values_of_another_width(bias: bool) -> None:
    model = host("cross", kdim=20, vdim=20, bias=bias)
    given = [{"x": one["x"], "y": one["y"][..., :20]} for one in batches("cross")]
    assert_exact(model, "kv", given)
    converted = convert(model, "kv", example_input=given[0]).attention
    assert converted.v_proj_weight is None
    assert converted.k_proj_weight.shape == (D, 20)
    assert not bias or converted.in_proj_bias.shape == (2 * D,)


def masks(way: str, images: int, asking: int, asked: int, kind: str) -> dict[str, Tensor]:
    keys = asked if way == "cross" else asking
    attention = torch.rand(asking, keys, generator=torch.Generator().manual_seed(asking)) < 0.3
    attention[:, 0] = False
    padding = torch.arange(keys) >= torch.tensor([[keys], [keys - 2], [keys - 1]])[:images]
    given = {"attn_mask": attention, "key_padding_mask": padding}
    if kind == "for each head":
        given = {"attn_mask": attention.expand(images * H, -1, -1)}
    elif kind != "both":
        del given["attn_mask" if kind == "padding" else "key_padding_mask"]
    return given


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    ("kind", "floating"), [("mask", False), ("padding", True), ("both", True), ("both", False), ("for each head", True)]
)
@pytest.mark.parametrize(("way", "mode"), [("self", "qv"), ("detr", "qk"), ("cross", "kv")])
def test_masks(way: str, mode: str, kind: str, floating: bool, need_weights: bool) -> None:
    given = []
    for images, asking, asked in ((2, N, M), (3, 6, 4)):
        masked = masks(way, images, asking, asked, kind)
        if floating:
            masked = {name: torch.zeros(mask.shape).double().masked_fill(mask, -7.0) for name, mask in masked.items()}
        given.append(batch(way, images, asking, asked) | masked)
    assert_exact(host(way, {"need_weights": need_weights}), mode, given)


class Causal(Host):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.attention(x, x, x, attn_mask=mask, is_causal=True, **self.options)


@pytest.mark.parametrize("options", [{"need_weights": False}, {"average_attn_weights": False}], ids="+".join)
def test_a_causal_mask(options: dict[str, Any]) -> None:
    model = randomize(Causal("self", options)).double().eval()
    for mode in ALL_THREE:
        assert_exact(model, mode, batches("self"))


@pytest.mark.parametrize(("way", "mode"), [("self", "qv"), ("cross", "kv")])
def test_a_sequence_without_a_batch(way: str, mode: str) -> None:
    alone = [{name: value[0] for name, value in one.items()} for one in batches(way)]
    assert_exact(host(way), mode, [*alone, batch(way)])


class ByHand(nn.Module):
    """Hands its own parameters to torch's function; the first tokens ask all."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(3 * D, D))
        self.offset = nn.Parameter(torch.randn(3 * D))
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        given = (D, H, self.packed, self.offset, None, None, False, 0.0, self.out.weight, self.out.bias)
        first = x[:1]
        return F.multi_head_attention_forward(first, x, x, *given, training=self.training)[0]


class Sliced(nn.Module):
    """Three Linears in one, applied one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(D, 3 * D)

    def part(self, x: Tensor, index: int) -> Tensor:
        rows = slice(index * D, (index + 1) * D)
        return F.linear(x, self.packed.weight[rows], self.packed.bias[rows])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.part(x, index).unflatten(-1, (H, -1)).transpose(1, 2) for index in range(3))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Gated(Sliced):
    """A fourth block of rows belongs to none of q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Linear(D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.part(x, 3).sigmoid()


class Overlapping(Sliced):
    """K's rows begin before Q's end."""

    def part(self, x: Tensor, index: int) -> Tensor:
        start = max(0, index * D - 4)
        return F.linear(x, self.packed.weight[start : start + D], self.packed.bias[start : start + D])


@pytest.mark.parametrize(("kind", "mode"), [(ByHand, "kv"), *((Sliced, mode) for mode in ALL_THREE)])
def test_slices_of_weights_that_hosts_cut_themselves(kind: type[nn.Module], mode: str) -> None:
    assert_exact(randomize(kind()).double().eval(), mode, batches("self"))


@pytest.mark.parametrize(
    ("kind", "reason"), [(Gated, "packed.weight for something other"), (Overlapping, "the same rows of packed.weight")]
)
def test_slices_that_others_need_are_left_alone(kind: type[nn.Module], reason: str) -> None:
    with pytest.raises(NothingToConvertError, match=reason):
        convert(randomize(kind()).double(), "qv", example_input=batch("self"))


def test_what_is_left_is_named_as_it_was() -> None:
    model = host("cross")
    merge(model, "kv", batch("cross"))
    converted = convert(model, "kv", example_input=batch("cross"))
    attention = converted.attention
    assert attention.in_proj_weight.shape == (2 * D, D)
    assert attention.in_proj_bias.shape == (2 * D,)
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert "in_proj_weight.narrow(0, 24, 24)" in attention.code
    # What the values were made of is gone; queries and keys are where they were.
    assert torch.equal(attention.in_proj_weight, model.attention.in_proj_weight[: 2 * D])


def test_a_folder_carries_it(tmp_path: Path) -> None:
    """The pooling head of SigLIP: a learned token asks all others, through torch's own attention."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=D, intermediate_size=32, num_hidden_layers=1, num_attention_heads=H, image_size=16, patch_size=8
    )
    model = randomize(SiglipVisionModel(config)).eval()
    images = {"pixel_values": torch.randn(2, 3, 16, 16)}
    errors = check(model, "kv", [images])
    assert max(errors.values()) <= 1e-5, errors
    converted = convert(model, "kv", example_input=images)
    assert [site.fqn for site in converted.surgery.sites] == ["encoder.layers.0.self_attn", "head.attention"]
    save(converted, tmp_path / "model")
    again = load(tmp_path / "model")
    with torch.no_grad():
        assert relative_error(outputs(converted, images), outputs(again, images)) == 0


class Pooled(nn.Module):
    """Learned tokens ask those of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, 4)
        self.inner = Host("probe", {"need_weights": False})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.patches(x).flatten(2).transpose(1, 2))[0]


def test_calibration_lowers_the_error() -> None:
    model = randomize(Pooled()).eval()
    images = torch.randn(128, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    errors = {}
    for init in ("wq", "calibrated"):
        given = {"calibration": images[:96].split(16)} if init == "calibrated" else {}
        converted = convert(model, "kv", init=init, example_input=images[:2], **given)
        with torch.no_grad():
            errors[init] = relative_error(outputs(model, {"x": images[96:]}), outputs(converted, {"x": images[96:]}))
    assert errors["calibrated"] < 0.3 * errors["wq"]


@pytest.mark.parametrize(("way", "mode"), [pair for pair in EVERY if pair[0] != "self"])
def test_a_deployed_one_answers_the_same(way: str, mode: str) -> None:
    model = host(way)
    converted = convert(model, mode, example_input=batch(way))
    deployed = deploy(converted, example_input=batch(way))
    with torch.no_grad():
        assert relative_error(outputs(converted, batch(way)), outputs(deployed, batch(way))) <= 1e-9


@pytest.mark.parametrize(("way", "mode"), EVERY)
def test_a_training_step(way: str, mode: str) -> None:
    converted = copy.deepcopy(convert(host(way), mode, example_input=batch(way))).train()
    outputs(converted, batch(way, 3))[0].square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in converted.parameters())
