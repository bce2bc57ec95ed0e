"""What lies where a folder is to be written, and whether it may be replaced."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from armour_surgery.errors import ModelError, NotOursError, OccupiedError, SchemaError
from armour_surgery.records import Source
from armour_surgery.saving.document import LARGEST, TOOL, read_document
from armour_surgery.saving.from_hub import folder_of_plan
from armour_surgery.saving.staging import OURS, PLAN, WEIGHTS

__all__ = ["AS_CONVERTED", "TRAINING", "check_output", "check_replaceable", "is_saved_folder", "refuse_foreign"]

# A training run's record; it makes a folder ours before there is a model in it.
TRAINING = "training.json"
# Stands in the metadata of weights that the command `convert` wrote: to have them again takes the same command. What
# Python saves may have been trained for days, and has no such mark.
AS_CONVERTED = {"armour_surgery": "as converted"}


def is_saved_folder(path: str | Path) -> bool:
    """Whether a path is a folder with a `surgery.json` in it, or hf-hub:ORG/NAME a repository with one."""
    with suppress(ModelError):  # whoever asks takes the name for another model then, and hears why that is none
        return (Path(path) / PLAN).is_file() or folder_of_plan(str(path)) is not None
    return False


def _is_ours(path: Path) -> bool:
    """Whether a folder's `surgery.json`, or the record of a run, says that this tool wrote it."""
    for name in (PLAN, TRAINING):
        try:
            with (path / name).open("rb") as stream:
                document = json.loads(stream.read(LARGEST + 1))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(document, dict) and document.get("tool") == TOOL:
            return True
    return False


def check_output(path: str | Path) -> None:
    """Make sure that a folder may be written at `path`: nothing is there, an empty folder, or one of ours.

    Raises:
        NotOursError: something else is there.
    """
    refuse_foreign(Path(path), _is_ours)


def refuse_foreign(target: Path, is_ours: Callable[[Path], bool]) -> None:
    """Make sure that nothing is at `target`, or an empty folder, or one that `is_ours` knows.

    Raises:
        NotOursError: something else is there.
    """
    if target.is_dir() and (is_ours(target) or not any(target.iterdir())):
        return
    if target.exists() or target.is_symlink():
        what = "is a folder with other things in it" if target.is_dir() else "exists and is not a folder"
        raise NotOursError(f"{target} {what}, so nothing was written; name another --out")


def check_replaceable(path: str | Path, source: Source | None = None, *, force: bool = False) -> None:
    """Make sure that the command `convert` may write a folder at `path`: there is nothing that a user could miss.

    What it wrote itself from the same model, it may replace. `force` allows everything but what is no folder. Without a
    `source`, which model is there is not looked at.

    Raises:
        NotOursError: something is there that this tool did not write.
        OccupiedError: a trained model is there, or one that may be, or a conversion of another model.
    """
    target = Path(path)
    if not target.is_dir() or not any(target.iterdir()):
        check_output(target)
        return
    if force:
        return
    try:
        check_output(target)
    except NotOursError as error:
        names = f"{', '.join(OURS[:-1])} and {OURS[-1]}"
        raise NotOursError(f"{error}, or replace {names} in it with --force; other files stay") from error
    if reason := _why_kept(target, source):
        raise OccupiedError(f"{target} {reason}, and was not replaced; name another --out, or replace it with --force")


def _why_kept(target: Path, source: Source | None) -> str | None:
    """Why a folder of ours is not to be replaced unasked, or None."""
    if (target / TRAINING).exists():
        return f"holds a training run ({TRAINING})"
    try:
        surgery = read_document(target).plan
    except SchemaError as error:
        return f"holds a model that cannot be read ({error})"
    if surgery.trained is not None:
        return "holds a trained model"
    if not _as_converted(target / WEIGHTS):
        return "holds a model that was saved in Python, perhaps after training"
    if source is not None and (surgery.source is None or _identity(surgery.source) != _identity(source)):
        return f"holds a conversion of another model ({surgery.source.name if surgery.source else 'built in Python'})"
    return None


def _as_converted(weights: Path) -> bool:
    """Whether the command `convert` wrote these weights, and nobody since."""
    try:
        with safe_open(weights, framework="pt") as stream:
            return AS_CONVERTED.items() <= (stream.metadata() or {}).items()
    except (SafetensorError, OSError, RuntimeError):
        return False


def _identity(source: Source) -> tuple[str, str, str]:
    """Which model a source is: equal however its folder was spelled, and whatever arguments it was built with."""
    prefix, colon, rest = source.name.rpartition(":")
    name = f"{prefix}{colon}{os.path.realpath(rest)}" if os.path.isdir(rest) else source.name
    return source.library, source.architecture, name
