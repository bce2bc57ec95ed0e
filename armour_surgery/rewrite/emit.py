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
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._compile import _disable_dynamo

from armour_surgery.errors import SpecializationError
from armour_surgery.patching import one_at_a_time, outside_of_modes
from armour_surgery.rewrite.generated import Generated, generated_class
from armour_surgery.rewrite.torch_attention import answers_of, taking_nested
from armour_surgery.traced import Call, FunctionReference, Signature

__all__ = ["ArmourAttention", "Variant", "make_class", "render", "write_forward"]

_SELF = "_self"
# fx ends a line with `;  a = b = None  # why` where it is the last that reads these names.
_FREED = re.compile(r";\s+((?:\w+ = )+)None\b.*$")
# How fx writes the `guard` of a traced size: generated code leaves the branch where the size is another.
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


class ArmourAttention(Generated):
    """What every converted attention has besides its host's class: its source, and the branches seen so far."""

    to_keep = (
        "its class was made in this process. Write the model with armour_surgery.save and read it with "
        "armour_surgery.load, in each process; for a model of your own, pass its state_dict() and convert there again"
    )
    armour_mode: ClassVar[str]
    armour_variants: ClassVar[list[Variant]]
    armour_trace: ClassVar[Callable[[Any, Call], Variant]]
    armour_source: ClassVar[str]

    @property
    def code(self) -> str:
        """The generated forward, as it runs."""
        return type(self).armour_source

    def armour_specialize(self, known: int, *args: Any, **kwargs: Any) -> Any:
        """Trace and rewrite the forward for a call of a new kind, add the branch, and run it.

        `known` is how many branches the forward had that found none of them to hold.

        Where somebody traces the model with torch.fx, this module becomes one node: which branch it is shows when that
        runs.

        Raises:
            SpecializationError: this kind of call cannot be followed; the message says what about it.
        """
        proxy = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Proxy)), None)
        if proxy is not None:
            tracer: Any = proxy.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        # A deployed attention is a subclass; what it does not know is traced for the class that was converted.
        cls = next(
            owner
            for owner in type(self).__mro__
            if issubclass(owner, ArmourAttention) and "armour_variants" in vars(owner)
        )
        # torch.compile reads the number here, so that it compiles anew once there are more.
        if known == len(cls.armour_variants):
            _learn(cls, self, known, Call(args, kwargs))  # type: ignore[arg-type]
        return cls.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    @classmethod
    def _add_branch(cls, variant: Variant) -> None:
        for known in cls.armour_variants:
            # The branch is there already and did not run, so adding it once more would end in a recursion.
            if (variant.conditions, variant.body) == (known.conditions, known.body):
                raise SpecializationError(
                    f"{cls.__name__} was called in a way that its conditions do not tell apart: {variant.conditions}. "
                    "Convert the model with an example_input of these shapes"
                )
        _install(cls, [*cls.armour_variants, variant])


@_disable_dynamo
def _learn(cls: type[ArmourAttention], module: nn.Module, known: int, call: Call) -> None:
    with one_at_a_time():
        # Another thread may have added the branch meanwhile.
        if known == len(cls.armour_variants):
            with outside_of_modes():
                cls._add_branch(cls.armour_trace(module, call))


def _is_large(node: fx.Node) -> bool:
    """Whether a node holds activations, rather than an argument, a parameter, a size or a module."""
    value = node.meta.get("value", _UNKNOWN)  # views that the passes wrote carry none
    return node.op.startswith("call") and (value is _UNKNOWN or isinstance(value, torch.Tensor))


def render(graph: fx.Graph, signature: Signature) -> Variant:
    """Write a graph as the statements of a method body."""
    code = graph.python_code("self")
    text = _freeing(graph, code.src)
    text, names = _readable(graph, text, code.globals)
    text = re.sub(rf"\b{_SELF}\b", "self", text)
    body = [f"{name} = {expression}" for name, expression in signature.preamble]
    for line in text.splitlines():
        guarded = _GUARD.match(line)
        if guarded:
            # `write_forward` makes such a branch a `while` that runs once: `break` goes on to the next branch.
            body.append(f"if {guarded['value']} != {guarded['expected']}:")
            body.append("    break  # traced for another size or type")
        else:
            body.append(line)
    objects = tuple(sorted({**signature.objects, **names}.items(), key=lambda item: item[0]))
    return Variant(signature.header, signature.conditions, tuple(body), objects)


def _freeing(graph: fx.Graph, source: str) -> str:
    """The statements of fx's source; where it sets names to None, large ones are deleted and the others stay."""
    # A large intermediate that is done with makes room for the next one, as in code written by hand; an argument stays,
    # since another branch may still need it.
    large = {node.name for node in graph.nodes if _is_large(node)}

    def freed(match: re.Match[str]) -> str:
        done_with = [name for name in match[1].replace("=", " ").split() if name in large]
        return f"; del {', '.join(done_with)}" if done_with else ""

    _, *lines = source[source.index("def forward(") :].splitlines()
    return "\n".join(_FREED.sub(freed, line)[4:] for line in lines if line.strip())


def _readable(graph: fx.Graph, text: str, used: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """fx's text with functions under the names that they have, and the globals that it then needs.

    fx calls them by where they are from, such as `torch_nn_functional_softmax`.
    """
    names: dict[str, Any] = {name: used[name] for name in ("torch", "device", "inf", "nan", "NoneType") if name in used}
    local = {node.name for node in graph.nodes}
    for name, value in used.items():
        short = getattr(value, "__name__", "")
        # fx names a node after its function: the local variable would hide the global.
        short = f"_{short}" if short in local else short
        if name not in names and callable(value) and short.isidentifier() and names.get(short, value) is value:
            text = re.sub(rf"\b{re.escape(name)}\b", short, text)
            names[short] = value
        else:
            names[name] = value
    # fx does not know that these are functions, and asks for no globals for them.
    for node in graph.nodes:
        for argument in node.args:
            if isinstance(argument, FunctionReference):
                names[repr(argument)] = argument.function
    return text, names


def _call_arguments(header: str) -> str:
    """The argument list that passes a forward's own arguments on."""
    _, *parameters = header.split(",")
    passed, keyword_only = [], False
    for parameter in parameters:
        name = parameter.strip().partition("=")[0]
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
    # Where a host has no dropout, the branches for training and for rest are the same, and one says so.
    first, second = variants
    differing = set(first.conditions) - set(second.conditions)
    if set(map(_negated, differing)) != set(second.conditions) - set(first.conditions):
        return variants
    conditions = tuple(condition for condition in first.conditions if condition not in differing)
    return [Variant(first.header, conditions, first.body, first.objects)]


def _negated(condition: str) -> str:
    return condition[4:] if condition.startswith("not ") else f"not {condition}"


def _install(cls: type[ArmourAttention], variants: list[Variant]) -> None:
    """Write the class's forward from its branches, newest first, and compile it."""
    # A name for each version of the source, since tracebacks look lines up by it, and older code may still be running.
    name = f"<armour {cls.__name__} {id(cls):x}.{len(variants)}>"
    otherwise = f"self.armour_specialize({len(variants)}, {{}})"
    cls.armour_source, forward = write_forward(variants, name, otherwise, {})
    cls.forward = taking_nested(forward, cls)  # type: ignore[attr-defined, arg-type]
    # Last: a thread that finds more branches than it knew calls the forward that has them.
    cls.armour_variants = variants


def write_forward(
    variants: list[Variant], filename: str, otherwise: str, scope: dict[str, Any]
) -> tuple[str, Callable[..., Any]]:
    """The source of a forward with one branch for each variant, newest first, and the compiled function.

    `otherwise` is what it returns where no branch holds, with a place for its arguments; `scope` are globals for it.
    """
    lines = [f"def forward({variants[0].header}):"]
    for index, variant in enumerate(reversed(variants)):
        renamed = _add_globals(scope, variant, index)
        condition = " and ".join(variant.conditions) or "True"
        body = _with_names("\n".join(variant.body), renamed).splitlines()
        # A branch that holds for one size only is left with `break`, on to the next.
        keyword = "while" if any(line.lstrip().startswith("break") for line in body) else "if"
        lines.append(f"    {keyword} {_with_names(condition, renamed)}:")
        lines += [f"        {line}" for line in body]
    arguments = _call_arguments(variants[0].header)
    lines.append(f"    return {otherwise.format(arguments)}")
    source = "\n".join([*lines, ""])
    # Where tracebacks and debuggers look for the lines of a file that is none.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), scope)
    return source, scope["forward"]


def _add_globals(scope: dict[str, Any], variant: Variant, index: int) -> dict[str, str]:
    """Add a branch's globals to those of the others; returns new names for what another one means otherwise."""
    renamed: dict[str, str] = {}
    for name, value in variant.objects:
        if scope.setdefault(name, value) is not value and scope[name] != value:
            renamed[name] = f"{name}_{index}"
            scope[renamed[name]] = value
    return renamed


def _with_names(text: str, renamed: dict[str, str]) -> str:
    for old, new in renamed.items():
        text = re.sub(rf"\b{re.escape(old)}\b", new, text)
    return text


def make_class(host: type[nn.Module], mode: str, variants: list[Variant], specialize: Specialize) -> type[nn.Module]:
    """A subclass of a host's attention class with a generated forward."""
    members = {
        "__module__": host.__module__,
        "__doc__": f"{host.__name__} after surgery: {mode}. Only forward differs; `print(module.code)` shows it.",
        "armour_mode": mode,
        "armour_variants": [],
        "armour_trace": staticmethod(specialize),
        **answers_of(host),
    }
    cls = generated_class(f"Armour{host.__name__}", ArmourAttention, host, members)
    _install(cls, _merge(variants))
    return cls
