"""The installed script and `python -m` work in a fresh folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from command_line import CONVERT_KEYS
from saved_models import FILES

from armour_surgery import load


def test_the_console_script_in_a_fresh_folder(here: Path) -> None:
    script = Path(sys.executable).with_name("armour-surgery")
    assert script.exists()
    arguments = ["convert", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "64", "--json"]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == CONVERT_KEYS
    assert found["out"] == "vit_tiny_patch16_224-armour-qv"
    assert sorted(os.listdir(here / found["out"])) == FILES
    assert len(found["sites"]) == 12
    assert load(here / found["out"])(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    # Nothing but what was asked for, hidden files included.
    assert os.listdir(here) == [found["out"]]


def test_python_dash_m_and_a_failure(here: Path) -> None:
    """One that is told before torch is imported, which takes seconds."""
    (here / "taken").touch()
    command = [sys.executable, "-m", "armour_surgery", "demo", "--out", "taken/out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "\x1b" not in line
    assert os.listdir(here) == ["taken"]
