"""What a recipe comes to on this data and these processes: how batches are spread, how long it runs, what it is.

What it is decides whether a run may go on from a checkpoint.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armour_surgery.errors import DataError, ResumeError, UsageError
from armour_surgery.images.sources import Pictures, Stream
from armour_surgery.recover.loading import Layout
from armour_surgery.recover.recipe import Recipe

__all__ = ["check_same_run", "count_steps", "identity", "known_length", "make_layout"]


def make_layout(recipe: Recipe, rank: int, world: int) -> Layout:
    """How the recipe's global batch is spread over processes and accumulated steps.

    Raises:
        UsageError: it does not divide.
    """
    batch = recipe.data.batch_size
    if batch % world:
        raise UsageError(f"data.batch_size={batch} does not divide among {world} processes; change it")
    micro = recipe.data.micro_batch or batch // world
    if (batch // world) % micro:
        raise UsageError(
            f"data.micro_batch={micro} does not divide the {batch // world} images that each of {world} processes gets "
            "in a step; change it"
        )
    if (recipe.augment.mixup or recipe.augment.cutmix) and micro % 2:
        raise UsageError(f"mixup pairs images, and a process holds {micro} at once; make data.micro_batch even")
    return Layout(batch, micro, batch // world // micro, rank, world)


def count_steps(data: Pictures | Stream, recipe: Recipe) -> int:
    """Steps in an epoch; the images that do not fill the last one are left out, others in every epoch.

    Raises:
        UsageError: nobody knows how many images there are.
        DataError: there are not enough for one step.
    """
    images = recipe.data.images_per_epoch or data.count
    if images is None:
        raise UsageError(
            f"nobody knows how many images {data.source} has; say how many make an epoch, with data.images_per_epoch=N"
        )
    steps = images // recipe.data.batch_size
    if not steps:
        raise DataError(
            f"{data.source} has {images} images to train on; a step takes data.batch_size={recipe.data.batch_size}; "
            "lower it, or set data.images_per_epoch"
        )
    return steps


def identity(recipe: Recipe) -> dict[str, Any]:
    """What has to stay the same for a run to be the same, by key: everything but where and how fast it is computed."""
    values = recipe.model_dump(mode="json", exclude={"description", "written_for"})
    # How fast a run is computed, and where it stops early, changes none of its numbers.
    values["run"] = {"precision": recipe.run.precision}
    values["schedule"].pop("max_steps")
    for key in ("workers", "micro_batch"):
        values["data"].pop(key)
    flat: dict[str, Any] = {}
    for part, inner in values.items():
        if not isinstance(inner, dict):
            flat[part] = inner
            continue
        for key, value in inner.items():
            flat[f"{part}.{key}"] = value
    return flat


def known_length(data: Pictures | Stream) -> int | None:
    """How many images there are to train on; None for a stream, which is not counted."""
    return len(data) if isinstance(data, Pictures) else None


def check_same_run(
    run: Mapping[str, Any], images: int | None, recipe: Recipe, data: Pictures | Stream, path: Path
) -> None:
    """Make sure that a checkpoint's `identity` and `known_length` are those of this recipe and data.

    Raises:
        ResumeError: they are not; the message says what differs.
    """
    for key, value in identity(recipe).items():
        if run.get(key) != value:
            raise ResumeError(
                f"{path} belongs to another run: {key} was {run.get(key)!r} and is {value!r}; set it back, or train "
                "into another --out"
            )
    # Among other images the same position of an epoch would be another image.
    now = known_length(data)
    if images != now:
        raise ResumeError(f"{path} was trained on {images} images, and now there are {now}")
