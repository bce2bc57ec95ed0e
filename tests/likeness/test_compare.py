"""How alike Q, K and V are: numbers against plain loops, whatever the layout; the figure, and the command."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import document, failed, good
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from oracle import merge
from tiny_hosts import CASES
from torch import Tensor, nn

import armour_surgery
from armour_surgery import convert, inspect, redundancy
from armour_surgery.copies import meta_copy
from armour_surgery.errors import AlreadyConvertedError, PatternError, TraceError, UsageError
from armour_surgery.likeness.compare import compare_layers
from armour_surgery.likeness.figure import redundancy_figure
from armour_surgery.likeness.pairs import PAIRS, compare_pair, differences

EXAMPLE = {name: CASES[name].example() for name in CASES}


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return CASES["vit"].build()


@pytest.fixture(scope="module")
def levit() -> nn.Module:
    return CASES["levit"].build()


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


# Layouts: what discovery found against what each library documents


def packed(weight: Tensor, heads: int) -> dict[str, Tensor]:
    """timm's ViT: `[3, H, d]` rows."""
    rows = weight.detach().double().unflatten(0, (3, heads, -1))
    return {letter: rows[place].mT for place, letter in enumerate("qkv")}


def test_timm_vit_is_packed_by_role(vit: nn.Module) -> None:
    _, layer = compare_layers(vit, layer="1", include="blocks.*", example_input=EXAMPLE["vit"])
    assert layer.fqn == "blocks.1.attn"
    wanted = packed(vit.blocks[1].attn.qkv.weight, 4)
    assert all(torch.equal(layer.weights[letter], wanted[letter]) for letter in "qkv")
    assert layer.weights["q"].shape == (4, 48, 12)


def test_transformers_vit_has_three_layers() -> None:
    model = CASES["hf-vit"].build()
    sites, layer = compare_layers(model, example_input=EXAMPLE["hf-vit"], threshold=0.05)
    projections = {site.fqn: site for site in inspect(model, example_input=EXAMPLE["hf-vit"])}[layer.fqn]
    for letter in "qkv":
        name = getattr(projections, letter).fqn
        wanted = model.get_submodule(name).weight.detach().double().unflatten(0, (4, 12)).mT
        assert torch.equal(layer.weights[letter], wanted)
    first, second = (layer.weights[letter].abs() for letter in "qv")
    below = ((first - second).abs() < 0.05).double().mean()
    assert sites[0].pairs["qv"].share == pytest.approx(100 * float(below))


def test_levit_is_packed_by_head_with_its_batch_norm(levit: nn.Module) -> None:
    """Keys of 8 and values of 16 channels: V's first 8 meet Q and K."""
    sites, layer = compare_layers(levit, example_input=EXAMPLE["levit"])
    block = levit.get_submodule(layer.fqn).qkv
    scale = block.bn.weight / (block.bn.running_var + block.bn.eps).sqrt()
    rows = (block.linear.weight * scale[:, None]).detach().double().unflatten(0, (3, 32))
    for letter, start, stop in (("q", 0, 8), ("k", 8, 16), ("v", 16, 32)):
        torch.testing.assert_close(layer.weights[letter], rows[:, start:stop].mT, rtol=1e-5, atol=1e-7)
    first = sites[0]
    assert (first.key_dim, first.value_dim, first.mode) == (8, 16, "concat-half")
    assert {pair: one.channels for pair, one in first.pairs.items()} == dict.fromkeys(PAIRS, 8)
    assert {pair: one.mode for pair, one in first.pairs.items()} == {"qk": "qk", "kv": None, "qv": "concat-half"}
    assert "needs equal sizes" in str(first.pairs["kv"].refused)
    # The shrinking block: weights can be compared, nothing can be shared.
    shrinking = next(site for site in sites if site.kind == "downsampling")
    assert shrinking.mode is shrinking.residual is None
    assert set(shrinking.pairs) == set(PAIRS)
    assert all("downsampling" in str(shrinking.pairs[pair].refused) for pair in ("qk", "qv"))


def test_roles_that_cannot_meet_say_why() -> None:
    class Grouped(nn.Module):
        """Six heads of queries for two of keys and values, from tokens of another width."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(30, 24), nn.Linear(20, 8), nn.Linear(20, 8)

        def forward(self, x: Tensor) -> Tensor:
            short = x[..., :20]
            q = self.q(x).unflatten(-1, (6, 4)).transpose(1, 2)
            k, v = (part(short).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.k, self.v))
            return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    [site] = redundancy(Grouped(), example_input=torch.empty(2, 7, 30))
    assert set(site.pairs) == {"kv"}
    assert all("different numbers of heads (6 and 2)" in site.skipped[pair] for pair in ("qk", "qv"))
    alone = site.pairs["kv"]
    assert (alone.channels, alone.mode, alone.residual) == (4, "kv", None)
    assert "no closed form" in str(alone.refused)


# What sharing costs


@pytest.mark.parametrize(("mode", "pair"), [("qv", "qv"), ("qk", "qk"), ("kv", "kv")])
def test_equal_weights_are_wholly_alike_and_cost_nothing(vit: nn.Module, mode: str, pair: str) -> None:
    model = copy.deepcopy(vit)
    merge(model, mode, EXAMPLE["vit"])
    for site in redundancy(model, example_input=EXAMPLE["vit"]):
        same = site.pairs[pair]
        assert (same.share, same.mean_abs_difference, same.mode) == (100.0, 0.0, mode)
        assert same.residual == pytest.approx(0, abs=1e-5)
        assert same.share_by_chance < 50
        others = [one for name, one in site.pairs.items() if name != pair]
        assert all(one.share < 50 and one.residual is not None and one.residual > 0.01 for one in others)


def test_the_residual_is_what_convert_reports(vit: nn.Module) -> None:
    wanted = {
        site.fqn: site.residual
        for site in convert(vit, "qv", init="joint-svd", example_input=EXAMPLE["vit"]).surgery.sites
    }
    before = copy.deepcopy(vit.state_dict())
    sites = redundancy(vit, example_input=EXAMPLE["vit"])
    assert all(torch.equal(before[name], tensor) for name, tensor in vit.state_dict().items())
    assert {site.fqn: site.residual for site in sites} == pytest.approx(wanted)
    assert all(site.mode == "qv" and site.residual == site.pairs["qv"].residual for site in sites)


def test_progress_and_patterns(vit: nn.Module) -> None:
    calls: list[tuple[str, int, int]] = []
    found = redundancy(
        vit, include="blocks.1*", example_input=EXAMPLE["vit"], progress=lambda *call: calls.append(call)
    )
    assert [site.fqn for site in found] == ["blocks.1.attn"]
    assert [call[1:] for call in calls] == [(0, 3), (1, 3), (2, 3)]
    with pytest.raises(PatternError, match="'head'"):
        redundancy(vit, include="head", example_input=EXAMPLE["vit"])


# Refusals


def test_without_weights_there_is_nothing_to_compare(vit: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"blocks\.0\.attn are on the meta device"):
        redundancy(meta_copy(vit), example_input=EXAMPLE["vit"])


def test_a_converted_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(AlreadyConvertedError, match="converted already"):
        redundancy(convert(vit, example_input=EXAMPLE["vit"]))


@pytest.mark.parametrize("layer", ["2", "-1", "blocks.7.attn", "attn", ""])
def test_a_layer_that_there_is_not(vit: nn.Module, layer: str) -> None:
    with pytest.raises(UsageError, match=r"none of the 2 attention sites; give a number from 0 to 1.*blocks\.0\.attn"):
        compare_layers(vit, layer=layer, example_input=EXAMPLE["vit"])


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


# The figure


def texts(figure: Figure) -> list[Text]:
    """What can be read in a figure, after drawing; ticks outside an axis have labels too, which are not drawn."""
    FigureCanvasAgg(figure).draw()
    hidden: list[Text] = []
    for axes in figure.findobj(Axes):
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden += [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
    return [one for one in figure.findobj(Text) if one.get_text().strip() and one.get_visible() and one not in hidden]


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    written = [(one.get_text(), one.get_window_extent()) for one in texts(figure)]
    inside = figure.bbox
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 for _, box in written)
    return [
        (a, b)
        for place, (a, first) in enumerate(written)
        for b, second in written[place + 1 :]
        if first.shrunk(0.98, 0.9).overlaps(second.shrunk(0.98, 0.9))
    ]


def test_the_figure_shows_the_layer_and_all_layers(vit: nn.Module) -> None:
    sites, layer = compare_layers(vit, layer="blocks.1.attn", example_input=EXAMPLE["vit"], threshold=0.02)
    figure = redundancy_figure(sites, layer.fqn, layer.weights, 0.02, "tiny $ViT, blocks.1.attn")
    assert overlapping(figure) == []
    written = [one.get_text() for one in texts(figure)]
    share = sites[1].pairs["qk"]
    assert f"{share.share:.1f} % below 0.02, by chance {share.share_by_chance:.1f} %" in written
    assert r"tiny \$ViT, blocks.1.attn" in written
    images = [axes.images[0].get_array() for axes in figure.findobj(lambda one: bool(getattr(one, "images", None)))]
    assert [image.shape for image in images] == [(48, 48)] * 3
    shown = differences(layer.weights, "qk").permute(1, 0, 2).reshape(48, 48)
    assert torch.equal(torch.as_tensor(images[0]), shown)


def test_many_layers_with_long_names_do_not_overlap(vit: nn.Module) -> None:
    sites, layer = compare_layers(vit, example_input=EXAMPLE["vit"])
    first = replace(sites[0], pairs={"kv": sites[0].pairs["kv"]}, skipped=dict.fromkeys(("qk", "qv"), "word " * 30))
    many = [first, *(replace(sites[1], fqn=f"stages.{number % 5}.odd{number}.attention") for number in range(60))]
    title = "some-organization/a-model-with-a-long-name-that-goes-on_patch16_clip_224.source_in21k_ft_in1k"
    figure = redundancy_figure(many, first.fqn, layer.weights, 0.0125, f"{title}\n(random weights)")
    assert overlapping(figure) == []


# The command


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


LEVIT = ("levit_128s", "--no-pretrained", "--img-size", "64")
VIT = ("test_vit", "--no-pretrained")


def test_one_document_and_a_figure(tiny: Path) -> None:
    found = document("redundancy", *VIT, "--out", "figure.png", "--layer", "3", "--threshold", "0.02")
    assert (found["model"], found["weights"], found["threshold"]) == ("test_vit", "random", 0.02)
    assert (found["layer"], found["out"]) == (found["sites"][3]["fqn"], "figure.png")
    for site in found["sites"]:
        assert {"fqn", "kind", "num_heads", "key_dim", "value_dim", "pairs", "mode", "residual"} <= set(site)
        for pair in PAIRS:
            one = site["pairs"][pair]
            assert 0 <= one["share"] <= 100
            assert abs(one["share"] - one["share_by_chance"]) < 5  # random weights
            assert one["mean_abs_difference"] > 0
            assert 0 < one["residual"] < 1
    assert (tiny / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_person_is_told_that_random_weights_say_nothing(tiny: Path) -> None:
    result = good("redundancy", *VIT)
    text = " ".join(result.stdout.split())
    assert "random weights: these numbers say nothing" in text
    assert "By chance" in text
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert list(tiny.iterdir()) == []


def test_mistakes_are_one_line(tiny: Path) -> None:
    assert "ends in .png" in failed("redundancy", *VIT, "--out", "figure.txt", code=2).stderr
    assert "absent" in failed("redundancy", *VIT, "--out", "absent/figure.png").stderr
    assert "layer '9'" in failed("redundancy", *VIT, "--layer", "9", code=2).stderr
    assert "threshold -1.0" in failed("redundancy", *VIT, "--threshold", "-1", code=2).stderr
    assert list(tiny.iterdir()) == []


def test_it_is_public() -> None:
    assert armour_surgery.redundancy is redundancy
    assert "redundancy" in armour_surgery.__all__
