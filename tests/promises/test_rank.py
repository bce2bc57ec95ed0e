"""Heads with fewer channels than they had: exact where nothing is lost, smaller by what arithmetic says, or refused."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import _tensors, merge, outputs, randomize, relative_error
from test_rewrite import Pieces, Plain, ReadsWidth, Shuffles, UsesPacked
from test_torchvision import swin, vit
from tiny_hosts import ANY_SIZE, CASES
from torch import nn
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery import convert, load, plan, save
from armour_surgery.cli import app
from armour_surgery.cli.tables import cost_table
from armour_surgery.copies import meta_copy
from armour_surgery.discover import find_sites
from armour_surgery.errors import NothingToConvertError, PatternError, SchemaError, UsageError
from armour_surgery.initialize.weights import locate, read, write
from armour_surgery.measure.cost import count_macs
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.saving.model_card import model_card
from armour_surgery.surgery.conversion import surgery_of

Example = dict[str, torch.Tensor]


def cut(model: nn.Module, mode: str, rank: int, example: Example) -> nn.Module:
    """Make V what the mode says it is, and all channels of a head from `rank` on zero."""
    found = find_sites(model, example)
    merge(model, mode, example, found)
    for one in found:
        if one.traced is None:
            continue
        module = model.get_submodule(one.site.fqn)
        for role in (one.traced.q, one.traced.k, one.traced.v):
            rows = [channel for head in role.channels for channel in head[rank:]]
            with torch.no_grad():
                for tensor, row in _tensors(role.producer, module, rows):
                    tensor[row] = 0.0
    return model


def error(model: nn.Module, converted: nn.Module, batches: list[dict[str, Any]]) -> float:
    """The worst relative error in eval and in train mode; no call may need another trace."""
    worst = 0.0
    variants = [m.armour_variants for m in converted.modules() if isinstance(m, ArmourAttention)]
    assert variants
    for training in (False, True):
        a, b = (copy.deepcopy(one).train(training) for one in (model, converted))
        for batch in batches:
            with torch.no_grad():
                worst = max(worst, relative_error(outputs(a, batch), outputs(b, batch)))
    assert variants == [m.armour_variants for m in converted.modules() if isinstance(m, ArmourAttention)]
    return worst


def meta(batch: dict[str, Any]) -> Example:
    return {name: value.to("meta") for name, value in batch.items()}


# Where nothing is lost, nothing changes.


@pytest.mark.parametrize(
    ("name", "mode", "rank"),
    [(name, "qv", 8) for name in ("vit", "deit3", "eva", "beit", "beit-shared-bias", "dinov2", "swin")]
    + [(f"hf-{name}", "qv", 7) for name in ("vit", "dinov2", "beit", "clip", "swin", "siglip")]
    + [("vit", "kv", 5), ("vit", "qv", 1), ("beit", "kv", 8), ("hf-vit", "kv", 8)],
)
def test_channels_that_are_zero_are_not_missed(name: str, mode: str, rank: int) -> None:
    host = CASES[name]
    model = cut(host.build(), mode, rank, host.example()).double()
    converted = convert(model, mode, rank=rank, example_input=meta(host.batches(torch.float64)[0]))
    assert {site.rank for site in surgery_of(converted).sites} == {rank}
    assert all(site.residual is not None and site.residual < 1e-5 for site in surgery_of(converted).sites)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        assert error(model.to(dtype), converted.to(dtype), host.batches(dtype)) <= tolerance


@pytest.mark.parametrize(("build", "size"), [(vit, 32), (swin, 64)])
def test_torchvision(build: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(count, 3, size, size, dtype=torch.float64)} for count in (2, 5)]
    model = cut(randomize(build().double()), "qv", 8, meta(batches[0]))
    converted = convert(model, "qv", rank=8, example_input=meta(batches[0]))
    assert error(model, converted, batches) <= 1e-12


@pytest.mark.parametrize("kind", [Plain, ReadsWidth, Shuffles])
def test_attention_of_ones_own(kind: type[nn.Module]) -> None:
    batches = [{"x": torch.randn(count, tokens, 20, dtype=torch.float64)} for count, tokens in ((2, 6), (5, 9))]
    model = cut(randomize(kind()).double(), "qv", 3, batches[0])
    assert error(model, convert(model, "qv", rank=3, example_input=batches[0]), batches) <= 1e-12


@pytest.mark.parametrize("name", ["vit", "eva", "beit", "swin"])
def test_the_other_kernel_and_a_mask_are_followed(name: str) -> None:
    """Calls of a kind that the conversion did not see keep the scale too."""
    host = CASES[name]
    model = cut(host.build(), "qv", 8, host.example()).double()
    batch = host.batches(torch.float64)[0]
    converted = convert(model, "qv", rank=8, example_input=batch)
    for one in (model, converted):
        for module in one.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = not module.fused_attn
    with torch.no_grad():
        assert relative_error(outputs(model, batch), outputs(converted, batch)) <= 1e-12
        if name == "vit":
            site = surgery_of(converted).sites[0].fqn
            call = {"x": torch.randn(2, 9, 48).double(), "attn_mask": torch.rand(2, 1, 9, 9) > 0.3}
            a, b = (outputs(one.get_submodule(site), call) for one in (model, converted))
            assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("name", ["hf-vit", "hf-clip"])
def test_transformers_eager_attention(name: str) -> None:
    host = CASES[name]
    model = cut(host.build(), "qv", 8, host.example()).double()
    converted = convert(model, "qv", rank=8, example_input=host.batches(torch.float64)[0])
    for one in (model, converted):
        one.set_attn_implementation("eager")  # type: ignore[operator]
    batch = host.batches(torch.float64)[1] | {"output_attentions": True}
    with torch.no_grad():
        assert relative_error(outputs(model, batch), outputs(converted, batch)) <= 1e-12


def test_it_compiles_whole() -> None:
    host = CASES["vit"]
    converted = convert(host.build(), "qv", rank=8, example_input=host.example())
    batch = host.batches()[0]["x"]
    with torch.no_grad():
        got = torch.compile(converted, fullgraph=True, backend="aot_eager")(batch)
        assert relative_error([converted(batch)], [got]) <= 1e-5


# Weights.


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd", "calibrated"])
@pytest.mark.parametrize(("name", "mode"), [("vit", "qv"), ("vit", "kv"), ("swin", "qv"), ("hf-dinov2", "qv")])
def test_products_of_that_rank_are_kept(name: str, mode: str, init: str) -> None:
    """Logits and values of 5 directions each, the same ones, in bases of 12 channels that have nothing in common."""
    host, rank = CASES[name], 5
    model = host.build()
    sites = find_sites(model, host.example())
    model.double()
    generator = torch.Generator().manual_seed(1)
    for found in sites:
        module, traced = model.get_submodule(found.site.fqn), found.traced
        assert traced is not None
        first, second = (traced.q, traced.k) if mode == "qv" else (traced.k, traced.q)
        few = read(module, locate(module, first, {}))[..., :rank]
        for role, base in ((first, few), (traced.v, few), (second, read(module, locate(module, second, {})))):
            mix = torch.randn(role.num_heads, base.shape[-1], role.head_dim, generator=generator, dtype=torch.float64)
            moment = torch.eye(base.shape[-2], dtype=torch.float64)
            write(module, locate(module, role, {}), base @ mix / 3, moment)
    batch = {key: value.double() for key, value in host.batches()[0].items()}
    shape = next(iter(batch.values())).shape
    images = [torch.randn(4, *shape[1:], generator=generator, dtype=torch.float64) for _ in range(6)]
    calibration = images if init == "calibrated" else None
    converted = convert(model, mode, init=init, rank=rank, calibration=calibration, example_input=batch).eval()
    with torch.no_grad():
        assert relative_error(outputs(model, batch), outputs(converted, batch)) <= 1e-5
    assert all(site.residual is not None and site.residual < 1e-3 for site in surgery_of(converted).sites)


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd"])
def test_more_channels_lose_less(init: str) -> None:
    host = CASES["dinov2"]
    model = host.build()
    residuals = []
    for rank in (1, 6, 11, 12):
        sites = surgery_of(convert(model, "qv", init=init, rank=rank, example_input=host.example())).sites
        assert {site.rank for site in sites} == {rank if rank < 12 else None}
        residuals.append([site.residual for site in sites])
    for fewer, more in zip(residuals, residuals[1:], strict=False):
        assert all(a > b > 0.1 for a, b in zip(fewer, more, strict=True))


def test_joint_svd_loses_no_more_than_what_keeps_q() -> None:
    host = CASES["vit"]
    model = host.build()
    kept, best = (
        surgery_of(convert(model, "qv", init=init, rank=6, example_input=host.example())).sites
        for init in ("wq-refit", "joint-svd")
    )
    assert all(a.residual > b.residual for a, b in zip(kept, best, strict=True))  # type: ignore[operator]


def test_types_stay_and_the_original_is_untouched() -> None:
    host = CASES["vit"]
    model = host.build().to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    batch = {key: value.bfloat16() for key, value in host.batches()[0].items()}
    for init in ("wq", "calibrated"):
        calibration = images if init == "calibrated" else None
        converted = convert(model, "qv", init=init, rank=8, calibration=calibration, example_input=batch)
        assert {tensor.dtype for tensor in converted.parameters()} == {torch.bfloat16}
        assert all(torch.isfinite(tensor).all() for tensor in converted.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_in_place_and_as_a_copy_are_the_same() -> None:
    host = CASES["vit"]
    model = host.build()
    for init in ("wq", "joint-svd"):
        there = convert(model, "qv", init=init, rank=8, example_input=host.example())
        here = convert(copy.deepcopy(model), "qv", init=init, rank=8, inplace=True, example_input=host.example())
        assert all(torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))


# Cost.


@pytest.mark.parametrize(("name", "mode"), [("vit", "qv"), ("vit", "kv"), ("hf-vit", "qv")])
def test_parameters_and_macs_are_what_arithmetic_says(name: str, mode: str) -> None:
    host, width, heads, d, tokens = CASES[name], 48, 4, 12, 17
    model = host.build()
    for rank in (1, 11):
        converted = convert(model, mode, rank=rank, example_input=host.example())
        one = surgery_of(converted).sites[0]
        rows = heads * rank
        assert one.params_before == 4 * width * (width + 1)
        assert one.params_after == 2 * rows * (width + 1) + rows * width + width
        assert one.macs_before == tokens * width * 4 * width + 2 * tokens * tokens * heads * d
        assert one.macs_after == tokens * width * 3 * rows + 2 * tokens * tokens * heads * rank
        assert count_macs(converted, host.example()).macs == surgery_of(converted).macs_after
        layers = [m for m in converted.get_submodule(one.fqn).modules() if isinstance(m, nn.Linear)]
        assert [(m.out_features, m.in_features) for m in layers] == [tuple(m.weight.shape) for m in layers]


def test_a_plan_says_what_would_be_done() -> None:
    model = timm.create_model("deit_tiny_patch16_224", depth=2)
    wanted = plan(model, "qv", rank=48)
    assert wanted == plan(meta_copy(model), "qv", rank=48)  # also for a model without any numbers
    assert {(site.rank, site.residual) for site in wanted.sites} == {(48, None)}
    per_block = 4 * 192 * 193 - (2 * 144 * 193 + 144 * 192 + 192)
    assert wanted.params_before - wanted.params_after == 2 * per_block


# Which sites.


def test_each_site_has_a_rank_of_its_own() -> None:
    host = CASES["vit"]
    model = host.build()
    ranks = {"blocks.0.attn": 8, "blocks.1.attn": 12}
    converted = convert(model, "qv", rank=ranks, example_input=host.example())
    assert [site.rank for site in surgery_of(converted).sites] == [8, None]
    whole = convert(model, "qv", example_input=host.example())
    again = convert(model, "qv", rank={"blocks.0.attn": 8}, example_input=host.example())
    for name, tensor in converted.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        if not name.startswith("blocks.0.attn"):
            assert torch.equal(tensor, whole.state_dict()[name])


def test_the_full_rank_is_the_ordinary_conversion() -> None:
    host = CASES["vit"]
    model = host.build()
    full, ordinary = (convert(model, "qv", rank=rank, example_input=host.example()) for rank in (12, None))
    assert surgery_of(full) == surgery_of(ordinary)
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), ordinary.parameters(), strict=True))


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
    model = host.build()
    with pytest.raises(NothingToConvertError, match=words):
        convert(model, rank=5, example_input=host.example())
    fqns = [one.site.fqn for one in find_sites(model, host.example()) if host.auto in one.site.modes]
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


@pytest.mark.parametrize("rank", [0, -8, True, 8.0, "8", {"blocks.0.attn": 0}])
def test_what_is_no_rank(rank: Any) -> None:
    with pytest.raises(UsageError, match="not a whole number from 1 to key_dim"):
        convert(CASES["vit"].build(), "qv", rank=rank)


@pytest.mark.parametrize("mode", ["qk", "qk-diag", "concat-half", "grouped"])
def test_modes_without_a_rank(mode: str) -> None:
    with pytest.raises(UsageError, match=f"mode '{mode}' has no rank"):
        convert(CASES["vit"].build(), mode, rank=8)


def test_a_rank_for_a_site_that_there_is_not() -> None:
    host = CASES["vit"]
    with pytest.raises(PatternError, match="'blocks.7.attn', which is none of the 2"):
        convert(host.build(), "qv", rank={"blocks.7.attn": 8}, example_input=host.example())
    with pytest.raises(PatternError, match="'blocks.0.attn', which is none of the 1"):
        convert(host.build(), "qv", rank={"blocks.0.attn": 8}, exclude="blocks.0", example_input=host.example())


# Saving.


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    """A ViT of which only the first site is narrow."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ANY_SIZE)
    return convert(randomize(model), "qv", init="joint-svd", rank={"blocks.0.attn": 8}).eval()


def test_a_model_comes_back_bit_identical(narrow: nn.Module, tmp_path: Path) -> None:
    batch = CASES["vit"].batches()[1]
    with torch.no_grad():
        wanted = narrow(**batch)
        for one in (copy.deepcopy(narrow), load(save(narrow, tmp_path / "saved"))):
            assert torch.equal(one(**batch), wanted)
            assert surgery_of(one).sites == surgery_of(narrow).sites
        again = load(save(load(tmp_path / "saved"), tmp_path / "again"))
        assert torch.equal(again(**batch), wanted)


def test_transformers_model_comes_back(tmp_path: Path) -> None:
    host = CASES["hf-vit"]
    converted = convert(host.build(), "qv", rank=8).eval()
    batch = host.batches()[1]
    with torch.no_grad():
        wanted, got = outputs(converted, batch), outputs(load(save(converted, tmp_path / "saved")), batch)
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_the_rank_is_written_and_told(narrow: nn.Module, tmp_path: Path) -> None:
    document = json.loads((save(narrow, tmp_path / "saved") / "surgery.json").read_text())
    assert [site["rank"] for site in document["plan"]["sites"]] == [8, None]
    assert "1 x `qv` with 8 channels a head, 1 x `qv`" in model_card(surgery_of(narrow), "saved")
    assert "blocks.0.attn  (qv, rank 8)" in next(iter(cost_table(surgery_of(narrow)).columns))._cells


def _edited(folder: Path, rank: Any) -> Path:
    path = folder / "surgery.json"
    document = json.loads(path.read_text())
    for site in document["plan"]["sites"]:
        site["rank"] = rank
        if rank == "none":
            del site["rank"]
    path.write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("rank", [0, 5, 12, 13, -1, 2**70, "8", 8.5, True, None, "none"])
def test_a_folder_with_another_rank_is_refused(rank: Any, narrow: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"surgery\.json"):
        load(_edited(save(narrow, tmp_path / "saved"), rank))


def test_a_folder_from_before_ranks_loads(tmp_path: Path) -> None:
    host = CASES["vit"]
    converted = convert(host.build(), "qv").eval()
    batch = host.batches()[0]
    with torch.no_grad():
        assert torch.equal(load(_edited(save(converted, tmp_path / "saved"), "none"))(**batch), converted(**batch))


# The command line.


def _command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", "deit_tiny_patch16_224", "--dry-run", "--json", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_option() -> None:
    code, out, _ = _command("--rank", "40", "--mode", "qv", "--img-size", "32")
    assert code == 0
    assert {(site["mode"], site["rank"]) for site in json.loads(out)["sites"]} == {("qv", 40)}


@pytest.mark.parametrize(
    ("given", "words"), [("many", "'many'"), ("-8", "'-8'"), ("0", "rank 0"), ("65", "64 channels"), ("4.5", "'4.5'")]
)
def test_the_option_with_a_wrong_value(given: str, words: str) -> None:
    code, out, told = _command(f"--rank={given}", "--img-size", "32")
    assert (code, out) == (2, "")
    assert words in " ".join(told.split())


def test_the_scale_is_what_the_original_had() -> None:
    host = CASES["vit"]
    converted = convert(host.build(), "qv", rank=8, example_input=host.example())
    site = converted.get_submodule("blocks.0.attn")
    assert f"scale = {math.sqrt(1 / 12)!r}"[:16] in site.code
