"""The projections of a traced attention module: which nodes make channels out of tokens, and what they are made of."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery.discover.layout import follow
from armour_surgery.discover.match import inputs_of, is_tensor
from armour_surgery.traced import BiasPiece, Producer, Trace

__all__ = ["extend_by_bias", "find_producers"]

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
    return tuple((path, name) for name in _SIZES if hasattr(module, name))


def _layer(node: fx.Node, module: nn.Module) -> Producer | None:
    """A call of a Linear or an ungrouped convolution."""
    linear = type(module) is nn.Linear
    convolution = type(module) in _CONVOLUTIONS and module.groups == 1
    if not linear and not convolution:
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
    inside = {name: module for name, module in modules.items() if name.startswith(f"{path}.")}
    if not any(isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) for module in inside.values()):
        return None
    graph = trace_inside(path, node).graph
    relative = {name[len(path) + 1 :]: module for name, module in inside.items()}
    outputs = [
        argument for argument in next(n for n in graph.nodes if n.op == "output").args if isinstance(argument, fx.Node)
    ]
    placeholders = [n for n in graph.nodes if n.op == "placeholder" and is_tensor(n)]
    layers = [n for n in graph.nodes if n.op == "call_module" and _layer(n, relative[str(n.target)])]
    if len(outputs) != 1 or not layers or len(placeholders) != 1:
        return None
    layer = layers[-1]
    found = _layer(layer, relative[str(layer.target)])
    assert found is not None
    norms = [n for n in graph.nodes if n.op == "call_module" and isinstance(relative[str(n.target)], _BatchNorm)]
    idle = [n for n in graph.nodes if n.op == "call_module" and isinstance(relative[str(n.target)], nn.Identity)]
    flow = follow(graph, layer, transparent=[*norms, *idle])
    norms = [n for n in norms if n in flow]
    if outputs[0] not in flow.pure:
        return None
    numbers: torch.Tensor = flow[outputs[0]]
    if not torch.equal(numbers.flatten(), torch.arange(numbers.numel())):
        return None
    if numbers.shape[found.axis] != found.channels or not all(_sees_whole_channels(flow[n], found) for n in norms):
        return None
    rows = [*found.rows, *(row for n in norms for row in _own_rows(relative[str(n.target)], str(n.target)))]
    sizes = [
        *found.sizes,
        *(size for n in norms for size in _own_sizes(relative[str(n.target)], str(n.target))),
    ]
    own = inputs_of(layer)[0]
    reads = inputs_of(node)[0].name if own is placeholders[0] else f"{inputs_of(node)[0].name} after {path}"
    return replace(
        found,
        node=node,
        fqn=path,
        reads=reads,
        rows=tuple(f"{path}.{row}" for row in rows),
        sizes=tuple((f"{path}.{name}", attribute) for name, attribute in sizes),
        weight=f"{path}.{found.weight}",
        chain=(node,),
    )


def _sees_whole_channels(numbers: torch.Tensor, layer: Producer) -> bool:
    """Whether a BatchNorm's axis 1 runs over the layer's channels, all of them and in order."""
    inner = 1 if layer.axis == -1 else numbers[0, 0].numel()
    return numbers.shape[1] == layer.channels and torch.equal(
        numbers[0].reshape(layer.channels, -1)[:, 0], torch.arange(layer.channels) * inner
    )


def _functional(node: fx.Node) -> Producer | None:
    """An `F.linear` or convolution called on the module's own parameters."""
    if node.op != "call_function" or (node.target is not F.linear and node.target not in _CONVOLVE):
        return None
    arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | dict(node.kwargs)
    weight, bias = arguments.get("weight"), arguments.get("bias")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or set(arguments) > {"input", "weight", "bias"}:
        return None
    rows = weight.meta["value"].shape[0]
    pieces = _bias_pieces(bias, rows) if isinstance(bias, fx.Node) else ()
    source = arguments["input"]
    if pieces is None or not isinstance(source, fx.Node):
        return None
    path = str(weight.target)
    owner = path.rpartition(".")[0]
    return Producer(
        node=node,
        fqn=owner or path,
        reads=source.name,
        axis=-1 if node.target is F.linear else -weight.meta["value"].ndim + 1,
        channels=rows,
        rows=(path,),
        sizes=tuple((owner, name) for name in ("out_features", "out_channels") if owner),
        bias=pieces,
        weight=path,
        plain=node.target is F.linear,
        chain=(weight, node),
    )


def _bias_pieces(bias: fx.Node, channels: int) -> tuple[BiasPiece, ...] | None:
    """What a bias is concatenated from; None if it is anything but parameters, one after the other."""
    if bias.op == "get_attr":
        return (BiasPiece(bias, 0, channels),)
    if bias.op != "call_function" or bias.target not in (torch.cat, torch.concat) or len(bias.args) != 1 or bias.kwargs:
        return None
    parts = bias.args[0]
    if not isinstance(parts, tuple | list):
        return None
    pieces, start = [], 0
    for part in parts:
        if not isinstance(part, fx.Node) or not _only_parameters(part) or part.meta["value"].ndim != 1:
            return None
        stop = start + part.meta["value"].shape[0]
        pieces.append(BiasPiece(part, start, stop))
        start = stop
    return tuple(pieces) if start == channels else None


def _only_parameters(node: fx.Node) -> bool:
    return node.op == "get_attr" or (node.target is torch.zeros_like and _only_parameters(inputs_of(node)[0]))


def extend_by_bias(producer: Producer) -> Producer:
    """Take in a bias that the host adds right after the product (`qkv = self.qkv(x); qkv += bias`)."""
    users = [user for user in producer.node.users if is_tensor(user)]
    if producer.bias or len(users) != 1 or users[0].op != "call_function":
        return producer
    node = users[0]
    if getattr(node.target, "__name__", "") not in ("add", "iadd") or len(node.args) != 2 or producer.axis != -1:
        return producer
    others = [argument for argument in node.args if argument is not producer.node]
    if len(others) != 1 or not isinstance(others[0], fx.Node) or not is_tensor(others[0]):
        return producer
    pieces = _bias_pieces(others[0], producer.channels)
    if others[0].meta["value"].ndim != 1 or pieces is None:
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
    for node in trace.graph.nodes:
        if node not in above:
            continue
        if node.op == "call_module":
            module = modules[str(node.target)]
            found = _layer(node, module)
            if found is None and len(inputs_of(node)) == 1:
                found = _container(node, modules, trace_inside)
            holds_layers = any(isinstance(child, (nn.Linear, *_CONVOLUTIONS)) for child in list(module.modules())[1:])
            if found is None and (holds_layers or len(inputs_of(node)) > 1):
                opaque.append(str(node.target))
        else:
            found = _functional(node)
        if found is not None:
            producers.append(extend_by_bias(found))
    return producers, opaque
