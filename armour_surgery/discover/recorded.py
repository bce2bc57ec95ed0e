"""The second tracer: it runs a module on stand-ins for tensors and writes down every call of a torch function.

Where Python code cannot meet a proxy (einops, `torch.finfo(x.dtype)`, sizes as arguments), it can meet a tensor: the
module runs on fake ones, which have shapes and no numbers. The record has the same words as the symbolic trace, since
it is made of torch's functions and methods, and calls of layers stay calls. Sizes of the inputs are symbols, so that
generated code computes them anew. What Python read of flags, factors and types, and what it decided by sizes, are
conditions of the trace.
"""

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.overrides import TorchFunctionMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from armour_surgery.copies import copy_with, plain_size
from armour_surgery.discover.functions import followed_functions
from armour_surgery.discover.nodes import SELF, attribute_of, value_of
from armour_surgery.discover.record import is_builtin
from armour_surgery.discover.signature import bind
from armour_surgery.discover.spied import spy
from armour_surgery.errors import TraceError
from armour_surgery.hosts.attention_interface import noted_interfaces
from armour_surgery.patching import one_at_a_time
from armour_surgery.traced import Call, FunctionReference, Trace

__all__ = ["trace_by_running"]

# How generated code writes the methods that operators stand for.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "add": operator.add, "__radd__": operator.add,
    "mul": operator.mul, "__rmul__": operator.mul, "__matmul__": operator.matmul, "__iadd__": operator.iadd,
    "__imul__": operator.imul, "__isub__": operator.isub, "__itruediv__": operator.itruediv,
}  # fmt: skip


def _sampled(image: torch.Tensor, grid: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return image.new_empty((*image.shape[:2], *grid.shape[1:-1]))


# Functions of which torch works out the shape, on fake tensors, in a second (deformable attention, optical flow).
_SHORTCUTS: dict[Any, Callable[..., Any]] = {F.grid_sample: _sampled}
_LOOKED_AT_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
_REFLECTED = {"__radd__", "__rmul__"}
_READ_TYPE: Any = getattr(torch.Tensor.dtype, "__get__")  # noqa: B009 - the descriptor's own, which mypy does not know


class _Recorder(TorchFunctionMode):
    """Writes what runs under it into a graph, for stand-ins of the inputs (`placeholder`) and tensors (`stand_in`)."""

    def __init__(self, is_leaf: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        # Equal sizes get symbols of their own: that two axes are as long may be chance.
        self._shapes = ShapeEnv(duck_shape=False, specialize_zero_one=False)
        self.fakes = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)
        # Every operation is seen once or twice, and remembering it costs as much as doing it.
        self.fakes.cache_enabled = False
        self._is_leaf = is_leaf
        self._module_names: dict[int, str] = {}
        self._tensor_names: dict[int, str] = {}
        self._nodes: dict[int, fx.Node] = {}
        self._results: dict[fx.Node, Any] = {}  # kept: an id must not be given to another tensor
        self._busy = False  # inside of a call that is one node
        self._sources: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        self._sizes: dict[sympy.Expr, fx.Node] = {}
        self._memories: dict[int, torch.Tensor] = {}
        self._decided: list[sympy.Expr] = []
        self._guards_seen = 0
        # What was read of the module and its inputs, and what it has to be.
        self.conditions: dict[str, str] = {}
        self.objects: dict[str, Any] = {}  # what they name
        self._self = self.graph.placeholder(SELF)
        # How conditions, which come before nested arguments are unpacked, read each input.
        self._inputs: dict[fx.Node, str] = {}

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor on the CPU with a parameter's or buffer's own sizes."""
        with self.fakes:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if not isinstance(tensor, nn.Parameter):
            return fake
        return nn.Parameter(fake, tensor.requires_grad)

    def placeholder(self, name: str, expression: str, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in for an input with a symbol for each of its sizes, and its node; conditions read it so."""
        # A size of one may be there to be broadcast.
        kinds = [DimDynamic.STATIC if size == 1 else DimDynamic.DYNAMIC for size in tensor.shape]
        dynamic: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
        like = torch.empty(tensor.shape, dtype=tensor.dtype)
        fake = self.fakes.from_tensor(like, source=LocalSource(name), symbolic_context=dynamic)
        node = self.graph.placeholder(name)
        self._inputs[node] = expression
        self._know(node, fake)
        sizes: tuple[Any, ...] = tuple(fake.shape)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                self._sources[size.node.expr] = node, axis
            else:
                read = f"{expression}.shape[{axis}]"
                self.conditions[read] = f"{read} == {size}"
        return fake

    def know_modules(self, root: nn.Module) -> None:
        """Tell the names of the modules and tensors that nodes may refer to."""
        for name, module in root.named_modules():
            self._module_names[id(module)] = name
            for key, value in {**module.__dict__, **module._parameters, **module._buffers}.items():
                if isinstance(value, torch.Tensor):
                    self._tensor_names.setdefault(id(value), f"{name}.{key}" if name else key)

    def attribute(self, module: nn.Module, name: str, value: Any) -> Any:
        """A flag or number(s) that forward reads off a module: what is recorded holds for the present value."""
        path = self._module_names.get(id(module))
        if path is not None and not self._busy:
            read = attribute_of(path, name)
            if isinstance(value, bool):
                self.conditions[read] = read if value else f"not {read}"
            else:
                self.conditions[read] = f"{read} == {value!r}"
        return value

    def interface(self, module: nn.Module, name: str) -> None:
        """An attention function of transformers that a module looks up by its config's word for it."""
        read = attribute_of(self._module_names[id(module)], "config._attn_implementation")
        self.conditions[read] = f"{read} == {name!r}"

    # What is recorded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = _SHORTCUTS.get(func, func)
        if self._busy:
            return run(*args, **kwargs)
        if func == _READ_TYPE:
            # Types become constants: `x.to(y.dtype)`, or the lowest number of one.
            for node, expression in self._inputs.items():
                read = f"{expression}.dtype"
                self.conditions[read] = f"{read} == {self._results[node].dtype}"
            read = f"{_cast_type.__name__}()"
            self.conditions[read] = f"{read} is {_cast_type()}"
            self.objects[_cast_type.__name__] = _cast_type
        return self._call(lambda: self._node_of(func, args, kwargs), run, args, kwargs)

    def call_module(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What calling a module of the copy comes to: a leaf's call is one node, any other one is run."""
        name = self._module_names[id(module)]
        if self._busy or not name or not self._is_leaf(name, module):
            return call(*args, **kwargs)
        node = partial(self._call_of, name, args, kwargs)
        return self._call(node, call, args, kwargs)

    def _call_of(self, name: str, args: Any, kwargs: Any) -> fx.Node:
        return self.graph.call_module(name, self._arguments(args), self._arguments(kwargs))

    def _call(self, write: Callable[[], fx.Node], func: Any, args: Any, kwargs: Any) -> Any:
        """Do one call, and write it down if it made something of tensors."""
        self._note_decisions()
        self._busy = True
        try:
            result = func(*args, **kwargs)
            makes_tensors = any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result))
            if makes_tensors or func is torch.Tensor.__setitem__:
                self._know(write(), result)
        finally:
            self._busy = False
        # What torch's own code asked of sizes, to choose a kernel or to check them, it will ask again.
        self._guards_seen = len(self._shapes.guards)
        return result

    def _node_of(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        name = getattr(func, "__name__", "")
        given, named = self._arguments(args), self._arguments(kwargs)
        if name == "__get__":  # a property: `x.mT`
            return self.graph.call_function(getattr, (given[0], func.__self__.__name__))
        if name in _OPERATORS and func is getattr(torch.Tensor, name, None) and not named:
            ordered = given[::-1] if name in _REFLECTED else given
            return self.graph.call_function(_OPERATORS[name], ordered)
        if func is getattr(torch.Tensor, name, None):
            return self.graph.call_method(name, given, named)
        return self.graph.call_function(func, given, named)

    def _know(self, node: fx.Node, result: Any) -> None:
        """Note which node made what; the items of a tuple are nodes of their own."""
        self._results[node] = result
        if isinstance(result, torch.Tensor):
            self._nodes[id(result)] = node
        elif isinstance(result, tuple | list):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._know(self.graph.call_function(operator.getitem, (node, index)), item)

    def _note_decisions(self) -> None:
        """Guards since the last call of torch: what the host's Python decided by a size."""
        guards = self._shapes.guards[self._guards_seen :]
        self._decided += [guard.expr for guard in guards]
        self._guards_seen = len(self._shapes.guards)

    # What calls were given

    def _arguments(self, given: Any) -> Any:
        if isinstance(given, torch.Tensor):
            return self._tensor(given)
        if isinstance(given, torch.SymInt):
            return self._size(given.node.expr)
        if isinstance(given, torch.SymFloat | torch.SymBool):
            raise TraceError("its forward computes with a size in a way that cannot be written down")
        if isinstance(given, torch.device):
            # What stands in is on the CPU; generated code runs where its first input is.
            return self._device()
        if isinstance(given, nn.Module):
            name = self._module_names[id(given)]
            return self.graph.get_attr(name) if name else self._self
        if isinstance(given, FunctionType):
            return FunctionReference(given)
        if isinstance(given, slice):
            return slice(*map(self._arguments, (given.start, given.stop, given.step)))
        if is_dataclass(given) and not isinstance(given, type):
            # A host that returns an object of its own (x-transformers): it is made anew from its fields.
            named = {field.name: self._arguments(getattr(given, field.name)) for field in fields(given) if field.init}
            return self.graph.call_function(type(given), (), named)
        if isinstance(given, tuple) and hasattr(given, "_fields"):
            return self.graph.call_function(type(given), tuple(map(self._arguments, given)))
        if isinstance(given, tuple | list):
            items = [self._arguments(item) for item in given]
            return items if isinstance(given, list) else tuple(items)
        if isinstance(given, dict):
            return {key: self._arguments(item) for key, item in given.items()}
        return given

    def _tensor(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = self._tensor_names.get(id(tensor))
            if name is None:
                raise TraceError("its forward uses a tensor that is neither an argument, a parameter nor a buffer")
            node = self.graph.get_attr(name)
            self._know(node, tensor)
        return self._nodes[id(tensor)]

    def _device(self) -> fx.Node:
        return self.graph.call_function(getattr, (next(iter(self._inputs)), "device"))

    def _size(self, expression: sympy.Expr) -> Any:
        """A size as a number, where it always is that one, or as a node that computes it from the inputs' sizes."""
        expression = self._shapes.simplify(expression)
        if expression.is_number:
            return int(expression)
        if expression not in self._sizes:
            proxies = {symbol: self._symbol(symbol) for symbol in expression.free_symbols}
            self._sizes[expression] = sympy_interp(PythonReferenceAnalysis, proxies, expression).node
        return self._sizes[expression]

    def _symbol(self, symbol: sympy.Symbol) -> fx.Proxy:
        if symbol not in self._sizes:
            source, axis = self._sources[symbol]
            self._sizes[symbol] = self.graph.call_method("size", (source, axis))
        return fx.Proxy(self._sizes[symbol])

    # What comes out

    def _value(self, result: Any) -> Any:
        """What a node held in the recorded call, on meta, with the memory that it shares with others."""
        if isinstance(result, torch.Tensor):
            return self._on_meta(result)
        if isinstance(result, tuple | list):
            return tuple(self._value(item) for item in result)
        return result

    def _on_meta(self, fake: torch.Tensor) -> torch.Tensor:
        storage = fake.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            memory = torch.empty(plain_size(storage.nbytes()), dtype=torch.uint8, device="meta")
            self._memories[storage._cdata] = memory
        sizes, strides = [list(map(plain_size, numbers)) for numbers in (fake.shape, fake.stride())]
        return torch.as_strided(memory.view(fake.dtype), sizes, strides, plain_size(fake.storage_offset()))

    def finish(self, result: Any) -> tuple[str, ...]:
        """Close the graph with what the forward returned; the conditions on sizes and types under which it holds."""
        self._note_decisions()
        self.graph.output(self._arguments(result))
        for node in reversed(list(self.graph.nodes)):
            # An item of a tuple that nobody takes.
            if node.target is operator.getitem and not node.users:
                self.graph.erase_node(node)
        for node in self.graph.nodes:
            if node in self._results:
                node.meta["value"] = self._value(self._results[node])
            elif node.op == "call_method":
                node.meta["value"] = value_of(node.args[0]).size(node.args[1])
            elif node.op == "call_function":  # of sizes, or an object around results
                node.meta["value"] = node.target(*value_of(node.args), **value_of(node.kwargs))
        return self._conditions()

    def _conditions(self) -> tuple[str, ...]:
        names = {symbol: f"{self._inputs[node]}.shape[{axis}]" for symbol, (node, axis) in self._sources.items()}
        conditions: list[str] = []
        # Some of torch's functions take a size for the number that it has: then it is no symbol any more.
        for symbol, size in self._shapes.replacements.items():
            if symbol in names and size.is_number:
                conditions.append(f"{names[symbol]} == {size}")
        for expression in self._decided:
            if not expression.free_symbols <= names.keys():
                raise TraceError(f"its forward decides something by {expression}, which is no size of its inputs")
            conditions.append(_Printer(names).doprint(expression))
        return (*self.conditions.values(), *dict.fromkeys(conditions))


class _Printer(PythonPrinter):
    """Writes a condition on sizes as Python that reads them off the inputs."""

    def __init__(self, names: dict[sympy.Symbol, str]) -> None:
        super().__init__()
        self._names = names

    def _print_Symbol(self, symbol: sympy.Symbol) -> str:
        return self._names[symbol]


def trace_by_running(module: nn.Module, call: Call, opaque: Callable[[str, nn.Module], bool]) -> Trace:
    """The graph of `module` for one recorded call, as `trace` gives it, from a run on fake tensors.

    Raises:
        TraceError: the forward looks at the numbers in a tensor, or does something that a graph cannot hold.
    """
    signature, data, rebuild = bind(type(module), call)
    recorder = _Recorder(lambda name, child: is_builtin(child) or opaque(name, child))
    root = copy_with(module, recorder.stand_in)
    recorder.know_modules(root)
    nested = dict(signature.preamble)
    forward = type(module).forward
    for child in list(root.modules()):
        spy(child, recorder.attribute, recorder.attribute, recorder.call_module)
    with ExitStack() as stack:
        stack.enter_context(one_at_a_time())
        stack.enter_context(followed_functions())
        stack.enter_context(noted_interfaces(recorder.interface))
        try:
            leaves = [recorder.placeholder(name, nested.get(name, name), value) for name, value in data.items()]
            args, kwargs = rebuild(tuple(leaves))
            # Without torch's Python kernels some functions (F.pad, torch.lerp) take no symbols for sizes.
            with enable_python_dispatcher(), recorder.fakes, recorder, torch.no_grad(), _same_cast():
                result = forward(root, *args, **kwargs)
            found = recorder.finish(result)
        except TraceError:
            raise
        except _LOOKED_AT_NUMBERS as error:
            raise TraceError("its forward branches on the contents of a tensor") from error
        except Exception as error:
            raise TraceError(f"its forward cannot be traced: {type(error).__name__}: {error}") from error
    objects = {**signature.objects, **recorder.objects}
    return Trace(recorder.graph, replace(signature, conditions=(*signature.conditions, *found), objects=objects))


def _cast_type() -> torch.dtype | None:
    """What autocast computes with where it is on; None where it is off."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


def _same_cast() -> AbstractContextManager[Any]:
    """Autocast on the CPU, where the stand-ins are, if it is on for another device."""
    dtype = _cast_type()
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)
