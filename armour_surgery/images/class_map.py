"""`--class-map FILE`: which class of a model each name means."""

import json
from pathlib import Path
from typing import Any

from armour_surgery.errors import DataError
from armour_surgery.images.files import require_file

__all__ = ["FORMS", "read_class_map"]

# Bytes; a line for each of ImageNet's 21,843 classes takes a hundredth.
LARGEST = 2**24
FORMS = (
    "write one class name a line in the model's order, or JSON: a list of names in that order, or {name: index, ...}"
)


def read_class_map(path: Path, classes: int) -> dict[str, int]:
    """The number of each name: by line (as timm's class maps are), from a JSON list, or from JSON's {name: index}.

    A JSON object may leave classes out, and give one several names; {index: name} is read too.

    Raises:
        DataError: there is no such file, it is none of these, or does not fit a head of so many classes.
    """
    try:
        require_file(path)
        if path.stat().st_size > LARGEST:
            raise DataError(f"--class-map {path} has more than {LARGEST // 2**20} MiB, which no list of names has")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(
            f"--class-map {path} cannot be read ({getattr(error, 'strerror', None) or error}); {FORMS}"
        ) from error
    if path.suffix.lower() == ".json":
        try:
            content: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"--class-map {path} is not readable JSON ({error}); {FORMS}") from error
    else:
        content = [line.strip() for line in text.rstrip().splitlines()]
    if isinstance(content, list):
        return _numbered(content, path, classes)
    if not isinstance(content, dict) or not content:
        raise DataError(f"--class-map {path} holds {type(content).__name__}, and no names; {FORMS}")
    if all(isinstance(name, str) for name in content.values()):
        content = _turned(content, path)
    numbers: dict[str, int] = {}
    for name, number in content.items():
        if type(number) is not int or not 0 <= number < classes:
            raise DataError(
                f"--class-map {path} gives {name!r} the index {number!r}, and the model's {classes} classes are 0 to "
                f"{classes - 1}; {FORMS}"
            )
        numbers[name] = number
    return numbers


def _numbered(names: list[Any], path: Path, classes: int) -> dict[str, int]:
    """Names in the order of their numbers, each of them once."""
    numbers: dict[str, int] = {}
    for number, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise DataError(f"--class-map {path} has {name!r} for the name of class {number}; {FORMS}")
        if name in numbers:
            raise DataError(
                f"--class-map {path} names {name!r} for the classes {numbers[name]} and {number}, and a name means "
                f"one; {FORMS}"
            )
        numbers[name] = number
    if len(names) != classes:
        raise DataError(f"--class-map {path} has {len(names)} names, and the model {classes} classes; {FORMS}")
    return numbers


def _turned(content: dict[str, str], path: Path) -> dict[str, int]:
    """{index: name}, as transformers writes id2label, the other way round."""
    numbers: dict[str, int] = {}
    for key, name in content.items():
        if not (key.isascii() and key.isdigit()) or name in numbers:
            problem = f"{name!r} twice" if name in numbers else f"{key!r} for a number"
            raise DataError(f"--class-map {path} has {problem}; {FORMS}")
        numbers[name] = int(key)
    return numbers
