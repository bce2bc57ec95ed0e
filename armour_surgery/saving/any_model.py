"""A model by any name: one of a library, a user's own, or a folder that `save` wrote."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import UsageError
from armour_surgery.hosts.examples import Written, keep_example
from armour_surgery.records import Source
from armour_surgery.saving.folder import find_folder, load, read_plan
from armour_surgery.saving.occupied import is_saved_folder

__all__ = ["NOTHING_SAID", "OwnModels", "load_any"]


@dataclass(frozen=True)
class OwnModels:
    """What is said of models that no library knows.

    `into` names what makes a fresh model for a saved folder, each as FILE.py:CALLABLE; `example` is what models take.
    """

    into: tuple[str, ...] = ()
    example: tuple[Written, ...] = ()


NOTHING_SAID = OwnModels()


def load_any(
    name: str, *, pretrained: bool = True, checkpoint: Path | None = None, own: OwnModels = NOTHING_SAID
) -> tuple[nn.Module, Source | None]:
    """MODEL as every command but `convert` takes it: a folder that this tool saved, or what the libraries know.

    The folder may lie on the hub: hf-hub:ORG/NAME is ours if there is a `surgery.json` in it, and else timm's.

    Raises:
        ModelError, FolderError: it cannot be loaded; the message says why.
        UsageError: a checkpoint is given for a folder, or nothing says what makes the model that it is of.
    """
    if not is_saved_folder(name):
        return hosts.load_model(name, pretrained=pretrained, checkpoint=checkpoint, example=own.example)
    if checkpoint is not None:
        raise UsageError(f"{name} has its weights in it; --checkpoint is for models of a library")
    folder = find_folder(name)
    source = read_plan(folder).source
    fresh = None
    if source is not None and source.library == hosts.OWN:
        fresh, _ = hosts.load_model(_maker(name, source, own.into))
    model = load(folder, into=fresh)
    keep_example(model, own.example)
    return model, None


def _maker(folder: str, source: Source, into: tuple[str, ...]) -> str:
    """Which of the callables makes the model that a folder is of: the one that it names, or the only one."""
    if len(into) == 1:
        return into[0]
    # Nothing of the folder is called by itself: it may come from anywhere.
    for name in into:
        if name.replace("\\", "/").rpartition("/")[2] == source.name:
            return name
    example = source.name if ":" in source.name else f"FILE.py:{source.name}"
    problem = f"none of --into {', '.join(into)} is that" if into else "only you have its code"
    raise UsageError(
        f"{folder} holds a {source.architecture} ({source.name}), which no library can build, and {problem}; say what "
        f"makes a fresh one with --into PATH/{example}"
    )
