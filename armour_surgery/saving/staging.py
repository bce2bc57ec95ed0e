"""Writing a folder so that it is the old one or the new one, whenever the writing stops."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CARD", "PLAN", "STAGE", "WEIGHTS", "digest_of", "names_weights", "written_aside"]

PLAN, WEIGHTS, CARD = "surgery.json", "model.safetensors", "README.md"
# Where the next version of a folder waits until its surgery.json is in place.
STAGE = ".armour-new"


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to write into; what is in it takes effect when the block ends well, and is gone when it does not.

    A new folder is renamed into place. In a folder that is there already, the new `surgery.json` is moved in first:
    from then on the folder is the new one, since `load` finds the weights that it names wherever they are by then.
    """
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            # mkdtemp makes folders for the owner alone.
            folder.chmod(0o755)
            yield folder
            os.rename(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    stage = target / STAGE
    if stage.exists():
        # An earlier writing was cut short, before or after the moment that counts.
        _finish(target)
    stage.mkdir()
    committed = False
    try:
        yield stage
        os.replace(stage / PLAN, target / PLAN)
        committed = True
    finally:
        _finish(target, committed)


def _finish(target: Path, committed: bool = False) -> None:
    """Move the rest of a new version into place if its `surgery.json` is there; drop it if it is not.

    Where nobody knows whether it was `committed`, the weights that wait are hashed to find out.
    """
    stage = target / STAGE
    if committed or (
        not (stage / PLAN).exists() and (stage / WEIGHTS).exists() and names_weights(target, stage / WEIGHTS)
    ):
        for name in (WEIGHTS, CARD):
            if (stage / name).exists():
                os.replace(stage / name, target / name)
    shutil.rmtree(stage, ignore_errors=True)


def names_weights(folder: Path, weights: Path) -> bool:
    """Whether a folder's `surgery.json` names these weights."""
    try:
        return bool(json.loads((folder / PLAN).read_text(encoding="utf-8"))["sha256"] == digest_of(weights))
    except (OSError, ValueError, KeyError, TypeError):
        return False
