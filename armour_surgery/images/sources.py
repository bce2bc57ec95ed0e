"""Where images come from: folders, Fashion-MNIST's files, digits, drawn ones, and every dataset that timm opens.

A source is opened into `Pictures`: a length, one picture by its number, its label (-1 without one) and a name to tell
it by. Datasets that can only be read in order become a `Stream`.
"""

import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from armour_surgery.errors import DataError
from armour_surgery.images.files import APART, SUFFIXES, images_below, is_apart, open_image, require_file
from armour_surgery.images.timm_datasets import is_timm_dataset

__all__ = ["Pictures", "Stream", "check_labels", "has_split", "held_out", "open_pictures", "open_stream", "subset"]

DIGITS, SYNTHETIC = "digits", "synthetic"
# Which folders, and which names of timm's datasets, hold a split; a user may name another.
FOLDERS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
NAMED = {"train": "train", "val": "validation"}
STREAMS = ("hfids", "wds", "tfds")
# Drawn images to judge by are this far away from those that are trained on.
FAR = 1 << 40


@dataclass(frozen=True)
class Pictures:
    """Images by number. `read(i)` gives the picture and its label, `name(i)` what to call it in a message.

    `classes` are the names of the labels where they are known, and `by_folder` says that they are those of folders, in
    their order. `endless`: every epoch reads new numbers. `files`: calibration sets some apart. `parts` were mixed.
    """

    source: str
    count: int
    read: Callable[[int], tuple[Image.Image, int]]
    name: Callable[[int], str]
    classes: tuple[str, ...] = ()
    endless: bool = False
    by_folder: bool = False
    parts: tuple["Pictures", ...] = ()
    files: bool = False

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class Stream:
    """Images that come in their own order; `epoch(e)` reads (picture, label) from the start of pass e."""

    source: str
    count: int | None
    epoch: Callable[[int], Iterator[tuple[Image.Image, int]]]


def subset(pictures: Pictures, chosen: Sequence[int]) -> Pictures:
    """Those pictures alone, numbered anew."""
    return replace(
        pictures,
        count=len(chosen),
        read=lambda index: pictures.read(chosen[index]),
        name=lambda index: pictures.name(chosen[index]),
        endless=False,
        parts=(),
        files=False,
    )


def held_out(pictures: Pictures, holdout: float) -> tuple[Pictures, Pictures]:
    """The pictures to train on and those to judge by: `holdout` of them from 1, or that share of them below 1.

    Which ones depends on the data alone, so that every run and every start judges by the same. Of files, those that
    calibration sets apart come first: a model that was fitted to the others looks better on them than it is, and what
    it learns later would seem to harm it. Of mixed sources each gives its share, of files no more than are set apart.

    Raises:
        DataError: nothing would be left to train on.
    """
    if pictures.parts:
        return _held_out_of_each(pictures, holdout)
    count = math.ceil(holdout * len(pictures)) if holdout < 1 else int(holdout)
    if pictures.endless:
        return pictures, Pictures(
            pictures.source, count, lambda index: pictures.read(FAR + index), lambda index: pictures.name(FAR + index)
        )
    if count >= len(pictures):
        raise DataError(
            f"data.holdout={holdout:g} keeps {count} of {len(pictures)} images of {pictures.source} out, and leaves "
            "none to train on; make it smaller"
        )
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tolist()
    if pictures.files:
        order.sort(key=lambda number: not is_apart(number, len(pictures)))
    return subset(pictures, sorted(order[count:])), subset(pictures, sorted(order[:count]))


def _held_out_of_each(pictures: Pictures, holdout: float) -> tuple[Pictures, Pictures]:
    """The same of mixed sources, part by part: one that comes round again must not judge what it trains."""
    pairs = []
    for part in pictures.parts:
        share = holdout if holdout < 1 else math.ceil(holdout / len(pictures.parts))
        if part.files and share >= 1:
            share = min(share, max(1, len(part) // APART))
        pairs.append(held_out(part, share))
    kept, judging = ([pair[place] for pair in pairs] for place in (0, 1))
    return _mixed(pictures.source, kept), _mixed(pictures.source, judging)


def open_pictures(
    source: str,
    split: str,
    *,
    size: tuple[int, int, int],
    labelled: bool,
    named_split: str | None = None,
    classes: tuple[str, ...] = (),
    seed: int = 0,
    per_epoch: int = 0,
) -> Pictures:
    """The `train` or `val` split of a source.

    Args:
        source: a folder of images by class (with `train/` and `val/`, or of one split), any folder of images where no
            labels are needed, a folder with Fashion-MNIST's four .gz files, `digits`, `synthetic`, or a dataset of timm
            as `PREFIX/NAME` or `PREFIX/NAME:FOLDER`. Without labels several can be joined by commas.
        size: (channels, height, width) of what is drawn for `synthetic`.
        classes: those of the training split; another split's folders get their numbers.
        per_epoch: how many images an epoch of an endless source has.

    Raises:
        DataError: it does not exist, has no images, or lacks labels that are needed; the message says what to do.
    """
    parts = [source] if labelled or Path(source).expanduser().exists() else [part.strip() for part in source.split(",")]
    if len(parts) > 1:
        opened = []
        for part in parts:
            opened.append(open_pictures(part, split, size=size, labelled=False, seed=seed, per_epoch=per_epoch))
        return _mixed(source, opened)
    if source == SYNTHETIC:
        if labelled:
            raise DataError("synthetic images have no labels; name labelled data, or set loss.labels=0")
        return _synthetic(size, seed, per_epoch)
    if source == DIGITS:
        return _digits(split)
    path = Path(source).expanduser()
    if is_timm_dataset(source) and not path.exists():
        return _of_timm(source, named_split or NAMED[split])
    if path.is_file() and path.suffix == ".tar":
        return _of_timm(f":{path}", named_split or NAMED[split])
    if not path.is_dir():
        raise DataError(
            f"--data {source} is no folder; name a folder of images, {DIGITS}, {SYNTHETIC}, or a dataset of timm as "
            "PREFIX/NAME:FOLDER"
        )
    if (path / _idx_name(split, "images")).is_file():
        return _idx(path, split)
    root = _split_folder(path, split, named_split)
    return _labelled_folder(root, classes) if labelled else _any_folder(root)


def open_stream(source: str, split: str, *, named_split: str | None, batch_size: int, seed: int) -> Stream | None:
    """A dataset that can only be read in order (`wds/`, `hfids/`, `tfds/`); None if the source is none.

    To train, each process reads its own share; to judge, each reads all.
    """
    if source.partition("/")[0].lower() not in STREAMS or not is_timm_dataset(source):
        return None
    from armour_surgery.images.timm_datasets import open_timm_stream

    name, _, root = source.partition(":")

    def opened() -> Any:
        return open_timm_stream(
            name, root or None, named_split or NAMED[split], training=split == "train", batch_size=batch_size, seed=seed
        )

    def epoch(number: int) -> Iterator[tuple[Image.Image, int]]:
        # Opened anew: what readers remember of earlier passes would be missing after a resume.
        dataset = opened()
        dataset.set_epoch(number)
        return iter(dataset)

    # Their length is what one process gets.
    count: int | None = getattr(opened().reader, "num_samples", None) or None
    return Stream(source, count, epoch)


def _synthetic(size: tuple[int, int, int], seed: int, per_epoch: int) -> Pictures:
    from armour_surgery.images.synthetic import synthetic_images

    def read(index: int) -> tuple[Image.Image, int]:
        drawn = next(synthetic_images(1, size, seed, start=index))
        pixels = (drawn * 255).round().to(torch.uint8).movedim(0, -1).numpy()
        return Image.fromarray(pixels[..., 0] if size[0] == 1 else pixels), -1

    if size[0] not in (1, 3):
        raise DataError(
            f"synthetic pictures have 1 or 3 channels, and the model takes {size[0]}; name data of its kind"
        )
    return Pictures(SYNTHETIC, max(1, per_epoch), read, lambda index: f"drawn image {index}", endless=True)


def _mixed(source: str, parts: list[Pictures]) -> Pictures:
    """Pictures of all parts in turns; a shorter part comes round again, and drawn ones are as many as an epoch has."""

    def place(index: int) -> tuple[Pictures, int]:
        part = parts[index % len(parts)]
        inner = index // len(parts)
        return part, inner if part.endless else inner % len(part)

    def read(index: int) -> tuple[Image.Image, int]:
        part, inner = place(index)
        return part.read(inner)

    def name(index: int) -> str:
        part, inner = place(index)
        return part.name(inner)

    return Pictures(source, len(parts) * max(map(len, parts)), read, name, parts=tuple(parts))


def _array(source: str, images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int) -> Pictures:
    """Gray images `[n, height, width]` and their labels, held in memory."""
    return Pictures(
        source,
        len(images),
        lambda index: (Image.fromarray(images[index]), int(labels[index])),
        lambda index: f"image {index} of {source}",
        tuple(map(str, range(classes))),
    )


def _digits(split: str) -> Pictures:
    from armour_surgery.images.digits import digits_split

    train_x, train_y, test_x, test_y = digits_split()
    images, labels = (train_x, train_y) if split == "train" else (test_x, test_y)
    pixels = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    return _array(DIGITS, pixels, labels.numpy(), 10)


def _idx_name(split: str, what: str) -> str:
    prefix = "train" if split == "train" else "t10k"
    return f"{prefix}-{what}-idx{3 if what == 'images' else 1}-ubyte.gz"


def _idx(folder: Path, split: str) -> Pictures:
    images = _read_idx(folder / _idx_name(split, "images"), 3)
    labels = _read_idx(folder / _idx_name(split, "labels"), 1)
    if len(images) != len(labels) or not len(images):
        raise DataError(f"{folder} has {len(images)} {split} images and {len(labels)} labels; copy the files again")
    return _array(str(folder), images, labels.astype(np.int64), int(labels.max()) + 1)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """A gzipped IDX file of bytes: two zeros, 8 for uint8, the number of dimensions, the sizes, the data."""
    try:
        require_file(path)
        content = gzip.decompress(path.read_bytes())
        sizes = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
        if content[:4] != bytes((0, 0, 8, dimensions)):
            raise ValueError(f"it does not begin like an IDX file with {dimensions} dimensions")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); copy or download it again") from error


def _of_timm(source: str, named_split: str) -> Pictures:
    from armour_surgery.images.timm_datasets import open_timm_dataset, require_item

    name, _, root = source.partition(":")
    dataset = open_timm_dataset(name, root or None, named_split, training=False, batch_size=1, seed=0)

    def read(index: int) -> tuple[Image.Image, int]:
        # An ImageDataset of timm replaces what it cannot read by the next image; ours is told.
        require_item(dataset, index)
        reader = getattr(dataset, "reader", None)
        if reader is None:
            picture, label = dataset[index]
        else:
            opened, label = reader[index]
            picture = opened if isinstance(opened, Image.Image) else Image.open(opened)
        picture.load()
        return picture, -1 if label is None else int(label)

    if not len(dataset):
        raise DataError(f"the split {named_split!r} of {source.lstrip(':')} is empty; name another split")
    return Pictures(source.lstrip(":"), len(dataset), read, lambda index: f"image {index} of {source.lstrip(':')}")


def _split_folder(root: Path, split: str, named: str | None) -> Path:
    """The folder of a split below `root`, or `root` itself if it has no such folders."""
    if named is not None:
        if not (root / named).is_dir():
            raise DataError(f"{root} has no folder {named!r}; name one that it has, with data.{split}_split")
        return root / named
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            return root / name
    others = [name for names in FOLDERS.values() for name in names if (root / name).is_dir()]
    if others and split == "train":
        raise DataError(f"{root} has {others[0]}/ and no train/; name the folder of training images, train/")
    return root


def has_split(source: str, split: str, named: str | None) -> bool:
    """Whether a source has images of its own for a split; a plain folder has them for one only."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return source not in (SYNTHETIC,) and "," not in source
    return (
        named is not None
        or any((path / name).is_dir() for name in FOLDERS[split])
        or (path / _idx_name(split, "images")).is_file()
    )


def _read_file(paths: Sequence[Path], labels: Sequence[int], index: int) -> tuple[Image.Image, int]:
    return open_image(paths[index]), labels[index]


def _any_folder(root: Path) -> Pictures:
    paths = images_below(root)
    if not paths:
        raise DataError(
            f"no images in {root} or below it (looked for {', '.join(sorted(SUFFIXES))}); name another folder"
        )
    read = partial(_read_file, paths, [-1] * len(paths))
    return Pictures(str(root), len(paths), read, lambda index: str(paths[index]), files=True)


def _labelled_folder(root: Path, classes: tuple[str, ...]) -> Pictures:
    """One folder per class. With `classes` their numbers are given, and no other class may appear."""
    folders = _class_folders(root)
    if not folders:
        raise DataError(
            f"{root} has no folders, and labels are the names of folders; sort the images into one folder per class, "
            "or set loss.labels=0"
        )
    numbers = {name: number for number, name in enumerate(classes or folders)}
    strangers = [name for name in folders if name not in numbers]
    if strangers:
        raise DataError(
            f"{root} has the class {strangers[0]!r}{f' and {len(strangers) - 1} more' if len(strangers) > 1 else ''}, "
            "which the training images do not have; remove the folder, or add it there"
        )
    paths, labels = [], []
    for name in folders:
        below = images_below(root / name)
        if not below and not classes:
            raise DataError(f"the class folder {root / name} has no images in it; remove it, or fill it")
        paths += below
        labels += [numbers[name]] * len(below)
    if not paths:
        raise DataError(f"no images in {root} or below it; name another folder")
    read = partial(_read_file, paths, labels)
    return Pictures(
        str(root), len(paths), read, lambda index: str(paths[index]), tuple(numbers), by_folder=True, files=True
    )


def _class_folders(root: Path) -> list[str]:
    """The names of the folders in `root`; a link to it or to a folder above is no class: it holds all of them."""
    real = root.resolve()
    above = {real, *real.parents}
    names = []
    for path in root.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.resolve() not in above:
            names.append(path.name)
    return sorted(names)


def check_labels(pictures: Pictures, classes: int) -> None:
    """Make sure that labels fit a head with so many classes.

    Raises:
        DataError: the data has another number of classes.
    """
    known: Any = len(pictures.classes)
    if known and known != classes:
        raise DataError(
            f"{pictures.source} has {known} classes and the model's head has {classes}; name the data that the model "
            "was trained for, or give the model another head (--num-classes)"
        )
