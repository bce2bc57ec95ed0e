"""A model by any name: one of a library, or a folder that `save` wrote."""

from pathlib import Path

from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import UsageError
from armour_surgery.records import Source
from armour_surgery.saving.folder import is_saved_folder, load

__all__ = ["load_any"]


def load_any(name: str, *, pretrained: bool = True, checkpoint: Path | None = None) -> tuple[nn.Module, Source | None]:
    """MODEL as every command but `convert` takes it: a folder that this tool saved, or what the libraries know.

    Raises:
        ModelError, FolderError: it cannot be loaded; the message says why.
    """
    if is_saved_folder(name):
        if checkpoint is not None:
            raise UsageError(f"{name} has its weights in it; --checkpoint is for models of a library")
        return load(name), None
    return hosts.load_model(name, pretrained=pretrained, checkpoint=checkpoint)
