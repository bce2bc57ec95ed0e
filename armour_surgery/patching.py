"""Changing what torch and the hosts' libraries do: for a moment, for one thread, and one surgery at a time."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["one_at_a_time", "patched"]

# Of two patches that overlap in time, the one that is undone last would put the other one back for good. Reentrant,
# since what runs under a patch may need another one.
_lock = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """While open, no other thread is in here or holds a patch."""
    with _lock:
        yield


@contextmanager
def patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """While open, `owner.name` is the replacement, for this thread alone; others get what stood there before."""
    with _lock:
        before = getattr(owner, name)
        stored = vars(owner).get(name, before)  # of a static method, not what it hands out
        thread = threading.get_ident()

        @functools.wraps(before)
        def confined(*args: Any, **kwargs: Any) -> Any:
            function = replacement if threading.get_ident() == thread else before
            return function(*args, **kwargs)

        setattr(owner, name, confined)
        try:
            yield
        finally:
            setattr(owner, name, stored)
