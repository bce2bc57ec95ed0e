"""Fold a scale and a shift per channel into the projection that makes the channels, or into those that read them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armour_surgery.discover.dataflow import Dataflow, FunctionCall, numbers_after, runs_along
from armour_surgery.rewrite.edits import owner_of, tensor_named

__all__ = [
    "Readers",
    "Weights",
    "fold_into_maker",
    "fold_into_readers",
    "readers_of",
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
    owner, _ = owner_of(flow.model, name)
    # A shift needs a bias to go to; only torch's own layers are known to use one that they are given later.
    if bias is None and not isinstance(owner, nn.Linear | nn.modules.conv._ConvNd):
        return f"{name} is no Linear's and no convolution's, so it cannot be given a bias"
    if call.name == "linear":
        return Weights(name, bias_name, axis=-1, pads=False)
    pads = call.argument(4, "padding") not in (0, (0,), (0, 0))
    return Weights(name, bias_name, axis=1 - weight.ndim, pads=pads)


def readers_of(flow: Dataflow, tensor: Tensor, axis: int) -> Readers | str:
    """All that reads a tensor with channels at `axis`, if all of it is Linears and convolutions; or what else does."""
    readers: list[Weights] = []
    for reader, steps in flow.ends(tensor):
        if reader is None:
            return "the model returns it, or something writes into it"
        # As its input, that is, and not as its weight or bias.
        last = steps[-1].outputs[0] if steps else tensor
        if not reader.is_linear or reader.source is not last:
            return f"{reader.name} in {reader.module or 'the model'} reads it too"
        weights = weights_of(flow, reader)
        if isinstance(weights, str):
            return weights
        if reader.name != "linear" and reader.argument(6, "groups") not in (None, 1):
            return f"{weights.weight} is grouped"
        # Zeros at the rim would have to be the shift, which they are not.
        if weights.pads:
            return f"the convolution of {weights.weight} pads with zeros"
        if not runs_along(numbers_after(tensor, axis, steps), weights.axis, tensor.shape[axis]):
            return f"{weights.weight} reads its channels in another order"
        readers.append(weights)
    return tuple(readers) or "nothing reads it"


def fold_into_maker(model: nn.Module, weights: Weights, scale: Tensor | None, shift: Tensor | None) -> None:
    """`y -> scale * y + shift` in the projection that makes y; computed in float64."""
    weight, bias = _values(model, weights)
    factor = torch.ones(len(weight), dtype=torch.float64, device=weight.device) if scale is None else scale.double()
    # Rows of the weight are channels of y.
    new_bias = None if bias is None else bias * factor
    if shift is not None:
        new_bias = shift.double() if new_bias is None else new_bias + shift.double()
    _store(model, weights, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)), new_bias)


def fold_into_readers(model: nn.Module, readers: Readers, scale: Tensor | None, shift: Tensor | None) -> None:
    """`x -> scale * x + shift` in the projections that read x; computed in float64."""
    for weights in readers:
        weight, bias = _values(model, weights)
        if shift is not None:
            # A constant input meets all places of a kernel: they add up. With the old weight: `scale` is for x alone.
            moved = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
            more = moved @ shift.double()
            bias = more if bias is None else bias + more
        if scale is not None:
            weight = weight * scale.double().reshape(1, -1, *[1] * (weight.ndim - 2))
        _store(model, weights, weight, bias)


def _values(model: nn.Module, weights: Weights) -> tuple[Tensor, Tensor | None]:
    weight = tensor_named(model, weights.weight).detach().double()
    # A fold before this one may have given it a bias.
    bias: Tensor | None = tensor_named(model, _bias_name(weights))
    return weight, None if bias is None else bias.detach().double()


def _store(model: nn.Module, weights: Weights, weight: Tensor, bias: Tensor | None) -> None:
    owner, attribute = owner_of(model, weights.weight)
    old = getattr(owner, attribute)
    setattr(owner, attribute, nn.Parameter(weight.to(old.dtype), old.requires_grad))
    if bias is not None:
        owner, attribute = owner_of(model, _bias_name(weights))
        setattr(owner, attribute, nn.Parameter(bias.to(old.dtype), old.requires_grad))


def _bias_name(weights: Weights) -> str:
    """Where a bias is, or would be: beside the weight."""
    return weights.bias or f"{weights.weight.rpartition('.')[0]}.bias"
