"""From the attention core forward to the projection that reads its result."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from armour_surgery.copies import meta_copy
from armour_surgery.discover.layout import Flow, follow
from armour_surgery.discover.match import find_core, is_call_of, is_tensor, projection_arguments, result_of
from armour_surgery.discover.trace import trace
from armour_surgery.errors import TraceError
from armour_surgery.traced import Call, OutputProjection, Role

__all__ = ["find_output", "output_of"]

_CONVOLUTIONS = {F.conv1d, F.conv2d, torch.conv1d, torch.conv2d}


def find_output(module: nn.Module, call: Call, value: Role) -> OutputProjection | None:
    """The projection of the heads' results in one call of an attention module; None where there is no single one.

    Whatever happens between the core and it is allowed as long as positions stay: whether V's basis is free is not
    said here. `value` is the site's V as discovered.

    Raises:
        TraceError: the module cannot be traced through its submodules.
    """
    modules = dict(module.named_modules())
    graph = trace(module, call, lambda name, child: False).graph
    core = find_core(graph, modules)
    if core is None:
        return None
    result, axes = result_of(core)
    flow = follow(graph, result)
    for node in graph.nodes:
        projection = _projection(node, modules)
        if projection is None:
            continue
        source, weight, bias, axis = projection
        # Projections before the core, or beside it, read nothing of what the heads found.
        numbers = flow.get(source)
        if not isinstance(numbers, torch.Tensor):
            continue
        channels = _channels(numbers, axis, result.meta["value"].shape, axes, value)
        if channels is None:
            return None
        return OutputProjection(weight, bias, _norm_after(graph, node, modules), channels)
    return None


def _projection(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, str, str | None, int] | None:
    """Input, weight, bias and channel axis (from the end) of a Linear or 1x1 convolution."""
    if not is_tensor(node) or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            return None
        bias = f"{node.target}.bias" if module.bias is not None else None
        weight, tensor = f"{node.target}.weight", module.weight
    elif node.op == "call_function" and (node.target is F.linear or node.target in _CONVOLUTIONS):
        arguments = projection_arguments(node)
        first, second = arguments.get("weight"), arguments.get("bias")
        if not isinstance(first, fx.Node) or first.op != "get_attr":
            return None
        if second is not None and (not isinstance(second, fx.Node) or second.op != "get_attr"):
            return None
        weight, bias = str(first.target), str(second.target) if second is not None else None
        tensor = first.meta["value"]
    else:
        return None
    # A kernel that is larger than 1x1 mixes neighbors: its channels are no single tokens' channels.
    if tensor[0].numel() != tensor.shape[1]:
        return None
    return source, weight, bias, -1 if tensor.ndim == 2 else 1 - tensor.ndim


def _channels(
    numbers: torch.Tensor, axis: int, shape: torch.Size, axes: tuple[int, int], value: Role
) -> tuple[tuple[int, ...], ...] | None:
    """Which input channel of the projection is which head and dimension, if every token agrees on it."""
    # One line for each token that the projection reads: the elements of the core's result that are its channels.
    lines = numbers.movedim(axis, -1).reshape(-1, numbers.shape[axis])
    place = torch.arange(shape.numel()).reshape(shape).movedim(axes, (-2, -1))
    tokens, width = place.shape[-2:]
    # The same elements, numbered as if the result were [.., N, e]: dimension and token then follow by division.
    flat = torch.empty(shape.numel(), dtype=torch.long)
    flat[place.flatten()] = torch.arange(shape.numel())
    position = flat[lines]
    dimension, lead = position % width, position // (tokens * width)
    if width != value.head_dim or lines.shape[-1] != value.num_heads * width:
        return None
    # Heads are the leading axis that runs fastest, or the only one that is as long.
    heads = _heads_of(lead, place.shape[:-2], value.num_heads)
    if heads is None or bool((dimension != dimension[:1]).any()) or bool((heads != heads[:1]).any()):
        return None
    table = torch.full((value.num_heads, width), -1)
    table[heads[0], dimension[0]] = torch.arange(lines.shape[-1])
    # As many channels as places: a place is left empty only where another one is read twice.
    if bool((table == -1).any()):
        return None
    return tuple(map(tuple, table.tolist()))


def _heads_of(lead: torch.Tensor, shape: torch.Size, num_heads: int) -> torch.Tensor | None:
    """The head of each leading position: the core's axis that all channels of one token run over."""
    coordinates = torch.unravel_index(lead, shape)
    for axis in reversed(range(len(shape))):
        varies = bool((coordinates[axis] != coordinates[axis][:, :1]).any())
        if shape[axis] == num_heads and (varies or num_heads == 1):
            return coordinates[axis]
    if num_heads == 1:
        return torch.zeros_like(lead)
    # Batch and heads in one axis (B * H), heads inside.
    return coordinates[0] % num_heads if len(shape) == 1 else None


def _norm_after(graph: fx.Graph, node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The BatchNorm that all of a projection's output goes through, if the first thing that acts on it is one."""
    flow: Flow = follow(graph, node)
    for other in graph.nodes:
        if other not in flow or other is node:
            continue
        if is_call_of(other, modules, _BatchNorm):
            return str(other.target)
        if other not in flow.pure:
            return None
    return None


def output_of(module: nn.Module, call: Call, value: Role) -> OutputProjection | None:
    """`find_output` in eval mode on a weightless copy; None also where the module cannot be traced through."""
    copied = meta_copy(module)
    copied.eval()  # timm's LeViT attention returns nothing here
    with suppress(TraceError), torch.no_grad():
        return find_output(copied, call, value)
    return None
