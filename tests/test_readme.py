"""The README's commands and code run as they are written, but for downloads: there is no network here."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def commands() -> list[str]:
    lines = [line.strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("armour-surgery")]


def test_there_is_something_to_run() -> None:
    assert len(commands()) >= 2
    assert len(blocks("python")) == 1


@pytest.mark.parametrize("command", commands())
def test_command(command: str, tmp_path: Path) -> None:
    offline = ["--no-pretrained"] if command.startswith("armour-surgery convert") else []
    done = subprocess.run(
        [sys.executable, "-m", "armour_surgery", *shlex.split(command)[1:], *offline],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if offline:
        assert (tmp_path / "deit_tiny_patch16_224-armour-qv" / "model.safetensors").is_file()


def test_python(tmp_path: Path) -> None:
    code = blocks("python")[0].replace("pretrained=True", "pretrained=False")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "blocks.11.attn 3 64 64" in done.stdout
    assert "5717416 5272744" in done.stdout
    assert "def forward(self, x" in done.stdout


def test_every_mode_is_explained() -> None:
    from armour_surgery.modes import MODES

    assert all(f"`{name}`" in README for name in MODES)
