"""A torch.fx tracer that knows the value of everything it traces.

Each `Proxy` carries the concrete value that its node had in the recorded call, on the meta device. Python that needs
a value (`*shape`, `len`, `if`, indices) gets it, and where a *size* decided something, a guard is put into the graph,
so that the traced code never silently runs with a decision that was made for another size.

Values are computed on a second copy of the module, the *shadow*: fx patches attribute access, and in the traced copy
parameters turn into proxies.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.fx import _symbolic_trace

from armour_surgery.copies import meta_copy
from armour_surgery.discover.functions import followed_functions
from armour_surgery.discover.nodes import SELF, attribute_of, guard, value_of
from armour_surgery.discover.record import is_builtin
from armour_surgery.discover.signature import bind
from armour_surgery.discover.spied import spy
from armour_surgery.errors import TraceError
from armour_surgery.hosts.attention_interface import is_interface, traced_interfaces
from armour_surgery.patching import one_at_a_time, patched
from armour_surgery.shapes import RememberedShapes
from armour_surgery.traced import Call, FunctionReference, Trace

__all__ = ["trace_symbolically"]


class _ValueProxy(fx.Proxy):
    """A proxy that answers Python's questions with the value of the recorded call."""

    @property
    def _value(self) -> Any:
        return self.node.meta["value"]

    def __getattr__(self, name: str) -> Any:
        # Past `self.node`: a proxy that has none yet (one that is being copied) would ask itself for it without end.
        value = getattr(object.__getattribute__(self, "node").meta["value"], name)
        if name in ("dim", "ndimension") and callable(value):
            return value  # a rank does not change from call to call
        if callable(value) and not isinstance(value, torch.Tensor | torch.Size):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        if isinstance(value, bool | str) or value is None or name == "ndim":
            return value
        # Sizes, types and devices may be others at the next call: generated code reads them again.
        return self.tracer.create_proxy("call_function", getattr, (self, name), {}, name=name)

    def __iter__(self) -> Iterator[Any]:
        # fx allows `a, b = x` alone, whose count it reads off the caller's bytecode; here every length is known.
        return map(self.__getitem__, range(len(self._value)))

    # fx refuses to assign to items; hosts fill masks and position tables in this way.
    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __len__(self) -> int:
        # Of a tensor it is a size, which may be another one at the next call.
        return int(self.shape[0]) if isinstance(self._value, torch.Tensor) else len(self._value)

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

    def _fixed(self) -> Any:
        """The value, as something that the trace now depends on."""
        value = self._value
        if isinstance(value, torch.Tensor):
            raise TraceError(f"its forward branches on the contents of a tensor ({self.node.name})")
        guarded = guard in (user.target for user in self.node.users)
        # A type or device that Python compared stays what it is, unless the whole model is moved: no guard for it.
        if not guarded and not isinstance(value, torch.device | torch.dtype):
            self.tracer.create_proxy("call_function", guard, (self, value), {})
        return value


class _ValueTracer(fx.Tracer):
    """Trace one module; see the module docstring."""

    def __init__(self, shadow: nn.Module, leaves: Callable[[str, nn.Module], bool], inputs: dict[str, Any]) -> None:
        super().__init__()
        # Buffers too are read anew by generated code; fx would bake the tensor that the buffer was.
        self.proxy_buffer_attributes = True
        self.shadow = shadow
        self.leaves = leaves
        self.inputs = {SELF: shadow, **inputs}
        self.conditions: dict[str, str] = {}  # by what they are about
        self.self_node: fx.Node  # the placeholder of the module itself; set when its forward starts
        self.module_names: dict[int, str] = {}
        self.parameter_proxies: dict[str, fx.Proxy] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ValueProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.leaves(module_qualified_name, m)

    def module_called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What calling a module of the traced copy comes to: a node, or its own code."""
        # As fx does, `math.sqrt` and its like are nodes too, in whatever file a forward is written.
        scope = getattr(module.forward, "__globals__", {})
        _symbolic_trace._autowrap_check(_symbolic_trace.CURRENT_PATCHER, scope, self._autowrap_function_ids)  # type: ignore[arg-type]
        return self.call_module(module, call, args, kwargs)

    def tensor_read(self, name: str, value: Any) -> Any:
        """What reading a parameter, buffer or submodule of the traced copy comes to: a node, or the module."""
        return self.getattr(name, value, self.parameter_proxies)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            # transformers hands `self` to attention functions: a module is an argument, which fx has no word for.
            if a is self.root:
                return self.self_node
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            # By identity: `in` compares numbers, which meta tensors do not have. Scalars are written as constants.
            is_buffer = any(a is buffer for buffer in self.root.buffers())
            if not is_buffer and (a.is_meta or a.numel() > 1):
                raise TraceError("its forward uses a tensor that is neither an argument, a parameter nor a buffer")
        # fx would refuse a function as an argument; this prints as its name, and the emitter makes it a global.
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
            # Python branches on a flag, and a graph holds one branch: the flag is a condition of the whole graph.
            read = attribute_of(path, name)
            self.conditions[read] = read if value else f"not {read}"
            return value
        owner = self.self_node if not path else self.create_node("get_attr", path, (), {})
        owner.meta["value"] = self.shadow.get_submodule(path)
        return self.create_proxy("call_function", getattr, (fx.Proxy(owner, self), name), {}, name=name)

    def structure(self, module: nn.Module, name: str, value: Any) -> None:
        """Whole numbers that forward reads off a module: the graph is one for these."""
        path = self.module_names.get(id(module))
        if path is not None:
            read = attribute_of(path, name)
            self.conditions[read] = f"{read} == {value!r}"

    def method(self, module: nn.Module, path: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Keep a host's method as a call (`self.get_attention_biases(x.device)`) unless activations go through it."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            given = pytree.tree_leaves((args, kwargs))
            if any(isinstance(leaf, fx.Proxy) and _is_tensor(value_of(leaf)) for leaf in given):
                return call(*args, **kwargs)
            # LeViT's biases are gathered once and cached on the module: traced, they would be gathered at every call.
            value = getattr(self.shadow.get_submodule(path), name)(*value_of(args), **value_of(kwargs))
            if not any(map(_is_tensor, pytree.tree_leaves(value))):
                return call(*args, **kwargs)
            owner = self.self_node if not path else self.create_node("get_attr", path, (), {})
            owner.meta["value"] = self.shadow.get_submodule(path)
            return self.create_proxy("call_method", name, (fx.Proxy(owner, self), *args), kwargs)

        return functools.wraps(call)(wrapper)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _own_methods(module: nn.Module) -> Iterator[str]:
    """Methods that a host's class defines itself, forward and Python's own apart."""
    for owner in type(module).__mro__:
        if owner is nn.Module:
            return
        for name, attribute in vars(owner).items():
            # Hosts override `train` and `_apply` too (LeViT drops its cache there); they are no steps of a forward.
            skipped = name.startswith("__") or name in {"forward", "train", "_apply"}
            if inspect.isfunction(attribute) and not skipped:
                yield name


def _spy(module: nn.Module, path: str, tracer: _ValueTracer, **members: Any) -> None:
    """Let the tracer see the flags, numbers, tensors and methods that are read off this (copied) module."""
    host = type(module)
    for name in set(_own_methods(module)):
        object.__setattr__(module, name, tracer.method(module, path, name, getattr(module, name)))

    def read_tensor(self: nn.Module, name: str) -> Any:
        return tracer.tensor_read(name, host.__getattr__(self, name))

    spy(module, tracer.plain_attribute, tracer.structure, tracer.module_called, __getattr__=read_tensor, **members)


@contextmanager
def _modules_unpatched() -> Iterator[None]:
    """While open, fx leaves nn.Module alone, which it otherwise patches for everybody: `_spy` does that for a copy.

    Every class of modules is told when nn.Module changes, and there are thousands of them.
    """
    patch_method = _symbolic_trace._Patcher.patch_method

    def patch_others(patcher: Any, cls: type, *rest: Any, **options: Any) -> None:
        if cls is not nn.Module:
            patch_method(patcher, cls, *rest, **options)

    with patched(_symbolic_trace._Patcher, "patch_method", patch_others):
        yield


def trace_symbolically(module: nn.Module, call: Call, opaque: Callable[[str, nn.Module], bool]) -> Trace:
    """The graph of `module` for one recorded call, in the module's present state (train or eval).

    `opaque(name, submodule)` says which submodules stay calls. torch.nn's own layers always do. The module is copied
    without its weights; it is neither run nor changed.

    Raises:
        TraceError: the forward does something that a graph cannot hold; the message says what.
    """
    signature, placeholders, rebuild = bind(type(module), call)
    # Two copies: whatever tracing leaves behind (LeViT caches its biases, which are proxies then) stays on the first.
    root = meta_copy(module)
    shadow = meta_copy(module)
    tracer = _ValueTracer(shadow, lambda name, m: is_builtin(m) or opaque(name, m), placeholders)

    host_forward = type(module).forward

    def run(self: nn.Module, *leaves: Any) -> Any:
        args, kwargs = rebuild(leaves)
        return host_forward(self, *args, **kwargs)

    # fx reads a forward's argument names off its code object, so the traced one is spelled out. The module itself is an
    # argument too: calls of its methods, and reads of its numbers, are nodes that need it as their input.
    names = ", ".join(["self", SELF, *placeholders])
    scope: dict[str, Any] = {"run": run, "tracer": tracer}
    exec(
        f"def forward({names}):\n    tracer.self_node = {SELF}.node\n"
        f"    return run({', '.join(['self', *placeholders])})",
        scope,
    )
    tracer.module_names = {id(child): name for name, child in root.named_modules()}
    for name, child in list(root.named_modules()):
        _spy(child, name, tracer, **({"forward": scope["forward"]} if child is root else {}))
    try:
        with (
            one_at_a_time(),
            torch.no_grad(),
            RememberedShapes(),
            traced_interfaces(shadow),
            followed_functions(),
            _modules_unpatched(),
        ):
            graph = tracer.trace(root)
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    return Trace(graph, replace(signature, conditions=(*signature.conditions, *tracer.conditions.values())))
