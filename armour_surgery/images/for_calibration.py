"""The images that a model is calibrated with: photos, a dataset, drawn ones, or batches that a caller made.

Everything is read when it is asked for, and nothing is kept, so memory does not grow with the number of images.
"""

import enum
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from armour_surgery.errors import CalibrationError
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.files import SUFFIXES, is_apart, open_image, pictures_by_folder
from armour_surgery.images.synthetic import synthetic_images
from armour_surgery.images.timm_datasets import is_timm_dataset, timm_pictures
from armour_surgery.patching import as_users_draw

__all__ = ["CalibrationBatches", "calibration_batches"]

SYNTHETIC = "synthetic"
# A crop of a photo that was seen before has this share of its area at least.
SMALLEST_CROP = 0.3

# Reads one picture; and one pass over all that a source has, each with a number that it keeps from pass to pass, and
# how many there are (0: not known).
Reader = Callable[[], Image.Image]
Pass = Callable[[np.random.Generator], Iterator[tuple[int, int, Reader]]]


class _Share(enum.Enum):
    """Which of a source's pictures a stream shows."""

    ALL = enum.auto()
    FITTED = enum.auto()
    APART = enum.auto()

    def has(self, number: int, count: int) -> bool:
        """Whether picture `number` of `count` (0: not known) belongs to it; a single one belongs to both."""
        if self is _Share.ALL or count == 1:
            return True
        return is_apart(number, count) is (self is _Share.APART)


class CalibrationBatches(Iterator[Tensor]):
    """Float batches `[B, C, H, W]`, preprocessed, to be used once.

    `images` counts what was handed out so far, and `skipped` the files that could not be read on the way.
    """

    def __init__(self, prep: Preprocessing, limit: int) -> None:
        self.images = 0
        self.skipped = 0
        self._prep = prep
        self._limit = limit
        self._checked: Iterator[Tensor] = iter(())

    def __next__(self) -> Tensor:
        return next(self._checked)

    def _begin(self, stream: Iterable[object]) -> "CalibrationBatches":
        self._checked = self._check(stream)
        return self

    def _check(self, stream: Iterable[object]) -> Iterator[Tensor]:
        # An image of one pixel has one color, and is not blank for that.
        varied = math.prod(self._prep.size[1:]) == 1
        for number, item in enumerate(stream, 1):
            batch = _image_batch(item, number, self._prep)[: self._limit - self.images]
            where = f"calibration batch {number} (images {self.images + 1} to {self.images + len(batch)})"
            if bad := int((~batch.isfinite()).sum()):
                raise CalibrationError(
                    f"{where} holds {bad} NaN or infinite values; look at the preprocessing of these images"
                )
            self.images += len(batch)
            varied = varied or bool((batch.amax((2, 3)) > batch.amin((2, 3))).any())
            yield batch
            if self.images >= self._limit:
                break
        if not self.images:
            raise CalibrationError(
                "calibration yields no images: the iterable is empty, or a generator that was used up before; "
                "pass a fresh one"
            )
        if not varied:
            raise CalibrationError(
                f"all {self.images} calibration images are blank: each has one color throughout, so they say "
                "nothing about the model; pass photos, or use synthetic images"
            )


def calibration_batches(
    source: object, prep: Preprocessing, *, images: int, batch_size: int = 16, seed: int = 0, apart: int = 0
) -> CalibrationBatches:
    """At most `images` images from `source`, in float batches `[B, C, H, W]` as the model takes them.

    `source` is one of these; strings can be joined by commas, and each then gives its share:

    - `"synthetic"`: drawn on the fly.
    - A folder of images in any layout. Files are chosen at random over all folders below it. If there are fewer than
      `images`, those seen before come again as other crops, half of them mirrored. Files that cannot be read are
      skipped and counted.
    - A dataset of timm, `PREFIX/NAME` or `PREFIX/NAME:FOLDER` (`hfds/...`, `wds/...`, `torch/...`), likewise.
    - An iterable of float batches `[B, C, H, W]` that are preprocessed, alone, in a tuple or list with labels,
      or under "pixel_values" in a mapping. They are used as they come, in their own batch size.

    The same `seed` gives the same images. With `apart` every so-many-th batch of a folder or dataset is made of
    pictures that the other batches do not have, not even as another crop: what is measured there was not fitted. Of an
    iterable nothing is drawn beyond what is used.

    Raises:
        CalibrationError: here, if an argument is wrong, a path does not exist or a folder has no images; while
            iterating, if no file can be read, the iterable holds no image batches of the model's size, pixels are NaN
            or infinite, or every image is blank.
    """
    for name, value, least in (("images", images, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or value < least:
            raise CalibrationError(f"{name} of the calibration must be {least} or more, not {value!r}")
    batches = CalibrationBatches(prep, images)
    if isinstance(source, str | os.PathLike):
        return batches._begin(_drawn(os.fspath(source), prep, images, batch_size, seed, apart, batches))
    if isinstance(source, Tensor):
        return batches._begin(torch.split(source, batch_size) if source.ndim == 4 else [source])
    if isinstance(source, Mapping):
        return batches._begin([source])
    if not isinstance(source, Iterable):
        raise CalibrationError(
            f"calibration is {_kind(source)}; pass a folder of images, {SYNTHETIC!r}, or an iterable of image batches"
        )
    return batches._begin(as_users_draw(source))


def _drawn(
    source: str, prep: Preprocessing, images: int, batch_size: int, seed: int, apart: int, tally: CalibrationBatches
) -> Iterator[Tensor]:
    """Batches of a source's parts in turns; every `apart`-th batch of the pictures that the others do not have."""
    parts = _parts(source)

    def streams(share: _Share) -> list[Iterator[Tensor]]:
        # Not a generator: what is wrong with a part is said before the first image is asked for.
        return [_images(part, prep, images, (seed, place), tally, share) for place, part in enumerate(parts)]

    fitted = streams(_Share.FITTED if apart else _Share.ALL)
    set_apart = streams(_Share.APART) if apart else []

    def image(turn: int) -> Tensor:
        batch = turn // batch_size
        chosen = set_apart if apart and batch % apart == apart - 1 else fitted
        return next(chosen[turn % len(chosen)])

    return _stacked(map(image, range(images)), batch_size)


def _parts(source: str) -> list[str]:
    if Path(source).expanduser().exists() and source:
        return [source]
    parts = [part.strip() for part in source.split(",")]
    if not all(parts):
        raise CalibrationError(
            f"the calibration source {source!r} has an empty part; name a folder of images, or {SYNTHETIC}"
        )
    return parts


def _images(
    part: str, prep: Preprocessing, images: int, seeds: tuple[int, int], tally: CalibrationBatches, share: _Share
) -> Iterator[Tensor]:
    """Endless images `[C, H, W]` of one part of a source; `seeds` are the seed and the part's place."""
    if part == SYNTHETIC:
        # Two streams that are both synthetic must not draw the same.
        start = (2 * seeds[1] + (share is _Share.APART)) << 32
        return map(prep.normalize, synthetic_images(images, prep.size, seeds[0], start=start))
    path = Path(part).expanduser()
    if is_timm_dataset(part) and not path.exists():
        return _photos(timm_pictures(part), part, prep, seeds, tally, share)
    if path.is_file():
        picture = path.suffix.lower() in SUFFIXES
        raise CalibrationError(
            f"{part} is {'one image' if picture else 'a file'}; pass the folder that holds the images"
            f"{f': {path.parent}' if picture else ''}"
        )
    if not path.exists():
        raise CalibrationError(
            f"the calibration folder {part} does not exist; check the path, or use {SYNTHETIC} for images that need no "
            "files"
        )
    folders = pictures_by_folder(path)
    if not folders:
        raise CalibrationError(
            f"no images in {part} or below it (looked for {', '.join(sorted(SUFFIXES))}); pass another folder, or "
            f"{SYNTHETIC}"
        )
    return _photos(partial(_files, folders), part, prep, seeds, tally, share)


def _files(folders: list[tuple[Path, list[str]]], rng: np.random.Generator) -> Iterator[tuple[int, int, Reader]]:
    """Every file once, in random order: one of each folder, then the next of each, until all are through."""
    waiting = []
    total = 0
    for folder, names in folders:
        # `total` is the number of the folder's first file.
        waiting.append((folder, names, rng.permutation(len(names)), total))
        total += len(names)
    for turn in itertools.count():
        waiting = [entry for entry in waiting if turn < len(entry[1])]
        if not waiting:
            return
        for place in rng.permutation(len(waiting)):
            folder, names, order, first = waiting[place]
            yield first + int(order[turn]), total, partial(open_image, folder / names[order[turn]])


def _photos(
    pictures: Pass,
    name: str,
    prep: Preprocessing,
    seeds: tuple[int, int],
    tally: CalibrationBatches,
    share: _Share,
) -> Iterator[Tensor]:
    """Every picture as the model sees it when it is evaluated, then random crops of them, without end."""
    rng = np.random.default_rng((*seeds, 1) if share is _Share.APART else seeds)
    for again in itertools.count():
        readable = unreadable = 0
        reason = ""
        for number, count, read in pictures(rng):
            if not share.has(number, count):
                continue
            try:
                picture = _loaded(read)
            except Exception as error:
                # Every image format has its own way of being damaged.
                unreadable += 1
                tally.skipped += not again
                reason = f"{type(error).__name__}: {error}"
                continue
            readable += 1
            yield prep.tensor(_random_crop(picture, prep, rng) if again else picture)
        if readable:
            continue
        if share is _Share.APART and not unreadable:
            # A stream so short that none of it was set aside.
            share = _Share.ALL
            continue
        # Another pass would end like this one, and the next, without end.
        problem = f"none of the {unreadable} images can be read (the last: {reason})" if unreadable else "no images"
        raise CalibrationError(f"{name}: {problem}; copy them again, or use {SYNTHETIC}")


def _loaded(read: Reader) -> Image.Image:
    """A picture with its pixels in memory; what Pillow warns of (odd metadata, huge images) is not the user's work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = read()
        # Pillow decodes when pixels are asked for; damage has to show itself here.
        picture.load()
    return picture


def _random_crop(picture: Image.Image, prep: Preprocessing, rng: np.random.Generator) -> Image.Image:
    """A part of the picture about as wide to high as what the model takes, mirrored half of the time."""
    _, height, width = prep.size
    # As in training on photos: the area is uniform, and so is the logarithm of the proportions, from 3:4 to 4:3.
    area = picture.width * picture.height * rng.uniform(SMALLEST_CROP, 1)
    ratio = width / height * math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    wide = min(picture.width, max(1, round(math.sqrt(area * ratio))))
    high = min(picture.height, max(1, round(math.sqrt(area / ratio))))
    left, top = rng.integers(picture.width - wide + 1), rng.integers(picture.height - high + 1)
    crop = picture.crop((int(left), int(top), int(left) + wide, int(top) + high))
    return ImageOps.mirror(crop) if rng.random() < 0.5 else crop


def _stacked(images: Iterator[Tensor], batch_size: int) -> Iterator[Tensor]:
    while batch := list(itertools.islice(images, batch_size)):
        yield torch.stack(batch)


def _image_batch(item: object, number: int, prep: Preprocessing) -> Tensor:
    """The images of what an iterable yielded, if they are what the model takes."""
    where = f"calibration batch {number}"
    expected = f"[B, {', '.join(map(str, prep.size))}]"
    batch: Any = item
    if isinstance(item, Mapping):
        batch = item.get("pixel_values", item)
    elif isinstance(item, tuple | list) and item:
        batch = item[0]
    if not isinstance(batch, Tensor):
        raise CalibrationError(
            f"{where} is {_kind(item)}; pass float tensors {expected}, (images, labels), or mappings with pixel_values"
        )
    if not batch.is_floating_point():
        raise CalibrationError(
            f"{where} has the type {str(batch.dtype).removeprefix('torch.')}; divide pixels by 255 and normalize them "
            f"with mean {_rounded(prep.mean)} and std {_rounded(prep.std)}"
        )
    if batch.ndim != 4:
        hint = "; is it a dataset? pass a DataLoader of it" if batch.ndim == 3 else ""
        raise CalibrationError(
            f"{where} has the shape {list(batch.shape)}, and the model takes image batches {expected}{hint}"
        )
    if batch.shape[1] != prep.size[0]:
        raise CalibrationError(
            f"{where} has {batch.shape[1]} channels (shape {list(batch.shape)}), and the model takes {prep.size[0]} "
            f"({expected}); convert the images"
        )
    if tuple(batch.shape[1:]) != prep.size:
        raise CalibrationError(
            f"{where} has the shape {list(batch.shape)}, and the model takes {expected}; resize the images to "
            f"{prep.size[1]}x{prep.size[2]}"
        )
    return batch.detach()


def _kind(value: object) -> str:
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    if isinstance(value, tuple | list):
        return f"a {name} of {', '.join(type(inner).__name__ for inner in value[:3]) or 'nothing'}"
    if isinstance(value, Mapping):
        return f"a {name} with {', '.join(map(str, list(value)[:3])) or 'nothing'}"
    return f"{article} {name}"


def _rounded(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:.3g}' for value in values)})"
