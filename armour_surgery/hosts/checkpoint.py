"""Fitting the tensors of a file to a model, strictly: all that the model has, and nothing left over."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts.weights_file import Kind, Tables, kind_of, kind_of_type
from armour_surgery.notes import ArmourWarning

__all__ = [
    "Builder",
    "Difference",
    "Selection",
    "announce",
    "compare",
    "lies_inside",
    "load_checkpoint",
    "named",
    "odd_kinds",
    "odd_tensor",
    "selections",
]

Weights = dict[str, torch.Tensor]
# Makes a library's names of those of a file; None where it cannot.
Form = Callable[[Weights], Weights | None]

# Where the dictionaries of a training checkpoint hold weights as well, in this order.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
AVERAGED = re.compile(r"(?<![a-z])(ema|swa)(?![a-z])|averag", re.IGNORECASE)
# What torch's AveragedModel counts its models in.
COUNTER = "n_averaged"


@dataclass(frozen=True, eq=False)
class Selection:
    """The tensors of a file that lie behind one prefix of one of its dictionaries, without it."""

    weights: Weights
    table: str
    prefix: str
    # Keys of the same dictionary that lie elsewhere.
    beside: tuple[str, ...]
    # How many of the model's keys it has.
    known: int
    # Whether the tensors of a head that was not wanted are among those beside.
    headless: bool = False

    def without(self, heads: Collection[str]) -> "Selection":
        """The same without the tensors of these modules."""
        below = tuple(f"{head}." for head in heads)
        dropped = tuple(key for key in self.weights if key.startswith(below))
        if not dropped:
            return self
        weights = {key: value for key, value in self.weights.items() if key not in dropped}
        return replace(self, weights=weights, beside=(*self.beside, *dropped), headless=True)

    @property
    def place(self) -> str:
        """The dictionary and the prefix, as a user finds them in the file."""
        return ".".join(part for part in (self.table, self.prefix.rstrip(".")) if part) or "its top level"

    @property
    def averaged(self) -> bool:
        """Whether these are an average over training, and not the weights that were trained."""
        return bool(AVERAGED.search(self.place)) or COUNTER in self.beside

    @property
    def rank(self) -> tuple[bool, int, bool]:
        """What is taken of several that fit: averages first, since a recipe reports its accuracy for them."""
        first = self.table.partition(".")[0]
        order = WRAPPERS.index(first) if first in WRAPPERS else len(WRAPPERS)
        # Of a student and its teacher, the teacher is the average.
        return not self.averaged, order, "student" in self.place.split(".")


@dataclass(frozen=True)
class Builder:
    """How the model comes about that a file is to fit, for messages.

    `options` are those of num_classes and in_chans that it can be built with, `head` the keys of its classifier, and
    `headless` says how to come to a model without one.
    """

    name: str
    options: Collection[str] = ()
    head: Collection[str] = ()
    headless: str = ""


@dataclass(frozen=True)
class Difference:
    """Keys that do not fit; `wrong` maps a key to the file's shape and the model's."""

    missing: Collection[str]
    left_over: Collection[str]
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def __len__(self) -> int:
        return len(self.missing) + len(self.left_over) + len(self.wrong)

    def message(self, path: object, builder: Builder) -> str:
        """What differs and what to do, in a line."""
        parts = []
        if self.missing:
            parts.append(f"missing {_some(self.missing)}")
        if self.left_over:
            parts.append(f"left over {_some(self.left_over)}")
        if self.wrong:
            shapes = [f"{key} {in_file} instead of {wanted}" for key, (in_file, wanted) in self.wrong.items()]
            parts.append(f"wrong shape {_some(shapes)}")
        advice = "check that MODEL is the architecture that the file was saved from"
        if builder.head and set(self.missing) == set(builder.head) and not self.left_over and not self.wrong:
            advice = f"the file has no head: {builder.headless}"
        elif not self.missing and not self.left_over:
            advice = self._sizes(builder.options) or advice
        return f"checkpoint {path} does not fit {builder.name}: {'; '.join(parts)}; {advice}"

    def _sizes(self, options: Collection[str]) -> str | None:
        """The options that make the model fit, where a number of classes or of channels is all that differs."""
        classes: set[int] = set()
        channels: set[int] = set()
        for in_file, wanted in self.wrong.values():
            if in_file and in_file[1:] == wanted[1:]:
                # A head for other classes: the first dimension of its weight and of its bias, alike.
                classes.add(in_file[0])
            elif len(in_file) > 3 and (in_file[0], *in_file[2:]) == (wanted[0], *wanted[2:]):
                # The first convolution of a model for other images.
                channels.add(in_file[1])
            else:
                return None
        if len(classes) > 1 or len(channels) > 1:
            return None
        said, passed = [], []
        for numbers, what, option in (
            (classes, "a head for {} classes", "num_classes"),
            (channels, "a first layer for {}-channel images", "in_chans"),
        ):
            for number in numbers:
                if option not in options:
                    return None
                said.append(what.format(number))
                passed.append(f"--{option.replace('_', '-')} {number}")
        return f"the file has {' and '.join(said)}: pass {' '.join(passed)}"


def load_checkpoint(
    model: nn.Module,
    tables: Tables,
    *,
    path: str | Path,
    builder: Builder,
    forms: Sequence[Form] = (dict,),
    without: Collection[str] = (),
) -> None:
    """Copy a file's weights into the model: those behind one prefix, in the first form in which all of them fit.

    `without` names heads that the model was to be built without; what the file has for them is left aside. Warns
    (`ArmourWarning`) of that, of what was chosen where the file gives a choice, and of tables for another image size.

    Raises:
        CheckpointError: nothing fits; the message names up to three keys of each kind for what comes closest.
    """
    expected = model.state_dict()
    tried = [selection.without(without) for selection in selections(tables, expected)]
    odd = [odd_tensor(selection.weights, expected) for selection in tried]
    closest = max(tried, key=lambda selection: selection.known)
    differences: list[Difference] = []
    for form in forms:
        fitting: list[tuple[Selection, Weights]] = []
        for selection, problem in zip(tried, odd, strict=True):
            adapted = form(selection.weights) if problem is None else None
            if adapted is None:
                continue
            difference = compare(expected, adapted)
            if selection is closest:
                differences.append(difference)
            if not difference:
                fitting.append((selection, adapted))
        if fitting:
            model.load_state_dict(fitting[0][1])
            announce([selection for selection, _ in fitting], tried, path)
            _announce_resampled(*fitting[0], path)
            return
    if problem := odd[tried.index(closest)]:
        raise CheckpointError(f"checkpoint {path} {problem}")
    difference = min(differences, key=len)
    where = named(path, closest)
    raise CheckpointError(difference.message(where, builder))


def selections(tables: Tables, expected: Mapping[str, Any]) -> list[Selection]:
    """What of a file could be the model's weights, the best first. Never empty."""
    found: list[Selection] = []
    for table, tensors in tables.items():
        known = Counter(prefix for key in tensors for prefix, rest in _splits(key) if rest in expected)
        prefixes = [prefix for prefix, count in known.items() if 2 * count >= len(expected)]
        if not prefixes:
            # By other names than the model's, which a library may know how to translate.
            sizes = Counter(prefix for key in tensors for prefix, _ in _splits(key))
            prefixes = [prefix for prefix, count in sizes.items() if 2 * count >= len(expected)]
        found += (_behind(table, tensors, prefix, known[prefix]) for prefix in prefixes)
    if not found:
        largest = max(tables, key=lambda table: len(tables[table]))
        found = [_behind(largest, tables[largest], "", 0)]
    return sorted(found, key=lambda selection: selection.rank)


def compare(expected: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Difference:
    """How the weights differ from what the model has; `expected` has tensors by key."""
    missing = [key for key in expected if key not in weights]
    left_over = [key for key in weights if key not in expected]
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            wrong[key] = (tuple(weights[key].shape), tuple(value.shape))
    return Difference(missing, left_over, wrong)


def odd_tensor(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    """Which tensor could only be copied into the model by a cast that changes what it means, and what to do."""
    return odd_kinds({key: kind_of(tensor) for key, tensor in weights.items()}, expected)


def odd_kinds(kinds: Mapping[str, Kind], expected: Mapping[str, torch.Tensor]) -> str | None:
    """The same from the kinds of a file's tensors. The text is the end of a sentence about the file."""
    leaves: dict[str, set[str]] = {}
    for key, tensor in expected.items():
        leaves.setdefault(_leaf(key), set()).add(kind_of_type(tensor.dtype))
    for key, (kind, shown) in kinds.items():
        # Libraries translate names, but hardly ever the last part.
        wanted = {kind_of_type(expected[key].dtype)} if key in expected else leaves.get(_leaf(key), {kind})
        if kind in wanted:
            continue
        there = next(iter(wanted))
        if kind in ("meta", "sparse"):
            remedy = "save the model when it has weights" if kind == "meta" else "save its to_dense()"
            return f"holds {shown} in {key}, where numbers are expected; {remedy}"
        if there == "float" and kind != "complex":
            return (
                f"holds {shown} in {key}, where the model has floats: quantized weights are not numbers without their "
                "scales; dequantize them, or save the model with float weights"
            )
        return f"holds {shown} in {key}, where the model has {there} numbers; save it in the model's own type"
    return None


def announce(fitting: Sequence[Selection], tried: Sequence[Selection], path: object) -> None:
    """Warn of what was chosen of a file: the first of what fits. Silent where there was no choice."""
    chosen = fitting[0]
    parts = []
    # By other names, what lies behind a longer prefix can be a part of the same.
    others = [selection.place for selection in fitting[1:] if not selection.place.startswith(chosen.place)]
    if chosen.averaged or others:
        kind = "averaged (EMA) weights" if chosen.averaged else "weights"
        parts.append(f"took the {kind} under {chosen.place}{f' and not {_some(others)}' if others else ''}")
    unfit = [selection.place for selection in tried if selection.averaged and selection not in fitting]
    if unfit and not chosen.averaged:
        parts.append(f"the averaged weights under {_some(unfit)} do not fit")
    if chosen.prefix:
        parts.append(f"took the prefix {chosen.prefix!r} off the names")
    if chosen.beside and (chosen.prefix or chosen.headless):
        parts.append(f"left {_some(chosen.beside)} aside")
    if parts:
        warnings.warn(f"checkpoint {path}: {'; '.join(parts)}", ArmourWarning, stacklevel=2)


def _announce_resampled(selection: Selection, adapted: Weights, path: object) -> None:
    """Warn of tables that a library's converter resampled, for a file that was trained on images of another size."""
    changed = []
    for key, value in adapted.items():
        in_file = selection.weights.get(key)
        if in_file is not None and in_file.numel() != value.numel():
            changed.append(f"{key} from {tuple(in_file.shape)} to {tuple(value.shape)}")
    if changed:
        warnings.warn(
            f"checkpoint {path} is for images of another size: resampled {_some(changed)}; --img-size builds the model "
            "for those of the file",
            ArmourWarning,
            stacklevel=2,
        )


def named(path: object, selection: Selection) -> str:
    """The file, and where in it the names that a message gives are to be found."""
    return f"{path} (behind {selection.place})" if selection.prefix else str(path)


def lies_inside(model: nn.Module, key: str, body: str) -> bool:
    """Whether a left-over tensor is of a part that the model runs, so that the model would compute something else.

    Such are a bias that the config says there is none of, a layer too many, an adapter. A head of its own beside the
    `body` (the name of the model without heads) is not, and neither is what needs no weights or plays no part at
    inference.
    """
    owner, _, leaf = key.rpartition(".")
    while owner:
        for name in (owner, f"{body}.{owner}"):
            module = _module_at(model, name)
            if module is not None and name != body:
                # Tables that older versions stored, and the token of masked patches in pre-training.
                return leaf not in module._buffers and leaf != "mask_token"
        owner = owner.rpartition(".")[0]
    return False


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _some(items: Collection[str]) -> str:
    shown = ", ".join(sorted(items)[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _splits(key: str) -> list[tuple[str, str]]:
    """Every prefix of a key, "" first and each with its dot, and the rest."""
    parts = key.split(".")
    ends = range(len(parts))
    return [(".".join((*parts[:end], "")) if end else "", ".".join(parts[end:])) for end in ends]


def _behind(table: str, tensors: Weights, prefix: str, known: int) -> Selection:
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    beside = tuple(key for key in tensors if not key.startswith(prefix))
    return Selection(weights, table, prefix, beside, known)
