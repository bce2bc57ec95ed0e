"""Help names every command and option, loads nothing heavy, and wrong flags are wrong usage."""

import inspect as python_inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import good, run

from armour_surgery import __version__
from armour_surgery.cli import app
from armour_surgery.modes import MODES

COMMANDS = (
    "inspect",
    "convert",
    "finetune",
    "eval",
    "bench",
    "export",
    "push",
    "recipes",
    "redundancy",
    "paper",
    "run",
    "coverage",
    "demo",
)


def test_the_command_line_loads_without_the_heavy_libraries() -> None:
    heavy = "{'torch', 'timm', 'transformers', 'torchvision', 'numpy', 'safetensors', 'huggingface_hub', 'matplotlib'}"
    code = f"import sys, armour_surgery.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    result = good("--help")
    assert result.stderr == ""
    assert [command for command in COMMANDS if re.search(rf"^  {command} ", result.stdout, re.MULTILINE)] == [*COMMANDS]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_short_name(command: str) -> None:
    words = command.split()
    assert good(*words, "-h").stdout == good(*words, "--help").stdout


def test_shells_complete_commands_and_options() -> None:
    asked = {
        "_ARMOUR_SURGERY_COMPLETE": "complete_bash",
        "COMP_CWORD": "2",
        "COMP_WORDS": "armour-surgery convert --ca",
    }
    program = [sys.executable, "-c", "from armour_surgery.cli import app; app(prog_name='armour-surgery')"]
    done = subprocess.run(program, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["--calib", "--calib-images"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "inspect",
            ["--checkpoint", "--pretrained", "--no-pretrained", "--img-size", "--num-classes", "--in-chans", "--json"],
        ),
        (
            "convert",
            ["--mode", "--init", "--include", "--exclude", "--checkpoint", "--no-pretrained", "--img-size",
             "--num-classes", "--in-chans", "--out", "--dry-run", "--json"],
        ),
        (
            "finetune",
            ["--checkpoint", "--img-size", "--num-classes", "--teacher", "--teacher-checkpoint", "--class-map",
             "--resume"],
        ),
        ("eval", ["--checkpoint", "--vs-checkpoint", "--img-size", "--num-classes", "--class-map", "--json"]),
        ("bench", ["--checkpoint", "--img-size", "--num-classes", "--json"]),
        ("redundancy", ["--out", "--layer", "--threshold", "--checkpoint", "--no-pretrained", "--img-size", "--json"]),
        ("paper", ["--no-speed", "--budget", "--markdown", "--json"]),
        ("push", ["--license", "--private", "--revision", "--message", "--include", "--dry-run", "--json"]),
        ("demo", ["--json"]),
    ],
)  # fmt: skip
def test_help_of_every_command(command: str, options: list[str]) -> None:
    text = good(command, "--help").stdout
    assert f"Usage: armour-surgery {command}" in text or f"{command} [OPTIONS]" in text
    assert [option for option in options if option not in text] == []
    flat = " ".join(text.split())
    if command in ("inspect", "convert", "redundancy"):
        for form in ("timm:NAME", "hf-hub:ORG/NAME", "local-dir:DIR", "hf:ID_OR_DIR", "torchvision:NAME"):
            assert form in flat
    if command == "convert":
        assert all(mode in flat for mode in MODES)
        assert "NAME-armour-MODE" in flat


def test_version_and_no_command() -> None:
    assert good("--version").stdout.strip() == __version__
    result = run()
    assert result.exit_code == 2
    assert "Commands" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["operate"],
        ["convert"],
        ["inspect"],
        ["convert", "vit_tiny_patch16_224", "--bogus"],
        ["convert", "vit_tiny_patch16_224", "--img-size", "big"],
        ["convert", "vit_tiny_patch16_224", "extra"],
        ["convert", "vit_tiny_patch16_224", "--out"],
        ["paper", "deit"],
    ],
    ids=" ".join,
)
def test_wrong_flags_are_wrong_usage(arguments: list[str], here: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "rror: " in result.stderr
    assert result.stdout == ""
    assert os.listdir(here) == []


def test_every_command_has_a_docstring_and_metavars() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert python_inspect.getdoc(command.callback)
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands | {group.name for group in app.registered_groups} == set(COMMANDS)
