"""Between the command line and the trainer: which student, teacher and images a recipe means, and what is kept.

The student is a converted model, or one that the recipe converts or trains as it is. Training works on it; what is
saved is a copy of the model as it came, with the weights that were kept, so that wrappers, stochastic depth and frozen
parameters of the training leave no trace.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.copies import full_copy
from armour_surgery.errors import ArmourError, DataError, ResumeError, TeacherError, UsageError
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.images.sources import (
    Pictures,
    Stream,
    check_labels,
    has_split,
    held_out,
    open_pictures,
    open_stream,
)
from armour_surgery.measure.held_out import held_out_scores
from armour_surgery.records import Source, SurgeryPlan
from armour_surgery.recover import checkpoint
from armour_surgery.recover.distillation import Teacher
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.loading import evaluation_batches
from armour_surgery.recover.recipe import DataPart, Recipe
from armour_surgery.recover.student import evaluating
from armour_surgery.recover.timm_parts import build_untrained, set_drop_path, training_transform
from armour_surgery.recover.trainer import Judge, Outcome, Task, Watch, train
from armour_surgery.recover.training_folder import check_saveable, open_folder, write_result
from armour_surgery.saving.folder import check_output, is_saved_folder, load
from armour_surgery.surgery.conversion import convert

__all__ = ["Finetuned", "adapted", "finetune", "head_size", "load_any"]

JUDGE_BATCH = 64


@dataclass(frozen=True)
class Finetuned:
    """A run that ended: what came of it, how the training data was judged, and the folder, which `load` reads."""

    outcome: Outcome
    folder: Path
    judged_on: str


def load_any(name: str, *, pretrained: bool = True, checkpoint: Path | None = None) -> tuple[nn.Module, Source | None]:
    """MODEL as every command but `convert` takes it: a folder that this tool saved, or what the libraries know.

    Raises:
        ModelError, FolderError: it cannot be loaded; the message says why.
    """
    if is_saved_folder(name):
        if checkpoint is not None:
            raise UsageError(f"{name} has its weights in it; --checkpoint is for models of a library")
        return load(name), None
    return hosts.load_model(name, pretrained=pretrained, checkpoint=checkpoint)


def finetune(
    model: str | nn.Module,
    recipe: Recipe,
    out: Path,
    process: Process,
    *,
    data: str | None = None,
    teacher: str | nn.Module | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> Finetuned:
    """Train a model by a recipe, and save what is kept to `out`.

    Args:
        model: a converted model, MODEL, or an unconverted model that the recipe converts or trains as it is.
        data: see `recover.data.open_pictures`; without it the recipe's.
        teacher: MODEL or a module; without it the recipe's, and without that the model that the student was
            converted from.
        resume: go on from the checkpoint in `out`.

    Raises:
        ArmourError: see `recover.trainer.train`; and whatever loading, converting and saving raise.
    """
    _check_folder(out, resume)
    process.wait()
    student = _student(model, recipe)
    surgery: SurgeryPlan | None = getattr(student, "surgery", None)
    check_saveable(student)
    own = preprocessing(student)
    prep = adapted(own, recipe.data)
    given = data or recipe.data.source
    if given is None:
        raise UsageError("this recipe needs images; name them with --data")
    training, judged, judged_on = _images(given, recipe, prep)
    classes = head_size(student)
    for pictures in (training, judged):
        if recipe.labelled and isinstance(pictures, Pictures):
            check_labels(pictures, classes)
    guide = _teacher(student, surgery, recipe, own, prep, teacher)
    if process.first:
        open_folder(out, recipe)
    process.wait()
    kept = full_copy(student)
    if recipe.model.drop_path:
        set_drop_path(student, recipe.model.drop_path)
    task = Task(
        student=student,
        recipe=recipe,
        data=training,
        transform=training_transform(prep, recipe.augment),
        judge=_judge(judged, prep, recipe, guide, process),
        out=out,
        teacher=guide,
        sites=tuple(site.fqn for site in surgery.sites) if surgery is not None else (),
        classes=classes,
    )
    outcome = train(task, process, resume=resume, watch=watch)
    if process.first:
        kept.load_state_dict(outcome.weights)
        write_result(kept, out, recipe, outcome, prep, judged_on)
    process.wait()
    return Finetuned(outcome, out, judged_on)


def adapted(prep: Preprocessing, data: DataPart) -> Preprocessing:
    """A model's preprocessing with what a recipe says about it.

    Raises:
        UsageError: the recipe has a mean or deviation for another number of channels.
    """
    changes: dict[str, Any] = {}
    for name, values in (("mean", data.mean), ("std", data.std)):
        if values is not None:
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


def _student(model: str | nn.Module, recipe: Recipe) -> nn.Module:
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
        if part.args:
            model = build_untrained(model.removeprefix("timm:"), part.args)
        else:
            model, source = load_any(model, pretrained=part.start == "weights")
    surgery = getattr(model, "surgery", None)
    if part.mode is None:
        return model
    if surgery is None:
        return convert(model, part.mode, init=part.init, inplace=True, source=source)
    if surgery.mode != part.mode and {site.mode for site in surgery.sites} != {part.mode}:
        raise UsageError(
            f"this recipe is for the mode {part.mode}, and the model was converted to {surgery.mode}; take another "
            f"recipe, or --set model.mode={surgery.mode}"
        )
    return model


def head_size(model: nn.Module) -> int:
    """The size of a model's head; 0 without one."""
    for name in ("num_classes", "num_labels"):
        found = getattr(model, name, getattr(getattr(model, "config", None), name, None))
        if isinstance(found, int):
            return found
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features if linears else 0


def _check_folder(out: Path, resume: bool) -> None:
    """Before anything is loaded, let alone written."""
    check_output(out)
    path = out / "checkpoints" / checkpoint.LAST
    if not resume and path.exists():
        raise UsageError(f"{out} holds a run already; go on with --resume, or name another --out")
    if resume and not path.exists():
        raise ResumeError(f"there is no checkpoint {path} to go on from; leave --resume out, or name another --out")


def _images(source: str, recipe: Recipe, prep: Preprocessing) -> tuple[Pictures | Stream, Pictures | Stream, str]:
    """Images to train on, those to judge by, and what the latter are, in words."""
    training = _open_split(source, "train", recipe, prep)
    holdout = recipe.data.holdout
    if isinstance(training, Stream):
        if holdout:
            raise UsageError(f"data.holdout: {source} is read in order, so nothing can be kept out of it; set it to 0")
        return training, _open_split(source, "val", recipe, prep), f"the validation split of {source}"
    if not holdout and has_split(source, "val", recipe.data.val_split):
        judged = _open_split(source, "val", recipe, prep, training.classes)
        return training, judged, f"the validation images of {source}"
    if not holdout:
        raise DataError(
            f"{source} has no images to judge by (a folder val/); add them, or keep some of the training images out "
            "with --set data.holdout=0.1"
        )
    training, kept_out = held_out(training, holdout)
    return training, kept_out, f"{len(kept_out)} images of {source} that were not trained on"


def _teacher(
    student: nn.Module,
    surgery: SurgeryPlan | None,
    recipe: Recipe,
    own: Preprocessing,
    prep: Preprocessing,
    given: str | nn.Module | None,
) -> Teacher | None:
    """The teacher that was given, the recipe's, or the original; None where nothing asks for one."""
    if not recipe.loss.needs_teacher:
        if given is not None:
            raise UsageError("--teacher is given, and no weight in the recipe's loss asks for one; set loss.logits=0.5")
        return None
    named = given if given is not None else recipe.teacher
    if isinstance(named, nn.Module):
        model = named
    elif named is not None:
        model, _ = load_any(named)
    else:
        model = _original(student, surgery)
    theirs = preprocessing(model)
    if theirs.size[0] != prep.size[0]:
        raise TeacherError(f"the teacher takes {theirs.size[0]} channels and the student {prep.size[0]}; name another")
    if (theirs.mean, theirs.std) == (own.mean, own.std):
        return Teacher(model)
    mean, std = torch.tensor(prep.mean), torch.tensor(prep.std)
    their_mean, their_std = torch.tensor(theirs.mean), torch.tensor(theirs.std)
    scale, shift = std / their_std, (mean - their_mean) / their_std
    return Teacher(model, (scale[:, None, None], shift[:, None, None]))


def _original(student: nn.Module, surgery: SurgeryPlan | None) -> nn.Module:
    """The model that the student was converted from, with the weights that it had."""
    advice = "name it with --teacher"
    if surgery is None or surgery.source is None:
        raise TeacherError(f"nobody knows which model {type(student).__name__} was converted from; {advice}")
    source = surgery.source
    if source.name == "digits_vit":
        from armour_surgery.demo.digits_vit import load_digits_vit

        return load_digits_vit()
    sizes: dict[str, Any] = {name: source.arguments.get(name) for name in ("img_size", "num_classes", "in_chans")}
    sizes = {name: size[0] if isinstance(size, list) else size for name, size in sizes.items() if size}
    try:
        model, _ = hosts.load_model(source.name, **sizes)
    except ArmourError as error:
        raise TeacherError(
            f"the original, {source.name or 'a model built in Python'}, cannot be loaded: {error}; {advice}"
        ) from error
    if surgery.trained is None and not _share_weights(model, student):
        raise TeacherError(
            f"{source.name} has other weights than the model that the student was converted from (was that given "
            f"--checkpoint or --no-pretrained?); {advice}"
        )
    return model


def _share_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether any matrix that is not constant is the same in both: a conversion leaves most as they are."""
    theirs = dict(second.named_parameters())
    return any(
        value.ndim > 1 and name in theirs and torch.equal(value, theirs[name]) and bool(value.std() > 0)
        for name, value in first.named_parameters()
    )


def _judge(
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

        def run(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
            outputs = model(images.to(process.device), True)
            return outputs.features, outputs.logits

        with evaluating(runner):
            return held_out_scores(
                lambda images: run(runner, images),
                (lambda images: run(compared, images)) if compared is not None else None,
                batches,
                labelled=recipe.labelled,
                blank=blank,
                total=process.sum,
            )

    return judge
