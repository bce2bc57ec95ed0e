"""The images that a run trains on, those that judge it, and how the recipe has both prepared."""

from dataclasses import replace
from typing import Any

from armour_surgery.errors import DataError, UsageError
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.sources import Pictures, Stream, has_split, held_out, open_pictures, open_stream
from armour_surgery.recover.recipe import DataPart, Recipe
from armour_surgery.spelled import names_only

__all__ = ["adapted_preprocessing", "open_images"]


def open_images(source: str, recipe: Recipe, prep: Preprocessing) -> tuple[Pictures | Stream, Pictures | Stream, str]:
    """Images to train on, those to judge by, and what the latter are, in words.

    Raises:
        UsageError: the recipe holds images out of a stream.
        DataError: there are no such images, or none to judge by.
    """
    training = _open_split(source, "train", recipe, prep)
    holdout = recipe.data.holdout
    # These words travel with the model, in its card.
    name = names_only(source)
    if isinstance(training, Stream):
        if holdout:
            raise UsageError(f"data.holdout: {source} is read in order, so nothing can be kept out of it; set it to 0")
        return training, _open_split(source, "val", recipe, prep), f"the validation split of {name}"
    if not holdout and has_split(source, "val", recipe.data.val_split):
        # With the training images' classes, so that a label means the same in both.
        judged = _open_split(source, "val", recipe, prep, training.classes)
        return training, judged, f"the validation images of {name}"
    if not holdout:
        raise DataError(
            f"{source} has no images to judge by (a folder val/); add them, or keep some of the training images out "
            "with --set data.holdout=0.1"
        )
    training, kept_out = held_out(training, holdout)
    return training, kept_out, f"{len(kept_out)} images of {name} that were not trained on"


def adapted_preprocessing(prep: Preprocessing, data: DataPart) -> Preprocessing:
    """A model's preprocessing with what a recipe says about it.

    Raises:
        UsageError: the recipe has a mean or deviation for another number of channels.
    """
    changes: dict[str, Any] = {}
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is None:
            continue
        if len(values) != prep.size[0]:
            raise UsageError(f"data.{name} has {len(values)} values, and the model takes {prep.size[0]} channels")
        changes[name] = tuple(values)
    if data.crop_pct is not None:
        changes["crop_pct"] = data.crop_pct
    if data.interpolation is not None:
        changes["interpolation"] = data.interpolation
    return replace(prep, **changes)


def _open_split(
    source: str, split: str, recipe: Recipe, prep: Preprocessing, classes: tuple[str, ...] = ()
) -> Pictures | Stream:
    """The `train` or `val` split of a source, as the recipe names it."""
    named = recipe.data.train_split if split == "train" else recipe.data.val_split
    stream = open_stream(source, split, named_split=named, batch_size=recipe.data.batch_size, seed=recipe.seed)
    return stream or open_pictures(
        source,
        split,
        size=prep.size,
        labelled=recipe.labelled,
        named_split=named,
        classes=classes,
        seed=recipe.seed,
        per_epoch=recipe.data.images_per_epoch or 0,
    )
