"""A whole run: the student, teacher and images that a recipe means are found, the trainer runs, the result is saved.

The student is a converted model, or one that the recipe converts or trains as it is. Training works on it; what is
saved is a copy of the model as it came, with the weights that were kept, so that wrappers, stochastic depth and frozen
parameters of the training leave no trace.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.errors import ResumeError, UsageError
from armour_surgery.hosts.class_names import class_names
from armour_surgery.hosts.own import is_own
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.hosts.running import head_size
from armour_surgery.images.class_order import ClassOrder, class_order, in_order
from armour_surgery.images.sources import Pictures, Stream, check_labels
from armour_surgery.measure.held_out import held_out_scores
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import SurgeryPlan
from armour_surgery.recover import checkpoint
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.splits import adapted_preprocessing, open_images
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.teacher import GivenTeacher, Teacher, find_teacher
from armour_surgery.recover.timm_parts import build_untrained, set_drop_path, training_transform
from armour_surgery.recover.trainer import Judge, Outcome, Task, Watch, train
from armour_surgery.recover.training_folder import check_same_classes, check_saveable, open_folder, write_result
from armour_surgery.saving.any_model import NOTHING_ASKED, NOTHING_SAID, Asked, OwnModels, load_any
from armour_surgery.saving.occupied import check_output, is_saved_folder
from armour_surgery.surgery.conversion import convert

__all__ = ["Finetuned", "finetune"]

JUDGE_BATCH = 64
BEYOND_CHANCE = 1.5


@dataclass(frozen=True)
class Finetuned:
    """A run that ended: what came of it, how the training data was judged, and the folder, which `load` reads.

    `teacher` says who taught, None where nobody did; `order` which class each label was, None without labels.
    """

    outcome: Outcome
    folder: Path
    judged_on: str
    teacher: str | None
    order: ClassOrder | None


def finetune(
    model: str | nn.Module,
    recipe: Recipe,
    out: Path,
    process: Process,
    *,
    data: str | None = None,
    asked: Asked = NOTHING_ASKED,
    teacher: str | nn.Module | None = None,
    teacher_checkpoint: Path | None = None,
    class_map: Path | None = None,
    resume: bool = False,
    own: OwnModels = NOTHING_SAID,
    watch: Watch | None = None,
) -> Finetuned:
    """Train a model by a recipe, and save what is kept to `out`.

    Args:
        model: a converted model, MODEL, or an unconverted model that the recipe converts or trains as it is.
        data: see `images.sources.open_pictures`; without it the recipe's.
        asked: how MODEL is to be built and filled, where it is no saved folder. Its sizes also count for a teacher
            that is named.
        teacher: MODEL or a module; without it the recipe's, and without that the model that the student was
            converted from, which has to have the weights that it had then.
        teacher_checkpoint: a file with the teacher's weights.
        class_map: a file with the names of the model's classes, where labels are names of folders.
        resume: go on from the checkpoint in `out`.
        own: what makes and feeds models of no library.

    Raises:
        ArmourError: see `recover.trainer.train`; and whatever loading, converting and saving raise.
    """
    _check_folder(out, resume)
    # Before the first process writes, all have to have looked.
    process.wait()
    if recipe.model.args and asked.sizes:
        # What was built is written down with the recipe, and saved with the model.
        part = recipe.model.model_copy(update={"args": {**recipe.model.args, **asked.sizes}})
        recipe = recipe.model_copy(update={"model": part})
    # What was converted is as it is, and sizes are then meant for a teacher beside it.
    settled = isinstance(model, nn.Module) or (is_saved_folder(model) and (teacher or teacher_checkpoint) is not None)
    student = _make_student(model, recipe, own, replace(asked, img_size=None, num_classes=None) if settled else asked)
    surgery: SurgeryPlan | None = getattr(student, "surgery", None)
    check_saveable(student)
    usual = preprocessing(student)
    prep = adapted_preprocessing(usual, recipe.data)
    given = data or recipe.data.source
    if given is None:
        raise UsageError("this recipe needs images; name them with --data")
    training, judged, judged_on = open_images(given, recipe, prep)
    classes = head_size(student)
    order: ClassOrder | None = None
    if recipe.labelled and isinstance(training, Pictures):
        order = class_order(training, class_names(student), classes, class_map)
        training = in_order(training, order)
    elif class_map is not None:
        raise UsageError(f"--class-map is about labels that are names of folders, and {given} has none here")
    if order is not None and isinstance(judged, Pictures):
        # Its labels are the training images', whatever folders it has.
        check_labels(judged, len(order.numbers))
        judged = in_order(judged, order)
    said = GivenTeacher(teacher, replace(asked, checkpoint=teacher_checkpoint))
    guide = find_teacher(student, surgery, recipe, usual, prep, said, own)
    if order is not None and recipe.model.start == "weights" and (note := order.note(given)):
        warnings.warn(note, ArmourWarning, stacklevel=2)
    numbers = order.numbers if order is not None else ()
    if resume:
        check_same_classes(out, numbers)
        process.wait()  # all have to have read what the first one writes anew
    if process.first:
        open_folder(out, recipe, numbers)
    process.wait()
    # Before anything about the training (stochastic depth, frozen parameters, wrappers) is done to the student.
    kept = full_copy(student)
    if recipe.model.drop_path:
        set_drop_path(student, recipe.model.drop_path)
    task = Task(
        student=student,
        recipe=recipe,
        data=training,
        transform=training_transform(prep, recipe.augment),
        judge=_make_judge(judged, prep, recipe, guide, process),
        out=out,
        teacher=guide,
        sites=tuple(site.fqn for site in surgery.sites) if surgery is not None else (),
        mlps=tuple(mlp.fqn for mlp in surgery.mlps) if surgery is not None else (),
        classes=classes,
    )
    outcome = train(task, process, resume=resume, watch=watch)
    if process.first:
        kept.load_state_dict(outcome.weights)
        write_result(kept, out, recipe, outcome, prep, judged_on, _names_to_keep(order, outcome))
    process.wait()
    return Finetuned(outcome, out, judged_on, guide.name if guide is not None else None, order)


def _names_to_keep(order: ClassOrder | None, outcome: Outcome) -> tuple[str, ...]:
    """What the classes are called from now on: as they were by name, or as the folders that they were trained on."""
    if order is None or order.way == "numbers":
        return ()
    # Nobody knew whether the model's classes are in the order of the folders. If it is right far more often than by
    # chance, they are by now.
    if order.way == "folders" and outcome.end.get("top1", 0.0) < BEYOND_CHANCE * 100 / len(order.names):
        return ()
    return order.names


def _make_student(model: str | nn.Module, recipe: Recipe, own: OwnModels, asked: Asked) -> nn.Module:
    """The model to train, converted if the recipe says so."""
    part, source = recipe.model, None
    torch.manual_seed(recipe.seed)  # random weights are the same in every process
    if isinstance(model, str):
        if part.start == "scratch" and is_saved_folder(model):
            raise UsageError(
                f"this recipe trains from scratch, and {model} has weights: name the architecture"
                f"{f' ({recipe.written_for})' if recipe.written_for else ''}, or keep the weights with --set "
                "model.start=weights --set model.args={}"
            )
        if part.start == "scratch" and asked.checkpoint is not None:
            raise UsageError(
                f"this recipe trains from scratch, and --checkpoint {asked.checkpoint} has weights: leave it out, or "
                "start from them with --set model.start=weights --set model.args={}"
            )
        if part.args and is_own(model):
            raise UsageError(
                f"this recipe has arguments for a builder of timm, and {model} is called with none; leave them out "
                "with --set model.args={}"
            )
        if part.args:
            model = build_untrained(model.removeprefix("timm:"), part.args)
        else:
            model, source = load_any(model, pretrained=part.start == "weights", asked=asked, own=own)
    if part.mode is None:
        return model
    surgery = getattr(model, "surgery", None)
    if surgery is None:
        return convert(model, part.mode, init=part.init, inplace=True, source=source)
    # A conversion that chose its modes itself (auto) may have come out as this mode everywhere.
    if surgery.mode != part.mode and {site.mode for site in surgery.sites} != {part.mode}:
        raise UsageError(
            f"this recipe is for the mode {part.mode}, and the model was converted to {surgery.mode}; take another "
            f"recipe, or --set model.mode={surgery.mode}"
        )
    return model


def _check_folder(out: Path, resume: bool) -> None:
    """Before anything is loaded, let alone written."""
    check_output(out)
    path = out / "checkpoints" / checkpoint.LAST
    if not resume and path.exists():
        raise UsageError(f"{out} holds a run already; go on with --resume, or name another --out")
    if resume and not path.exists():
        raise ResumeError(f"there is no checkpoint {path} to go on from; leave --resume out, or name another --out")


def _make_judge(
    data: Pictures | Stream, prep: Preprocessing, recipe: Recipe, teacher: Teacher | None, process: Process
) -> Judge:
    """Top-1 and top-5 where there are labels; likeness to the teacher where that is what counts."""
    blank = torch.zeros(1, *prep.size)
    compared = None if recipe.metric == "top1" else teacher

    def judge(runner: nn.Module) -> Mapping[str, float]:
        batches = evaluation_batches(
            data,
            prep.tensor,
            JUDGE_BATCH,
            rank=process.rank,
            world=process.world,
            workers=recipe.data.workers,
            limit=recipe.judge.images,
        )

        def asked(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
            outputs = model(images.to(process.device), True)
            return outputs.features, outputs.logits

        with evaluating(runner):
            return held_out_scores(
                partial(asked, runner),
                partial(asked, compared) if compared is not None else None,
                batches,
                labelled=recipe.labelled,
                blank=blank,
                total=process.sum,
            )

    return judge
