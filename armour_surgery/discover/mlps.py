"""Find every MLP of a model by dataflow: projections, something that acts on each hidden channel alone, a projection.

Nothing here knows a class or an attribute of any model. Whether hidden channels go one by one from the first
projections to the second shows in which function reads what (`dataflow.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery.altered import innermost, is_plain
from armour_surgery.discover.dataflow import (
    Dataflow,
    FunctionCall,
    follow_model,
    memory_of,
    numbers_after,
    repeat_layout,
)
from armour_surgery.traced import FoundMlp, HiddenRows

__all__ = ["find_mlps", "mlps_in"]

# Functions of one number, or of two in the same place: a hidden channel stays what it is, and meets no other.
_POINTWISE = {
    "gelu", "silu", "relu", "relu_", "relu6", "elu", "celu", "selu", "mish", "hardswish", "hardsigmoid", "hardtanh",
    "leaky_relu", "softplus", "sigmoid", "logsigmoid", "tanh", "erf", "exp", "square", "pow", "sqrt", "clamp", "clip",
    "mul", "add", "sub", "div", "__mul__", "__rmul__", "__add__", "__radd__", "__sub__", "__rsub__", "__truediv__",
    "__pow__", "multiply", "float", "to", "type", "dropout", "neg", "__neg__", "abs",
}  # fmt: skip
_PIECES = {"chunk", "split", "tensor_split", "unbind", "split_with_sizes"}
# Fewer tokens than this in an image are a head's or a gate's, and no stream's.
_FEWEST_TOKENS = 4
_FEWEST_CHANNELS = 16


def find_mlps(model: nn.Module, example: dict[str, Tensor]) -> list[FoundMlp]:
    """Every MLP whose hidden channels can be fewer, in the order in which they run.

    Raises:
        ExampleInputError: the model did not accept the example.
    """
    return mlps_in(model, follow_model(model, example))


def mlps_in(model: nn.Module, flow: Dataflow) -> list[FoundMlp]:
    """The same, of a model that was followed already."""
    found: list[FoundMlp] = []
    taken: set[str] = set()
    for call in flow.calls:
        mlp = _mlp_at(model, flow, call)
        # One that is a first projection of one and the second of another would be narrowed from two sides.
        if mlp is not None and taken.isdisjoint(mlp.weights):
            found.append(mlp)
            taken.update(mlp.weights)
    return _named_apart(found)


@dataclass
class _Hidden:
    """What lies between: projections by the channel numbers that arrive, and every call and tensor on the way."""

    firsts: list[tuple[FunctionCall, Tensor]] = field(default_factory=list)
    calls: list[FunctionCall] = field(default_factory=list)
    norms: list[FunctionCall] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)


def _mlp_at(model: nn.Module, flow: Dataflow, second: FunctionCall) -> FoundMlp | None:
    """The MLP that ends with this call; None where it ends none."""
    layer = _layer(model, flow, second)
    if layer is None or not isinstance(second.source, Tensor):
        return None
    axis = -1 if second.name == "linear" else 1 - second.argument(1, "weight").ndim
    hidden = second.source
    channels = hidden.shape[axis]
    if channels < _FEWEST_CHANNELS or hidden.numel() < _FEWEST_TOKENS * channels * len(hidden):
        return None
    between = _Hidden()
    if not _follow(flow, hidden, between) or not between.calls or not _closed(flow, second, between):
        return None
    rows = _rows_of(model, flow, between, hidden, axis)
    if rows is None:
        return None
    return FoundMlp(
        fqn=innermost([*(row.weight for row in rows), f"{layer}.weight"]),
        hidden=channels,
        firsts=rows,
        second=layer,
    )


def _layer(model: nn.Module, flow: Dataflow, call: FunctionCall) -> str | None:
    """The Linear or pointwise convolution that makes this call, by name, if its weights are its own and plain."""
    if not call.is_linear:
        return None
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    name = flow.own_name(weight)
    if name is None or weight[0].numel() != weight.shape[1] or (bias is not None and flow.own_name(bias) is None):
        return None  # shared, computed, used twice, over neighbors, or in groups
    fqn = name.rpartition(".")[0]
    layer = model.get_submodule(fqn)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or flow.is_hooked(fqn):
        return None
    groups = getattr(layer, "groups", 1)
    plain = is_plain(layer, "weight") and (layer.bias is None or is_plain(layer, "bias"))
    return fqn if plain and groups == 1 else None


def _follow(flow: Dataflow, tensor: Tensor, between: _Hidden) -> bool:
    """Go back from a tensor to the projections that it is made from; whether each channel came alone."""
    maker = flow.maker(tensor)
    if maker is None:
        return False
    if any(known is tensor for known in between.tensors):
        return True
    between.tensors.append(tensor)
    if maker.is_linear:
        between.firsts.append((maker, tensor))
        return True
    between.calls.append(maker)
    if maker.name in _PIECES:
        between.tensors += [other for other in maker.outputs if other is not tensor]
        return _follow(flow, maker.source, between)
    if maker.name == "batch_norm" or maker.is_layout:
        if maker.name == "batch_norm":
            between.norms.append(maker)
        return _follow(flow, maker.source, between)
    if maker.name not in _POINTWISE:
        return False
    sources = [read for read in maker.reads() if read.numel() > 1]
    same = all(read.shape == tensor.shape and read.dtype == tensor.dtype for read in sources)
    return bool(sources) and same and all(_follow(flow, read, between) for read in sources)


def _closed(flow: Dataflow, second: FunctionCall, between: _Hidden) -> bool:
    """Whether nothing else reads what lies between, and nothing but functions in place writes into it."""
    own = [*between.calls, second]
    written: set[int] = set()
    for tensor in between.tensors:
        for reader in flow.readers_of(tensor):
            in_place = bool(reader.outputs) and reader.outputs[0] is tensor and reader.name in _POINTWISE
            if in_place:
                written.add(memory_of(tensor))
            elif not any(reader is known for known in own):
                return False
    # An activation in place writes into all views of what it is given.
    return not any(
        flow.is_result(tensor) or (flow.is_written(tensor) and memory_of(tensor) not in written)
        for tensor in between.tensors
    )


def _rows_of(
    model: nn.Module, flow: Dataflow, between: _Hidden, hidden: Tensor, axis: int
) -> tuple[HiddenRows, ...] | None:
    """For each first projection, which of its channels make each hidden channel."""
    rows: list[HiddenRows] = []
    for first, made in between.firsts:
        layer = _layer(model, flow, first)
        if layer is None:
            return None
        own_axis = -1 if first.name == "linear" else 1 - first.argument(1, "weight").ndim
        numbers = numbers_after(made, own_axis, [])
        places = [_line(arrived, axis) for arrived in _arrivals(flow, made, numbers, hidden, between)]
        if not places or any(place is None for place in places):
            return None
        tensors = [f"{layer}.weight"]
        if first.argument(2, "bias") is not None:
            tensors.append(f"{layer}.bias")
        sizes = [(layer, "out_features" if first.name == "linear" else "out_channels")]
        for norm in between.norms:
            name = norm.module
            module = model.get_submodule(name)
            if not isinstance(module, _BatchNorm) or _maker_before(flow, norm) is not first:
                continue
            held = ("weight", "bias", "running_mean", "running_var")
            tensors += [f"{name}.{one}" for one in held if getattr(module, one) is not None]
            sizes.append((name, "num_features"))
        # By several ways it may arrive as the same channels (GELU written out reads its input three times).
        pieces = tuple(sorted({tuple(place) for place in places if place is not None}, key=min))
        flat = [row for piece in pieces for row in piece]
        if len(set(flat)) != len(flat) or len(flat) != made.shape[own_axis]:
            return None
        rows.append(HiddenRows(f"{layer}.weight", tuple(tensors), tuple(sizes), pieces))
    known = sum(1 for row in rows for tensor in row.tensors if "running_mean" in tensor)
    return tuple(rows) if known == len(between.norms) else None


def _maker_before(flow: Dataflow, norm: FunctionCall) -> FunctionCall | None:
    """The projection that a norm reads, through layout."""
    maker = flow.maker(norm.source)
    while maker is not None and maker.is_layout:
        maker = flow.maker(maker.source)
    return maker


def _arrivals(flow: Dataflow, tensor: Tensor, numbers: Tensor, goal: Tensor, between: _Hidden) -> Iterator[Tensor]:
    """The channel numbers with which a first projection arrives at the second, by each way that leads there."""
    if tensor is goal:
        yield numbers
        return
    for reader in flow.readers_of(tensor):
        if not any(reader is known for known in between.calls) or reader.outputs[0] is tensor:
            continue
        if reader.name in _PIECES:
            moved = reader.function(numbers, *reader.args[1:], **reader.kwargs)
            for piece, output in zip(moved, reader.outputs, strict=True):
                yield from _arrivals(flow, output, piece, goal, between)
        elif reader.is_layout:
            yield from _arrivals(flow, reader.outputs[0], repeat_layout(reader, numbers), goal, between)
        else:
            yield from _arrivals(flow, reader.outputs[0], numbers, goal, between)


def _line(numbers: Tensor, axis: int) -> list[int] | None:
    """The channels along an axis, if they are the same wherever one looks."""
    moved = numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis])
    return moved[0].tolist() if bool((moved == moved[0]).all()) else None


def _named_apart(found: list[FoundMlp]) -> list[FoundMlp]:
    """Where a module holds several MLPs, they are called by what ends them."""
    names = [mlp.fqn for mlp in found]
    return [replace(mlp, fqn=mlp.second) if names.count(mlp.fqn) > 1 or not mlp.fqn else mlp for mlp in found]
