"""Run the command line inside this process, and check what every command promises."""

import json
import os
from typing import Any

from click.testing import Result
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery.cli import app

__all__ = ["CONVERT_KEYS", "bad", "document", "failed", "good", "run"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def good(*arguments: str) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    assert "Traceback" not in result.stderr
    return result


def document(*arguments: str) -> dict[str, Any]:
    """The one JSON document on stdout."""
    result = good(*arguments, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.stdout.endswith("}\n")
    return found


def failed(*arguments: str, code: int = 1) -> Result:
    """A command that fails, with one line on stderr."""
    result = run(*arguments)
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert "this is a bug" not in lines[0]
    return result


def bad(*arguments: str, code: int = 1) -> str:
    """The message of a command that fails: one line on stderr, nothing on stdout, and nothing written."""
    before = sorted(os.listdir())
    result = failed(*arguments, code=code)
    assert result.stdout == ""
    assert sorted(os.listdir()) == before
    return result.stderr.rstrip("\n")


CONVERT_KEYS = {
    "model", "mode", "init", "out", "params_before", "params_after", "macs_before", "macs_after", "sites", "refused",
    "fidelity",
    "frontier",
    "max_loss",
    "params_goal",
    "mlps",
    "seconds",
}  # fmt: skip
