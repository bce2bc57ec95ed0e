"""Heads with fewer channels than they had: exact where nothing is lost, smaller by what arithmetic says."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from oracle import merge, outputs, randomize, relative_error
from own_attentions import Plain, ReadsWidth, Shuffles
from shared_hosts import built
from tiny_hosts import CASES
from torch import nn
from torchvision_hosts import swin, vit

from armour_surgery import convert, plan
from armour_surgery.copies import full_copy, meta_copy
from armour_surgery.discover import find_sites
from armour_surgery.initialize.weights import locate, read, write
from armour_surgery.measure.cost import count_macs
from armour_surgery.records import RefusedSite
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.surgery.perform import surgery_of
from armour_surgery.surgery.rows import places_of
from armour_surgery.traced import SeenSite

Example = dict[str, torch.Tensor]


def cut(model: nn.Module, mode: str, rank: int, example: Example, sites: list[SeenSite] | None = None) -> nn.Module:
    """Make V what the mode says it is, and all channels of a head from `rank` on zero.

    `sites` are what `find_sites` found before, to save the time.
    """
    sites = find_sites(model, example) if sites is None else sites
    merge(model, mode, example, sites)
    for found in sites:
        if isinstance(found, RefusedSite):
            continue
        module = model.get_submodule(found.site.fqn)
        for role in (found.traced.q, found.traced.k, found.traced.v):
            rows = [channel for head in role.channels for channel in head[rank:]]
            with torch.no_grad():
                for place in places_of(module, role.producer, rows):
                    place.write(0.0)
    return model


@functools.cache
def _narrowed(name: str, mode: str, rank: int) -> tuple[nn.Module, nn.Module]:
    host = CASES[name]
    original, sites = built(name)
    model = cut(full_copy(original), mode, rank, host.example(), sites).double()
    return model, convert(model, mode, rank=rank, example_input=meta(host.batches(torch.float64)[0]))


def narrowed(name: str, mode: str, rank: int) -> tuple[nn.Module, nn.Module]:
    """A host of whose heads only `rank` channels count, and the same with no others, in float64; copies."""
    model, converted = _narrowed(name, mode, rank)
    return full_copy(model), full_copy(converted)


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
    model, converted = narrowed(name, mode, rank)
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
    model, converted = narrowed(name, "qv", 8)
    batch = host.batches(torch.float64)[0]
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
    model, converted = narrowed(name, "qv", 8)
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
    images = [torch.randn(8, *shape[1:], generator=generator, dtype=torch.float64) for _ in range(3)]
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
    # Also for a model without any numbers, of which there is no digest.
    assert replace(wanted, original={}) == plan(meta_copy(model), "qv", rank=48)
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


def test_the_scale_is_what_the_original_had() -> None:
    host = CASES["vit"]
    converted = convert(host.build(), "qv", rank=8, example_input=host.example())
    site = converted.get_submodule("blocks.0.attn")
    assert f"scale = {math.sqrt(1 / 12)!r}"[:16] in site.code
