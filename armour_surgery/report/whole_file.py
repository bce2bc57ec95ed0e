"""Writing one file whole or not at all, and saying beforehand whether that will work."""

import os
import tempfile
from pathlib import Path

from armour_surgery.errors import FolderError

__all__ = ["check_target", "write_whole"]


def check_target(path: str | Path, what: str) -> None:
    """Make sure that `what` (a report, say) may be written at `path`.

    Raises:
        FolderError: `path` is a folder or a device, or its folder is missing or cannot be written to.
    """
    target = Path(path)
    if target.is_dir():
        raise FolderError(f"{target} is a folder; name a file for the {what} in it")
    if target.exists() and not target.is_file():
        raise FolderError(f"{target} is not a regular file; name another for the {what}")
    folder = target.resolve().parent
    if not folder.is_dir():
        raise FolderError(f"{folder} is not a folder, so the {what} {target.name} cannot be written there; create it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FolderError(f"{folder} cannot be written to; name another place for the {what} {target.name}")


def write_whole(path: str | Path, content: bytes, what: str) -> Path:
    """Write a file beside its place and rename it, so that whoever looks sees the old one or the new one.

    Raises:
        FolderError: see `check_target`; or the disk refuses.
    """
    check_target(path, what)
    target = Path(path).resolve()  # what a link points to is replaced, not the link
    waiting = None
    try:
        handle, waiting = tempfile.mkstemp(prefix=".armour-", dir=target.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.chmod(waiting, 0o644)
        os.replace(waiting, target)
    except OSError as error:
        raise FolderError(f"the {what} {target} could not be written: {error.strerror}; name another place") from error
    finally:
        if waiting is not None:
            Path(waiting).unlink(missing_ok=True)
    return Path(path)
