"""`armour-surgery coverage`: how much of the installed libraries can be converted, and whether that is exact."""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armour_surgery.cli.options import AsJson, MarkdownPage, check_page, page_option
from armour_surgery.cli.progress import progress_bar
from armour_surgery.cli.run import command, console_for, print_json
from armour_surgery.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from armour_surgery.coverage.summary import Coverage

__all__ = ["coverage"]

_LIBRARIES = ("timm", "transformers", "torchvision")
# Architectures that a terminal shows one by one.
_SHOWN = 60
_TIMEOUT = 120.0


@command
def coverage(
    library: Annotated[
        list[str] | None,
        typer.Option(
            metavar="timm|transformers|torchvision", help="May be repeated. Default: all three.", show_default=False
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Only N architectures of each, drawn by --seed.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Which ones --sample draws.")] = 0,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Processes to work in.")] = 1,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="Give an architecture up after this time.")
    ] = _TIMEOUT,
    markdown: MarkdownPage = None,
    as_json: AsJson = False,
) -> None:
    """Find and convert the attention of every architecture that the installed libraries have.

    Needs no network and no weights: architectures are built without any, and one attention module of each kind gets
    random ones, to see that nothing changes where nothing may.
    """
    console = console_for(as_json)
    for unknown in set(library or ()) - set(_LIBRARIES):
        raise UsageError(f"--library {unknown!r} is unknown; choose one of {', '.join(_LIBRARIES)}")
    check_page(markdown)
    with console.status("reading the libraries"):
        from armour_surgery.coverage.summary import Coverage
        from armour_surgery.coverage.survey import survey
        from armour_surgery.hosts.catalog import architectures, skeleton

        chosen = [name for name in _LIBRARIES if not library or name in library]
        names: list[tuple[str, str]] = []
        for each in chosen:
            names += [(each, name) for name in _drawn(architectures(each), sample, seed)]  # type: ignore[arg-type]
    with progress_bar(console, "architectures") as tell:
        outcomes = survey(
            names, skeleton, jobs=jobs, timeout=timeout, progress=lambda _, *done: tell("architectures", *done)
        )
    result = Coverage.of(outcomes)
    if markdown is not None:
        from armour_surgery.coverage.views import page
        from armour_surgery.report.whole_file import write_whole

        text = page(result, _command_line(library, sample, seed, jobs, timeout, markdown), "What converts")
        write_whole(markdown, text.encode(), "page")
    if as_json:
        print_json(result.to_dict())
        return
    _show(console, result)
    if markdown is not None:
        console.print(f"Written: {markdown}", markup=False, soft_wrap=True)


def _drawn(names: list[str], sample: int | None, seed: int) -> list[str]:
    if sample is None or sample >= len(names):
        return names
    return sorted(random.Random(seed).sample(names, sample))


def _command_line(
    library: list[str] | None, sample: int | None, seed: int, jobs: int, timeout: float, markdown: Path
) -> str:
    """The command that makes the same page, for whoever reads the page; without options that are as by default."""
    words = ["armour-surgery coverage"]
    words += [f"--library {name}" for name in library or ()]
    if sample is not None:
        words.append(f"--sample {sample} --seed {seed}")
    if jobs != 1:
        words.append(f"--jobs {jobs}")
    if timeout != _TIMEOUT:
        words.append(f"--timeout {timeout:g}")
    words.append(page_option(markdown))
    return " ".join(words)


def _show(console: "Console", result: "Coverage") -> None:
    from armour_surgery.cli.tables import Shown
    from armour_surgery.coverage import views

    for library, outcomes in result.outcomes.items():
        few = sum(outcome.attention for outcome in outcomes) <= _SHOWN
        for view in (views.class_table(result, library), views.architecture_table(result, library, all_of_them=few)):
            if view.rows:
                console.print(Shown(view))
        for reason, number in result.count(library).refused.items():
            console.print(f"  {number} left as they are: {reason}", style="dim", markup=False)
        for line in views.failures(result, library):
            console.print(f"  {line}", style="red", markup=False)
    console.print(Shown(views.library_table(result)))
