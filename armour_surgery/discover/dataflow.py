"""Which function of torch makes what every other one reads, in one run of a whole model without weights.

The record is made at the level of function calls, not of modules: it sees the `F.linear`, `F.batch_norm` or product
with a parameter whichever class it is written in, and says which module was running then.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from armour_surgery.altered import has_hooks, names_below, why_altered
from armour_surgery.calls import run, running, without_fast_paths
from armour_surgery.copies import alias, floating_weight, meta_copy
from armour_surgery.discover.record import could_not_run
from armour_surgery.examples import on_meta, with_numbers
from armour_surgery.shapes import RememberedShapes

__all__ = [
    "Dataflow",
    "FunctionCall",
    "follow_model",
    "memory_of",
    "numbers_after",
    "repeat_layout",
    "runs_along",
    "tensors_in",
]

# They move numbers and change none: what goes in as channel c comes out as channel c. Unlike discovery's, this list has
# `expand` and `roll`, which repeat and wrap tokens: channels stay what they are.
_LAYOUT = {
    "view", "reshape", "permute", "transpose", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "select",
    "movedim", "moveaxis", "swapaxes", "swapdims", "clone", "view_as", "reshape_as", "__getitem__", "roll", "narrow",
    "detach", "expand", "expand_as",
}  # fmt: skip
_SHAPE_OF_SECOND = {"view_as", "reshape_as", "expand_as", "type_as"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}


@dataclass(eq=False)
class FunctionCall:
    """One call of a torch function, and the fqn of the innermost module that was running."""

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    module: str

    @property
    def is_linear(self) -> bool:
        """Whether it is a Linear or a convolution."""
        return self.name in _LINEAR

    @property
    def is_layout(self) -> bool:
        """Whether it only moves numbers."""
        return self.name in _LAYOUT and len(self.outputs) == 1

    @property
    def source(self) -> Any:
        """Its first argument, as a rule what it acts on."""
        return self.args[0] if self.args else self.kwargs.get("input")

    def argument(self, index: int, name: str) -> Any:
        """An argument, however it was passed; None where it was not."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)

    def reads(self) -> list[Tensor]:
        """The tensors whose numbers it takes, in order; not those that only lend their shape."""
        args = self.args[:1] if self.name in _SHAPE_OF_SECOND else self.args
        return tensors_in((args, self.kwargs))


@dataclass
class Dataflow:
    """What one run of `model` (a copy without weights, in eval mode) showed.

    `inputs` and `outputs` are what every module took and gave, call by call. `results` are the model's own outputs,
    and what somebody's hooks see on the modules `hooked`: nothing may be folded into or out of it.
    """

    model: nn.Module
    calls: list[FunctionCall] = field(default_factory=list)
    inputs: dict[str, list[Any]] = field(default_factory=dict)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    results: list[Tensor] = field(default_factory=list)
    # Tensors by their id: they compare number by number, and meta tensors have none.
    makers: dict[int, FunctionCall] = field(default_factory=dict)
    readers: dict[int, list[FunctionCall]] = field(default_factory=dict)
    names: dict[int, list[str]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    kept: list[Any] = field(default_factory=list)
    hooked: set[str] = field(default_factory=set)

    def maker(self, tensor: Any) -> FunctionCall | None:
        """The call that made a tensor; None for inputs and parameters."""
        return self.makers.get(id(tensor))

    def readers_of(self, tensor: Tensor) -> list[FunctionCall]:
        """The calls that read a tensor's numbers."""
        return self.readers.get(id(tensor), [])

    def is_result(self, tensor: Tensor) -> bool:
        """Whether the model returns it."""
        return any(tensor is result for result in self.results)

    def is_hooked(self, fqn: str) -> bool:
        """Whether somebody's hook is on a module, or on one inside it."""
        return any(f"{hooked}.".startswith(f"{fqn}.") for hooked in self.hooked)

    def is_written(self, tensor: Tensor) -> bool:
        """Whether something in the run wrote into its memory."""
        return memory_of(tensor) in self.written

    def own_name(self, tensor: Any) -> str | None:
        """The one name of a parameter or buffer that is read exactly once in the run; None of any other tensor."""
        names = self.names.get(id(tensor), [])
        return names[0] if len(names) == 1 and len(self.readers_of(tensor)) == 1 else None

    def alone(self, call: FunctionCall) -> str | None:
        """The module that does this call and nothing else: it takes what the call takes and returns what it returns."""
        calls = sum(other.module == call.module for other in self.calls)
        return self.passes_through(call) if calls == 1 else None

    def passes_through(self, call: FunctionCall) -> str | None:
        """The module, run once, that takes what this call takes and returns what it returns, whatever else it does."""
        taken, given = self.inputs.get(call.module, []), self.outputs.get(call.module, [])
        once = len(taken) == len(given) == 1 and call.module
        return call.module if once and taken[0] is call.source and given[0] is call.outputs[0] else None

    def back(self, tensor: Any) -> tuple[FunctionCall, list[FunctionCall]] | None:
        """The call that made a tensor, and the layout operations since, first one first.

        None where what it made is also read by something else, returned, or written to.
        """
        steps: list[FunctionCall] = []
        while True:
            maker = self.maker(tensor)
            if maker is None or len(self.readers_of(tensor)) != 1 or self.is_result(tensor) or self.is_written(tensor):
                return None
            if not maker.is_layout:
                return maker, steps[::-1]
            steps.append(maker)
            tensor = maker.source

    def ends(self, tensor: Tensor) -> Iterator[tuple[FunctionCall | None, list[FunctionCall]]]:
        """All that reads a tensor, each with the layout operations before it; None for the model's results."""
        waiting: list[tuple[Tensor, list[FunctionCall]]] = [(tensor, [])]
        while waiting:
            current, steps = waiting.pop()
            if self.is_result(current) or self.is_written(current):
                yield None, steps
            for reader in self.readers_of(current):
                if reader.is_layout and reader.source is current:
                    waiting.append((reader.outputs[0], [*steps, reader]))
                else:
                    yield reader, steps


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; one made in inference mode, such as libraries cache, cannot be, and is not."""
    return 0 if tensor.is_inference() else tensor._version


class _Notes(TorchFunctionMode):
    """Write down every call of a torch function."""

    def __init__(self, flow: Dataflow, stack: list[str]) -> None:
        super().__init__()
        self.flow = flow
        self.stack = stack

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        # autograd counts how often a tensor was written to, whichever function did it, under whatever name.
        versions = [_version(tensor) for tensor in inputs]
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        self.flow.kept += [*inputs, *outputs]  # an id must not be given to another tensor
        written: set[int] = set()
        for tensor, version in zip(inputs, versions, strict=True):
            if _version(tensor) != version:
                written.add(memory_of(tensor))
        self.flow.written |= written
        unchanged = len(outputs) == 1 and any(outputs[0] is tensor for tensor in inputs)
        if not written and (unchanged or not outputs):
            return result  # a size, or dropout at rest
        name = getattr(func, "__name__", str(func))
        call = FunctionCall(name, func, tuple(args), dict(kwargs), tuple(outputs), self.stack[-1])
        self.flow.calls.append(call)
        for tensor in call.reads():
            known = self.flow.readers.setdefault(id(tensor), [])
            if call not in known:
                known.append(call)
        for tensor in outputs:
            self.flow.makers.setdefault(id(tensor), call)
        return result


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a nest of sequences and mappings, and in an output of transformers, in order."""
    # Its outputs are dicts of classes of their own, and pytree takes those that nobody registered for leaves.
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """What tensors that share their numbers have in common."""
    # Views share the storage object; meta tensors have no address to go by.
    address: int = tensor.untyped_storage()._cdata
    return address


def follow_model(model: nn.Module, example: dict[str, Tensor]) -> Dataflow:
    """Run a weightless copy of `model` in eval mode on `example` (keyword arguments) and note what flows where.

    Where that fails, since the model looks at numbers, a copy that has the model's own weights is run. The model itself
    is not run and not changed.

    Raises:
        ExampleInputError: the model did not accept the example.
    """
    try:
        flow = _followed(meta_copy(model), on_meta(example))
    except Exception as first:
        if why_altered(model, names_below(model, "")) is not None:
            raise could_not_run(model, example, first) from first  # on a copy, it would run the model's own modules
        try:
            weight = floating_weight(model)
            numbers = with_numbers(example, "cpu" if weight is None else weight.device)
            flow = _followed(alias(model), numbers)
        except Exception as error:
            raise could_not_run(model, example, error) from error
    # Asked of the model itself: the copy has no hooks.
    flow.hooked = {fqn for fqn, module in model.named_modules() if fqn and has_hooks(module)}
    for fqn in flow.hooked:
        flow.results += tensors_in((flow.inputs.get(fqn, []), flow.outputs.get(fqn, [])))
    return flow


def _followed(copied: nn.Module, example: Mapping[str, Any]) -> Dataflow:
    copied.eval()
    flow = Dataflow(copied)
    # With every name of a tied parameter: what has several must not be changed in one place.
    for name, tensor in itertools.chain(
        copied.named_parameters(remove_duplicate=False), copied.named_buffers(remove_duplicate=False)
    ):
        flow.names.setdefault(id(tensor), []).append(name)

    def entered(fqn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((args, kwargs))
        flow.inputs.setdefault(fqn, []).append(leaves[0] if leaves else None)

    def left(fqn: str, output: Any) -> None:
        flow.outputs.setdefault(fqn, []).append(output)

    with (
        torch.no_grad(),
        without_fast_paths(),
        running(copied, entered, left) as stack,
        _Notes(flow, stack),
        RememberedShapes(),
    ):
        result = run(copied, example)
    flow.results = tensors_in(result)
    return flow


def numbers_after(tensor: Tensor, axis: int, steps: list[FunctionCall]) -> Tensor:
    """The channel that every element belongs to, where a tensor with channels at `axis` went through `steps`."""
    shape = [1] * tensor.ndim
    shape[axis] = tensor.shape[axis]
    numbers = torch.arange(tensor.shape[axis]).reshape(shape).expand(tensor.shape)
    for step in steps:
        numbers = repeat_layout(step, numbers)
    return numbers


def repeat_layout(step: FunctionCall, numbers: Tensor) -> Tensor:
    """A layout operation of the run, done once more to numbers."""
    # These numbers need not have the strides of what the host had, and `view` would refuse them.
    function = torch.Tensor.reshape if step.name == "view" else step.function
    moved: Tensor = function(numbers, *step.args[1:], **step.kwargs)
    return moved


def runs_along(numbers: Tensor, axis: int, channels: int) -> bool:
    """Whether element c along `axis` belongs to channel c, wherever one looks."""
    if numbers.shape[axis] != channels:
        return False
    line = torch.arange(channels)
    return bool((numbers.movedim(axis, -1) == line).all())
