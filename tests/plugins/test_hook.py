"""Fresh processes load saved folders by the libraries' own calls: with this tool, and not without it.

There are two of them, since each takes seconds to import the libraries: one imports this tool first, one last.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from saved_models import armour

from armour_surgery import save

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))
# How each folder in the working directory is loaded, in the order in which it is tried. `by_timm` and `by_save` are
# what `save` writes, `by_save_pretrained` what transformers' own method does.
LOADING = """
import json, torch

def load(folder):
    if folder == "by_timm":
        import timm
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    from transformers import AutoModelForImageClassification
    return AutoModelForImageClassification.from_pretrained(folder)

def told():
    return {folder: loaded(folder) for folder in ("by_timm", "by_save", "by_save_pretrained")}

def loaded(folder):
    images, wanted = torch.load(f"{folder}.pt")
    try:
        model = load(folder).eval()
    except Exception as error:
        return [type(error).__name__, str(error)]
    with torch.no_grad():
        found = model(images)
    equal = torch.equal(found if torch.is_tensor(found) else found.logits, wanted)
    return ["equal" if equal else "other", type(model).__name__, type(getattr(model, "config", None)).__name__]
"""
TOOL_FIRST = f"""
import armour_surgery, sys
early = [name for name in ("timm", "transformers") if name in sys.modules]
{LOADING}
print(json.dumps({{"early": early, "with": told()}}))
"""
TOOL_LAST = f"""
import sys
from timm import create_model
{LOADING}
found = {{"without": told(), "early": "armour_surgery" in sys.modules}}
import armour_surgery
found["with"] = told()
found["depth"] = create_model("vit_tiny_patch16_224", depth=1)._model_args["depth"]
print(json.dumps(found))
"""
# The class of the model, and of its config.
EQUAL = {
    "by_timm": ["equal", "VisionTransformer", "NoneType"],
    "by_save": ["equal", "ViTForImageClassification", "ArmourViTConfig"],
    "by_save_pretrained": ["equal", "ViTForImageClassification", "ArmourViTConfig"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes load, each folder beside the images and outputs of the model that is in it."""
    root = tmp_path_factory.mktemp("folders")
    save(armour("vit"), root / "by_timm")
    save(armour("hf-vit"), root / "by_save")
    armour("hf-vit").save_pretrained(root / "by_save_pretrained")  # type: ignore[operator]
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "by_save_pretrained")
    with torch.no_grad():
        ours, theirs = armour("vit")(IMAGES), armour("hf-vit")(IMAGES).logits
    for name, wanted in (("by_timm", ours), ("by_save", theirs), ("by_save_pretrained", theirs)):
        torch.save((IMAGES, wanted), root / f"{name}.pt")
    return root


def ran(code: str, folders: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folders, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_libraries_that_come_after_this_tool_load_its_folders(folders: Path) -> None:
    assert ran(TOOL_FIRST, folders) == {"early": [], "with": EQUAL}


def test_libraries_that_were_there_before_fail_without_this_tool_and_load_with_it(folders: Path) -> None:
    found = ran(TOOL_LAST, folders)
    assert not found["early"]
    assert found["without"].keys() == EQUAL.keys()
    assert all("armour" in message for _, message in found["without"].values())
    for name in ("by_save", "by_save_pretrained"):
        kind, message = found["without"][name]
        assert kind == "ValueError"
        assert "armour_vit" in message
    assert found["with"] == EQUAL
    # timm's function keeps what it is called with, also where somebody has imported it before.
    assert found["depth"] == 1
