"""Image files below a folder: which there are, and how one is read."""

import os
import stat
from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["APART", "SUFFIXES", "images_below", "is_apart", "open_image", "pictures_by_folder", "require_file"]

# Of so many pictures calibration fits nothing to one, to measure by it; of fewer than that to the last.
APART = 8

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)


def pictures_by_folder(root: Path) -> list[tuple[Path, list[str]]]:
    """Each folder at or below `root` and the names of the images in it, in a fixed order.

    Links are followed, and every folder is read once. Links to a folder that `root` lies in are not followed: they lead
    here again, and to the folders beside it, which are another class's or nobody's.
    """
    listed: list[tuple[Path, list[str]]] = []
    seen = set(map(str, Path(os.path.realpath(root)).parents))
    for folder, folders, names in os.walk(root, followlinks=True):
        # Without this a link to a folder above would be followed down to the longest path that there can be.
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # os.walk goes on into what is left in this very list, in its order.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = sorted(filter(_is_image, names))
        if pictures:
            listed.append((Path(folder), pictures))
    return listed


def _is_image(name: str) -> bool:
    # Macs leave ._photo.jpg beside photo.jpg; it is no image.
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES


def images_below(root: Path) -> list[Path]:
    """Image files at or below a folder, in a fixed order, without hidden ones."""
    paths: list[Path] = []
    for folder, names in pictures_by_folder(root):
        paths += (folder / name for name in names)
    return paths


def require_file(path: Path) -> None:
    """Return if the path is a regular file, or a link to one.

    Raises:
        ValueError: it is not; to open a pipe or a device can take forever.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is a pipe, a socket or a device, and no file")


def open_image(path: Path) -> Image.Image:
    """A picture in memory, turned as its camera says that it was held.

    Raises:
        OSError, ValueError: it cannot be read, or is no regular file.
    """
    require_file(path)
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)


def is_apart(number: int, count: int) -> bool:
    """Whether calibration sets picture `number` of `count` (0: not known) apart; a single one is not."""
    period = min(APART, count or APART)
    return period > 1 and number % period == period - 1
