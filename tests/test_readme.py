"""The README's commands and code run as they are written, but for downloads: there is no network here."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_line import good
from timm.models import save_for_hf
from timm.models._registry import _model_entrypoints
from torchvision.transforms.functional import to_pil_image

from armour_surgery.images.synthetic import synthetic_images

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text: str = README) -> list[str]:
    lines = [line.strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in lines if line.startswith("armour-surgery")]


@pytest.fixture(autouse=True)
def _fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_turns: None) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str) -> None:
    """In this process: that the installed script is the same program is test_cli.py's matter, and it costs seconds."""
    words = shlex.split(command)[1:]
    if words[0] == "bench":
        words += ["--batch-size", "2", "--budget", "0.2", "--rounds", "2"]
    good(*words)


def photos(place: Path, classes: int, count: int) -> None:
    """PHOTOS/ and VALIDATION/ stand for what a user has: drawn pictures here."""
    for number, picture in enumerate(synthetic_images(count, (3, 40, 40))):
        for name in ("PHOTOS", "VALIDATION"):
            folder = place / name / f"class{number % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(picture).save(folder / f"{number}.png")


def test_the_story_of_a_users_own_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in its order, of a DeiT that is one block deep, on small images."""
    build = _model_entrypoints["deit_tiny_patch16_224"]
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
    monkeypatch.setitem(_model_entrypoints, "deit_tiny_patch16_224", lambda **given: build(**{**given, **small}))
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10, img_size=32)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    photos(tmp_path, 10, 40)
    told = [command for command in commands() if "my_vit" not in command]
    for command in told:
        words = command.replace("--num-classes 10", "--num-classes 10 --img-size 32")
        if "--no-pretrained" in words:
            words += " --num-classes 10 --img-size 32"
        if "convert" in words:
            words += " --calib-images 40"
        if "finetune" in words:
            words += " --set data.images_per_epoch=8 --set data.batch_size=4 --set data.holdout=4"
            words += " --set schedule.epochs=1"
        run(words)
    assert len(told) == 11
    written = ("deit-armour/config.json", "deit.onnx", "deit-stock/config.json", "recovered/surgery.json", "speed.png")
    assert [name for name in written if not (tmp_path / name).is_file()] == []


def test_the_options_of_convert(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=2, img_size=32, depth=2)
    save_for_hf(model, tmp_path / "mine", model_config={"pretrained_cfg": {"input_size": [3, 32, 32]}})
    photos(tmp_path, 2, 24)
    told = commands(OPTIONS)
    for command in told:
        words = command.replace("MODEL", "local-dir:mine").replace("0.02", "1.0").replace("cuda", "cpu")
        run(f"{words} --calib-images 64 --force" if "convert" in words else words)
    assert len(told) == 5
    assert (tmp_path / "sites.png").is_file()
    assert (tmp_path / "report.html").is_file()


MY_VIT = """
from timm.models.vision_transformer import Attention
from torch import nn

class MyViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 56, 56)
        self.attention = Attention(24, num_heads=3)
        self.head = nn.Linear(24, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.attention(tokens)).mean(1))
"""


def test_commands_with_a_model_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "my_vit.py").write_text(MY_VIT, encoding="utf-8")
    made: dict[str, Any] = {}
    exec(MY_VIT, made)
    torch.save(made["MyViT"]().state_dict(), tmp_path / "weights.pt")
    own = [command for command in commands() if "my_vit" in command]
    for command in own:
        run(command)
    assert len(own) == 2
    assert (tmp_path / "my-vit-armour" / "surgery.json").is_file()


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    short, code = blocks("python")
    code = code.replace("pretrained=True", "pretrained=False")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    told = capsys.readouterr().out
    assert "blocks.11.attn 3 64 64" in told
    assert "5717416 5272744" in told
    assert "def forward(self, x" in told
    exec(compile(short, "README.md", "exec"), {})  # it loads what the other has saved


def test_every_mode_is_explained() -> None:
    from armour_surgery.modes import MODES

    assert all(f"`{name}`" in README for name in MODES)
