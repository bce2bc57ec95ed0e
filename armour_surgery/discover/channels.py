"""Which channels an operation's result holds, found by trying it out: it need not be one that anybody listed.

Pooling, padding, windows that overlap, interpolation, depthwise convolutions and learned mixtures of tokens make new
tokens out of a channel's own. All of them have in common what is tried here: where every channel holds one number
throughout, `f(number) - f(0)` is the same multiple of each channel's number.
"""

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from armour_surgery.discover.nodes import value_of

__all__ = ["Channels"]

# Numbers of different channels are a good deal further apart than this.
_CLOSE = 1e-11


@dataclass(frozen=True)
class Channels:
    """The channels of a producer's elements, which are numbered row by row: `inner` of a channel, then the next one.

    `modules` are those that a graph calls, by name. Operations are tried out `within` some nodes alone.
    """

    inner: int
    count: int
    modules: Mapping[str, nn.Module]
    within: Collection[fx.Node]

    def of(self, numbers: torch.Tensor) -> torch.Tensor:
        """The channel of each element; -1 where there is none."""
        return torch.where(numbers < 0, -1, (numbers // self.inner) % self.count)

    def after(self, node: fx.Node, numbers: Mapping[fx.Node, Any]) -> torch.Tensor | None:
        """For each element of a node's result a number of its channel, or -1 where it does not depend on any.

        None where an element depends on several channels, or it cannot be told. `numbers` are those of its inputs.
        """
        sources = [source for source in node.all_input_nodes if source in numbers]
        result = node.meta["value"]
        if node not in self.within or len(sources) != 1 or not isinstance(result, torch.Tensor):
            return None
        held = numbers[sources[0]]
        if not isinstance(held, torch.Tensor) or held.shape != sources[0].meta["value"].shape:
            return None
        channel = self.of(held)
        # Images, or windows, are mostly kept apart, and there may be thousands: then two of them speak for all.
        if len(held) > 2 and result.shape[:1] == held.shape[:1] and bool((channel == channel[:1]).all()):
            few = self._tried(node, sources[0], channel[[0, -1]], torch.Size((2, *result.shape[1:])))
            if few is not None and torch.equal(few[0], few[1]):
                return few[:1].expand(result.shape)
        return self._tried(node, sources[0], channel, result.shape)

    def _tried(self, node: fx.Node, source: fx.Node, channel: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """What `after` returns, for a source that holds these channels and a result of this shape."""
        own = torch.rand(self.count, generator=_noise(), dtype=torch.float64) + 1
        inside = (channel >= 0).double()
        try:
            with torch.no_grad():
                nothing, same, told = (
                    self._run(node, source, value) for value in (inside * 0, inside, own[channel] * inside)
                )
        except Exception:  # whatever it may be that it cannot take in place of activations
            return None
        if told.shape != shape:
            return None
        return self._told(told - nothing, same - nothing, own)

    def _told(self, told: torch.Tensor, same: torch.Tensor, own: torch.Tensor) -> torch.Tensor | None:
        """The channels whose numbers `told` holds, times `same`."""
        empty = same.abs() <= _CLOSE
        ratio = torch.where(empty, 0, told / same)
        ordered, channel = own.sort()
        place = torch.searchsorted(ordered, (ratio - _CLOSE).contiguous()).clamp(max=self.count - 1)
        known = torch.where(empty, told.abs() <= _CLOSE, (ordered[place] - ratio).abs() <= _CLOSE)
        if not bool(known.all()):
            return None
        return torch.where(empty, -1, channel[place] * self.inner)

    def _run(self, node: fx.Node, source: fx.Node, value: torch.Tensor) -> torch.Tensor:
        """What a node makes of a value; whatever else it takes are positive random numbers, the same every time."""
        generator = _noise()

        def number(other: fx.Node) -> Any:
            held = value if other is source else other.meta["value"]
            if other is source or not isinstance(held, torch.Tensor):
                return held
            return _random(held, generator)

        args: Any = value_of(fx.map_arg(node.args, number))
        kwargs: Any = value_of(fx.map_arg(node.kwargs, number))
        if node.op == "call_module":
            module = _with_numbers(self.modules[str(node.target)], generator)
            result = module(*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            raise TypeError("no numbers came out")
        return result


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _random(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    # An index or a mask stands for itself: what it chooses depends on the values, which are not known.
    if not like.is_floating_point():
        raise TypeError("its numbers matter")
    return torch.rand(like.shape, generator=generator, dtype=torch.float64) + 0.5


def _with_numbers(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy of a module, which may have no numbers, with such."""
    copied = copy.deepcopy(module)
    for owner in copied.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owner._parameters[name] = nn.Parameter(_random(parameter, generator))
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = _random(buffer, generator)
    return copied
