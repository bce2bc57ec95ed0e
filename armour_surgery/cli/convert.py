"""`armour-surgery convert MODEL`."""

import glob
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from armour_surgery.cli.options import (
    AsJson,
    Checkpoint,
    Example,
    ImgSize,
    InChans,
    Model,
    ModelKwargs,
    NumClasses,
    Pretrained,
    Submodule,
    name_for_folder,
    read_model,
    read_part,
)
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, command_line, console_for, print_json
from armour_surgery.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from armour_surgery.records import SurgeryPlan
    from armour_surgery.report.page import Making
    from armour_surgery.tabular import Table

__all__ = ["convert"]


@command
def convert(
    context: typer.Context,
    model: Model,
    mode: Annotated[
        str,
        typer.Option(
            help="auto (the first that fits of qv, concat-half and kv), qv, qk, qk-diag, kv, concat-half, concat-full, "
            "concat-key, grouped-shuffled, or grouped.",
            metavar="MODE",
        ),
    ] = "auto",
    init: Annotated[
        str,
        typer.Option(
            help="How the shared weight is chosen: wq, wq-refit, joint-svd, or calibrated (needs no training).",
            metavar="INIT",
        ),
    ] = "wq",
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGES",
            help="Images for calibrated: a folder, a timm dataset, synthetic, or several joined by commas.",
            show_default="synthetic",
        ),
    ] = None,
    calib_images: Annotated[int, typer.Option(metavar="N", min=8, help="How many calibration images to use.")] = 256,
    reconstruct: Annotated[
        int,
        typer.Option(
            metavar="STEPS", min=0, help="With calibrated: then so many steps by gradient, every block for itself."
        ),
    ] = 0,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="With calibrated: convert the sites that fit this loss (1 - cosine of the final features).",
            show_default="all sites",
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="With calibrated, instead: the best model with so many parameters at most, such as 18M, or -15%.",
            show_default=False,
        ),
    ] = None,
    mlp: Annotated[
        bool,
        typer.Option("--mlp", help="With --max-loss or --params: also let MLPs have fewer hidden channels."),
    ] = False,
    rank: Annotated[
        str | None,
        typer.Option(
            metavar="R",
            help="Channels of Q, K and V per head, fewer than it has (qv and kv; multiples of 8 run best), or auto.",
            show_default="all",
        ),
    ] = None,
    gauge: Annotated[
        str,
        typer.Option(
            metavar="GAUGE",
            help="keep, or fixed: the basis that a conversion leaves open is chosen so that fewer weights are stored.",
        ),
    ] = "keep",
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Convert only sites that match, such as 'blocks.0*'."),
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Leave sites that match alone.")] = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    img_size: ImgSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    submodule: Submodule = None,
    example: Example = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: NAME-armour-MODE.", show_default=False),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace what is in DIR already; an earlier conversion of the same model is replaced without it.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page about the conversion.", show_default=False),
    ] = None,
    bench: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            min=1.0,
            help="With --report: time the model against its original, so long at each batch size, and show that too.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Rewrite MODEL's attention and save the result to a folder that `armour_surgery.load` reads."""
    started = time.perf_counter()
    console = console_for(as_json)
    with console.status("loading the model"):
        from armour_surgery import convert as convert_model
        from armour_surgery import plan as plan_conversion
        from armour_surgery.copies import full_copy
        from armour_surgery.saving.folder import save_conversion
        from armour_surgery.saving.occupied import check_replaceable
        from armour_surgery.surgery.order import check_options
        from armour_surgery.surgery.parts import plan_of_whole
        from armour_surgery.surgery.perform import keep_plan, surgery_of

        if bench is not None and (report is None or dry_run):
            raise UsageError("--bench is for the page that --report writes, of a model that is converted; add --report")
        channels = _rank(rank)
        check_options(mode, init, calib, channels, reconstruct, max_loss, params, mlp, gauge=gauge)
        if out is not None and not dry_run:
            check_replaceable(out, force=force)
        if report is not None:
            # Only who draws waits for matplotlib.
            from armour_surgery.report.page import check_report, html_report, write_html

            check_report(report)
        # A plan needs no weights, so none are downloaded for one.
        given = None if submodule is not None else example
        whole, source = read_model(
            model, pretrained and not dry_run, checkpoint, img_size, num_classes, in_chans, model_kwargs, given
        )
        host = whole if submodule is None else read_part(whole, submodule, example)
    kind = type(whole).__name__
    speed: Table | None = None
    options: dict[str, Any] = {
        "init": init,
        "gauge": gauge,
        "include": _below(submodule, include),
        "exclude": _below(submodule, exclude),
        "source": source,
    }

    def planned() -> "SurgeryPlan":
        with console.status("planning"):
            return plan_conversion(host, mode, rank=None if channels == "auto" else channels, **options)

    if dry_run:
        surgery = planned()
        if submodule is not None:
            surgery = plan_of_whole(whole, {submodule: surgery}, source)
        target = None
    else:
        # Before the work, which may take long. Only where a folder could be in its way is its name worth a plan.
        if out is not None:
            check_replaceable(out, source, force=force)
        elif any(Path().glob(f"{glob.escape(name_for_folder(model))}-armour-*")):
            check_replaceable(_default_name(model, planned()), source, force=force)
        # The host itself is converted, and nothing would be left to time it against.
        original = full_copy(host) if bench is not None else None
        with progress_bar(console, "rewriting attention") as tell:
            converted = convert_model(
                host,
                mode,
                inplace=True,
                calibration=calib,
                calibration_images=calib_images,
                reconstruct=reconstruct,
                max_loss=max_loss,
                params=params,
                mlp=mlp,
                rank=channels,
                progress=tell,
                **options,
            )
        surgery = surgery_of(converted)
        if submodule is not None:
            surgery = plan_of_whole(whole, {submodule: surgery}, source)
            del converted.surgery
            keep_plan(whole, surgery)
        target = out if out is not None else Path(_default_name(model, surgery))
        with console.status("saving"):
            save_conversion(whole, target, force=force)
        if original is not None and bench is not None:
            speed = _speed(console, original, converted, bench)
    if report is not None:
        made = _making(context)
        folder = str(target) if target is not None else None
        write_html(report, html_report(surgery, model, surgery.sensitivities, surgery.frontier, folder, made, speed))
    if as_json:
        print_json(_document(model, surgery, target, time.perf_counter() - started))
        return
    _tell(console, model, kind, surgery, target)
    if report is not None:
        console.print(f"What was done and measured: {report}", markup=False, soft_wrap=True)


def _speed(console: "Console", original: "nn.Module", converted: "nn.Module", seconds: float) -> "Table":
    """The model beside its original, both in turns on this machine."""
    from armour_surgery.benchmarking.benchmark import benchmark

    with progress_bar(console, "timing", still=True) as tell:
        models = {"original": original, "converted": converted}
        measured = benchmark(models, budget_s=seconds, keep_freed_memory=True, progress=tell)
    return measured.table()


def _making(context: typer.Context) -> "Making":
    import platform

    from armour_surgery.report.page import Making
    from armour_surgery.saving.document import installed_versions

    versions = {**installed_versions(), "Python": platform.python_version()}
    return Making(command_line(context), time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), versions)


def _rank(given: str | None) -> int | Literal["auto"] | None:
    """The number that --rank names, or "auto".

    Raises:
        UsageError: it is none.
    """
    if given is None:
        return None
    if given == "auto":
        return "auto"
    if not given.isascii() or not given.isdigit():
        raise UsageError(f"--rank {given!r} is neither auto nor a whole number from 1 to key_dim; 48, say")
    return int(given)


def _below(submodule: str | None, patterns: list[str] | None) -> list[str] | None:
    """Patterns of site names as `inspect` shows them, in the names that the submodule's sites have in it."""
    if submodule is None or patterns is None:
        return patterns
    return [pattern.removeprefix(f"{submodule}.") for pattern in patterns]


def _default_name(model: str, surgery: "SurgeryPlan") -> str:
    """`NAME-armour-MODE`, with the mode that `auto` chose where it chose one."""
    modes = {site.mode for site in surgery.sites}
    mode = modes.pop() if len(modes) == 1 else surgery.mode
    return f"{name_for_folder(model)}-armour-{mode}"


def _document(model: str, surgery: "SurgeryPlan", target: Path | None, seconds: float) -> dict[str, Any]:
    sites = []
    for site in surgery.sites:
        fixed = asdict(site.gauge) if site.gauge is not None else None
        sites.append({"fqn": site.fqn, "mode": site.mode, "rank": site.rank, "residual": site.residual, "gauge": fixed})
    frontier = []
    for point in surgery.frontier:
        choice = {"params": point.params, "predicted": point.predicted, "measured": point.measured}
        frontier.append({**choice, "sites": len(point.sites)})
    return {
        "model": model,
        "mode": surgery.mode,
        "init": surgery.init,
        "out": str(target) if target is not None else None,
        "params_before": surgery.params_before,
        "params_after": surgery.params_after,
        "macs_before": surgery.macs_before,
        "macs_after": surgery.macs_after,
        "sites": sites,
        "mlps": [asdict(mlp) for mlp in surgery.mlps],
        "refused": [asdict(refused) for refused in surgery.refused],
        "fidelity": asdict(surgery.fidelity) if surgery.fidelity is not None else None,
        "max_loss": surgery.max_loss,
        "params_goal": surgery.params_goal,
        "frontier": frontier,
        "seconds": round(seconds, 3),
    }


def _tell(console: "Console", model: str, kind: str, surgery: "SurgeryPlan", target: Path | None) -> None:
    from rich.markup import escape

    from armour_surgery.cli.tables import cost_table, fidelity_lines, frontier_table
    from armour_surgery.saving.model_card import how_to_load
    from armour_surgery.views import gauge_lines, refused_lines

    verb = "converted" if target is not None else "would be converted"
    total = len(surgery.sites) + len(surgery.refused)
    narrower = f", {len(surgery.mlps)} MLPs narrowed" if surgery.mlps else ""
    console.print(
        f"[bold]{escape(model)}[/bold] ({kind}): {len(surgery.sites)} of {total} attention sites {verb}{narrower}"
    )
    console.print(cost_table(surgery))
    for line in gauge_lines(surgery):
        console.print(f"  {line}", style="dim", markup=False)
    for line in refused_lines(surgery.refused):
        console.print(f"  left alone: {line}", style="dim", markup=False)
    if surgery.frontier:
        console.print(frontier_table(surgery.frontier, surgery.params_before, surgery.chosen(surgery.frontier)))
    if target is None:
        console.print("Nothing was written (--dry-run).")
        return
    console.print(f"Saved to [bold]{escape(str(target))}[/bold]", soft_wrap=True)
    for line in fidelity_lines(surgery):
        console.print(line, markup=False)
    console.print(_advice(surgery), markup=False)
    for line in ("", *how_to_load(surgery.source, str(target)), ""):
        console.print(f"    {line}".rstrip(), markup=False, soft_wrap=True)


def _advice(surgery: "SurgeryPlan") -> str:
    """What the model is good for now, in a sentence or two."""
    from armour_surgery.report.wording import needs_training, verdict

    if surgery.fidelity is not None:
        return f"\n{verdict(surgery.fidelity)} No labels were used."
    if needs_training(surgery):
        return (
            "\nThis model needs training. Its projections now serve a purpose that they were not trained for (init "
            "wq), so its accuracy is near chance until it is fine-tuned: load it where your recipe creates the model, "
            "and train as you would the original (the paper: from scratch, same recipe, learning rate 1e-3). "
            "--init calibrated gives one that works without training."
        )
    return (
        f"\nIts weights were chosen without images (init {surgery.init}): better than wq, and still in need of "
        "training. --init calibrated gives a model that works without training."
    )
