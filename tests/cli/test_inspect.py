"""`inspect` shows sites to a person and to a script."""

import json
import os
from pathlib import Path

from command_line import document, good, run
from safetensors.torch import load_file, save_file

from armour_surgery.modes import MODES


def test_inspect_shows_sites_to_a_person(tiny: str, here: Path) -> None:
    result = good("inspect", tiny)
    assert result.stderr == ""
    assert "2 attention sites in a VisionTransformer" in result.stdout
    assert "blocks.0-1.attn" in result.stdout
    assert "12 x 12" in result.stdout
    assert "qv, qk, qk-diag, kv" in " ".join(result.stdout.split())
    assert "not concat-half, concat-full" in result.stdout
    assert f"Next: armour-surgery convert {tiny}" in result.stdout
    assert os.listdir(here) == ["tiny"]


def test_inspect_json(tiny: str) -> None:
    found = document("inspect", tiny)
    assert set(found) >= {"model", "sites"}
    assert found["model"] == tiny
    for site in found["sites"]:
        assert set(site) >= {"fqn", "kind", "num_heads", "key_dim", "value_dim", "modes", "refused"}
        assert set(site["modes"]) | set(site["refused"]) == set(MODES)
    assert [site["fqn"] for site in found["sites"]] == ["blocks.0.attn", "blocks.1.attn"]


def test_inspect_of_other_libraries(models: Path, here: Path) -> None:
    found = document("inspect", f"hf:{models / 'hf'}")
    assert [site["num_heads"] for site in found["sites"]] == [4, 4]
    assert document("inspect", str(models / "hf"))["sites"] == found["sites"]
    levit = good("inspect", str(models / "levit")).stdout
    assert "downsampling" in levit
    assert "the paper leaves these blocks alone too" in " ".join(levit.split())


def test_what_was_chosen_of_a_checkpoint_is_one_line_beside_the_result(tiny: str, models: Path, here: Path) -> None:
    weights = load_file(models / "weights.safetensors")
    save_file({f"net.{key}": value for key, value in weights.items()}, here / "net.safetensors")
    result = run("inspect", tiny, "--checkpoint", "net.safetensors", "--json")
    assert result.stderr == "note: checkpoint net.safetensors: took the prefix 'net.' off the names\n"
    assert json.loads(result.stdout)["model"] == tiny
