"""Find, by looking at numbers, what a module's output does to the model's residual stream.

A host adds what a block computes to its stream, often scaled channel by channel (LayerScale, a BatchNorm), sometimes
after a norm. Only in the first case is there a gain per channel, and then the block's last projection can be fitted
to the stream. Which case it is shows in one batch of activations: either `target = base + gain * branch + constant`
holds to rounding, or it does not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armour_surgery.initialize.walk import Arguments, Walk, first_tensor

__all__ = ["Branch", "Seen", "as_stream", "few", "find_branch", "inverse_gain", "learned_tokens", "look", "match_width"]

_TOLERANCE = 1e-3
# A gain below this share of the largest is none.
_LEAST_GAIN = 1e-3
# Images of a batch that are looked at.
_LOOKED = 4
# Tokens that are looked at before all are.
_GLANCE = 64


@dataclass(frozen=True)
class Branch:
    """`target = base + gain * output + constant` for the output of the layer `fqn`; `gain [E]`."""

    fqn: str
    gain: Tensor


@dataclass(frozen=True)
class Seen:
    """Activations of one part of a model in the order in which modules got them, and its layers' outputs."""

    inputs: list[tuple[str, Tensor]]
    outputs: list[tuple[str, Tensor]]


def match_width(tensor: Tensor, width: int) -> Tensor | None:
    """A tensor as `[B, N, width]`, channels last or second; None if it has no such axis."""
    if tensor.ndim >= 3 and tensor.shape[-1] == width:
        return tensor.reshape(len(tensor), -1, width)
    if tensor.ndim == 4 and tensor.shape[1] == width:
        return tensor.flatten(2).mT
    return None


def as_stream(change: Tensor, stream: Tensor) -> Tensor:
    """`change [B, N, width]` in the shape of a stream that `match_width` gave this form."""
    if stream.shape[-1] == change.shape[-1] and stream.ndim >= 3:
        return change.reshape(stream.shape)
    return change.mT.reshape(stream.shape)


def few(tensor: Tensor, size: int) -> Tensor:
    """What a tensor has of the first few of `size` images, or all of it where it is not one row an image."""
    return tensor[:_LOOKED] if len(tensor) == size else tensor


def look(walk: Walk, number: int, batch: Tensor, arguments: Arguments) -> tuple[Seen, Arguments]:
    """Run unit `number` and note what modules get and what Linears and convolutions give, up to the next unit.

    Of a batch the first few images are noted: all layers of a block together are large, and those show as much.
    """
    seen = Seen([], [])
    handles = []
    skipped = walk.skipped(number)
    for name, module in walk.model.named_modules():
        if any(name == other or name.startswith(f"{other}.") for other in skipped):
            continue

        # Copies, because what follows may write into its input (ReLU in place, +=).
        def before(_: nn.Module, args: tuple[object, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor):
                seen.inputs.append((name, few(args[0], len(batch)).clone()))

        def after(_: nn.Module, args: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                seen.outputs.append((name, few(output, len(batch)).clone()))

        handles.append(module.register_forward_pre_hook(before))
        if isinstance(module, nn.Linear | nn.Conv2d):
            handles.append(module.register_forward_hook(after))
    try:
        return seen, walk.run(number, batch, arguments)
    finally:
        for handle in handles:
            handle.remove()


def find_branch(target: Tensor, bases: list[Tensor], outputs: list[tuple[str, Tensor]]) -> tuple[Branch, Tensor] | None:
    """The last of `outputs` which, scaled channel by channel and added to one of `bases` (latest first), is `target`.

    Returns the branch and its base.
    """
    for name, output in reversed(outputs):
        # Channels are last in a sequence of tokens, and second in an image of them.
        for axis in (output.shape[-1], output.shape[1]):
            goal, branch = match_width(target, axis), match_width(output, axis)
            if goal is None or branch is None or goal.shape != branch.shape:
                continue
            for base in reversed(bases):
                start = match_width(base, axis)
                if start is None or start.shape != goal.shape or torch.equal(start, goal):
                    continue
                # Most pairs fail, and a few tokens of one image are enough to say so.
                if _gain(goal[:1, :_GLANCE], start[:1, :_GLANCE], branch[:1, :_GLANCE]) is None:
                    continue
                gain = _gain(goal, start, branch)
                if gain is not None:
                    return Branch(name, gain), base
    return None


def _gain(target: Tensor, base: Tensor, branch: Tensor) -> Tensor | None:
    """The slope per channel if `target - base = gain * branch + constant` holds."""
    y, x = (target - base).double().flatten(0, 1), branch.double().flatten(0, 1)
    y, x = y - y.mean(0), x - x.mean(0)
    gain = (x * y).sum(0) / x.square().sum(0).clamp(min=1e-300)
    left = (y - gain * x).norm()
    return gain.cpu() if left <= _TOLERANCE * y.norm() and y.norm() > 0 else None


def inverse_gain(gain: Tensor) -> Tensor:
    """What an output must change by for its stream to change by one; 0 where the gain is next to none of the largest.

    A channel that hardly reaches the stream cannot make up for it, and would only grow.
    """
    usable = gain.abs() > _LEAST_GAIN * gain.abs().max()
    return torch.where(usable, 1 / gain, torch.zeros_like(gain))


def learned_tokens(before: Walk, batch: Tensor, arguments: Arguments) -> Tensor | None:
    """Which tokens `[N]` enter the first unit as they were learned, whatever the image: class tokens, registers."""
    # An image that no photo is like: what stays the same has not seen it.
    noise = torch.randn(batch.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(batch)
    on_image, on_noise = first_tensor(arguments), first_tensor(before.begin(noise))
    if on_image.ndim != 3 or on_image.shape != on_noise.shape:
        return None
    alike = torch.isclose(on_image, on_noise, rtol=1e-4, atol=1e-6).all(-1).all(0).cpu()
    return alike if 0 < int(alike.sum()) < len(alike) else None
