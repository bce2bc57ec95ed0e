"""`armour-surgery run SCRIPT ...`."""

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from armour_surgery.cli.run import command
from armour_surgery.errors import UsageError

__all__ = ["as_it_is", "run"]

# What comes after the script is its own, `--help` too.
as_it_is = {"allow_extra_args": True, "allow_interspersed_args": False, "ignore_unknown_options": True}


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(metavar="SCRIPT ...", help="A Python file, and what it is to be told.")],
) -> None:
    """Run a script of others (timm's train.py, validate.py, benchmark.py) with converted models known to libraries.

    It is as if the script began with `import armour_surgery`: local-dir:FOLDER and the paper's names are timm's then,
    and transformers loads converted folders. Under torchrun: torchrun --no-python armour-surgery run SCRIPT ...
    """
    _check(script)
    # As Python itself does for a script; what goes wrong in it is shown as Python shows it. Libraries know converted
    # models since this package was imported.
    sys.argv = [str(script), *context.args]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")


@command
def _check(script: Path) -> None:
    if not script.is_file():
        raise UsageError(f"SCRIPT {str(script)!r} is no file; name a Python file, and its arguments after it")
