"""What a model's classes are called: as the model says itself, or as ImageNet's are if it has as many."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn

from armour_surgery.hosts.libraries import library_of
from armour_surgery.hosts.running import head_size
from armour_surgery.records import SurgeryPlan

__all__ = ["ClassNames", "class_arguments", "class_names", "numbers_by_name", "plain_name"]

# What transformers calls classes that nobody named.
UNNAMED = re.compile(r"LABEL_\d+")
# Of a thousand labels in ImageNet's order some are spelled differently by every library.
ALIKE = 0.9


@dataclass(frozen=True)
class ClassNames:
    """The names of a model's classes in its order, and what else each is called.

    `said` is False where the model says nothing, and has as many classes as a set of ImageNet's.
    """

    names: tuple[str, ...]
    others: tuple[tuple[str, ...], ...]
    said: bool

    def numbers(self) -> dict[str, int]:
        """Which class a name means; names that several classes have mean none."""
        # The first names win over the others, as they are over how they are spelled.
        return {**numbers_by_name(self.others), **numbers_by_name([(name,) for name in self.names])}


def numbers_by_name(names: Iterable[Sequence[str]]) -> dict[str, int]:
    """Which class each of its names means, as they are and in their `plain_name`; what several share means none."""
    exact: dict[str, set[int]] = {}
    plain: dict[str, set[int]] = {}
    for number, alike in enumerate(names):
        for name in alike:
            exact.setdefault(name, set()).add(number)
            plain.setdefault(plain_name(name), set()).add(number)
    numbers: dict[str, int] = {}
    for spelled in (plain, exact):
        numbers |= {name: min(meant) for name, meant in spelled.items() if len(meant) == 1}
    return numbers


def plain_name(name: str) -> str:
    """A name without what differs between a label and the name of a folder: case, underscores, hyphens."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def class_names(model: nn.Module) -> ClassNames | None:
    """The names of the classes of a model's head; None where nothing is known.

    They are in its plan after a training, in the config of a transformers model, or in the `label_names` of timm's
    `pretrained_cfg`; names of another head than the model has now do not count.
    """
    classes = head_size(model)
    names = _said(model)
    imagenet = _imagenet(classes)
    if not names or len(names) != classes:
        if not imagenet:
            return None
        return ClassNames(tuple(synset for synset, *_ in imagenet), tuple(tuple(rest) for _, *rest in imagenet), False)
    described: Any = _timm_config(model).get("label_descriptions")
    others: list[tuple[str, ...]] = []
    for name in names:
        text = described.get(name) if isinstance(described, Mapping) else None
        others.append(_parts(text) if isinstance(text, str) else _parts(name)[1:])
    if imagenet and _is_imagenet(names, imagenet):
        others = [(*known, *alike) for known, alike in zip(imagenet, others, strict=True)]
    return ClassNames(names, tuple(others), True)


def class_arguments(model: nn.Module, names: Sequence[str]) -> dict[str, Any]:
    """The builder's arguments that give a model's classes names, where its library has a place for them; else none."""
    library = library_of(model)
    if library == "timm":
        return {"pretrained_cfg_overlay": {"label_names": list(names)}}
    if library == "transformers":
        return {
            "id2label": {str(number): name for number, name in enumerate(names)},
            "label2id": {name: number for number, name in enumerate(names)},
        }
    return {}


def _said(model: nn.Module) -> tuple[str, ...]:
    surgery = getattr(model, "surgery", None)
    if isinstance(surgery, SurgeryPlan) and surgery.classes:
        return surgery.classes
    if library_of(model) == "transformers":
        names = _in_order(getattr(model.config, "id2label", None))
        return () if all(map(UNNAMED.fullmatch, names)) else names
    return _in_order(_timm_config(model).get("label_names"))


def _timm_config(model: nn.Module) -> Mapping[str, Any]:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def _in_order(names: Any) -> tuple[str, ...]:
    """Names from a list, or from a dictionary by number that leaves none out."""
    if isinstance(names, Mapping):
        by_number = {str(number): name for number, name in names.items()}
        numbers = list(map(str, range(len(by_number))))
        names = [by_number[number] for number in numbers] if by_number.keys() == set(numbers) else ()
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


@lru_cache(maxsize=2)
def _imagenet(classes: int) -> tuple[tuple[str, ...], ...]:
    """Synset, description and the words of that, for every class of the set of ImageNet's that has so many."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    known = []
    for synset in info.label_names():
        try:
            known.append((synset, *_parts(info.label_name_to_description(synset))))
        except KeyError:
            # Some have no description.
            known.append((synset,))
    return tuple(known)


def _is_imagenet(names: Sequence[str], imagenet: Sequence[Sequence[str]]) -> bool:
    alike = 0
    for name, known in zip(names, imagenet, strict=True):
        alike += not set(map(plain_name, _parts(name))).isdisjoint(map(plain_name, known))
    return alike >= ALIKE * len(names)


def _parts(text: str) -> tuple[str, ...]:
    """A description, and each of the words that it is made of: `tench, Tinca tinca`."""
    words = [word.strip() for word in text.split(",")]
    return (text, *words) if len(words) > 1 else (text,)
