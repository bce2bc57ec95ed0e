"""How alike Q, K and V are, and what sharing costs: numbers against plain loops, or a refusal."""

import copy
import math

import pytest
import torch
from oracle import merge
from shared_hosts import built
from tiny_hosts import CASES
from torch import Tensor, nn

from armour_surgery import convert, redundancy
from armour_surgery.copies import meta_copy
from armour_surgery.errors import AlreadyConvertedError, PatternError, TraceError, UsageError
from armour_surgery.likeness.compare import compare_layers
from armour_surgery.likeness.pairs import PAIRS, compare_pair, differences

# Numbers


def test_numbers_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    weights = {"q": torch.randn(2, 5, 3), "k": torch.randn(2, 5, 3), "v": torch.randn(2, 5, 4)}
    weights = {letter: weight.double() for letter, weight in weights.items()}
    for pair in PAIRS:
        first, second = (weights[letter][..., :3].flatten().tolist() for letter in pair)
        apart = [abs(abs(a) - abs(b)) for a, b in zip(first, second, strict=True)]
        every = [abs(abs(a) - abs(b)) for a in first for b in second]
        found = compare_pair(weights, pair, 0.3)
        assert found.channels == 3
        assert found.share == pytest.approx(100 * sum(one < 0.3 for one in apart) / 30)
        assert found.share_by_chance == pytest.approx(100 * sum(one < 0.3 for one in every) / 900)
        assert found.mean_abs_difference == pytest.approx(sum(apart) / 30)
        assert differences(weights, pair).flatten().tolist() == pytest.approx(apart)


def test_at_the_threshold_is_not_below_it() -> None:
    weights = {"q": torch.tensor([[[1.0, 2.0]]]), "k": torch.tensor([[[-1.5, 2.25]]])}
    found = compare_pair(weights, "qk", 0.5)
    assert found.share == 50.0
    assert found.share_by_chance == 25.0  # of 0.5, 1.25, 0.5, 0.25


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_a_threshold_must_be_above_zero(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"not above 0.*0\.01"):
        compare_pair({"q": torch.ones(1, 1, 1), "k": torch.ones(1, 1, 1)}, "qk", threshold)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="nan or inf"):
        compare_pair({"q": torch.full((1, 1, 1), math.nan), "k": torch.ones(1, 1, 1)}, "qk", 0.1)


# What sharing costs


@pytest.mark.parametrize(("mode", "pair"), [("qv", "qv"), ("qk", "qk"), ("kv", "kv")])
def test_equal_weights_are_wholly_alike_and_cost_nothing(vit: nn.Module, mode: str, pair: str) -> None:
    model = copy.deepcopy(vit)
    merge(model, mode, CASES["vit"].example(), built("vit")[1])
    for site in redundancy(model, example_input=CASES["vit"].example()):
        same = site.pairs[pair]
        assert (same.share, same.mean_abs_difference, same.mode) == (100.0, 0.0, mode)
        assert same.residual == pytest.approx(0, abs=1e-5)
        assert same.share_by_chance < 50
        others = [one for name, one in site.pairs.items() if name != pair]
        assert all(one.share < 50 and one.residual is not None and one.residual > 0.01 for one in others)


def test_the_residual_is_what_convert_reports(vit: nn.Module) -> None:
    wanted = {
        site.fqn: site.residual
        for site in convert(vit, "qv", init="joint-svd", example_input=CASES["vit"].example()).surgery.sites
    }
    before = copy.deepcopy(vit.state_dict())
    sites = redundancy(vit, example_input=CASES["vit"].example())
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert {site.fqn: site.residual for site in sites} == pytest.approx(wanted)
    assert all(site.mode == "qv" and site.residual == site.pairs["qv"].residual for site in sites)


def test_progress_and_patterns(vit: nn.Module) -> None:
    calls: list[tuple[str, int, int]] = []
    found = redundancy(
        vit, include="blocks.1*", example_input=CASES["vit"].example(), progress=lambda *call: calls.append(call)
    )
    assert [site.fqn for site in found] == ["blocks.1.attn"]
    assert [call[1:] for call in calls] == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(PatternError, match="'head'"):
        redundancy(vit, include="head", example_input=CASES["vit"].example())


# Refusals


def test_without_weights_there_is_nothing_to_compare(vit: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.attn are on the meta device"):
        redundancy(meta_copy(vit), example_input=CASES["vit"].example())


def test_a_converted_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(AlreadyConvertedError, match="converted already"):
        redundancy(convert(vit, example_input=CASES["vit"].example()))


@pytest.mark.parametrize("layer", ["2", "-1", "blocks.7.attn", "attn", ""])
def test_a_layer_that_there_is_not(vit: nn.Module, layer: str) -> None:
    with pytest.raises(UsageError, match=r"none of the 2 attention sites; give a number from 0 to 1.*blocks\.0\.attn"):
        compare_layers(vit, layer=layer, example_input=CASES["vit"].example())


class Summed(nn.Module):
    """An attention that cannot be followed: q, k and v are sums of what two layers make."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.low = nn.Linear(12, 36), nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.qkv(x) + self.low(x)).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class Mixed(nn.Module):
    def __init__(self, *kinds: type[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(kind() for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Plain(Summed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_what_cannot_be_followed_is_told() -> None:
    example = torch.empty(2, 5, 12)
    with pytest.raises(TraceError, match="none of the 1 attention sites could be followed"):
        redundancy(Mixed(Summed), example_input=example)
    model = Mixed(Summed, Plain)
    sites, layer = compare_layers(model, example_input=example)
    assert layer.fqn == "parts.1"
    assert sites[0].pairs == {}
    assert set(sites[0].skipped) == set(PAIRS)
    with pytest.raises(TraceError, match=r"parts\.0 could not be followed.*'parts\.1'"):
        compare_layers(model, layer="0", example_input=example)


LEVIT = ("levit_128s", "--no-pretrained", "--img-size", "64")
