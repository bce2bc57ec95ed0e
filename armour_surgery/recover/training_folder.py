"""The folder of a training run: ours from the start, and in the end a model with the weights that were kept."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from armour_surgery import hosts
from armour_surgery.errors import FolderError, ResumeError, UsageError
from armour_surgery.hosts.class_names import class_arguments
from armour_surgery.hosts.library_folder import write_as_timm
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.records import SurgeryPlan
from armour_surgery.recover.log import write_text
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.recipe_files import to_yaml
from armour_surgery.recover.trainer import Outcome
from armour_surgery.saving.folder import save
from armour_surgery.saving.occupied import TRAINING

__all__ = ["check_same_classes", "check_saveable", "open_folder", "write_result"]

RECIPE = "recipe.yaml"
# In the record of a run: the model's class of every label.
CLASSES = "classes"


def check_saveable(model: nn.Module) -> None:
    """Before hours go by: whether the model can be written in the end.

    Raises:
        UsageError: it is not converted, and neither timm's nor transformers'.
    """
    if not hasattr(model, "surgery") and hosts.library_of(model) not in ("timm", "transformers"):
        raise UsageError(
            f"{type(model).__name__} is not converted, and of such models only timm's and transformers' can be saved; "
            "convert it first, or set model.mode=auto"
        )
    if not hasattr(model, "surgery") and hosts.library_of(model) == "timm":
        try:
            hosts.outline(model, {})
        except FolderError as error:
            # A user's own class that derives from one of timm's.
            raise UsageError(f"{error}; or convert it first, or set model.mode=auto") from error


def check_same_classes(out: Path, numbers: Sequence[int]) -> None:
    """Before a run goes on: whether labels mean the classes that they meant when it began.

    Raises:
        ResumeError: they mean others.
    """
    recorded = _recorded_classes(out)
    if recorded is not None and recorded != list(numbers):
        raise ResumeError(
            f"the run in {out} began with the labels as classes {str(recorded)[:60]}, and they are now "
            f"{str(list(numbers))[:60]}; resume with the same --class-map and data, or train into another --out"
        )


def open_folder(out: Path, recipe: Recipe, numbers: Sequence[int]) -> None:
    """Make the folder ours from the start, with the resolved recipe in it, and which class each label is."""
    out.mkdir(parents=True, exist_ok=True)
    header = [f"effective learning rate {recipe.effective_lr:g} (base {recipe.optimizer.lr:g})"]
    write_text(out / RECIPE, to_yaml(recipe, header))
    _write_record(out, {"status": "running", CLASSES: list(numbers)})


def _recorded_classes(out: Path) -> list[int] | None:
    """The classes that the record of a run has; None in folders of older versions, and where the record was lost."""
    try:
        recorded = json.loads((out / TRAINING).read_text(encoding="utf-8"))[CLASSES]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return recorded if isinstance(recorded, list) else None


def _write_record(out: Path, values: Mapping[str, Any]) -> None:
    record = {"tool": "armour-surgery", **values}
    write_text(out / TRAINING, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_result(
    model: nn.Module,
    out: Path,
    recipe: Recipe,
    outcome: Outcome,
    prep: Preprocessing,
    judged_on: str,
    classes: tuple[str, ...],
) -> None:
    """Write the model with the weights that were kept, and a record of the run; `classes` are its names, if known."""
    record = {
        "status": "done",
        "steps": outcome.steps,
        "kept": outcome.kept,
        "average": outcome.average,
        "judged_on": judged_on,
        "start": outcome.start,
        "end": outcome.end,
        "images": outcome.images,
        "seconds": round(outcome.seconds, 1),
        "unreadable": len(outcome.broken),
        CLASSES: _recorded_classes(out),
    }
    library: str | None = hosts.library_of(model)
    surgery: SurgeryPlan | None = getattr(model, "surgery", None)
    if surgery is not None and (surgery.source is None or surgery.source.library == hosts.OWN):
        library = None  # a user's own class, though it may derive from one of timm's
    named = class_arguments(model, classes) if classes and library is not None else {}
    # transformers keeps what it wants done to images in a file of its own, which is not the model's to write.
    overlay = {**_data_config(model, prep), **named.pop("pretrained_cfg_overlay", {})} if library == "timm" else {}
    if surgery is not None:
        # What was measured about the conversion is no longer true of other weights.
        if outcome.kept != "start":
            surgery = replace(surgery, fidelity=None, trained=_sentence(outcome, judged_on))
        if library not in ("timm", "transformers") and classes:
            surgery = replace(surgery, classes=classes)
        model.surgery = surgery  # type: ignore[assignment]
        earlier = surgery.source.arguments.get("pretrained_cfg_overlay", {}) if surgery.source is not None else {}
        save(model, out, model_args={**named, "pretrained_cfg_overlay": {**earlier, **overlay}} if overlay else named)
    elif library == "timm":
        model.pretrained_cfg = {**_config_of(model), **overlay}  # type: ignore[assignment]
        write_as_timm(model, hosts.outline(model, recipe.model.args).arguments, out)
    else:
        if named:
            config: Any = model.config
            config.id2label, config.label2id = dict(enumerate(classes)), named["label2id"]
        model.save_pretrained(out)  # type: ignore[operator]
    _write_record(out, record)


def _config_of(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(config)


def _data_config(model: nn.Module, prep: Preprocessing) -> dict[str, Any]:
    """What timm has to know about images from now on, where the recipe changed it."""
    own = preprocessing(model)
    names = ("mean", "std", "crop_pct", "interpolation")
    changed: dict[str, Any] = {}
    for name in names:
        value = getattr(prep, name)
        if value != getattr(own, name):
            # As JSON has it.
            changed[name] = list(value) if isinstance(value, tuple) else value
    return changed


def _sentence(outcome: Outcome, judged_on: str) -> str:
    """What the model card says about training."""
    scores = ", ".join(f"{name} {value:.4g}" for name, value in outcome.end.items())
    which = "the moving average of the weights" if outcome.average else "the weights"
    return (
        f"Trained for {outcome.steps:,} steps ({outcome.images:,} images); kept: {which} of "
        f"{'the last step' if outcome.kept == 'last' else outcome.kept}. On {judged_on}: {scores}."
    )
