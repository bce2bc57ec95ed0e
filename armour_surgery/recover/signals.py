"""SIGTERM and Ctrl-C while a model trains: noted, and acted on between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["noted_signals"]


@contextmanager
def noted_signals() -> Iterator[list[str]]:
    """Inside, SIGTERM and SIGINT add their names to the list and do nothing else; a second Ctrl-C interrupts."""
    came: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread gets signals, and may say what is done with them.
        yield came
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
