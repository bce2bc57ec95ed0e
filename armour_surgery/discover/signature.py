"""How a module was called: which arguments are data, which are fixed, and under which conditions that holds."""

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.traced import Call, Signature

__all__ = ["bind"]

# A converted attention may be traced once more, and is then called with proxies.
_TENSOR = (torch.Tensor, fx.Proxy)
# From the traced leaves (proxies, in the order of the data) to one argument, and to all of a call's arguments.
Find = Callable[[tuple[Any, ...]], Any]
Rebuild = Callable[[tuple[Any, ...]], tuple[tuple[Any, ...], dict[str, Any]]]


class _Reader:
    """Walks the arguments of one call and collects its data and its conditions."""

    def __init__(self) -> None:
        self.data: dict[str, torch.Tensor] = {}
        self.preamble: list[tuple[str, str]] = []
        self.conditions: list[str] = []
        self.objects: dict[str, Any] = {}

    def name_object(self, value: Any) -> str:
        """A name for an object that generated code has to refer to and that has no literal."""
        name = f"_fixed_{len(self.objects)}"
        self.objects[name] = value
        return name

    def read(self, value: Any, expression: str, required: bool) -> Find:
        """Note one argument; the returned function finds it again among the traced leaves."""
        if isinstance(value, torch.Tensor):
            return self.read_tensor(value, expression, required)
        if isinstance(value, tuple | list) and _holds_tensors(value):
            self.conditions.append(
                f"isinstance({expression}, {type(value).__name__}) and len({expression}) == {len(value)}"
            )
            items = self.read_items(value, expression)
            return lambda leaves: type(value)(find(leaves) for find in items)
        if isinstance(value, dict) and _holds_tensors(value):
            keys = sorted(value)
            self.conditions.append(f"isinstance({expression}, dict) and sorted({expression}) == {keys!r}")
            entries = self.read_entries(value, expression)
            return lambda leaves: {key: find(leaves) for key, find in entries.items()}
        self.read_fixed(value, expression)
        return lambda leaves: value

    def read_tensor(self, value: torch.Tensor, expression: str, required: bool) -> Find:
        """Note a tensor: it is data, and the graph gets a placeholder for it."""
        for index, (name, known) in enumerate(self.data.items()):
            if known is value:
                # One tensor given twice (query, key and value of self-attention) is one input.
                self.conditions.append(f"{expression} is {name}")
                return operator.itemgetter(index)
        index = len(self.data)
        name = expression if expression.isidentifier() else f"input_{index}"
        if name != expression:
            self.preamble.append((name, expression))
        # What has no default is taken to be a tensor at every call; an optional argument may be None the next time.
        if not required:
            self.conditions.append(f"isinstance({expression}, {self.name_object(_TENSOR)})")
        self.data[name] = value
        return operator.itemgetter(index)

    def read_items(self, values: Any, expression: str) -> list[Find]:
        """Note what a sequence holds."""
        return [self.read(item, f"{expression}[{index}]", False) for index, item in enumerate(values)]

    def read_entries(self, values: dict[str, Any], expression: str) -> dict[str, Find]:
        """Note what a mapping holds, in the order of its keys: the order in a call means nothing."""
        return {key: self.read(values[key], f"{expression}[{key!r}]", False) for key in sorted(values)}

    def read_fixed(self, value: Any, expression: str) -> None:
        """Note that the traced code holds for this very value."""
        if value is None or isinstance(value, bool):
            # `is`, since `1 == True`: an int would pass for the flag.
            self.conditions.append(f"{expression} is {value!r}")
        elif _is_plain(value):
            # Sizes come as a tuple of their own at every call, and a torch.Size equals a tuple.
            literal = tuple(value) if isinstance(value, tuple) else value
            self.conditions.append(f"{expression} == {literal!r}")
        else:
            self.conditions.append(f"{expression} is {self.name_object(value)}")


def _is_plain(value: Any) -> bool:
    """Whether a value is a number or a text, or a nest of sequences and mappings of such: equal ones are as good."""
    if isinstance(value, dict):
        return all(map(_is_plain, (*value.keys(), *value.values())))
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | str)


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a nest of sequences and mappings with one somewhere inside."""
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor)


def _header(parameters: list[inspect.Parameter], reader: _Reader) -> str:
    """The argument list of the host's forward, as source; defaults that have no literal become globals."""
    parts = ["self"]
    starred = False
    for parameter in parameters:
        text = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, starred = f"*{text}", True
        elif parameter.kind is parameter.VAR_KEYWORD:
            text = f"**{text}"
        elif parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        if parameter.default is not parameter.empty:
            plain = parameter.default is None or isinstance(parameter.default, bool | int | float | str)
            text += f"={parameter.default!r}" if plain else f"={reader.name_object(parameter.default)}"
        parts.append(text)
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter is parameters[-1]:
            parts.append("/")
    return ", ".join(parts)


def bind(host: type[nn.Module], call: Call) -> tuple[Signature, dict[str, torch.Tensor], Rebuild]:
    """Split a call of `host.forward` into data (tensors, by name) and what was fixed.

    Returns the signature, the data by placeholder name, and a function that turns traced data back into the call's
    positional and keyword arguments.
    """
    signature = inspect.signature(host.forward)
    parameters = list(signature.parameters.values())[1:]
    bound = signature.bind(None, *call.args, **call.kwargs)
    bound.apply_defaults()
    reader = _Reader()
    positional: list[Find] = []
    named: dict[str, Find] = {}
    for parameter in parameters:
        value = bound.arguments[parameter.name]
        name = parameter.name
        if parameter.kind is parameter.VAR_POSITIONAL:
            reader.conditions.append(f"len({name}) == {len(value)}")
            positional += reader.read_items(value, name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            reader.conditions.append(f"sorted({name}) == {sorted(value)!r}" if value else f"not {name}")
            named |= reader.read_entries(value, name)
        else:
            find = reader.read(value, name, parameter.default is parameter.empty)
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[name] = find
            else:
                positional.append(find)
    header = _header(parameters, reader)

    def rebuild(leaves: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(find(leaves) for find in positional), {key: find(leaves) for key, find in named.items()}

    result = Signature(header, tuple(reader.conditions), tuple(reader.preamble), reader.objects)
    return result, reader.data, rebuild
