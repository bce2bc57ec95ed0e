"""Which class of a model the folders of labelled images are: by their names where those are known, else by their order.

A folder of images by class is in the order of its names. A model has the order of the data that it was trained on,
which may be another one; then every label would be wrong.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from armour_surgery.errors import DataError, UsageError
from armour_surgery.hosts.class_names import ClassNames, numbers_by_name, plain_name
from armour_surgery.images.class_map import FORMS, read_class_map
from armour_surgery.images.sources import Pictures, check_labels

__all__ = ["ClassOrder", "class_order", "in_order"]

ADVICE = f"say which is which with --class-map FILE: {FORMS}"


@dataclass(frozen=True)
class ClassOrder:
    """The model's class of every label that some data has (`numbers`), and the names of the model's classes.

    `way` says how that is known: by names, from a class map, not at all (folders count in their order), or because
    labels are numbers in the data.
    """

    numbers: tuple[int, ...]
    names: tuple[str, ...]
    way: Literal["names", "class map", "folders", "numbers"]

    def note(self, source: str) -> str:
        """What has to be said where the order of folders is all there is to go by; else nothing."""
        if self.way != "folders":
            return ""
        first = ", ".join(self.names[:3]) + ", ..." * (len(self.names) > 3)
        # Both ways of sorting are common, and only numbers of several digits tell them apart.
        other = next(
            (name for name, there in zip(self.names, _by_number(self.names), strict=True) if name != there), ""
        )
        hint = f" (in the order of numbers, in which timm sorts, {other} comes elsewhere)"
        return (
            f"nothing is known of the names of the model's classes, so the folders of {source} count as its classes 0 "
            f"to {len(self.names) - 1} in the order of their names: {first}{hint if other else ''}; --class-map FILE "
            "says it otherwise"
        )


def class_order(pictures: Pictures, known: ClassNames | None, classes: int, class_map: Path | None) -> ClassOrder:
    """Which of a model's `classes` each label of the data is.

    `known` are the names of the model's classes; a class map wins over them, and need not have a folder for each.

    Raises:
        DataError: the data has another number of classes, or its folders have other names than the model's classes.
        UsageError: there is a class map, and labels are no folders.
    """
    if class_map is not None:
        if not pictures.by_folder:
            raise UsageError(
                f"--class-map is about the names of folders, and the labels of {pictures.source} are numbers; leave it "
                "out"
            )
        numbers = read_class_map(class_map, classes)
        found = _matched(pictures, {**numbers_by_name([(name,) for name in numbers]), **numbers}, class_map, numbers)
        return ClassOrder(found, _named(numbers, known, classes), "class map")
    if not pictures.by_folder:
        check_labels(pictures, classes)
        return ClassOrder(tuple(range(classes)), pictures.classes, "numbers")
    _check_number(pictures, known, classes)
    by_name = known.numbers() if known is not None else {}
    meant = [by_name.get(name, by_name.get(plain_name(name))) for name in pictures.classes]
    # As many classes as ImageNet has, and no word from the model: its names are a guess that has to fit altogether.
    if known is None or (not known.said and None in meant):
        return ClassOrder(tuple(range(classes)), pictures.classes, "folders")
    return ClassOrder(_matched(pictures, by_name, None, known.names), known.names, "names")


def in_order(pictures: Pictures, order: ClassOrder) -> Pictures:
    """The same pictures with the model's numbers for labels."""
    if order.way == "numbers":
        return pictures

    def read(index: int) -> tuple[Image.Image, int]:
        picture, label = pictures.read(index)
        return picture, order.numbers[label]

    return replace(pictures, read=read, classes=order.names)


def _matched(
    pictures: Pictures, by_name: Mapping[str, int], class_map: Path | None, expected: Collection[str]
) -> tuple[int, ...]:
    """The class that each folder's name means.

    Raises:
        DataError: a name means none, or two mean the same.
    """
    whose = f"--class-map {class_map}" if class_map is not None else "the model"
    found: dict[int, str] = {}
    strangers = []
    for name in pictures.classes:
        number = by_name.get(name, by_name.get(plain_name(name)))
        if number is None:
            strangers.append(name)
        elif number in found:
            raise DataError(
                f"{pictures.source} has the folders {found[number]!r} and {name!r}, and to {whose} both are class "
                f"{number}; put their images into one folder, or {ADVICE}"
            )
        else:
            found[number] = name
    if strangers:
        raise DataError(
            f"{len(strangers)} of the {len(pictures.classes)} class folders of {pictures.source} have names that "
            f"{whose} does not have ({_some(strangers)}; the names there are {_some(expected)}), so nobody can tell "
            f"which class they are; rename the folders, or {ADVICE}"
        )
    return tuple(found)


def _check_number(pictures: Pictures, known: ClassNames | None, classes: int) -> None:
    """Of classes that the model has and the data lacks, the names are told."""
    if len(pictures.classes) == classes:
        return
    by_name = known.numbers() if known is not None and known.said else {}
    meant = {by_name.get(name, by_name.get(plain_name(name))) for name in pictures.classes}
    if known is None or None in meant or len(meant) != len(pictures.classes):
        check_labels(pictures, classes)
        return
    without = [name for number, name in enumerate(known.names) if number not in meant]
    raise DataError(
        f"{pictures.source} has {len(pictures.classes)} classes and the model's head has {classes}: there is no folder "
        f"for {_some(without)}; add what is missing, or where these are all, {ADVICE}"
    )


def _named(numbers: Mapping[str, int], known: ClassNames | None, classes: int) -> tuple[str, ...]:
    """A name for every class of the model: the first that a map has for it."""
    names = list(known.names) if known is not None else list(map(str, range(classes)))
    for name in reversed(list(numbers)):
        names[numbers[name]] = name
    return tuple(names)


def _by_number(names: Iterable[str]) -> list[str]:
    """Names in the order in which 2 comes before 10."""

    def key(name: str) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]

    return sorted(names, key=key)


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + ", ..." * (len(names) > 3)
