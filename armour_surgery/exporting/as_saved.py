"""Folders as `save` writes them, for timm and transformers, and a modeling file for who has not this tool."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.errors import ExportError
from armour_surgery.exporting.comparison import Inputs, answers
from armour_surgery.exporting.compat import ORIGIN
from armour_surgery.exporting.remote_code import write_remote_code
from armour_surgery.hosts.library_folder import auto_class
from armour_surgery.records import Source
from armour_surgery.saving.folder import read_plan, save
from armour_surgery.saving.staging import CARD

__all__ = ["LIBRARIES", "write_saved"]

# The library that loads a folder of each format.
LIBRARIES = {"timm": "timm", "hf": "transformers"}

_HOW = """
## In {library}

```python
{first}{how}
```
"""


def write_saved(
    model: nn.Module, format: str, folder: Path, origin: dict[str, Any], calls: list[Inputs], *, remote_code: bool
) -> Source:
    """Write the folder; returns how the original is built. `calls` are what a modeling file has to know.

    Raises:
        UsageError: the model is not converted. ExportError: it is of another library, or see `write_remote_code`.
        FolderError: it cannot be rebuilt from its library.
    """
    source = read_plan(save(model, folder)).source
    assert source is not None
    if source.library != LIBRARIES[format]:
        other = next((name for name, library in LIBRARIES.items() if library == source.library), "compat")
        raise ExportError(
            f"--format {format} is for models of {LIBRARIES[format]}, and {type(model).__name__} is of "
            f"{source.library}; --format {other} is for those, or save"
        )
    (folder / ORIGIN).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")
    if format == "timm":
        first, how = "import armour_surgery, timm\n", 'model = timm.create_model("local-dir:FOLDER", pretrained=True)'
    elif remote_code:
        _see(model, calls)
        auto = write_remote_code(model, source, folder)
        first = f"from transformers import {auto}  # without armour-surgery\n"
        how = f'model = {auto}.from_pretrained("FOLDER", trust_remote_code=True)'
    else:
        auto = auto_class(model)
        first = f"import armour_surgery\nfrom transformers import {auto}\n"
        how = f'model = {auto}.from_pretrained("FOLDER")'
    card = (folder / CARD).read_text(encoding="utf-8")
    section = _HOW.format(library=source.library, first=first, how=how)
    (folder / CARD).write_text(card + section, encoding="utf-8")
    return source


def _see(model: nn.Module, calls: list[Inputs]) -> None:
    """Call the attentions in all ways that a user of the folder will, so that their forwards have a branch for each."""
    # Training changes running means, and the classes belong to the copy too.
    copied = full_copy(model)
    with torch.random.fork_rng(devices=[]):
        for training in (False, True):
            copied.train(training)
            # A single image has no variance to train BatchNorm with.
            for inputs in calls[training:]:
                answers(copied, inputs)
