"""`armour-surgery finetune MODEL --recipe NAME`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armour_surgery.cli.options import AsJson, Checkpoint, ClassMap, Example, Into, Model, name_for_folder, own_models
from armour_surgery.cli.run import command, console_of_first_rank, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from armour_surgery.recover.finetuning import Finetuned
    from armour_surgery.recover.recipe import Recipe

__all__ = ["finetune"]


@command
def finetune(
    model: Model,
    recipe: Annotated[
        str,
        typer.Option(metavar="NAME|FILE", help="A shipped recipe (see recipes ls) or a YAML file.", show_default=False),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="A folder of images (train/ and val/ by class; any layout where no labels are needed), a folder with "
            "Fashion-MNIST's files, digits, synthetic, or a timm dataset PREFIX/NAME:FOLDER. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Default: the recipe's, or the model that MODEL was converted from.",
            show_default=False,
        ),
    ] = None,
    teacher_checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--teacher-checkpoint",
            metavar="FILE",
            help="The teacher's weights. Default: where MODEL was converted from a file, that one. The original has to "
            "have the weights that it was converted with; another teacher is taken if --teacher names it.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    img_size: Annotated[
        int | None,
        typer.Option(
            "--img-size",
            metavar="N",
            help="Input height and width of MODEL, and of a teacher that --teacher names, where they are no saved "
            "folders.",
        ),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option(
            "--num-classes",
            metavar="N",
            help="Classes of MODEL, and of a teacher that --teacher names, where they are no saved folders; 0: no "
            "head.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: optimizer.lr=1e-4.", show_default=False),
    ] = None,
    class_map: ClassMap = None,
    into: Into = None,
    example: Example = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: NAME-RECIPE.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train MODEL by a recipe: recover a converted model, distil it, or train it from scratch. Runs under torchrun."""
    from armour_surgery.recover.recipe_files import load_recipe

    chosen = load_recipe(recipe, settings or ())
    target = out if out is not None else Path(f"{name_for_folder(model)}-{Path(recipe).stem}")
    started = time.perf_counter()
    console = console_of_first_rank(as_json)
    with console.status("loading PyTorch"):
        from armour_surgery.recover.distributed import distributed
        from armour_surgery.recover.finetuning import finetune as run
        from armour_surgery.saving.any_model import Asked
    _announce(console, chosen, recipe, target)
    with distributed(chosen.run.device) as process, _Display(console) as display:
        done = run(
            model,
            chosen,
            target,
            process,
            data=data,
            asked=Asked(checkpoint, img_size, num_classes),
            teacher=teacher,
            teacher_checkpoint=teacher_checkpoint,
            class_map=class_map,
            resume=resume,
            own=own_models(into, example),
            watch=display.update,
        )
    # JSON does not go through the console.
    if console.quiet:
        return
    document = _document(model, recipe, chosen, done, time.perf_counter() - started)
    if as_json:
        print_json(document)
    else:
        _tell(console, done)


def _announce(console: "Console", chosen: "Recipe", name: str, target: Path) -> None:
    base, effective = chosen.optimizer.lr, chosen.effective_lr
    rule = f" (for 512 images, times {chosen.data.batch_size}/512)" if chosen.optimizer.lr_rule == "deit" else ""
    console.print(f"recipe {name}, into {target}", markup=False, soft_wrap=True)
    console.print(
        f"learning rate {base:g}{rule}, effective {effective:g}; {chosen.data.batch_size} images a step", markup=False
    )


class _Display:
    """A progress bar with images per second and the time that is left; on no terminal, a line per epoch.

    Not the bar of other commands: that one starts anew when its text changes, and here the text tells the loss.
    """

    def __init__(self, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            # Where nobody watches, a bar would only leave empty lines.
            disable=not console.is_terminal or console.quiet,
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, values: Mapping[str, Any]) -> None:
        """Show what the trainer tells."""
        if "epoch" in values:
            scores = values.keys() - {"epoch", "epochs", "step", "steps"}
            text = ", ".join(f"{name} {values[name]:.4g}" for name in values if name in scores)
            self._console.print(f"epoch {values['epoch']}/{values['epochs']}: {text}", markup=False, soft_wrap=True)
            return
        if self._task is None:
            # Not made before: a run that is resumed does not begin with step 0, and only a message says with which.
            self._task = self._progress.add_task("", total=values["steps"], completed=values["step"])
        text = f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s"
        self._progress.update(self._task, completed=values["step"], description=text)


def _document(model: str, name: str, chosen: "Recipe", done: "Finetuned", seconds: float) -> dict[str, Any]:
    outcome = done.outcome
    return {
        "model": model,
        "recipe": name,
        "out": str(done.folder),
        "lr": {"base": chosen.optimizer.lr, "effective": chosen.effective_lr},
        "steps": outcome.steps,
        "epochs": outcome.epochs,
        "kept": outcome.kept,
        "average": outcome.average,
        "judged_on": done.judged_on,
        "teacher": done.teacher,
        "classes": done.order.way if done.order is not None else None,
        "start": outcome.start,
        "end": outcome.end,
        "images": outcome.images,
        "images_per_s": round(outcome.images / outcome.seconds, 2) if outcome.seconds else None,
        "unreadable": outcome.broken,
        "seconds": round(seconds, 3),
    }


def _tell(console: "Console", done: "Finetuned") -> None:
    outcome = done.outcome
    for name, value in outcome.end.items():
        before = f"{outcome.start[name]:.5g} -> " if name in outcome.start else ""
        console.print(f"  {name}: {before}{value:.5g}", markup=False)
    console.print(f"  (on {done.judged_on})", markup=False, soft_wrap=True)
    if done.teacher is not None:
        console.print(f"  (taught by {done.teacher})", markup=False, soft_wrap=True)
    if outcome.kept == "start":
        console.print("No step was better than the start, so the weights are what they were.")
    elif outcome.kept != "last":
        which = "the moving average at " if outcome.average else ""
        console.print(f"Kept: {which}{outcome.kept} of {outcome.steps}.")
    if outcome.broken:
        console.print(
            f"{len(outcome.broken)} images could not be read, and others were taken; the first: "
            f"{next(iter(outcome.broken))}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"Saved to {done.folder}", markup=False, soft_wrap=True)
