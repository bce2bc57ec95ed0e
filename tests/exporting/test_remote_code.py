"""A modeling file loads a converted model where this tool is not, and says what it does not know."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from saved_models import HF, HOSTS, armour, host, outputs
from small_models import refused
from torch import nn

from armour_surgery import convert, export
from armour_surgery.errors import ExportError
from armour_surgery.hosts.library_folder import read_converted
from armour_surgery.saving.folder import read_plan

# What another process does, in which this tool cannot be imported.
ANOTHER = """
import sys, torch
sys.modules["armour_surgery"] = None
import transformers
images, wanted = torch.load(sys.argv[2])
auto = transformers.AutoModelForImageClassification
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(images).logits, wanted)
assert model.vit.layers[0].attention.v_proj is None
model.train()(images).logits.sum().backward()
model.save_pretrained(sys.argv[3])
again = auto.from_pretrained(sys.argv[3], trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(images).logits, wanted)
try:
    transformers.ViTForImageClassification.from_pretrained(sys.argv[3])
except RuntimeError:
    print("equal")
"""
SIZES = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}


def _siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF))


MORE = {"siglip": _siglip, "swin-shifted": lambda: transformers.SwinModel(transformers.SwinConfig(**SIZES))}


def _converted(name: str) -> nn.Module:
    if name in HOSTS:
        return armour(name)
    torch.manual_seed(0)
    return convert(MORE[name]().eval())


def loaded_by_its_code(folder: Path, model: nn.Module) -> nn.Module:
    source = read_plan(folder).source
    assert source is not None
    return read_converted(folder, model, source, by_its_code=True)


def test_another_process_without_this_tool_loads_trains_and_saves_it(tmp_path: Path) -> None:
    converted: Any = armour("hf-vit")
    told = export(converted, tmp_path / "out", format="hf", remote_code=True)
    assert told.max_relative_error == 0.0
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.save((images, converted(images).logits), tmp_path / "wanted.pt")
    command = [sys.executable, "-c", ANOTHER, str(tmp_path / "out"), str(tmp_path / "wanted.pt"), str(tmp_path / "two")]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )
    assert ran.stdout == "equal\n", ran.stderr
    assert 'from_pretrained("FOLDER", trust_remote_code=True)' in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("name", [*(name for name in sorted(HOSTS) if name.startswith("hf-")), *MORE])
def test_every_host_has_one(name: str, tmp_path: Path) -> None:
    converted = _converted(name)
    assert export(converted, tmp_path / "out", format="hf", remote_code=True).max_relative_error == 0.0
    text = (tmp_path / "out/modeling_armour.py").read_text(encoding="utf-8")
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    packages = {getattr(node, "module", None) or node.names[0].name for node in imported}
    assert {package.partition(".")[0] for package in packages} <= {"__future__", "re", "torch", "transformers"}
    told = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))
    assert told["auto_map"]["AutoConfig"].startswith("modeling_armour.Armour")
    loaded = loaded_by_its_code(tmp_path / "out", converted)
    assert loaded.state_dict().keys() == converted.state_dict().keys()
    loaded.train()
    assert outputs(loaded)


def test_a_call_that_the_file_does_not_know_is_told(tmp_path: Path) -> None:
    export(armour("hf-vit"), tmp_path / "out", format="hf", remote_code=True)
    loaded: Any = loaded_by_its_code(tmp_path / "out", armour("hf-vit"))
    with pytest.raises(NotImplementedError, match="ArmourViTAttention0 was called in a way .a mask"):
        loaded.vit.layers[0].attention(torch.randn(1, 17, 48), torch.zeros(1, 1, 17, 17))


def test_a_mode_that_adds_modules_is_refused(tmp_path: Path) -> None:
    config = transformers.LevitConfig(
        image_size=64,
        hidden_sizes=[24, 32, 40],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    )
    converted = convert(transformers.LevitModel(config).eval(), "grouped")
    message = refused(ExportError, lambda: export(converted, tmp_path / "out", format="hf", remote_code=True))
    assert "which --remote-code cannot write" in message
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_was_converted_by_itself(tmp_path: Path) -> None:
    model: Any = host("hf-clip")
    model.vision_model = convert(model.vision_model, "kv")
    assert export(model, tmp_path / "out", format="hf", remote_code=True).max_relative_error == 0.0
    assert "(kv)" in (tmp_path / "out/modeling_armour.py").read_text(encoding="utf-8").splitlines()[0]


def test_attention_of_torch_draws_all_its_weights(tmp_path: Path) -> None:
    converted = _converted("siglip")
    export(converted, tmp_path / "out", format="hf", remote_code=True)
    loaded: Any = loaded_by_its_code(tmp_path / "out", converted)
    attention = loaded.head.attention
    with torch.no_grad():
        for parameter in attention.parameters(recurse=False):
            parameter.fill_(torch.nan)
    attention._reset_parameters()
    assert all(parameter.isfinite().all() for parameter in attention.parameters())
