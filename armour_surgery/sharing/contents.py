"""Which files of a folder are its model's, and go to the hub, and which stay here, each with the reason."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from armour_surgery.errors import UsageError
from armour_surgery.hosts.library_config import CONFIG, PROCESSOR
from armour_surgery.saving.occupied import TRAINING
from armour_surgery.saving.staging import CARD, PLAN, WEIGHTS, stays_inside

__all__ = ["LeftOut", "sort_files"]

# Beside what `save` wrote: pictures and pages that a card shows, whose license it is, and what libraries read.
PICTURES = (".gif", ".html", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp")
PAPERS = ("citation", "copying", "license", "licence", "notice")
CONFIGS = (CONFIG, PROCESSOR, "processor_config.json")
# Names that trainers give to what they go on from, ours (`checkpoints/`) and others' (`checkpoint-500/`).
STATES = ("checkpoint*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*", "*.ckpt")
RECORDS = (TRAINING, "recipe.yaml", "log.jsonl", "summary.csv", "events.out.tfevents*", "tensorboard*")


@dataclass(frozen=True)
class LeftOut:
    """A file, or a folder (`name/`), that is not sent, and why."""

    name: str
    reason: str


def sort_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[LeftOut]]:
    """The files to send by their names in the folder, but for those that `save` wrote, and all that is left out.

    `include` are patterns of names (`notes.txt`, `onnx/*`) to send too. Hidden files, links out of the folder and
    checkpoints of training are not sent, whatever it says.

    Raises:
        UsageError: a pattern matches no file that may be sent.
    """
    sent: dict[str, Path] = {}
    left_out: list[LeftOut] = []
    matched: set[str] = set()
    for name, path in _entries(folder, "", deep=bool(include)):
        if name in (PLAN, WEIGHTS, CARD):
            continue
        reason = _never(folder, name.rstrip("/"), path)
        asked = [pattern for pattern in include if fnmatchcase(name, pattern)]
        if reason is None and not name.endswith("/") and (asked or _is_of_the_model(name)):
            sent[name] = path
            matched.update(asked)
            continue
        left_out.append(LeftOut(name, reason or _why_not(name)))
    for pattern in include:
        if pattern not in matched:
            raise UsageError(
                f"--include {pattern!r} matches no file in {folder} that may be sent; write a name as it is there, or "
                "a pattern such as 'onnx/*'"
            )
    return sent, left_out


def _entries(folder: Path, prefix: str, *, deep: bool) -> Iterator[tuple[str, Path]]:
    """Files by their names, and folders that are not looked into as `name/`."""
    for entry in sorted(os.scandir(folder / prefix), key=lambda entry: entry.name):
        name = prefix + entry.name
        path = folder / name
        if not entry.is_dir(follow_symlinks=False):
            yield name, path
        elif deep and not entry.name.startswith(".") and not _is_state(entry.name):
            yield from _entries(folder, f"{name}/", deep=True)
        else:
            yield f"{name}/", path


def _never(folder: Path, name: str, path: Path) -> str | None:
    """Why a file is not sent in any case; None where it may be."""
    last = name.rpartition("/")[2]
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    if last.startswith("."):
        return "hidden"
    if _is_state(last):
        return "what training goes on from"
    if not stays_inside(folder, path):
        return "a link out of the folder"
    try:
        kind = path.stat().st_mode
    except OSError:
        return "a link to nothing"
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        return "not a file"
    return "a link to a folder" if path.is_symlink() and stat.S_ISDIR(kind) else None


def _is_state(name: str) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in STATES)


def _is_of_the_model(name: str) -> bool:
    lower = name.lower()
    return "/" not in name and (lower in CONFIGS or lower.endswith(PICTURES) or lower.startswith(PAPERS))


def _why_not(name: str) -> str:
    if any(fnmatchcase(name.rstrip("/"), pattern) for pattern in RECORDS):
        return "a record of training"
    return "a folder of other things" if name.endswith("/") else "not of the model"
