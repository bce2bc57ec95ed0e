"""A model by any name: one of a library, a user's own, or a folder that `save` wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import UsageError
from armour_surgery.hosts.examples import Written, keep_example
from armour_surgery.hosts.own import is_own
from armour_surgery.records import Source
from armour_surgery.saving.folder import find_folder, load, read_plan
from armour_surgery.saving.occupied import is_saved_folder

__all__ = ["NOTHING_ASKED", "NOTHING_SAID", "Asked", "OwnModels", "load_any", "shared_out"]


@dataclass(frozen=True)
class OwnModels:
    """What is said of models that no library knows.

    `into` names what makes a fresh model for a saved folder, each as FILE.py:CALLABLE; `example` is what models take.
    """

    into: tuple[str, ...] = ()
    example: tuple[Written, ...] = ()


@dataclass(frozen=True)
class Asked:
    """How models are to be that are no saved folders: weights from a file, an image size, classes (0: no head)."""

    checkpoint: Path | None = None
    img_size: int | None = None
    num_classes: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Those of the two numbers that were given, by name."""
        given = {"img_size": self.img_size, "num_classes": self.num_classes}
        return {name: value for name, value in given.items() if value is not None}


NOTHING_SAID = OwnModels()
NOTHING_ASKED = Asked()


def load_any(
    name: str, *, pretrained: bool = True, asked: Asked = NOTHING_ASKED, own: OwnModels = NOTHING_SAID
) -> tuple[nn.Module, Source | None]:
    """MODEL as every command but `convert` takes it: a folder that this tool saved, or what the libraries know.

    The folder may lie on the hub: hf-hub:ORG/NAME is ours if there is a `surgery.json` in it, and else timm's.

    Raises:
        ModelError, FolderError: it cannot be loaded; the message says why.
        UsageError: a checkpoint or a size is given for a folder, or nothing says what makes the model that it is of.
    """
    if not is_saved_folder(name):
        return hosts.load_model(
            name,
            pretrained=pretrained,
            checkpoint=asked.checkpoint,
            img_size=asked.img_size,
            num_classes=asked.num_classes,
            example=own.example,
        )
    if asked.checkpoint is not None:
        raise UsageError(f"{name} has its weights in it; --checkpoint is for models of a library")
    if asked.sizes:
        option = f"--{next(iter(asked.sizes)).replace('_', '-')}"
        raise UsageError(
            f"{name} is as it was converted; {option} is for models of a library: convert the original with it"
        )
    folder = find_folder(name)
    source = read_plan(folder).source
    fresh = None
    if source is not None and source.library == hosts.OWN:
        fresh, _ = hosts.load_model(_maker(name, source, own.into))
    model = load(folder, into=fresh)
    keep_example(model, own.example)
    return model, None


def shared_out(names: Sequence[str], asked: Asked) -> list[Asked]:
    """What of it is meant for which of several models.

    The file goes to the first that is no saved folder, and sizes go to all that a library builds. Where there is none,
    the first gets it all, and refuses it.
    """
    loose = [place for place, name in enumerate(names) if not is_saved_folder(name)]
    built = [place for place in loose if not is_own(names[place])]
    shares = []
    for place in range(len(names)):
        share = asked if place in (built or loose[:1] or [0]) else NOTHING_ASKED
        file = asked.checkpoint if place == (loose or [0])[0] else None
        shares.append(replace(share, checkpoint=file))
    return shares


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
