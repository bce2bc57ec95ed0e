"""What a session shows of the records: short, with alike sites together, and complete enough to act on."""

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from page_by_hand import frontier, sensitivities, surgery
from quick_benchmarks import quick
from small_models import tiny_levit, vit

from armour_surgery import AttentionSite, convert, inspect, plan, redundancy
from armour_surgery import sensitivities as measure
from armour_surgery.records import RefusedSite
from armour_surgery.views import Sensitivities

SCREEN = 1_800


def shown(thing: Any) -> str:
    text = repr(thing)
    assert text == str(thing)
    assert len(text.splitlines()) <= 20
    assert len(text) <= SCREEN
    return text


def test_a_model_of_twelve_attentions_takes_a_few_lines() -> None:
    with torch.device("meta"):
        sites = inspect(timm.create_model("deit_tiny_patch16_224"))
    text = shown(sites)
    assert text.splitlines()[0] == "12 attention sites"
    assert text.splitlines()[3].split()[:5] == ["blocks.0-11.attn", "3", "64", "x", "64"]
    assert "\n" not in repr(sites[0])
    assert (
        repr(sites[0]) == "AttentionSite('blocks.0.attn', self-attention, 3 heads, 64 x 64, modes qv, qk, qk-diag, kv)"
    )
    assert repr(sites[0].q) == "Projection('blocks.0.attn.qkv', 3 heads x 64, 197 tokens)"
    assert "blocks.0-11.attn" in sites._repr_html_()  # type: ignore[attr-defined]
    assert isinstance(sites, list)
    assert pickle.loads(pickle.dumps(sites)) == sites
    assert json.loads(json.dumps([site.to_dict() for site in sites]))[0]["fqn"] == "blocks.0.attn"


def test_sites_that_differ_and_sites_that_nothing_fits() -> None:
    text = shown(inspect(tiny_levit(), example_input=(1, 3, 32, 32)))
    assert "downsample" in text
    assert "concat-half" in text
    refused = AttentionSite(
        "a.b", "unknown", 0, 0, 0, None, None, None, refused=dict.fromkeys(("qv", "kv"), "why " * 90)
    )
    assert "\n" not in repr(refused)
    assert len(repr(refused)) < 130
    assert "no mode: why" in repr(refused)
    assert "no mode: not known why" in repr(replace(refused, refused={}))


def test_a_plan_tells_what_is_done_and_what_is_left() -> None:
    text = shown(surgery())
    for part in (
        "SurgeryPlan: 3 of 4 sites, mode auto, init calibrated",
        "blocks.0-2.attn",
        "0.050 to 0.150",
        "parameters 1.235 M -> 1.111 M (-10.0 %)",
        "cosine to the original 0.9712, on 41 held-out images (photos)",
        "left alone: down.attn: downsampling attention: Q & V differ",
    ):
        assert part in text
    assert "Q &amp; V differ" in surgery()._repr_html_()
    many = replace(surgery(200), refused=tuple(RefusedSite(f"a{n}.b", f"{n} {'x ' * 300}") for n in range(200)))
    shown(many)
    ranked = replace(many, sites=tuple(replace(site, rank=place) for place, site in enumerate(many.sites, 1)))
    assert "more rows" in shown(ranked)
    assert "more remarks" in shown(many)


def test_what_plan_and_convert_give() -> None:
    model = vit()
    assert "3 of 3 sites, mode auto, init wq" in shown(plan(model))
    assert shown(plan(model)).splitlines()[3].endswith(" -")  # nothing was compared
    converted = convert(model, "kv")
    assert "blocks.0-2.attn  kv" in shown(converted.surgery)
    assert converted.surgery._repr_html_().startswith("<div")  # type: ignore[union-attr, operator]


def test_sensitivities_and_the_frontier() -> None:
    text = shown(Sensitivities(sensitivities(30)))
    assert "more rows" in text
    assert repr(frontier()[0]) == "FrontierPoint(1.235 M, 0 converted, predicted 0.00000, measured 0.00000)"
    assert "not measured" in repr(frontier()[1])
    found = measure(vit(depth=1), calibration_images=8)
    assert shown(found).splitlines()[-2].split()[:2] == ["blocks.0.attn", "qv"]


def test_redundancy() -> None:
    found = redundancy(vit(), threshold=0.02)
    assert "Entries closer than 0.02" in shown(found)
    assert "Entries closer than 0.02" in shown(found[1:])
    assert found[1:]._repr_html_().count("<tr>") == 3  # type: ignore[attr-defined]
    assert repr(found[0]).startswith("SiteRedundancy('blocks.0.attn', alike: qk ")


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("models", [1, 3])
def test_benchmark(models: int) -> None:
    measured = quick({f"model {number}": vit(depth=1) for number in range(models)})
    text = shown(measured)
    assert text.startswith("Benchmark: fp32, eager, ")
    assert "noise" in text
    assert measured._repr_html_().count("<tr>") == 1 + models * len(measured.batches)
