"""`armour-surgery convert MODEL`."""

import glob
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from armour_surgery.cli.converted import document_of, tell, warn_of_unmeasured
from armour_surgery.cli.options import (
    AsJson,
    Checkpoint,
    Device,
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
from armour_surgery.cli.run import command, command_line, console_of_first_rank, print_json
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
    device: Device = "auto",
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
    console = console_of_first_rank(as_json)
    calibrated = init == "calibrated"
    if console.quiet and (dry_run or not calibrated):
        return  # torchrun's first process does it
    with console.status("loading the model"):
        from armour_surgery import convert as convert_model
        from armour_surgery import plan as plan_conversion
        from armour_surgery.copies import full_copy
        from armour_surgery.recover.distributed import distributed, share_weights
        from armour_surgery.saving.folder import save_conversion
        from armour_surgery.saving.occupied import check_replaceable
        from armour_surgery.surgery.order import check_options
        from armour_surgery.surgery.parts import plan_of_whole
        from armour_surgery.surgery.perform import keep_plan, surgery_of

        if bench is not None and (report is None or dry_run):
            raise UsageError("--bench is for the page that --report writes, of a model that is converted; add --report")
        channels = _rank(rank)
        place = None if device == "auto" else device
        check_options(mode, init, calib, channels, reconstruct, max_loss, params, mlp, gauge=gauge, device=place)
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
        asked = {
            "--max-loss": max_loss is not None,
            "--params": params is not None,
            "--mlp": mlp,
            "--rank auto": channels == "auto",
        }
        warn_of_unmeasured([option for option, given in asked.items() if given])
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
        # What uses no images is done by one process.
        together = distributed(device, option="--device") if calibrated else nullcontext()
        with together as process, progress_bar(console, "rewriting attention") as progress:
            if process is not None:
                share_weights(host)
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
                device=None if process is None else process.device,
                distributed=process is not None and process.world > 1,
                progress=progress,
                **options,
            )
        if console.quiet:
            return
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
        print_json(document_of(model, surgery, target, time.perf_counter() - started))
        return
    tell(console, model, kind, surgery, target)
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
