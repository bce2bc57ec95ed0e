"""Image files below a folder: which there are, and how one is read."""

import os
from pathlib import Path

from PIL import Image, ImageOps

__all__ = ["SUFFIXES", "images_below", "open_image", "pictures_by_folder"]

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)


def pictures_by_folder(root: Path) -> list[tuple[Path, list[str]]]:
    """Each folder at or below `root` and the names of the images in it, in a fixed order. Follows links once."""
    listed: list[tuple[Path, list[str]]] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        # A link to a folder above leads here again, without end.
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        # Macs leave ._photo.jpg beside photo.jpg; it is no image.
        pictures = sorted(n for n in names if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES)
        if pictures:
            listed.append((Path(folder), pictures))
    return listed


def images_below(root: Path) -> list[Path]:
    """Image files at or below a folder, in a fixed order, without hidden ones."""
    return [folder / name for folder, names in pictures_by_folder(root) for name in names]


def open_image(path: Path) -> Image.Image:
    """A picture in memory, turned as its camera says that it was held."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image)
