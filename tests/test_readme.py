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
from torchvision.transforms.functional import to_pil_image

from armour_surgery.benchmarking import benchmark
from armour_surgery.images.synthetic import synthetic_images

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("armour-surgery")]


def test_there_is_something_to_run() -> None:
    assert len(commands()) >= 2
    assert len(blocks("python")) == 1


@pytest.fixture(autouse=True)
def _fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(command: str) -> None:
    """In this process: that the installed script is the same program is test_cli.py's matter, and it costs seconds."""
    good(*shlex.split(command)[1:])


@pytest.mark.parametrize(
    "command", [one for one in commands() if "deit_tiny" in one and not {"eval", "bench"} & set(one.split())]
)
def test_command(command: str, tmp_path: Path) -> None:
    offline = " --no-pretrained" if command.startswith("armour-surgery convert") else ""
    run(command + offline)
    if offline:
        assert (tmp_path / "deit_tiny_patch16_224-armour-qv" / "model.safetensors").is_file()


def test_commands_with_names_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL, PHOTOS/ and VALIDATION/ stand for what a user has: a tiny model here, and drawn pictures."""
    monkeypatch.setattr(benchmark, "keep_memory", lambda: True)  # it would be for the whole suite
    model = timm.create_model("test_vit", num_classes=2, img_size=32, depth=2)
    save_for_hf(model, tmp_path / "mine", model_config={"pretrained_cfg": {"input_size": [3, 32, 32]}})
    for number, picture in enumerate(synthetic_images(24, (3, 40, 40))):
        for name in ("PHOTOS", "VALIDATION"):
            folder = tmp_path / name / ("left" if number % 2 else "right")
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(picture).save(folder / f"{number}.png")
    seen = 0
    for command in commands():
        own = "MODEL" in command or "deit-armour" in command or "recovered" in command or "bench" in command
        if "my_vit" in command or (not own and not command.endswith("recipes ls")):
            continue
        words = command.replace("deit_tiny_patch16_224-armour", "mine-armour")
        words = words.replace("MODEL", "local-dir:mine").replace("deit_tiny_patch16_224", "local-dir:mine")
        words = words.replace("deit-armour", "mine-armour-qv")
        if "convert" in words:
            words = f"{words.replace('0.02', '1.0')} --calib-images 64"
        if "bench" in words:
            words += " --batch-size 2 --budget 1"
        if "finetune" in words:
            words += (
                " --set data.images_per_epoch=8 --set data.batch_size=4 --set data.holdout=4 --set schedule.epochs=1"
            )
        run(words)
        seen += 1
    assert seen == 11
    written = ("deit.onnx", "deit-stock/config.json", "mine-armour-qv/surgery.json", "recovered/surgery.json")
    for made in ("sites.png", "report.html", *written):
        assert (tmp_path / made).is_file(), made


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
        run(command + " --batch-size 2 --budget 1" if "bench" in command else command)
    assert len(own) == 2
    assert (tmp_path / "my-vit-armour" / "surgery.json").is_file()


def test_python(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")[0].replace("pretrained=True", "pretrained=False")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    told = capsys.readouterr().out
    assert "blocks.11.attn 3 64 64" in told
    assert "5717416 5272744" in told
    assert "def forward(self, x" in told


def test_every_mode_is_explained() -> None:
    from armour_surgery.modes import MODES

    assert all(f"`{name}`" in README for name in MODES)
