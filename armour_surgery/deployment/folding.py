"""Fold a scale and a shift per channel into the projection that makes the channels, or into those that read them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armour_surgery.deployment.dataflow import Dataflow, FunctionCall

__all__ = [
    "Readers",
    "Weights",
    "fold_into_maker",
    "fold_into_readers",
    "numbers_after",
    "readers_of",
    "runs_along",
    "tensor_named",
    "weights_of",
]


@dataclass(frozen=True)
class Weights:
    """The parameters of one Linear or convolution, by name in the model, and the axis of its channels."""

    weight: str
    bias: str | None
    axis: int
    pads: bool


Readers = tuple[Weights, ...]


def weights_of(flow: Dataflow, call: FunctionCall) -> Weights | str:
    """What a Linear or convolution computes with; or why its weights must stay as they are."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    name, bias_name = flow.own_name(weight), flow.own_name(bias)
    if name is None or name not in dict(flow.model.named_parameters()):
        return f"the weight in {call.module or 'the model'} is shared, computed, or used more than once"
    if bias is not None and bias_name is None:
        return f"the bias of {name} is shared, computed, or used more than once"
    owner = flow.model.get_submodule(name.rpartition(".")[0])
    if bias is None and not isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return f"{name} is no Linear's and no convolution's, so it cannot be given a bias"
    padding = call.argument(4, "padding") if call.name != "linear" else 0
    return Weights(name, bias_name, -1 if call.name == "linear" else 1 - weight.ndim, padding not in (0, (0,), (0, 0)))


def numbers_after(tensor: Tensor, axis: int, steps: list[FunctionCall]) -> Tensor:
    """The channel that every element belongs to, where a tensor with channels at `axis` went through `steps`."""
    shape = [1] * tensor.ndim
    shape[axis] = tensor.shape[axis]
    numbers = torch.arange(tensor.shape[axis]).reshape(shape).expand(tensor.shape)
    for step in steps:
        function = torch.Tensor.reshape if step.name == "view" else step.function
        numbers = function(numbers, *step.args[1:], **step.kwargs)
    return numbers


def runs_along(numbers: Tensor, axis: int, channels: int) -> bool:
    """Whether element c along `axis` belongs to channel c, wherever one looks."""
    if numbers.shape[axis] != channels:
        return False
    line = torch.arange(channels)
    return bool((numbers.movedim(axis, -1) == line).all())


def readers_of(flow: Dataflow, tensor: Tensor, axis: int) -> Readers | str:
    """All that reads a tensor with channels at `axis`, if all of it is Linears and convolutions; or what else does."""
    found: list[Weights] = []
    for reader, steps in flow.ends(tensor):
        if reader is None:
            return "the model returns it, or something writes into it"
        if not reader.is_linear or not any(reader.source is out for out in [tensor, *(s.outputs[0] for s in steps)]):
            return f"{reader.name} in {reader.module or 'the model'} reads it too"
        weights = weights_of(flow, reader)
        if isinstance(weights, str):
            return weights
        if reader.name != "linear" and reader.argument(6, "groups") not in (None, 1):
            return f"{weights.weight} is grouped"
        if weights.pads:
            return f"the convolution of {weights.weight} pads with zeros"
        if not runs_along(numbers_after(tensor, axis, steps), weights.axis, tensor.shape[axis]):
            return f"{weights.weight} reads its channels in another order"
        found.append(weights)
    return tuple(found) or "nothing reads it"


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its name."""
    owner, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), attribute)
    return tensor


def fold_into_maker(model: nn.Module, weights: Weights, scale: Tensor | None, shift: Tensor | None) -> None:
    """`y -> scale * y + shift` in the projection that makes y; computed in float64."""
    weight, bias = _values(model, weights)
    factor = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if scale is None else scale.double()
    new_bias = None if bias is None else bias * factor
    if shift is not None:
        new_bias = shift.double() if new_bias is None else new_bias + shift.double()
    _store(model, weights, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), new_bias)


def fold_into_readers(model: nn.Module, readers: Readers, scale: Tensor | None, shift: Tensor | None) -> None:
    """`x -> scale * x + shift` in the projections that read x; computed in float64."""
    for weights in readers:
        weight, bias = _values(model, weights)
        if shift is not None:
            moved = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            more = moved @ shift.double()
            bias = more if bias is None else bias + more
        if scale is not None:
            weight = weight * scale.double().reshape(1, -1, *[1] * (weight.ndim - 2))
        _store(model, weights, weight, bias)


def _values(model: nn.Module, weights: Weights) -> tuple[Tensor, Tensor | None]:
    weight = tensor_named(model, weights.weight).detach().double()
    # A fold before this one may have given it a bias.
    bias: Tensor | None = tensor_named(model, weights.bias or f"{weights.weight.rpartition('.')[0]}.bias")
    return weight, None if bias is None else bias.detach().double()


def _store(model: nn.Module, weights: Weights, weight: Tensor, bias: Tensor | None) -> None:
    owner, _, attribute = weights.weight.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, attribute)
    setattr(module, attribute, nn.Parameter(weight.to(old.dtype), old.requires_grad))
    if bias is None:
        return
    owner, _, attribute = weights.bias.rpartition(".") if weights.bias else (owner, "", "bias")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(bias.to(old.dtype), old.requires_grad))
