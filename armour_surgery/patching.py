"""Changing what torch and the hosts' libraries do: for a moment, for one thread, and one surgery at a time."""

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import _len_torch_function_stack
from torch.overrides import _pop_mode_temporarily
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["as_users_draw", "on_cpu_by_default", "one_at_a_time", "outside_of_modes", "patched"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

_users_device: ContextVar[torch.device | None] = ContextVar("users_device", default=None)

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


@contextmanager
def outside_of_modes() -> Iterator[None]:
    """While open, no mode of torch is at work: what runs here is no part of what somebody exports or counts around it.

    A default device is such a mode too.
    """
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        for _ in range(_len_torch_function_stack()):
            stack.enter_context(_pop_mode_temporarily())
        yield


def on_cpu_by_default(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """The function as it runs where nobody set a default device: what it makes without naming one is on the CPU.

    With `torch.set_default_device("cuda")` or under `with torch.device("meta")` channel numbers would be made there.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        device = torch.get_default_device()
        if device.type == "cpu":  # also when one of these functions calls another
            return function(*args, **kwargs)
        token = _users_device.set(device)
        try:
            with torch.device("cpu"):
                return function(*args, **kwargs)
        finally:
            _users_device.reset(token)

    return run


def as_users_draw(items: Iterable[_Item]) -> Iterable[_Item]:
    """What a user's iterable gives, drawn with the user's own default device, as its samplers may need."""
    device = _users_device.get()
    return items if device is None else _drawn_on(device, items)


def _drawn_on(device: torch.device, items: Iterable[_Item]) -> Iterator[_Item]:
    # Not open across a yield: the caller's steps between two items are not the user's.
    with torch.device(device):
        iterator = iter(items)
    while True:
        with torch.device(device):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
