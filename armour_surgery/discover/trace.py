"""A torch.fx tracer that knows the value of everything it traces.

Each `Proxy` carries the concrete value that its node had in the recorded call, on the meta device. Python that needs
a value (`*shape`, `len`, `if`, indices) gets it, and where a *size* decided something, a guard is put into the graph,
so that the traced code never silently runs with a decision that was made for another size.

Values are computed on a second copy of the module, the *shadow*: fx patches attribute access, and in the traced copy
parameters turn into proxies.
"""

import functools
import inspect
import itertools
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx import _symbolic_trace

from armour_surgery.copies import meta_copy
from armour_surgery.discover.record import is_builtin
from armour_surgery.discover.signature import bind
from armour_surgery.errors import TraceError
from armour_surgery.hosts.attention_interface import is_interface, traced_interfaces
from armour_surgery.traced import Call, FunctionReference, Trace

__all__ = ["SELF", "guard", "trace", "value_of"]

SELF = "_self"  # the placeholder that stands for the module itself; emitted code calls it `self`


def guard(value: Any, expected: Any) -> None:
    """Marks, in a graph, that tracing relied on `value == expected`. Emitted as an `if`; never called."""
    raise AssertionError("guards are emitted, not called")


def value_of(argument: Any) -> Any:
    """Replace every node (or proxy) in a nested argument by the value it had in the recorded call."""
    if isinstance(argument, fx.Proxy):
        argument = argument.node
    if isinstance(argument, fx.Node):
        return argument.meta["value"]
    if isinstance(argument, FunctionReference):
        return argument.function
    if isinstance(argument, slice):
        return slice(value_of(argument.start), value_of(argument.stop), value_of(argument.step))
    if isinstance(argument, tuple | list):
        items = [value_of(item) for item in argument]
        return items if isinstance(argument, list) else tuple(items)
    if isinstance(argument, dict):
        return {key: value_of(item) for key, item in argument.items()}
    return argument


class _ValueProxy(fx.Proxy):
    """A proxy that answers Python's questions with the value of the recorded call."""

    @property
    def _value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        value = getattr(object.__getattribute__(self, "node").meta["value"], name)
        if name in ("dim", "ndimension") and callable(value):
            return value  # a rank does not change from call to call
        if callable(value) and not isinstance(value, torch.Tensor | torch.Size):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        if isinstance(value, bool | str) or value is None or name == "ndim":
            return value
        return self.tracer.create_proxy("call_function", getattr, (self, name), {}, name=name)

    def __iter__(self) -> Iterator[Any]:
        pick = operator.getitem
        return (pick(self, index) for index in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        return len(self._value)

    def __contains__(self, item: Any) -> bool:
        return value_of(item) in self._value

    def __bool__(self) -> bool:
        return bool(self._fixed())

    def __int__(self) -> int:
        return int(self._fixed())

    def __index__(self) -> int:
        return operator.index(self._fixed())

    def __float__(self) -> float:
        return float(self._fixed())

    def __hash__(self) -> int:
        return id(self)

    def _fixed(self) -> Any:
        """The value, as something that the trace now depends on."""
        value = self._value
        if isinstance(value, torch.Tensor):
            raise TraceError(f"its forward branches on the contents of a tensor ({self.node.name})")
        known = any(user.target is guard for user in self.node.users)
        if not known and not isinstance(value, torch.device | torch.dtype):
            self.tracer.create_proxy("call_function", guard, (self, value), {})
        return value


class _ValueTracer(fx.Tracer):
    """Trace one module; see the module docstring."""

    def __init__(self, shadow: nn.Module, leaves: Callable[[str, nn.Module], bool], inputs: dict[str, Any]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.shadow = shadow
        self.shadow_modules = {id(module) for module in shadow.modules()}
        self.leaves = leaves
        self.inputs = {SELF: shadow, **inputs}
        self.switches: dict[str, bool] = {}
        self.self_node: fx.Node  # the placeholder of the module itself; set when its forward starts
        self.module_names: dict[int, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaves(module_qualified_name, m)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        # fx patches every module's call while it traces; the shadow's modules are run, not traced.
        if id(m) in self.shadow_modules:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError as error:
            raise TraceError(f"its forward calls a {type(mod).__name__} that is not one of its own modules") from error

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            if a is self.root:
                return self.self_node
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            known = any(a is buffer for buffer in self.root.buffers())
            if not known and (a.is_meta or a.numel() > 1):
                raise TraceError("its forward uses a tensor that is neither an argument, a parameter nor a buffer")
        if isinstance(a, FunctionType):
            return FunctionReference(a)
        return super().create_arg(a)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        if kind == "output":
            return proxy
        value = self._run(node)
        node.meta["value"] = value
        # None steers Python (`if mask is None`), so it is handed out as it is; but attention weights that one function
        # of the interface does not return, another will.
        source = node.args[0] if target is operator.getitem else None
        from_interface = isinstance(source, fx.Node) and is_interface(source.target)
        return None if value is None and kind.startswith("call") and not from_interface else proxy

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.inputs[str(node.target)]
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.shadow)
        if node.target is guard:
            return None
        args, kwargs = value_of(node.args), value_of(node.kwargs)
        if node.op == "call_module":
            return self.shadow.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def plain_attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """A flag or a number that forward reads off a module: the emitted code must keep following it."""
        path = self.module_names.get(id(module))
        if path is None:
            return value
        if isinstance(value, bool):
            self.switches[_expression(path, name)] = value
            return value
        owner = self.self_node if not path else self.create_node("get_attr", path, (), {})
        owner.meta["value"] = self.shadow.get_submodule(path)
        return self.create_proxy("call_function", getattr, (fx.Proxy(owner, self), name), {}, name=name)

    def method(self, module: nn.Module, path: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Keep a host's method as a call (`self.get_attention_biases(x.device)`) unless activations go through it."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            leaves = pytree.tree_leaves((args, kwargs))
            proxies = [leaf for leaf in leaves if isinstance(leaf, fx.Proxy)]
            if any(isinstance(value_of(proxy), torch.Tensor) for proxy in proxies):
                return call(*args, **kwargs)
            value = getattr(self.shadow.get_submodule(path), name)(*value_of(args), **value_of(kwargs))
            if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
                return call(*args, **kwargs)
            owner = self.self_node if not path else self.create_node("get_attr", path, (), {})
            owner.meta["value"] = self.shadow.get_submodule(path)
            return self.create_proxy("call_method", name, (fx.Proxy(owner, self), *args), kwargs)

        return functools.wraps(call)(wrapper)


def _expression(path: str, name: str) -> str:
    """How generated code reads an attribute of a submodule: `self.blocks[1].attn.training`."""
    return re.sub(r"\.(\d+)(?=\.)", r"[\1]", f"self.{path}.{name}" if path else f"self.{name}")


def _own_methods(module: nn.Module) -> Iterator[str]:
    """Methods that a host's class defines itself, forward and Python's own apart."""
    for owner in type(module).__mro__:
        if owner is nn.Module:
            return
        for name, attribute in vars(owner).items():
            if (
                inspect.isfunction(attribute)
                and not name.startswith("__")
                and name not in {"forward", "train", "_apply"}
            ):
                yield name


def _spy(module: nn.Module, path: str, tracer: _ValueTracer, forward: Any = None) -> None:
    """Let the tracer see the flags, numbers and methods that are read off this (copied) module."""
    host = type(module)

    def read(self: nn.Module, name: str) -> Any:
        value = host.__getattribute__(self, name)
        if type(value) in (bool, float) and name in object.__getattribute__(self, "__dict__"):
            return tracer.plain_attribute(self, name, value)
        return value

    for name in set(_own_methods(module)):
        object.__setattr__(module, name, tracer.method(module, path, name, getattr(module, name)))
    members: dict[str, Any] = {"__getattribute__": read, "__module__": host.__module__}
    if forward is not None:
        members["forward"] = forward
    object.__setattr__(module, "__class__", type(host.__name__, (host,), members))


@contextmanager
def _followed_functions() -> Iterator[None]:
    """While open, functions that fx keeps as one call are followed like a host's own code: attention may be inside.

    These are `F.multi_head_attention_forward`, and whatever a host registered with `torch.fx.wrap`.
    """
    functional: Any = F
    original = functional.has_torch_function
    wrapped = _symbolic_trace._wrapped_fns_to_patch

    def has_torch_function(arguments: Iterable[Any]) -> bool:
        caller = sys._getframe(1).f_code.co_name
        return caller != "multi_head_attention_forward" and bool(original(arguments))

    functional.has_torch_function = has_torch_function
    _symbolic_trace._wrapped_fns_to_patch = {}
    try:
        yield
    finally:
        functional.has_torch_function = original
        _symbolic_trace._wrapped_fns_to_patch = wrapped


def trace(module: nn.Module, call: Call, opaque: Callable[[str, nn.Module], bool]) -> Trace:
    """The graph of `module` for one recorded call, in the module's present state (train or eval).

    `opaque(name, submodule)` says which submodules stay calls. torch.nn's own layers always do. The module is copied
    without its weights; it is neither run nor changed.

    Raises:
        TraceError: the forward does something that a graph cannot hold; the message says what.
    """
    signature, placeholders, rebuild = bind(type(module), call)
    shadow = meta_copy(module)
    root = meta_copy(module)
    tracer = _ValueTracer(shadow, lambda name, m: is_builtin(m) or opaque(name, m), placeholders)

    host_forward = type(module).forward

    def run(self: nn.Module, *leaves: Any) -> Any:
        args, kwargs = rebuild(leaves)
        return host_forward(self, *args, **kwargs)

    # fx reads a forward's argument names off its code object, so the traced one is spelled out.
    names = ", ".join(["self", SELF, *placeholders])
    scope: dict[str, Any] = {"run": run, "tracer": tracer}
    exec(
        f"def forward({names}):\n    tracer.self_node = {SELF}.node\n"
        f"    return run({', '.join(['self', *placeholders])})",
        scope,
    )
    tracer.module_names = {id(child): name for name, child in root.named_modules()}
    for name, child in list(root.named_modules()):
        _spy(child, name, tracer, scope["forward"] if child is root else None)
    try:
        with torch.no_grad(), traced_interfaces(), _followed_functions():
            graph = tracer.trace(root)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    switches = tuple(name if value else f"not {name}" for name, value in tracer.switches.items())
    conditions = tuple(itertools.chain(signature.conditions, switches))
    return Trace(graph, type(signature)(signature.header, conditions, signature.preamble, signature.objects))
