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
def patched(
    owner: Any, name: str, replacement: Callable[..., Any], for_others: Callable[..., Any] | None = None
) -> Iterator[None]:
    """While open, `owner.name` is the replacement, for this thread alone.

    Other threads get `for_others`, by default what stood there before, which comes back in the end.
    """
    with _lock:
        before = getattr(owner, name)
        others = before if for_others is None else for_others
        thread = threading.get_ident()

        @functools.wraps(before)
        def confined(*args: Any, **kwargs: Any) -> Any:
            function = replacement if threading.get_ident() == thread else others
            return function(*args, **kwargs)

        setattr(owner, name, confined)
        try:
            yield
        finally:
            setattr(owner, name, before)
