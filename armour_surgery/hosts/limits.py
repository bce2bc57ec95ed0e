"""What building a host from a folder may cost: never much more than the weights that come with it.

The sizes in a folder are whatever somebody wrote there, and a host makes its tables (N x N numbers for N tokens), its
thousands of blocks and its lists of labels before anything can be compared with the weights.
"""

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from armour_surgery.errors import SchemaError
from armour_surgery.hosts.untrusted import entries

__all__ = ["Limits"]


class _OutOfTime(BaseException):
    """Raised inside of a thread that takes too long; no `except Exception` of a library may keep it."""


@dataclass(frozen=True)
class Limits:
    """What a model may cost whose file holds so many `numbers` in so many `tensors`.

    A host has more parameters than the file, where a surgery took some of them, and makes tables and intermediate
    results. The limits leave room for several times what any host of the libraries was seen to need.
    """

    numbers: int
    tensors: int

    @property
    def bytes_made(self) -> int:
        """Memory of all tensors that a builder makes with real numbers, those that it drops again included."""
        return 4 * 2**30 + 96 * self.numbers

    @property
    def tensors_made(self) -> int:
        """How many tensors a builder makes: one for each parameter, and a few dozen for a table."""
        return 1_000 + 16 * self.tensors

    @property
    def number(self) -> int:
        """The largest number among the arguments: one that counts rows of a weight needs at least so many numbers."""
        return max(2**21, self.numbers // 8)

    @property
    def seconds(self) -> float:
        """Processor time for building a host and doing the surgery again."""
        return 20 + 0.1 * self.tensors

    @property
    def entries(self) -> int:
        """The longest list among the arguments that has an entry for each layer or so; names of labels are others."""
        return max(1000, self.tensors)

    def check_arguments(self, architecture: str, arguments: Mapping[str, Any]) -> None:
        """Refuse sizes that Python itself would count up to.

        Raises:
            SchemaError: a number or a list in the arguments is larger than the weights leave room for.
        """
        for key, value in entries(arguments):
            if isinstance(value, list) and len(value) > self.entries and not all(isinstance(v, str) for v in value):
                raise SchemaError(
                    f"arguments of {architecture} set {key!r} to a list of {len(value)}, and a model with "
                    f"{self.tensors} tensors has none above {self.entries}"
                )
            if isinstance(value, int) and abs(value) > self.number:
                raise SchemaError(
                    f"arguments of {architecture} set {key!r} to {str(value)[:40]}, and no size of a model with "
                    f"{self.numbers} weights is above {self.number}"
                )

    def builds(self) -> TorchDispatchMode:
        """A context in which making more or larger tensors than these limits raises a SchemaError before it happens.

        It holds for the thread that enters it.
        """
        return _Metered(self)

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """A context that is left with a SchemaError when this thread has computed for too long in it.

        Libraries fill tables in loops of Python too, where no tensor is made for minutes.
        """
        thread, done, deciding = threading.get_ident(), threading.Event(), threading.Lock()
        spent = _processor_time(thread)
        end = spent() + self.seconds

        def watch() -> None:
            while not done.wait(0.1):
                if spent() > end:
                    with deciding:
                        if not done.is_set():
                            raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                            raise_in(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime))
                    return

        watcher = threading.Thread(target=watch, name="armour-surgery-limits", daemon=True)
        watcher.start()
        try:
            try:
                yield
            finally:
                # Either the watcher has raised by now, or it never will.
                with deciding:
                    done.set()
        except _OutOfTime:
            raise SchemaError(
                f"building it took more than {self.seconds:.0f} s of processor time, which a model with "
                f"{self.tensors} tensors does not need"
            ) from None
        finally:
            watcher.join()


def _processor_time(thread: int) -> Callable[[], float]:
    """A clock of what a thread has computed, whatever else runs; where there is none, of the time that passes."""
    if hasattr(time, "pthread_getcpuclockid"):
        return functools.partial(time.clock_gettime, time.pthread_getcpuclockid(thread))
    return time.monotonic


class _Metered(TorchDispatchMode):
    """Charge every new tensor to the limits before it is made."""

    def __init__(self, limits: Limits) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limits = limits
        self.bytes_made = self.tensors_made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _makes_tensors(func):
            self._charge(func, args, kwargs)
        return func(*args, **kwargs)

    def _charge(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device = kwargs.get("device")
        if (device is not None and torch.device(device).type == "meta") or (
            device is None and given and all(tensor.is_meta for tensor in given)
        ):
            return  # such tensors have no memory
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs))
        if _takes_device(func):
            kwargs = {**kwargs, "device": torch.device("meta")}
        try:
            made = tree_leaves(func(*args, **kwargs))
        except (NotImplementedError, RuntimeError):
            return  # its shape depends on values, so that it is no larger than what it was given; or it fails
        for tensor in made:
            self.bytes_made += tensor.numel() * tensor.element_size()
            self.tensors_made += 1
        limits = self.limits
        if self.bytes_made > limits.bytes_made:
            raise SchemaError(
                f"it would take {self.bytes_made / 2**30:.0f} GiB of memory before its weights are read, and its "
                f"weights are {limits.numbers} numbers"
            )
        if self.tensors_made > limits.tensors_made:
            raise SchemaError(
                f"it has more than {limits.tensors_made} parameters and tables, and its weights are {limits.tensors} "
                "tensors"
            )


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


@functools.cache
def _makes_tensors(func: Any) -> bool:
    """Whether an operator returns memory of its own, and not that of its arguments."""
    returns = func._schema.returns
    return any(value.alias_info is None and "Tensor" in str(value.type) for value in returns)


@functools.cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)
