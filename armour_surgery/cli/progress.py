"""One progress bar for what a long command does, stage after stage."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from armour_surgery.records import Progress as Tell

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(console: Console, first: str, *, still: bool = False) -> Iterator[Tell]:
    """A bar that starts as `first` and is moved by calling `tell(what, finished, total)`.

    `still`: it is drawn at these calls only, and no thread takes time from what is being measured.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    # Where nobody watches, a bar would only leave empty lines.
    disable = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable, auto_refresh=not still) as progress:
        task = progress.add_task(first, total=None)
        # A list, because a closure cannot bind a name of its surroundings anew without saying so.
        stage = [first]

        def tell(what: str, finished: int, total: int) -> None:
            if what != stage[0]:
                # Anew, so that the time that is left follows from this stage alone.
                stage[0] = what
                progress.reset(task, description=what, total=total)
            progress.update(task, completed=finished, total=total, refresh=still)

        yield tell
