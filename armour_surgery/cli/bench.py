"""`armour-surgery bench MODEL --vs MODEL`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from armour_surgery.cli.options import (
    AsJson,
    Example,
    Into,
    Model,
    OtherCheckpoint,
    OtherImgSize,
    OtherNumClasses,
    own_models,
)
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, console_for, print_json

if TYPE_CHECKING:
    from torch import nn

    from armour_surgery.benchmarking.results import Benchmark
    from armour_surgery.saving.any_model import Asked, OwnModels

__all__ = ["bench"]


@command
def bench(
    model: Model,
    vs: Annotated[
        list[str] | None,
        typer.Option("--vs", metavar="MODEL", help="Hold this one against MODEL; any number.", show_default=False),
    ] = None,
    into: Into = None,
    example: Example = None,
    checkpoint: OtherCheckpoint = None,
    img_size: OtherImgSize = None,
    num_classes: OtherNumClasses = None,
    device: Annotated[str, typer.Option(metavar="D", help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="T", help="fp32, bf16 or fp16, for weights and inputs.")] = "fp32",
    batch_size: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Images at once; any number of sizes. One image alone is always timed too. Default: 16.",
            show_default=False,
        ),
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile every model.")] = False,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="RUNTIME", help="What runs them: torch, compile (as --compile), onnx (ONNX Runtime) or openvino."
        ),
    ] = "torch",
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Make every model ready for inference first (BatchNorm folded, ...).")
    ] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Also show in which operators the time goes.")] = False,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=2, help="Rounds at each batch size, at most; an even number.")
    ] = 300,
    budget: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the rounds at each batch size.")] = 40.0,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads inside an operator.", show_default=False)
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Write it too: .json, .csv, .md, or speed-ups with intervals as .png, .svg, .pdf; any number.",
            show_default=False,
        ),
    ] = None,
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained/--no-pretrained", help="Load pretrained weights; they do not change the speed."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Time MODEL and others in turns: throughput, latency, memory, and whether they differ by more than noise.

    MODEL and --vs may be folders saved by this tool. All models get the same treatment; MODEL is also timed against a
    copy of itself, which shows what noise alone does on this machine.
    """
    console = console_for(as_json)
    with console.status("loading PyTorch"):
        from armour_surgery.benchmarking.benchmark import benchmark
        from armour_surgery.benchmarking.files import check_speed_file, write_speed_file
        from armour_surgery.exporting.packages import require

    # Before the work, whose numbers would be lost.
    require(runtime)
    for path in out or ():
        check_speed_file(path)
    with console.status("building the models"):
        from armour_surgery.saving.any_model import Asked

        asked = Asked(checkpoint, img_size, num_classes)
        models = _load([model, *(vs or ())], pretrained, asked, own_models(into, example))
    with progress_bar(console, "counting", still=True) as tell:
        measured = benchmark(
            models,
            batch_sizes=batch_size or (16,),
            device=device,
            dtype=dtype,
            compile=compile,
            runtime=runtime,
            deploy=deploy,
            profile=profile,
            rounds=rounds,
            budget_s=budget,
            threads=threads,
            # This process ends with the command, and nobody else uses its models.
            keep_freed_memory=True,
            inplace=True,
            progress=tell,
        )
    for path in out or ():
        write_speed_file(path, measured)
    if as_json:
        print_json(measured.to_dict())
        return
    _tell(console, measured)
    for path in out or ():
        console.print(f"Written: {path}", markup=False, soft_wrap=True)


def _load(names: Sequence[str], pretrained: bool, asked: "Asked", own: "OwnModels") -> "dict[str, nn.Module]":
    """The models by name; one that is named again gets a number."""
    from armour_surgery.saving.any_model import load_any, shared_out

    models: dict[str, nn.Module] = {}
    for name, share in zip(names, shared_out(names, asked), strict=True):
        label, number = name, 1
        while label in models:
            number += 1
            label = f"{name} ({number})"
        models[label], _ = load_any(name, pretrained=pretrained, asked=share, own=own)
    return models


def _tell(console: Console, benchmark: "Benchmark") -> None:
    from armour_surgery.cli.bench_tables import environment_line, model_table, pair_table, profile_table, size_table

    console.print(environment_line(benchmark), markup=False, style="dim")
    console.print(size_table(benchmark))
    console.print(model_table(benchmark))
    console.print(pair_table(benchmark))
    if len(benchmark.costs) > 1:
        console.print(
            "A difference is called where its interval leaves out 1 and it is larger than what MODEL shows against a "
            "copy of itself.",
            style="dim",
        )
    if benchmark.profiles:
        console.print(profile_table(benchmark.profiles))
        console.print("The profiler takes time at every call, which this table counts too.", style="dim")
