"""Weights of the original's own shape, which its library loads without knowing of this tool."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from armour_surgery.exporting.stock import as_stock
from armour_surgery.hosts.library_folder import write_folder
from armour_surgery.records import Source
from armour_surgery.saving.licenses import license_lines, license_sentence

__all__ = ["ORIGIN", "write_compat"]

ORIGIN = "armour_export.json"


def write_compat(
    model: nn.Module, into: nn.Module | None, folder: Path, origin: dict[str, Any]
) -> tuple[nn.Module, Source]:
    """Write the folder; returns the unconverted model that it holds, and how it is built.

    Raises:
        ExportError, SchemaError, FolderError: see `as_stock`.
    """
    stock, source = as_stock(model, into)
    folder.mkdir()
    how = write_folder(stock, source, folder)
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(origin, how), encoding="utf-8")
    return stock, source


def _card(origin: dict[str, Any], how: str) -> str:
    """What the folder is, for whoever finds it."""
    license_of_base = origin["license"]
    lines = ["---", *license_lines(license_of_base), "tags: [vision, armour]", "---", f"# {origin['model']}", ""]
    mode = origin["mode"]
    lines += [
        f"`{origin['converted_from']}` after Armour surgery (mode `{mode}`, init `{origin['init']}`), in the shape "
        "that it had before: a projection that serves twice is stored twice. It loads without armour-surgery and "
        "computes what the converted model computes, but is neither smaller nor faster than the original. Converted to "
        f"mode `{mode}` again it is the converted model.",
        "",
        "```python",
        how,
        "```",
        "",
        license_sentence(license_of_base),
    ]
    return "\n".join(lines) + "\n"
