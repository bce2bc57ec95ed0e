"""`convert` as a person and a script use it: what it tells, what it writes, and where."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from command_line import CONVERT_KEYS, document, good
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery import SurgeryPlan, load
from armour_surgery.cli import app
from armour_surgery.saving.folder import read_plan


def test_convert_tells_a_person_what_was_done(tiny: str, here: Path) -> None:
    result = good("convert", tiny)
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    assert "2 of 2 attention sites converted" in text
    assert "blocks.0-1.attn (qv)" in text
    assert "MACs per image" in text
    assert "Saved to tiny-armour-qv" in text
    assert "This model needs training" in text
    assert 'load("tiny-armour-qv")' in text
    assert sorted(os.listdir(here)) == ["tiny", "tiny-armour-qv"]
    assert load(here / "tiny-armour-qv")(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_convert_json(tiny: str, here: Path) -> None:
    found = document("convert", tiny, "--mode", "kv", "--exclude", "blocks.1*", "--out", "x/y")
    assert set(found) == CONVERT_KEYS
    assert (found["model"], found["mode"], found["init"], found["out"]) == (tiny, "kv", "wq", "x/y")
    assert [set(site) for site in found["sites"]] == [{"fqn", "mode", "rank", "residual", "gauge"}]
    assert found["sites"][0]["gauge"] is None
    assert (found["sites"][0]["fqn"], found["sites"][0]["mode"]) == ("blocks.0.attn", "kv")
    assert found["sites"][0]["residual"] > 0
    assert found["seconds"] > 0
    surgery = load(here / "x" / "y").surgery
    assert isinstance(surgery, SurgeryPlan)
    assert (found["params_before"], found["params_after"]) == (surgery.params_before, surgery.params_after)
    assert (found["macs_before"], found["macs_after"]) == (surgery.macs_before, surgery.macs_after)


def test_convert_fixes_a_gauge_and_tells_it(tiny: str, here: Path) -> None:
    free = document("convert", tiny, "--dry-run")
    found = document("convert", tiny, "--gauge", "fixed", "--out", "x")
    gauges = [site["gauge"] for site in found["sites"]]
    assert [set(gauge) for gauge in gauges] == [{"start", "condition", "error", "error_before"}] * 2
    assert found["params_after"] < free["params_after"]
    surgery = load(here / "x").surgery
    assert isinstance(surgery, SurgeryPlan)
    assert (
        surgery.params_after
        == found["params_after"]
        == document("convert", tiny, "--gauge", "fixed", "--dry-run")["params_after"]
    )
    assert "gauge fixed at 2 of 2 sites" in good("convert", tiny, "--gauge", "fixed", "--dry-run").stdout


def test_convert_keeps_pretrained_weights(tiny: str, models: Path, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    original = timm.create_model(f"local-dir:{models / 'tiny'}", pretrained=True).state_dict()
    kept = load(here / "out").state_dict()
    assert all(torch.equal(kept[key], original[key]) for key in kept if "qkv" not in key)


def test_refused_sites_are_told(models: Path, here: Path) -> None:
    levit = str(models / "levit")
    found = document("convert", levit, "--dry-run")
    assert found["refused"]
    assert all(set(entry) == {"fqn", "reason"} and "downsampling" in entry["reason"] for entry in found["refused"])
    assert {site["mode"] for site in found["sites"]} == {"concat-half"}
    text = " ".join(good("convert", levit, "--dry-run").stdout.split())
    assert "left alone" in text
    assert "downsampling" in text


def test_dry_run_writes_nothing(tiny: str, here: Path) -> None:
    result = good("convert", tiny, "--dry-run")
    assert "would be converted" in result.stdout
    assert "Nothing was written" in result.stdout
    assert "needs training" not in result.stdout
    found = document("convert", tiny, "--dry-run", "--out", "out")
    assert set(found) == CONVERT_KEYS
    assert found["out"] is None
    assert all(site["residual"] is None for site in found["sites"])
    assert os.listdir(here) == ["tiny"]
    real = document("convert", tiny, "--out", "out")
    same = CONVERT_KEYS - {"out", "seconds", "sites"}
    assert {key: found[key] for key in same} == {key: real[key] for key in same}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--max-loss", "0.02"], "--max-loss"),
        (["--params=-20%", "--mlp"], "--params, --mlp"),
        (["--params=-20%", "--rank", "auto"], "--params, --rank auto"),
    ],
)
def test_a_dry_run_says_what_it_cannot_know(options: list[str], named: str, tiny: str, here: Path) -> None:
    result = good("convert", tiny, "--dry-run", "--init", "calibrated", *options)
    assert f"what {named} would choose is measured on images" in result.stderr
    whole = document("convert", tiny, "--dry-run", "--init", "calibrated")
    assert document("convert", tiny, "--dry-run", "--init", "calibrated", *options)["sites"] == whole["sites"]
    assert good("convert", tiny, "--dry-run", "--rank", "8", "--init", "joint-svd").stderr == ""


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        (["--include", "blocks.1*"], ["blocks.1.attn"]),
        (["--exclude", "*.1.*"], ["blocks.0.attn"]),
        (["--include", "blocks.0", "--include", "blocks.1"], ["blocks.0.attn", "blocks.1.attn"]),
        (["--include", "*", "--exclude", "blocks.0.attn"], ["blocks.1.attn"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_include_and_exclude(options: list[str], sites: list[str], tiny: str) -> None:
    assert [site["fqn"] for site in document("convert", tiny, "--dry-run", *options)["sites"]] == sites


@pytest.mark.parametrize(
    ("model", "options", "out"),
    [
        ("tiny/", [], "tiny-armour-qv"),
        ("local-dir:./tiny", ["--mode", "qk-diag"], "tiny-armour-qk-diag"),
        ("hf:hf", [], "hf-armour-qv"),
        ("./hf/", ["--mode", "kv"], "hf-armour-kv"),
        ("timm:vit_tiny_patch16_224", ["--no-pretrained", "--img-size", "32"], "vit_tiny_patch16_224-armour-qv"),
    ],
)
def test_the_default_name(model: str, options: list[str], out: str, models: Path, tiny: str, here: Path) -> None:
    (here / "hf").symlink_to(models / "hf")
    if model == "tiny/":
        model = f"local-dir:{model}"
    assert document("convert", model, *options)["out"] == out
    assert read_plan(here / out).sites


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_checkpoint(file: str, tiny: str, models: Path, here: Path) -> None:
    good("convert", tiny, "--checkpoint", str(models / file), "--out", "out")
    original = timm.create_model(f"local-dir:{models / 'tiny'}", pretrained=True).state_dict()
    kept = load(here / "out").state_dict()
    assert all(torch.equal(kept[key], original[key] + 1) for key in kept if "qkv" not in key)


def test_sizes(here: Path) -> None:
    sizes = ["--img-size", "32", "--num-classes", "7", "--in-chans", "1"]
    good("convert", "vit_tiny_patch16_224", "--no-pretrained", *sizes, "--include", "blocks.0*", "--out", "out")
    assert load(here / "out")(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_converting_again_replaces_our_folder_and_keeps_other_files(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    (here / "out" / "notes.txt").write_text("mine")
    good("convert", tiny, "--mode", "kv", "--out", "out")
    assert read_plan(here / "out").mode == "kv"
    assert (here / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["a[b]", "a[/b]", "[bold]x", "with space", "-dash", "über"])
def test_names_with_odd_characters(out: str, tiny: str, here: Path) -> None:
    result = good("convert", tiny, f"--out={out}")
    assert read_plan(here / out).sites
    assert f"Saved to {out}" in result.stdout
    printed = re.search(r"model = load\((.+)\)", result.stdout)
    assert printed
    assert ast.literal_eval(printed[1]) == out


def test_a_long_path_is_printed_so_that_it_can_be_copied(tiny: str, here: Path) -> None:
    out = f"{'long-' * 30}name"
    assert f'load("{out}")' in good("convert", tiny, "--out", out).stdout


def _command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["convert", "deit_tiny_patch16_224", "--dry-run", "--json", *arguments])
    return result.exit_code, result.stdout, result.stderr


# --rank


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
