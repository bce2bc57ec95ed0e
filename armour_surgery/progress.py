"""What `progress=` may be, and the bar that `progress=True` shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from armour_surgery.errors import UsageError
from armour_surgery.records import Progress

__all__ = ["told"]


@contextmanager
def told(progress: Progress | bool | None) -> Iterator[Progress | None]:
    """What long work calls while this is open: for True a bar of tqdm, which goes when the work ends, however it ends.

    A callable is handed on as it is; None and False are silent.

    Raises:
        UsageError: it is neither.
    """
    if progress is True:
        bar = _Bar()
        try:
            yield bar.tell
        finally:
            bar.close()
    elif progress is None or progress is False:
        yield None
    elif callable(progress):
        yield progress
    else:
        raise UsageError(
            f"progress is {progress!r}; pass True for a bar, or a function that is called with what is being done, how "
            "much of it is done, and how much there is"
        )


class _Bar:
    """One bar for what is done, stage after stage; it appears when the first stage begins."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def tell(self, what: str, finished: int, total: int) -> None:
        """Show that so much of a stage is done."""
        if self._bar is None:
            self._bar = _quiet_tqdm()(total=total, desc=what, leave=False)
        elif what != self._stage:
            # Anew, so that the time that is left follows from this stage alone.
            self._bar.reset(total=total)
            self._bar.set_description(what)
        self._stage = what
        self._bar.total = total
        self._bar.update(finished - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def _quiet_tqdm() -> Any:
    """tqdm for a terminal or a notebook, without the thread that redraws bars and takes time from what is timed."""
    from tqdm.auto import tqdm

    return type("Bar", (tqdm,), {"monitor_interval": 0})
