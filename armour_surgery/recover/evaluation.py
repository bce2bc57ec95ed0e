"""Accuracy of any MODEL on labelled images, over all processes, and beside another model."""

import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import DataError, UsageError
from armour_surgery.hosts.class_names import class_names
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.hosts.running import has_no_head, head_size
from armour_surgery.images.class_order import ClassOrder, class_order, in_order
from armour_surgery.images.sources import Pictures, Stream, open_pictures, open_stream
from armour_surgery.images.timm_datasets import imagenet_real_labels
from armour_surgery.measure.accuracy import Choices, agreement, choices, confusion, real_hits, relabelled_hits, top_hits
from armour_surgery.notes import ArmourWarning
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.recipe import DataPart
from armour_surgery.recover.splits import adapted_preprocessing
from armour_surgery.recover.student import Runner, evaluating
from armour_surgery.saving.any_model import NOTHING_ASKED, NOTHING_SAID, Asked, OwnModels, load_any, shared_out

__all__ = ["Evaluated", "Options", "evaluate"]

# When another order of classes is worth a word: this share of images right by it, so many times as many as by the
# present one, and so many standard deviations beyond.
MOST, FAR_BETTER, CERTAIN = 0.4, 1.5, 2.0


@dataclass(frozen=True)
class Options:
    """How to evaluate: which split, what to change about the model's preprocessing, what else to count or draw.

    `asked` is shared out over both models as `saving.any_model.shared_out` does it; with `vs_checkpoint` each has a
    file of its own. `class_map` is a file with the names of their classes. `own` says what makes and feeds models of no
    library.
    """

    split: str | None = None
    crop_pct: float | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    real: bool = False
    confusion: Path | None = None
    batch_size: int = 64
    workers: int = 0
    pretrained: bool = True
    asked: Asked = NOTHING_ASKED
    vs_checkpoint: Path | None = None
    class_map: Path | None = None
    own: OwnModels = NOTHING_SAID


@dataclass(frozen=True)
class Evaluated:
    """Accuracies in percent of `images`. `agreement` with `vs` is the share of the same first choice, in percent.

    `order` says which class of the model each label was; None where images came in a stream.
    """

    model: str
    images: int
    top1: float
    top5: float
    real: dict[str, Any] | None = None
    vs: "Evaluated | None" = None
    agreement: float | None = None
    unreadable: list[str] = field(default_factory=list)
    confusion: Path | None = None
    order: ClassOrder | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the contract's keys first."""
        other = self.vs
        beside = None
        if other is not None:
            beside = {
                "model": other.model,
                "top1": other.top1,
                "top5": other.top5,
                "agreement": self.agreement,
                "real": other.real,
                "classes": other.order.way if other.order is not None else None,
            }
        return {
            "model": self.model,
            "top1": self.top1,
            "top5": self.top5,
            "images": self.images,
            "vs": beside,
            "real": self.real,
            "unreadable": self.unreadable,
            "confusion": str(self.confusion) if self.confusion is not None else None,
            "classes": self.order.way if self.order is not None else None,
        }


def evaluate(
    model: str, data: str, process: Process, *, vs: str | None = None, options: Options | None = None
) -> Evaluated:
    """Count a model's right choices on the `val` images of a source, each image once, on any number of processes.

    Raises:
        ModelError, FolderError: a model cannot be loaded.
        DataError: there are no labelled images, or of other classes than the model has.
        UsageError: an option does not fit the model or the data.
    """
    options = options or Options()
    first, second = _shares(model, vs, options)
    # Both before either is run, which may take hours.
    subject = _prepare(model, data, first, options)
    beside = None if vs is None else _prepare(vs, data, second, options)
    chosen, evaluated = _evaluate(subject, data, process, options)
    result = evaluated
    if beside is not None:
        # A figure was asked for the first model alone.
        theirs, other = _evaluate(beside, data, process, replace(options, confusion=None))
        same, counted = process.sum(agreement(chosen, theirs, _same_class(evaluated.order, other.order)))
        result = replace(evaluated, vs=other, agreement=100 * same / max(1, counted))
        _note_orders(data, (chosen, evaluated), (theirs, other))
    else:
        _note_orders(data, (chosen, evaluated))
    return result


def _shares(model: str, vs: str | None, options: Options) -> tuple[Asked, Asked]:
    """What was asked of each of the two models."""
    if vs is None:
        if options.vs_checkpoint is not None:
            raise UsageError("--vs-checkpoint is for the model that --vs names, and there is none; use --checkpoint")
        return options.asked, NOTHING_ASKED
    first, second = shared_out([model, vs], options.asked)
    if options.vs_checkpoint is not None:
        first = replace(first, checkpoint=options.asked.checkpoint)
        second = replace(second, checkpoint=options.vs_checkpoint)
    return first, second


@dataclass(frozen=True)
class _Subject:
    """A model, and the images as it wants them, with labels in its own order."""

    name: str
    model: nn.Module
    classes: int
    prep: Preprocessing
    pictures: Pictures | Stream
    order: ClassOrder | None


def _prepare(name: str, data: str, asked: Asked, options: Options) -> _Subject:
    model, _ = load_any(name, pretrained=options.pretrained, asked=asked, own=options.own)
    part = DataPart(crop_pct=options.crop_pct, mean=options.mean, std=options.std)
    prep = adapted_preprocessing(preprocessing(model), part)
    opened = open_stream(data, "val", named_split=options.split, batch_size=options.batch_size, seed=0)
    pictures = opened or open_pictures(data, "val", size=prep.size, labelled=True, named_split=options.split)
    classes = head_size(model)
    if has_no_head(model):
        raise DataError(f"{name} has no head for classes, so it has no accuracy; name a classifier")
    order: ClassOrder | None = None
    if isinstance(pictures, Pictures):
        order = class_order(pictures, class_names(model), classes, options.class_map)
        pictures = in_order(pictures, order)
    elif options.class_map is not None:
        raise UsageError(f"--class-map is about the names of folders, and {data} is read in order; leave it out")
    return _Subject(name, model, classes, prep, pictures, order)


def _evaluate(subject: _Subject, data: str, process: Process, options: Options) -> tuple[Choices, Evaluated]:
    """What one model chose in this process, and how right it was in all of them."""
    pictures, classes = subject.pictures, subject.classes
    runner = Runner(subject.model).to(process.device)
    batches = evaluation_batches(
        pictures,
        subject.prep.tensor,
        options.batch_size,
        rank=process.rank,
        world=process.world,
        workers=options.workers,
    )
    with evaluating(runner):
        chosen = choices(lambda images: _logits(runner, images.to(process.device), subject.name), batches)
    first, five = top_hits(chosen)
    _check_labels_seen(chosen, classes, data)
    images, top1, top5 = process.sum([len(chosen.labels), first, five])
    if not images:
        raise DataError(f"no image of {data} could be read; the first: {(chosen.broken or ['there is none'])[0]}")
    real = _real(chosen, pictures, process) if options.real else None
    if options.confusion is not None:
        _draw_confusion(chosen, pictures, classes, process, options.confusion)
    return chosen, Evaluated(
        subject.name,
        int(images),
        100 * top1 / images,
        100 * top5 / images,
        real,
        unreadable=chosen.broken,
        confusion=options.confusion,
        order=subject.order,
    )


def _same_class(ours: ClassOrder | None, theirs: ClassOrder | None) -> dict[int, int] | None:
    """Our class of each of theirs, by the labels of the data that both were asked about."""
    if ours is None or theirs is None or ours.numbers == theirs.numbers:
        return None
    return dict(zip(theirs.numbers, ours.numbers, strict=True))


def _note_orders(data: str, *made: tuple[Choices, Evaluated]) -> None:
    """Say what is assumed of classes, and where another order of theirs would explain the choices far better."""
    notes = [scores.order.note(data) for _, scores in made if scores.order is not None]
    for note in dict.fromkeys(filter(None, notes)):
        warnings.warn(note, ArmourWarning, stacklevel=2)
    for chosen, scores in made:
        _note_another_order(chosen, scores.model)


def _note_another_order(chosen: Choices, name: str) -> None:
    right, would_be, images = relabelled_hits(chosen)
    # Beyond what chance does: among n images that only one of them has right, they differ by sqrt(n) or so.
    beyond = would_be - right > CERTAIN * math.sqrt(would_be + right)
    if beyond and would_be > max(MOST * images, FAR_BETTER * right):
        warnings.warn(
            f"{name} has {100 * right / images:.1f} % right, and {100 * would_be / images:.1f} % would be right if the "
            "labels meant other classes of the model (which, was found on every other image, and counted on the rest): "
            "are they in the model's order? --class-map FILE says which name is which class",
            ArmourWarning,
            stacklevel=2,
        )


def _draw_confusion(chosen: Choices, pictures: Pictures | Stream, classes: int, process: Process, path: Path) -> None:
    counts = torch.tensor(process.sum(confusion(chosen, classes).flatten().tolist())).reshape(classes, classes)
    if process.first:
        # Only who draws waits for matplotlib.
        from armour_surgery.report.figures import draw_confusion

        names = pictures.classes if isinstance(pictures, Pictures) else ()
        draw_confusion(counts, names or tuple(map(str, range(classes))), path)


def _logits(runner: nn.Module, images: Tensor, name: str) -> Tensor:
    logits: Tensor | None = runner(images).logits
    if logits is None:
        raise UsageError(f"{name} has no head for classes, so it has no accuracy; name a classifier")
    return logits


def _check_labels_seen(chosen: Choices, classes: int, data: str) -> None:
    """A stream tells its labels only as they come by."""
    if not len(chosen.labels):
        return
    low, high = int(chosen.labels.min()), int(chosen.labels.max())
    if not 0 <= low <= high < classes:
        raise DataError(
            f"labels of {data} run from {low} to {high}, and the model's head has {classes} classes; name the data "
            "that it was trained for"
        )


def _real(chosen: Choices, pictures: Pictures | Stream, process: Process) -> dict[str, Any]:
    if isinstance(pictures, Stream):
        raise UsageError("--real knows images by their file names, and this data is read in order; name a folder")
    first, five, images = process.sum(real_hits(chosen, pictures.name, imagenet_real_labels(None)))
    if not images:
        raise UsageError(
            "--real: no image is called like ImageNet's validation images (ILSVRC2012_val_00000001.JPEG); leave it out"
        )
    return {"top1": 100 * first / images, "top5": 100 * five / images, "images": int(images)}
