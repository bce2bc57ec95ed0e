"""Turn rewritten graphs into a module: an instance of a subclass of the host's own attention class.

The subclass differs from the host's in its `forward` alone. That has one branch for each way the attention was called
so far (training or not, with a mask or without), each traced and rewritten for that very case; a call of a new kind
is traced when it first happens. `print(module.code)` shows it.
"""

import linecache
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from armour_surgery.errors import SpecializationError
from armour_surgery.traced import Call, FunctionReference, Signature

__all__ = ["ArmourAttention", "Variant", "make_class", "render", "write_forward"]

_SELF = "_self"
_FREED = re.compile(r";\s+((?:\w+ = )+)None\b.*$")
_GUARD = re.compile(r"^\w+ = _?guard\((?P<value>\w+), (?P<expected>.+)\)$")

_UNKNOWN = object()

Specialize = Callable[[nn.Module, Call], "Variant"]


@dataclass(frozen=True)
class Variant:
    """One branch of a generated forward: `body` runs where all `conditions` hold."""

    header: str
    conditions: tuple[str, ...]
    body: tuple[str, ...]
    objects: tuple[tuple[str, Any], ...]


class ArmourAttention:
    """What every converted attention has besides its host's class: its source, and the branches seen so far."""

    armour_mode: ClassVar[str]
    armour_variants: ClassVar[list[Variant]]
    armour_trace: ClassVar[Specialize]
    armour_source: ClassVar[str]

    @property
    def code(self) -> str:
        """The generated forward, as it runs."""
        return type(self).armour_source

    def armour_specialize(self, *args: Any, **kwargs: Any) -> Any:
        """Trace and rewrite the forward for a call of a new kind, add the branch, and run it.

        Raises:
            SpecializationError: this kind of call cannot be followed; the message says what about it.
        """
        assert isinstance(self, nn.Module)
        # A deployed attention is a subclass; what it does not know is traced for the class that was converted.
        cls = next(owner for owner in type(self).__mro__ if "armour_variants" in vars(owner))
        assert issubclass(cls, ArmourAttention)
        variant = cls.armour_trace(self, Call(args, kwargs))
        if any((variant.conditions, variant.body) == (known.conditions, known.body) for known in cls.armour_variants):
            raise SpecializationError(
                f"{cls.__name__} was called in a way that its conditions do not tell apart: {variant.conditions}. "
                "Convert the model with an example_input of these shapes"
            )
        cls.armour_variants = [*cls.armour_variants, variant]
        _install(cls)
        return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]


def _is_large(node: fx.Node) -> bool:
    """Whether a node holds activations, rather than an argument, a parameter, a size or a module."""
    value = node.meta.get("value", _UNKNOWN)  # views that the passes wrote carry none
    return node.op.startswith("call") and (value is _UNKNOWN or isinstance(value, torch.Tensor))


def render(graph: fx.Graph, signature: Signature) -> Variant:
    """Write a graph as the statements of a method body."""
    code = graph.python_code("self")
    lines = code.src[code.src.index("def forward(") :].splitlines()[1:]
    names: dict[str, Any] = {}
    local = {node.name for node in graph.nodes}
    for name, value in code.globals.items():
        if name in ("torch", "device", "inf", "nan", "NoneType"):
            names[name] = value
    # A large intermediate that is done with makes room for the next one, as in code written by hand; an argument stays,
    # since another branch may still need it.
    large = {node.name for node in graph.nodes if _is_large(node)}

    def freed(match: re.Match[str]) -> str:
        unread = [name for name in match[1].replace("=", " ").split() if name in large]
        return f"; del {', '.join(unread)}" if unread else ""

    text = "\n".join(_FREED.sub(freed, line)[4:] for line in lines if line.strip())
    for name, value in code.globals.items():
        short = getattr(value, "__name__", "")
        short = f"_{short}" if short in local else short
        if name not in names and callable(value) and short.isidentifier() and names.get(short, value) is value:
            text = re.sub(rf"\b{re.escape(name)}\b", short, text)
            names[short] = value
        else:
            names[name] = value
    for node in graph.nodes:
        for argument in node.args:
            if isinstance(argument, FunctionReference):
                names[repr(argument)] = argument.function
    text = re.sub(rf"\b{_SELF}\b", "self", text)
    body = [*signature.preamble]
    for line in text.splitlines():
        guarded = _GUARD.match(line)
        if guarded:
            body.append(f"if {guarded['value']} != {guarded['expected']}:")
            body.append("    break  # traced for another size or type")
        else:
            body.append(line)
    objects = tuple(sorted({**signature.objects, **names}.items(), key=lambda item: item[0]))
    return Variant(signature.header, signature.conditions, tuple(body), objects)


def _call_arguments(header: str) -> str:
    """The argument list that passes a forward's own arguments on."""
    parts = [part.strip() for part in header.split(",")][1:]
    passed, keyword_only = [], False
    for part in parts:
        name = part.partition("=")[0]
        if name in ("*", "/"):
            keyword_only = keyword_only or name == "*"
        elif name.startswith("*"):
            passed.append(name)
            keyword_only = keyword_only or not name.startswith("**")
        else:
            passed.append(f"{name}={name}" if keyword_only else name)
    return ", ".join(passed)


def _merge(variants: list[Variant]) -> list[Variant]:
    """Drop what two branches do not differ by: equal bodies need no condition on the flag that tells them apart."""
    if len(variants) != 2 or variants[0].body != variants[1].body:
        return variants
    first, second = variants
    differing = {c for c in first.conditions if c not in second.conditions}
    if {_negated(c) for c in differing} != {c for c in second.conditions if c not in first.conditions}:
        return variants
    conditions = tuple(c for c in first.conditions if c not in differing)
    return [Variant(first.header, conditions, first.body, first.objects)]


def _negated(condition: str) -> str:
    return condition[4:] if condition.startswith("not ") else f"not {condition}"


def _install(cls: type[ArmourAttention]) -> None:
    """Write the class's forward from its branches, newest first, and compile it."""
    name = f"<armour {cls.__name__} {id(cls):x}.{len(cls.armour_variants)}>"
    source, forward = write_forward(cls.armour_variants, name, "self.armour_specialize({})", {})
    cls.armour_source = source
    cls.forward = forward  # type: ignore[attr-defined]


def write_forward(
    variants: list[Variant], filename: str, otherwise: str, scope: dict[str, Any]
) -> tuple[str, Callable[..., Any]]:
    """The source of a forward with one branch for each variant, newest first, and the compiled function.

    `otherwise` is what it returns where no branch holds, with a place for its arguments; `scope` are globals for it.
    """
    lines: list[str] = []
    arguments = _call_arguments(variants[0].header)
    for index, variant in enumerate(reversed(variants)):
        renamed: dict[str, str] = {}
        for name, value in variant.objects:
            if scope.setdefault(name, value) is not value and scope[name] != value:
                renamed[name] = f"{name}_{index}"
                scope[renamed[name]] = value

        def own(text: str, renamed: dict[str, str] = renamed) -> str:
            for old, new in renamed.items():
                text = re.sub(rf"\b{re.escape(old)}\b", new, text)
            return text

        condition = " and ".join(own(c) for c in variant.conditions) or "True"
        body = [own(line) for line in variant.body]
        # A branch that holds for one size only is left with `break`, on to the next.
        keyword = "while" if any(line.lstrip().startswith("break") for line in body) else "if"
        lines += [f"    {keyword} {condition}:", *(f"        {line}" for line in body)]
    lines.append(f"    return {otherwise.format(arguments)}")
    source = "\n".join([f"def forward({variants[0].header}):", *lines, ""])
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    return source, scope["forward"]


def make_class(host: type[nn.Module], mode: str, variants: list[Variant], specialize: Specialize) -> type[nn.Module]:
    """A subclass of a host's attention class with a generated forward."""
    members = {
        "__module__": host.__module__,
        "__doc__": f"{host.__name__} after surgery: {mode}. Only forward differs; `print(module.code)` shows it.",
        "armour_mode": mode,
        "armour_variants": _merge(variants),
        "armour_trace": staticmethod(specialize),
    }
    cls: type[Any] = type(f"Armour{host.__name__}", (ArmourAttention, host), members)
    _install(cls)
    return cls
