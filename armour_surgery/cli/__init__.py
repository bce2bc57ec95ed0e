"""The command line: one file per command. Only this folder imports typer and rich.

The commands import torch, timm and transformers inside, so that `--help` answers at once.
"""

from armour_surgery.cli.app import app, main

__all__ = ["app", "main"]
