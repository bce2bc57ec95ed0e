"""Datasets that timm opens: one way in for calibration and for training."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from armour_surgery.errors import ArmourError, CalibrationError, DataError
from armour_surgery.hosts.hub import quiet
from armour_surgery.images.files import require_file

__all__ = [
    "imagenet_real_labels",
    "is_timm_dataset",
    "open_timm_dataset",
    "open_timm_stream",
    "require_item",
    "timm_pictures",
]

# A prefix of timm's dataset names, and the package that it needs.
DATASETS = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow_datasets", "wds": "webdataset", "torch": ""}


def is_timm_dataset(name: str) -> bool:
    """Whether the name has one of timm's prefixes for datasets (`torch/cifar10`, `hfds/ORG/NAME`)."""
    return name.partition("/")[0].lower() in DATASETS and "/" in name


def timm_pictures(name: str) -> Callable[[np.random.Generator], Iterator[tuple[int, int, Callable[[], Image.Image]]]]:
    """Open the training split of `PREFIX/NAME` or `PREFIX/NAME:FOLDER`, with `timm.data.create_dataset`.

    What is returned makes one pass over it: per picture its number, how many there are (0: not known), and a function
    that reads it. A dataset that is indexed comes in an order drawn from the generator, a stream in its own. Nothing is
    downloaded for `torch/`.

    Raises:
        CalibrationError: timm cannot open it; the message says why.
    """
    prefix = name.partition("/")[0].lower()
    package = DATASETS[prefix]
    if package and importlib.util.find_spec(package) is None:
        raise CalibrationError(
            f"{name} needs the Python package {package}, which is not installed; install it, or give a folder of images"
        )
    bare, _, root = name.partition(":")

    def refused(reason: str) -> CalibrationError:
        return CalibrationError(
            f"timm cannot open the dataset {bare} {f'in {root}' if root else 'without a folder'}: {reason}; write "
            f"{prefix}/NAME:FOLDER, or give a folder of images"
        )

    with quiet():
        dataset = _create(bare, root or None, "train", refused)
    return partial(_one_pass, dataset)


def _create(name: str, root: str | None, split: str, refused: Callable[[str], ArmourError], **options: Any) -> Any:
    """`timm.data.create_dataset`; where it fails, `refused(reason)` is raised. Pictures keep their own color mode."""
    try:
        from timm.data import create_dataset

        # timm and what it imports print advice; stdout belongs to the command.
        with contextlib.redirect_stdout(io.StringIO()):
            return create_dataset(name, root=root, split=split, input_img_mode=None, **options)
    except Exception as error:
        # Every kind of dataset fails in its own way, an assertion among them.
        raise refused(" ".join(str(error).split()) or type(error).__name__) from error


def _one_pass(dataset: Any, rng: np.random.Generator) -> Iterator[tuple[int, int, Callable[[], Image.Image]]]:
    if isinstance(dataset, torch.utils.data.IterableDataset):
        for number, item in enumerate(dataset):
            yield number, 0, lambda item=item: item[0]  # type: ignore[misc]
        return
    for index in rng.permutation(len(dataset)):
        yield int(index), len(dataset), partial(_item, dataset, int(index))


def require_item(dataset: Any, index: int) -> None:
    """Return if the image of a dataset is no file of its own, or a regular one.

    Raises:
        ValueError: it is a pipe or a device, at which the dataset would wait forever.
    """
    # Both timm's and torchvision's readers of folders list paths and labels so.
    samples = getattr(getattr(dataset, "reader", dataset), "samples", None)
    if isinstance(samples, list) and isinstance(samples[index][0], str):
        require_file(Path(samples[index][0]))


def _item(dataset: Any, index: int) -> Image.Image:
    require_item(dataset, index)
    with quiet():
        image: Image.Image = dataset[index][0]
    return image


def open_timm_dataset(name: str, root: str | None, split: str, *, training: bool, batch_size: int, seed: int) -> Any:
    """A split of one of timm's datasets; `name` is empty for a folder or a .tar file of images.

    Raises:
        DataError: timm cannot open it; the message says why.
    """

    def refused(reason: str) -> DataError:
        where = f"{name} in {root}" if root and name else name or root
        return DataError(
            f"timm cannot open the {split!r} split of {where}: {reason}; "
            "write PREFIX/NAME:FOLDER, and name splits with --set data.train_split=... and data.val_split=..."
        )

    return _create(name, root, split, refused, is_training=training, batch_size=batch_size, seed=seed)


def open_timm_stream(name: str, root: str | None, split: str, *, training: bool, batch_size: int, seed: int) -> Any:
    """`open_timm_dataset` for a dataset that is read in order; one to judge by gives every process all of its images.

    timm's readers note when they are made which process they are in, give it its share, and repeat or leave out images
    so that shares are equal. That is right for training; judging counts every image once.
    """
    dataset = open_timm_dataset(name, root, split, training=training, batch_size=batch_size, seed=seed)
    if not training:
        dataset.reader.dist_rank, dataset.reader.dist_num_replicas = 0, 1
    return dataset


def imagenet_real_labels(path: str | None) -> dict[str, list[int]]:
    """ReaL labels (arXiv 2006.07159) by file name of ImageNet's validation images, from a file or as timm ships them.

    Raises:
        DataError: the file is not a JSON list of 50,000 lists.
    """
    from timm.data import RealLabelsImagenet

    try:
        known = RealLabelsImagenet([""] * 50_000, real_json=path).real_labels
    except (OSError, ValueError, AssertionError, TypeError) as error:
        raise DataError(f"ReaL labels {path} are not a JSON list with 50,000 lists of labels: {error}") from error
    return dict(known)
