"""The projections of a traced attention module: which nodes make channels out of tokens, and what they are made of."""

import operator
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery.discover.layout import find_layout, first_alike, follow, is_cast
from armour_surgery.discover.match import (
    all_above,
    inputs_of,
    is_call_of,
    is_tensor,
    is_weight,
    outputs_of,
    projection_arguments,
)
from armour_surgery.discover.nodes import Changes
from armour_surgery.traced import BiasPiece, Producer, Trace

__all__ = ["extend_by_bias", "find_producers", "rows_in"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE = {F.conv1d, F.conv2d, F.conv3d}
_SIZES = ("out_features", "out_channels", "num_features")

TraceInside = Callable[[str, fx.Node], Trace]


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, _CONVOLUTIONS)
        and module.groups == 1
        and set(module.kernel_size) == {1}
        and set(module.stride) == {1}
    )


def _own_rows(module: nn.Module, path: str) -> tuple[str, ...]:
    """Parameters and buffers of one layer that have a row per output channel."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return tuple(f"{path}.{name}" for name, tensor in tensors.items() if tensor.ndim > 0)


def _own_sizes(module: nn.Module, path: str) -> tuple[tuple[str, str], ...]:
    """The attributes of one layer that state how many output channels it has."""
    return tuple((path, name) for name in _SIZES if hasattr(module, name))


def _layer(node: fx.Node, module: nn.Module) -> Producer | None:
    """A call of a Linear or an ungrouped convolution."""
    # The exact classes: a subclass may do more than its name says (quantize, add a LoRA branch), and is looked into.
    linear = type(module) is nn.Linear
    convolution = type(module) in _CONVOLUTIONS and module.groups == 1
    # A weight that is computed before every call (weight norm, pruning) is no parameter.
    if (not linear and not convolution) or "weight" not in module._parameters:
        return None
    path = str(node.target)
    weight = module.get_parameter("weight")
    return Producer(
        node=node,
        fqn=path,
        reads=inputs_of(node)[0].name,
        axis=-1 if linear else -weight.ndim + 1,
        channels=weight.shape[0],
        rows=_own_rows(module, path),
        sizes=_own_sizes(module, path),
        bias=(),
        weight=f"{path}.weight",
        plain=_is_pointwise(module),
        chain=(node,),
    )


def _container(node: fx.Node, modules: dict[str, nn.Module], trace_inside: TraceInside) -> Producer | None:
    """A call of a module that holds one projection, followed at most by what acts on each channel for itself."""
    path = str(node.target)
    inside = {name[len(path) + 1 :]: module for name, module in modules.items() if name.startswith(f"{path}.")}
    if not any(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) for module in inside.values()):
        return None
    graph = trace_inside(path, node).graph
    entry, result, layer = _only_input(graph), _only_result(graph), _last_layer(graph, inside)
    if entry is None or result is None or layer is None:
        return None
    norms = _norms_between(graph, layer, result, inside)
    if norms is None:
        return None
    rows: list[str] = []
    sizes: list[tuple[str, str]] = []
    for name in (layer.fqn, *norms):
        rows += _own_rows(inside[name], f"{path}.{name}")
        sizes += _own_sizes(inside[name], f"{path}.{name}")
    # `reads` is compared by name: what a container does to its input first makes it another tensor than the input.
    reads = inputs_of(node)[0].name
    if inputs_of(layer.node)[0] is not entry:
        reads = f"{reads} after {path}"
    return replace(
        layer,
        node=node,
        fqn=path,
        reads=reads,
        rows=tuple(rows),
        sizes=tuple(sizes),
        weight=f"{path}.{layer.weight}",
        chain=(node,),
    )


def _only_input(graph: fx.Graph) -> fx.Node | None:
    """The one tensor that a graph takes; None where it takes several."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]
    return placeholders[0] if len(placeholders) == 1 else None


def _only_result(graph: fx.Graph) -> fx.Node | None:
    """The one node that a graph returns; None where it returns a tuple, or a constant."""
    returned = graph.output_node().args[0]
    return returned if isinstance(returned, fx.Node) else None


def _last_layer(graph: fx.Graph, modules: dict[str, nn.Module]) -> Producer | None:
    """The last Linear or ungrouped convolution that a graph calls."""
    last = None
    for node in graph.nodes:
        if node.op == "call_module":
            last = _layer(node, modules[str(node.target)]) or last
    return last


def _norms_between(
    graph: fx.Graph, layer: Producer, result: fx.Node, modules: dict[str, nn.Module]
) -> list[str] | None:
    """The BatchNorms that act on a layer's channels; None where the result is not these channels in their order."""
    # They act on each channel for itself, and the rows of a norm are narrowed together with the layer's.
    transparent = [node for node in graph.nodes if is_call_of(node, modules, _BatchNorm, nn.Identity)]
    flow = follow(graph, layer.node, transparent=transparent)
    if result not in flow.pure:
        return None
    numbers: torch.Tensor = flow[result]
    in_place = torch.equal(numbers.flatten(), torch.arange(numbers.numel()))
    if not in_place or numbers.shape[layer.axis] != layer.channels:
        return None
    names = []
    for norm in transparent:
        # A norm before the layer acts on other channels; its rows are none of ours.
        if norm not in flow or is_call_of(norm, modules, nn.Identity):
            continue
        if not _sees_whole_channels(flow[norm], layer):
            return None
        names.append(str(norm.target))
    return names


def _sees_whole_channels(numbers: torch.Tensor, layer: Producer) -> bool:
    """Whether a BatchNorm's axis 1 runs over the layer's channels, all of them and in order."""
    # In what a Linear makes, the channels of the first token are the first numbers; a convolution makes whole planes.
    inner = 1 if layer.axis == -1 else numbers[0, 0].numel()
    return numbers.shape[1] == layer.channels and torch.equal(
        numbers[0].reshape(layer.channels, -1)[:, 0], torch.arange(layer.channels) * inner
    )


def _functional(node: fx.Node) -> Producer | None:
    """An `F.linear` or convolution called on the module's own parameters."""
    if node.op != "call_function" or (node.target is not F.linear and node.target not in _CONVOLVE):
        return None
    arguments = projection_arguments(node)
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if not isinstance(weight, fx.Node) or set(arguments) > {"input", "weight", "bias"}:
        return None
    stored = _stored(weight)
    if stored is None:
        return None
    rows = weight.meta["value"].shape[0]
    pieces = _bias_pieces(bias, rows) if isinstance(bias, fx.Node) else ()
    turning, first_row, out_axes = stored
    whole = first_row == 0 and not out_axes
    factors = _factors(bias, rows) if isinstance(bias, fx.Node) and pieces is None and whole else []
    if factors:
        pieces = ()
    elif pieces is None and isinstance(bias, fx.Node) and is_weight(bias) and bias.meta["value"].shape == (rows,):
        # Edited before every call (SwinV2 zeroes K's part of a copy): it is edited as before, and then rows are taken.
        pieces = (BiasPiece(bias, 0, rows),)
    source = arguments["input"]
    if pieces is None or not isinstance(source, fx.Node):
        return None
    path = str(turning[0].target)
    # Of a list of parameters each is a projection of its own; a layer's weight stands for the layer.
    owner, _, name = path.rpartition(".")
    owner = owner if name == "weight" else ""
    # A weight that a submodule owns (EVA's `F.linear(x, self.qkv.weight, bias)`) has a module that states its size.
    sizes = tuple((owner, name) for name in ("out_features", "out_channels")) if owner else ()
    return Producer(
        node=node,
        fqn=owner or path,
        reads=source.name,
        axis=-1 if node.target is F.linear else -weight.meta["value"].ndim + 1,
        channels=rows,
        rows=(path, *dict.fromkeys(str(factor.target) for factor in factors if factor.op == "get_attr")),
        sizes=sizes,
        bias=pieces,
        weight=path,
        plain=node.target is F.linear and not out_axes and not factors,
        chain=(*turning, node, *factors),
        first_row=first_row,
        out_axes=out_axes,
    )


def _stored(weight: fx.Node) -> tuple[tuple[fx.Node, ...], int, tuple[int, ...]] | None:
    """How a weight comes from a parameter: the nodes from that on, its first row, and `Producer.out_axes`.

    None where it is anything else than rows of one, or all of it turned around.
    """
    sliced = rows_in(weight)
    if sliced is not None:
        return (sliced[0],), sliced[1], ()
    turning = [weight]
    while turning[0].op != "get_attr":
        sources = inputs_of(turning[0])
        if len(sources) != 1:
            return None
        turning.insert(0, sources[0])
    parameter = turning[0]
    shape = parameter.meta["value"].shape
    flow = follow(weight.graph, parameter)
    if weight not in flow.pure or weight.meta["value"].ndim != 2 or weight.meta["value"].numel() != shape.numel():
        return None
    layout = find_layout(
        flow[weight], lambda numbers: dict(enumerate(torch.unravel_index(numbers, shape))), dict(enumerate(shape))
    )
    if layout is None:
        return None
    axes = tuple(axis for axis in layout[0] if isinstance(axis, int))
    return tuple(turning), 0, axes


def rows_in(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The parameter or buffer of which a node holds rows, one after the other, and the first of them; or None.

    The parameter itself is all of its rows; `weight.chunk(3)[1]` or `weight[8:16]` are some.
    """
    source = node
    while source.op != "get_attr":
        first = source.args[0] if source.args else None
        if not isinstance(first, fx.Node):
            return None
        source = first
    # A view says itself what it is a view of: it has the memory, the strides and, but for the first, the sizes.
    rows, whole = node.meta["value"], source.meta["value"]
    if not isinstance(rows, torch.Tensor) or not isinstance(whole, torch.Tensor) or not rows.ndim:
        return None
    if rows.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        return None
    if rows.shape[1:] != whole.shape[1:] or rows.stride() != whole.stride() or rows.dtype != whole.dtype:
        return None
    skipped = int(rows.storage_offset()) - int(whole.storage_offset())
    return None if skipped % whole.stride(0) else (source, skipped // whole.stride(0))


def _factors(bias: fx.Node, channels: int) -> list[fx.Node]:
    """The nodes of a bias that is a product of the module's tensors, row by row (DINOv3 masks K's); none for others."""
    above = all_above(bias)
    for node in above:
        by_rows = node.op == "get_attr" or is_cast(node) or node.target in (operator.mul, torch.mul, "mul")
        if not by_rows or node.meta["value"].shape != (channels,):
            return []
    return [node for node in bias.graph.nodes if node in above]


def _bias_pieces(bias: fx.Node, channels: int) -> tuple[BiasPiece, ...] | None:
    """What a bias is concatenated from; None if it is anything but parameters, one after the other."""
    single = rows_in(bias)
    if single is not None:
        return (_piece(bias, 0),) if bias.meta["value"].shape == (channels,) else None
    if bias.op != "call_function" or bias.target not in (torch.cat, torch.concat) or len(bias.args) != 1 or bias.kwargs:
        return None
    parts = bias.args[0]
    if not isinstance(parts, tuple | list):
        return None
    pieces, start = [], 0
    for part in parts:
        if not isinstance(part, fx.Node) or not _only_parameters(part) or part.meta["value"].ndim != 1:
            return None
        pieces.append(_piece(part, start))
        start = pieces[-1].stop
    return tuple(pieces) if start == channels else None


def _piece(node: fx.Node, start: int) -> BiasPiece:
    """The part of a bias that a node holds, put from channel `start` on."""
    stop = start + node.meta["value"].shape[0]
    stored = rows_in(node)
    if stored is None:
        return BiasPiece(node, start, stop)
    return BiasPiece(node, start, stop, str(stored[0].target), stored[1])


def _only_parameters(node: fx.Node) -> bool:
    # BEiT and EVA write K's missing bias as `zeros_like(v_bias)`.
    if rows_in(node) is not None:
        return True
    return node.target is torch.zeros_like and _only_parameters(inputs_of(node)[0])


def extend_by_bias(producer: Producer) -> Producer:
    """Take in a bias that the host adds right after the product (`qkv = self.qkv(x); qkv += bias`)."""
    users = outputs_of(producer.node)
    if producer.bias or len(users) != 1 or users[0].op != "call_function":
        return producer
    node = users[0]
    # By name, since it may be operator.add, operator.iadd or torch.add; and along the last axis, where a bias belongs.
    if getattr(node.target, "__name__", "") not in ("add", "iadd") or len(node.args) != 2 or producer.axis != -1:
        return producer
    others = [argument for argument in node.args if argument is not producer.node]
    bias = others[0] if len(others) == 1 else None
    if not isinstance(bias, fx.Node) or not is_tensor(bias):
        return producer
    pieces = _bias_pieces(bias, producer.channels)
    if bias.meta["value"].ndim != 1 or pieces is None:
        return producer
    return replace(producer, node=node, bias=pieces, chain=(*producer.chain, node))


def find_producers(
    trace: Trace, modules: dict[str, nn.Module], above: set[fx.Node], trace_inside: TraceInside
) -> tuple[list[Producer], list[str]]:
    """Every projection among the nodes `above` the attention core.

    Returns the producers, and the names of modules that hold a projection but have to be looked into, because more
    happens in them after it.
    """
    producers: list[Producer] = []
    opaque: list[str] = []
    alike = first_alike(trace.graph)
    by_name = {node.name: node for node in trace.graph.nodes}
    changes = Changes()
    for node in trace.graph.nodes:
        changes.note(node)
        if node not in above:
            continue
        if node.op == "call_module":
            module = modules[str(node.target)]
            several_inputs = len(inputs_of(node)) > 1
            producer = _layer(node, module)
            if producer is None and len(inputs_of(node)) == 1:
                producer = _container(node, modules, trace_inside)
            # Numbers cannot be followed through a call with several inputs, whatever it holds.
            if producer is None and (several_inputs or _holds_layers(module)):
                opaque.append(str(node.target))
        else:
            producer = _functional(node)
        if producer is not None:
            name, *after = producer.reads.split(" ", 1)
            source = by_name[name]
            if changes.last(source):  # what was read before that is another tensor than what is read now
                after.append(f"after {changes.last(source)}")
            producers.append(extend_by_bias(replace(producer, reads=" ".join([alike[source].name, *after]))))
    return producers, opaque


def _holds_layers(module: nn.Module) -> bool:
    """Whether a Linear or a convolution is below a module (not: whether it is one)."""
    below = list(module.modules())[1:]
    return any(isinstance(child, (nn.Linear, *_CONVOLUTIONS)) for child in below)
