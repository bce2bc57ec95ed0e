"""`run` gives a script of others the converted models, its own arguments, and its own end."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import bad, run
from saved_models import armour

from armour_surgery import save

SCRIPT = """
import sys, timm

print(__name__, sys.argv)
from beside import LAST
model = timm.create_model(sys.argv[1], pretrained=True)
assert "surgery" in vars(model)
sys.exit(LAST)
"""


@pytest.fixture
def script(here: Path) -> Path:
    (here / "scripts").mkdir()
    (here / "scripts/beside.py").write_text("LAST = 3\n")
    (here / "scripts/check.py").write_text(SCRIPT)
    return Path("scripts/check.py")


def test_a_script_finds_a_saved_folder_and_has_its_own_arguments(script: Path, here: Path) -> None:
    save(armour("vit"), here / "ours")
    command = [sys.executable, "-m", "armour_surgery", "run", str(script), "local-dir:ours", "--help", "-x", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"__main__ ['{script}', 'local-dir:ours', '--help', '-x', '1']\n"


def test_what_goes_wrong_in_it_is_shown_as_python_shows_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (here / "wrong.py").write_text("1 / 0\n")
    found = run("run", "wrong.py")
    assert isinstance(found.exception, ZeroDivisionError)


def test_no_such_script(here: Path) -> None:
    assert "SCRIPT 'train.py' is no file" in bad("run", "train.py", code=2)
