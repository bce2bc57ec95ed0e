"""`convert` leaves the original alone and does what `plan` says; its numbers are those of the weights."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from own_attentions import SHAPE, Hidden, PerHead
from small_models import Own, refused, surgery_of, vit
from torch import nn

from armour_surgery import ArmourError, convert, inspect, plan, save
from armour_surgery.errors import FolderError, NoAttentionError, NothingToConvertError

# What it does


def test_the_original_stays_and_the_copy_is_of_its_class() -> None:
    model = vit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    converted = convert(model, mode="qv")
    assert converted is not model
    assert type(converted) is type(model)
    assert not hasattr(model, "surgery")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    kept = converted.state_dict()
    assert all(torch.equal(kept[key], before[key]) for key in kept if "qkv" not in key)


def test_inplace_returns_the_same_object() -> None:
    model = vit()
    expected = convert(model)
    blocks = list(model.children())
    converted = convert(model, inplace=True)
    assert converted is model
    assert all(a is b for a, b in zip(blocks, model.children(), strict=True))
    assert surgery_of(model) == surgery_of(expected)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), expected(x))


def test_the_surgery_survives_deepcopy() -> None:
    converted = convert(vit())
    twin = copy.deepcopy(converted)
    assert surgery_of(twin) == surgery_of(converted)
    twin.blocks[0].attn.qkv.weight.data.zero_()  # type: ignore[union-attr, index]
    assert converted.blocks[0].attn.qkv.weight.abs().sum() > 0  # type: ignore[union-attr, index]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(converted)(x), converted(x))


@pytest.mark.parametrize("mode", ["auto", "qv", "qk", "qk-diag", "kv"])
def test_the_plan_is_what_convert_does(mode: str) -> None:
    model = vit()
    wanted = plan(model, mode)
    done = surgery_of(convert(model, mode))
    assert all(site.residual is None for site in wanted.sites)
    assert all(site.residual is not None for site in done.sites)
    blank = replace(done, sites=tuple(replace(site, residual=None) for site in done.sites))
    assert wanted == blank
    assert not hasattr(model, "surgery")


def test_the_plan_takes_the_same_arguments() -> None:
    model = Own().eval()
    wanted = plan(model, "kv", include="mix*", example_input=(1, 3, 32, 32))
    done = surgery_of(convert(model, "kv", include="mix*", example_input=(1, 3, 32, 32)))
    assert wanted == replace(done, sites=tuple(replace(site, residual=None) for site in done.sites))


def test_a_refused_conversion_in_place_leaves_the_model_alone() -> None:
    model = vit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for arguments in ({"mode": "concat-half"}, {"include": "nowhere"}, {"init": "magic"}, {"mode": "magic"}):
        refused(ArmourError, lambda options=arguments: convert(model, inplace=True, **options))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not hasattr(model, "surgery")
    convert(model, inplace=True)


def test_a_mode_that_fits_nowhere_says_why() -> None:
    message = refused(NothingToConvertError, lambda: convert(vit(), "concat-half"))
    assert "'concat-half'" in message
    assert "blocks.0.attn" in message
    assert "use qv" in message


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet18"), lambda: nn.Linear(4, 4)], ids=["conv", "mlp"])
def test_a_model_without_attention(make: Callable[[], nn.Module]) -> None:
    example = None if make().__class__ is not nn.Linear else torch.zeros(2, 4)
    message = refused(NoAttentionError, lambda: convert(make(), example_input=example))
    assert "no attention" in message
    refused(NoAttentionError, lambda: inspect(make(), example_input=example))


# Numbers


def test_nothing_is_lost_where_the_weights_were_equal() -> None:
    model = vit()
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight[96:] = block.attn.qkv.weight[:48]
    assert [site.residual for site in surgery_of(convert(model, "qv")).sites] == [0.0] * 3
    assert all(site.residual > 0.5 for site in surgery_of(convert(model, "kv")).sites)  # type: ignore[operator]


@pytest.mark.parametrize(("mode", "old", "new"), [("qv", "v", "q"), ("kv", "v", "k"), ("qk", "k", "q")])
def test_the_residual_is_the_relative_distance_of_the_merged_weights(mode: str, old: str, new: str) -> None:
    model = vit(depth=1)
    weight = model.blocks[0].attn.qkv.weight  # type: ignore[union-attr, index]
    with torch.no_grad():
        # By hand: q = 1, k = 3, v = 4 everywhere.
        weight[:48], weight[48:96], weight[96:] = 1.0, 3.0, 4.0
    values = {"q": 1.0, "k": 3.0, "v": 4.0}
    [site] = surgery_of(convert(model, mode)).sites
    assert site.residual == pytest.approx(abs(values[old] - values[new]) / values[old], rel=1e-6)


def test_the_residual_of_random_weights() -> None:
    model = vit(depth=1)
    query, _, value = model.blocks[0].attn.qkv.weight.detach().double().chunk(3)  # type: ignore[union-attr, index]
    [site] = surgery_of(convert(model, "qv")).sites
    assert site.residual == pytest.approx(float((value - query).norm() / value.norm()), rel=1e-6)


def test_weights_that_are_zero_have_no_residual() -> None:
    model = vit(depth=1)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)  # type: ignore[union-attr, index, arg-type]
    [site] = surgery_of(convert(model, "qv")).sites
    assert site.residual == 0.0


def test_deit_tiny_has_the_papers_numbers() -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    surgery = plan(model, "qv")
    assert (surgery.params_before, surgery.params_after) == (5_717_416, 5_272_744)
    assert (surgery.macs_before, surgery.macs_after) == (1_253_683_200, 1_166_536_704)
    assert len(surgery.sites) == 12
    assert surgery.refused == ()
    saved = 192 * 192 + 192
    assert {site.params_before - site.params_after for site in surgery.sites} == {saved}
    assert {site.macs_before - site.macs_after for site in surgery.sites} == {197 * 192 * 192}
    assert surgery.params_before == sum(parameter.numel() for parameter in model.parameters())


def test_the_counts_are_those_of_the_converted_model() -> None:
    for mode in ("qv", "qk", "kv"):
        converted = convert(vit(), mode)
        surgery = surgery_of(converted)
        assert surgery.params_after == sum(parameter.numel() for parameter in converted.parameters())
        change = sum(site.params_before - site.params_after for site in surgery.sites)
        assert surgery.params_before - surgery.params_after == change
        assert surgery.macs_before - surgery.macs_after == sum(s.macs_before - s.macs_after for s in surgery.sites)


def test_a_plan_tells_what_convert_does() -> None:
    model = Hidden(PerHead())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    planned = plan(model, "qv", example_input=torch.empty(SHAPE))
    done = convert(model, "qv", example_input=torch.empty(SHAPE)).surgery
    assert [site.fqn for site in planned.sites] == ["inner"]
    assert planned.sites[0].residual is None
    assert (planned.params_before, planned.params_after) == (done.params_before, done.params_after)
    assert (planned.macs_before, planned.macs_after) == (done.macs_before, done.macs_after)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_that_a_model_with_pruned_heads_cannot_be_saved_is_said_at_once(tmp_path: Path) -> None:
    model = vit()
    attention = model.blocks[1].attn
    # As structured pruning leaves it: two heads of four, so that heads times their size is not the width.
    attention.qkv, attention.proj = nn.Linear(48, 3 * 24), nn.Linear(24, 48)
    attention.num_heads, attention.attn_dim = 2, 24
    with pytest.warns(UserWarning, match=r"cannot be saved, since timm .* blocks.1.attn.qkv.weight is \(72, 48\)"):
        converted = convert(model, "qv")
    assert len(surgery_of(converted).sites) == 3
    assert converted(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    message = refused(FolderError, lambda: save(converted, tmp_path / "out"))
    assert "blocks.1.attn had 4,728 parameters before its conversion, and has 9,408" in message
    assert "state_dict()" in message


def test_inspect_promises_of_auto_what_convert_keeps() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = PerHead(), PerHead()
            self.second.foo = self.first.foo

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    first, second = inspect(Tied(), example_input=torch.empty(SHAPE, device="meta"))
    assert "qv" not in first.modes + second.modes
    assert "is shared with second.foo" in first.refused["qv"]
