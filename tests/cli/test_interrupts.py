"""Ctrl-C leaves nothing half-written, a bug is one line too, and warnings of libraries stay out."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import bad, good, run

from armour_surgery.saving import folder


def test_an_interrupt_while_saving(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    good("convert", tiny, "--out", "ours")
    before = {path.name: path.read_bytes() for path in (here / "ours").iterdir()}
    monkeypatch.setattr(folder, "save_file", interrupted)
    assert "interrupted" in bad("convert", tiny, "--out", "out", code=130)
    assert "interrupted" in bad("convert", tiny, "--mode", "kv", "--out", "ours", code=130)
    assert {path.name: path.read_bytes() for path in (here / "ours").iterdir()} == before


SLOW_SAVE = """
import signal, sys, time
# A shell that starts the tests in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from armour_surgery.saving import folder
from armour_surgery.cli import main
def slow(tensors, path, **options):
    Path(path).write_bytes(b"half")
    print("saving", flush=True, file=sys.__stdout__)
    time.sleep(60)
folder.save_file = slow
sys.argv = ["armour-surgery", *sys.argv[1:]]
main()
"""


def test_ctrl_c_while_saving(tiny: str, here: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, "convert", tiny, "--out", "out", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        assert len(os.listdir(here)) == 2
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == ""
    assert errors.splitlines() == ["error: interrupted; nothing was left half-written"]
    assert os.listdir(here) == ["tiny"]


def test_debugging_adds_the_traceback(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMOUR_DEBUG", "1")
    result = run("convert", tiny, "--mode", "vq")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "UsageError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown mode 'vq'")
    assert result.stdout == ""


def test_a_bug_is_one_line_too(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("armour_surgery.surgery.conversion.find_sites", broken)
    result = run("inspect", tiny)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ZeroDivisionError: first line second line")
    assert "ARMOUR_DEBUG=1" in line


def test_warnings_of_libraries_stay_out(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from armour_surgery.surgery import conversion

    original = conversion.find_sites

    def warned(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("noise", UserWarning, stacklevel=1)
        return original(*args, **kwargs)

    monkeypatch.setattr(conversion, "find_sites", warned)
    assert good("inspect", tiny).stderr == ""
