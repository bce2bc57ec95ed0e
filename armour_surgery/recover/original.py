"""The model that a student was converted from: loading it again, and making sure that it is the same."""

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import ArmourError, TeacherError
from armour_surgery.hosts.own import is_own
from armour_surgery.hosts.running import head_tensors
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import Source, SurgeryPlan, WeightsFile
from armour_surgery.saving.any_model import Asked
from armour_surgery.surgery.original import differing_tensors, tensor_digests, weights_digest

__all__ = ["check_original", "load_original", "note_other"]

SIZES = ("img_size", "num_classes", "in_chans")
# Digits of a file's sha256 that a message shows.
SHOWN = 16


def load_original(student: nn.Module, surgery: SurgeryPlan | None, asked: Asked) -> tuple[nn.Module, Source]:
    """The model that the student was converted from, loaded as it was then; `asked` wins over what is recorded.

    Raises:
        TeacherError: nobody knows it, or it cannot be loaded.
    """
    advice = "name it with --teacher"
    if surgery is None or surgery.source is None:
        raise TeacherError(f"nobody knows which model {type(student).__name__} was converted from; {advice}")
    source = surgery.source
    if source.library == hosts.OWN or is_own(source.name):
        # Nothing that a folder names is called by itself: it may come from anywhere.
        file = f" and --teacher-checkpoint FILE ({source.checkpoint.path})" if source.checkpoint is not None else ""
        raise TeacherError(
            f"the original, {source.name}, is of no library, and only you can make it with its weights; name what "
            f"does with --teacher FILE.py:CALLABLE{file}"
        )
    if source.name == "digits_vit":
        from armour_surgery.demo.digits_vit import load_digits_vit

        return load_digits_vit(), source
    options = {**_options(source), **asked.sizes}
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    recorded = source.checkpoint.path if source.checkpoint is not None else None
    if recorded is not None:
        advice = "name the file of its weights with --teacher-checkpoint, or another model with --teacher"
    try:
        return hosts.load_model(source.name, checkpoint=asked.checkpoint or recorded, **sizes, arguments=options)
    except ArmourError as error:
        file = f" with the weights of {recorded}" if recorded is not None and asked.checkpoint is None else ""
        raise TeacherError(
            f"the original, {source.name or 'a model built in Python'}{file}, cannot be loaded: {error}; {advice}"
        ) from error


def _options(source: Source) -> dict[str, Any]:
    """What the original was loaded with, as far as it was recorded; else as the model showed it."""
    options: dict[str, Any] = {}
    if source.options is not None:
        options |= source.options
    else:
        for name in SIZES:
            size = source.arguments.get(name)
            # A height and a width, as JSON holds them; who loads by name gives one number.
            options[name] = size[0] if isinstance(size, list) and size else size
    for name in SIZES:
        size = options.get(name)
        if size is None:
            options.pop(name, None)
        elif type(size) is not int:
            raise TeacherError(
                f"the original, {source.name}, was built with {name}={size!r}, which is no number; name it with "
                "--teacher"
            )
    return options


def check_original(
    model: nn.Module, source: Source, student: nn.Module, surgery: SurgeryPlan | None, *, judges_head: bool
) -> None:
    """Make sure that a model has the weights that the student was converted from.

    A head of other numbers passes where nobody looks at it (`judges_head`): a new one is drawn at every loading.

    Raises:
        TeacherError: it has others; the message says how many tensors differ, and what to do.
    """
    if surgery is None:
        return
    name = source.name
    if not surgery.original:
        _check_unrecorded(model, name, student, surgery)
        return
    other = _other_weights(model, source, surgery)
    if not other.names or (not judges_head and other.names <= head_tensors(model)):
        return
    file = f" --teacher-checkpoint {source.checkpoint.path}" if source.checkpoint is not None else ""
    raise TeacherError(
        f"{name} has other weights than the model that the student was converted from: {other.told}; name the file of "
        f"the right ones with --teacher-checkpoint FILE, or learn from these all the same with --teacher {name}{file}"
    )


def note_other(model: nn.Module, source: Source | None, surgery: SurgeryPlan, name: str) -> None:
    """Warn of a teacher that was named, and is not the model that the student was converted from."""
    if not surgery.original:
        return
    other = _other_weights(model, source, surgery)
    if other.names:
        original = surgery.source.name if surgery.source is not None and surgery.source.name else "the original"
        warnings.warn(
            f"the teacher {name} is not what the student was converted from ({original}): {other.told}; the student "
            "learns from it since it was named",
            ArmourWarning,
            stacklevel=2,
        )


class _Other(NamedTuple):
    """The tensors of a model that are not the original's, and how they and their files differ, in words."""

    names: set[str]
    told: str


def _other_weights(model: nn.Module, source: Source | None, surgery: SurgeryPlan) -> _Other:
    digests = tensor_digests(model)
    if surgery.parts:
        digests = {name: digest for name, digest in digests.items() if name in surgery.original}
    names = differing_tensors(surgery.original, digests)
    theirs = surgery.source.checkpoint if surgery.source is not None else None
    ours = source.checkpoint if source is not None else None
    # Tables that were resampled may differ in the last digit on another machine; what the file holds does not.
    if theirs is not None and ours is not None and theirs.sha256 == ours.sha256 and digests.keys() >= set(names):
        return _Other(set(), "")
    total = len(surgery.original.keys() | names)
    shown = ", ".join(names[:2]) + ", ..." * (len(names) > 2)
    told = (
        f"{len(names)} of {total} tensors differ ({shown}), digest {weights_digest(digests)} instead of "
        f"{weights_digest(surgery.original)}"
    )
    if ours is not None or theirs is not None:
        told += f", {_named(ours)} instead of {_named(theirs)}"
    return _Other(set(names), told)


def _named(file: WeightsFile | None) -> str:
    return "no file" if file is None else f"{file.path} (sha256 {file.sha256[:SHOWN]}...)"


def _check_unrecorded(model: nn.Module, name: str, student: nn.Module, surgery: SurgeryPlan) -> None:
    """The same for a folder of a version that kept no record."""
    if surgery.trained is not None:
        # Any matrix may have moved.
        warnings.warn(
            f"the student was saved without a record of the weights that it was converted from, so nobody can tell "
            f"whether the teacher, {name}, has them; convert again to have one",
            ArmourWarning,
            stacklevel=2,
        )
    elif not _share_weights(model, student):
        raise TeacherError(
            f"{name} has other weights than the model that the student was converted from (was that given --checkpoint "
            "or --no-pretrained?); name the file with --teacher-checkpoint, or another model with --teacher"
        )


def _share_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether any matrix that is not constant is the same in both: a conversion leaves most as they are."""
    theirs = dict(second.named_parameters())
    for name, value in first.named_parameters():
        # Biases and norms start out as zeros and ones in every model, and say nothing.
        if value.ndim > 1 and name in theirs and torch.equal(value, theirs[name]) and bool(value.std() > 0):
            return True
    return False
