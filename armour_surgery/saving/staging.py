"""Writing a folder so that it is the old one or the new one, whenever the writing stops and whoever else writes."""

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from armour_surgery.errors import FolderError
from armour_surgery.hosts.library_config import CONFIG, PROCESSOR, is_config_of_ours
from armour_surgery.hosts.weights_file import digest_of

__all__ = [
    "CARD",
    "OURS",
    "PATIENCE",
    "PLAN",
    "STAGE",
    "WEIGHTS",
    "check_stage",
    "names_weights",
    "state_of",
    "stays_inside",
    "written_aside",
]

PLAN, WEIGHTS, CARD = "surgery.json", "model.safetensors", "README.md"
# All files of a folder that this tool writes; what else lies there is the user's.
OURS = (PLAN, WEIGHTS, CARD, CONFIG, PROCESSOR)
# Where the next version of a folder waits until its surgery.json is in place.
STAGE = ".armour-new"
# safetensors writes beside its file under such a name first, and a process that is killed leaves it there.
UNFINISHED = ".tmp"
# How long a writer waits for another, and a reader for a moment in which nobody writes, in seconds.
PATIENCE = 60.0


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether a file of a folder is in it, also where it is a link.

    In the hub's cache a folder `snapshots/COMMIT` holds links into `blobs` beside `snapshots`; that counts as inside.
    """
    home, real = folder.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return real.is_relative_to(home) or real.parent == blobs


def state_of(folder: Path) -> list[tuple[int, int, int] | None]:
    """Which files a reader meets; equal before and after it read, they were the same ones all the time."""
    state: list[tuple[int, int, int] | None] = []
    for name in (PLAN, WEIGHTS, f"{STAGE}/{WEIGHTS}"):
        try:
            found = (folder / name).stat()
        except OSError:
            state.append(None)
        else:
            state.append((found.st_ino, found.st_mtime_ns, found.st_size))
    return state


def check_stage(target: Path) -> None:
    """Make sure that what waits in a folder, if something does, is of this tool and lies there itself.

    Raises:
        FolderError: it is a link, holds one, or holds what this tool does not write.
    """
    stage = target / STAGE
    try:
        found = stage.lstat()
    except OSError:
        return
    if not stat.S_ISDIR(found.st_mode):
        raise FolderError(f"{stage} is a link or a file, where only a folder of this tool may be; remove it")
    try:
        waiting = list(os.scandir(stage))
    except OSError:
        return  # a writer has come to its end meanwhile
    for entry in waiting:
        ours = entry.name in OURS or entry.name.startswith(UNFINISHED)
        if not ours or not entry.is_file(follow_symlinks=False):
            raise FolderError(
                f"{stage} is where this tool keeps unfinished files, and {entry.name!r} in it is a link or not one of "
                "them; move it away, or remove the folder"
            )


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A folder to write into; what is in it takes effect when the block ends well, and is gone when it does not.

    A new folder is renamed into place. In a folder that is there already, the new `surgery.json` is moved in first:
    from then on the folder is the new one, since `load` finds the weights that it names wherever they are by then.
    Writers of one folder wait for each other.

    Raises:
        FolderError: another writer was first, or does not come to its end, or the stage holds what is not ours.
    """
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            # mkdtemp makes folders for the owner alone.
            folder.chmod(0o755)
            yield folder
            try:
                os.rename(folder, target)
            except OSError as error:
                if not os.path.lexists(target):
                    raise
                raise FolderError(
                    f"{target} was written by somebody else meanwhile, and is left as it is; save again to replace it"
                ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return
    with _alone(target):
        check_stage(target)
        stage = target / STAGE
        if stage.exists():
            # An earlier writing was cut short, before or after the moment that counts.
            _finish(target)
        stage.mkdir()
        committed = False
        try:
            yield stage
            stale = _stale(stage, target)
            os.replace(stage / PLAN, target / PLAN)
            committed = True
        finally:
            _finish(target, committed)
        for path in stale:
            path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it is open no other writer, thread or process, is inside for the same folder.

    The lock is on the folder itself, leaves nothing behind, and is gone with its process. Where the system or the file
    system has no such locks nobody waits.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise FolderError(
                        f"{folder} has been written by another process for {PATIENCE:.0f} s; save again when that is "
                        "done, or name another folder"
                    ) from error
                time.sleep(0.02)
            except OSError:
                break  # network file systems refuse to lock folders
        try:
            yield
        finally:
            # Closing alone would leave the lock with a process that was forked meanwhile.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _finish(target: Path, committed: bool = False) -> None:
    """Move the rest of a new version into place if its `surgery.json` is there; drop it if it is not.

    Where nobody knows whether it was `committed`, the weights that wait are hashed to find out.
    """
    stage = target / STAGE
    if committed or (
        not (stage / PLAN).exists() and (stage / WEIGHTS).exists() and names_weights(target, stage / WEIGHTS)
    ):
        # The weights come last: as long as they wait here, it can be seen that something does.
        for name in (CARD, CONFIG, PROCESSOR, WEIGHTS):
            if (stage / name).exists():
                os.replace(stage / name, target / name)
    shutil.rmtree(stage, ignore_errors=True)


def _stale(stage: Path, target: Path) -> list[Path]:
    """What an earlier version wrote for its library and the new one, of another library, has not."""
    if not is_config_of_ours(target / CONFIG):
        return []
    return [target / name for name in (CONFIG, PROCESSOR) if not (stage / name).exists()]


def names_weights(folder: Path, weights: Path) -> bool:
    """Whether a folder's `surgery.json` names these weights."""
    try:
        return bool(json.loads((folder / PLAN).read_text(encoding="utf-8"))["sha256"] == digest_of(weights))
    except (OSError, ValueError, KeyError, TypeError):
        return False
