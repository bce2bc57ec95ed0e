"""The globals of generated code as source: imports where a package has them, and the text of this tool's functions."""

import builtins
import importlib
import inspect
import math
from types import CodeType, FunctionType, ModuleType
from typing import Any

from armour_surgery.errors import ExportError

__all__ = ["Preamble", "names_in"]

_OURS = __name__.partition(".")[0]
# Where functions are found that do not say so, or say it of a private place.
_PLACES = ("torch", "torch.nn.functional", "operator", "math")


def names_in(code: CodeType) -> set[str]:
    """All names that code reads besides its own, those of functions inside it too."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= names_in(constant)
    return names


class Preamble:
    """Lines that give generated code its globals, each name once."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._known: dict[str, Any] = {}
        self.imports: list[str] = []
        self.definitions: list[str] = []

    def add(self, name: str, value: Any) -> None:
        """Make a name mean a value.

        Raises:
            ExportError: no source says what the value is, or the name means something else already.
        """
        if name in self._known:
            if self._known[name] is not value and self._known[name] != value:
                raise ExportError(f"{name} means two things in {self._what}; please report it")
            return
        if getattr(builtins, name, None) is value:
            return
        self._known[name] = value
        if isinstance(value, FunctionType) and value.__module__.partition(".")[0] == _OURS:
            self._define(value, name)
        elif isinstance(value, ModuleType):
            self.imports.append(f"import {value.__name__}" + ("" if value.__name__ == name else f" as {name}"))
        elif (place := _place_of(value)) is not None:
            module, _, attribute = place.rpartition(":")
            self.imports.append(f"from {module} import {attribute}" + ("" if attribute == name else f" as {name}"))
        else:
            self.definitions.append(f"{name} = {self._spelled(value)}")

    def _define(self, function: FunctionType, name: str) -> None:
        """A function of this tool: first what it reads, then its text."""
        for read in sorted(names_in(function.__code__)):
            if read in function.__globals__:
                self.add(read, function.__globals__[read])
        self.definitions.append(inspect.getsource(function).rstrip())
        if function.__name__ != name:
            self.definitions.append(f"{name} = {function.__name__}")

    def _spelled(self, value: Any) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        if value is type(None):
            return "type(None)"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._spelled(item)}, ' for item in value)})"
        if isinstance(value, type) and _place_of(value) is not None:
            self.add(value.__name__, value)
            return value.__name__
        raise ExportError(f"{self._what} needs {value!r}, which has no source; export to another format")


def _place_of(value: Any) -> str | None:
    """`module:name` by which a class or function can be imported, and is the same one."""
    name = getattr(value, "__name__", None)
    if not callable(value) or name is None:
        return None
    for module in (getattr(value, "__module__", None), *_PLACES):
        if module is None or module.partition(".")[0] == _OURS or module == builtins.__name__:
            continue
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            continue
        if found is value:
            return f"{module}:{name}"
    return None
