"""Reconstruction: go on by gradient from where the closed forms ended, towards what the original computes.

The closed forms treat the softmax as if errors of its logits counted alike; small steps do not. Every block learns
alone, to give what the original's block gives from what the converted model now feeds it, all blocks in one pass: end
to end, steps that are small enough to be safe moved nothing. Held-out images judge by the final features, the best
weights seen are kept, and weights that are no better than the first are dropped.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from armour_surgery.initialize.walk import first_tensor

__all__ = ["Weights", "descend", "reconstruct", "relative_error"]

# How often held-out images are looked at.
_JUDGMENTS = 4
# The largest step, relative to the root mean square of a tensor.
_RATE = 0.003
_WARM_UP = 0.1


# How much each of so many tokens counts, `[count, 1]`, or None if all count alike.
Weights = Callable[[int], Tensor | None]


def relative_error(got: Tensor, wanted: Tensor, weights: Weights = lambda _: None) -> Tensor:
    """The mean of `|g - w|^2 / |w|^2` over tokens `[..., C]`: a norm follows, so tokens of every size count alike."""
    energy = wanted.square().sum(-1)
    errors = (got - wanted).square().sum(-1) / energy.clamp(min=1e-6 * float(energy.mean()) + 1e-30)
    each = weights(errors.shape[1]) if errors.ndim == 2 else None
    return errors.mean() if each is None else (errors @ each.to(errors)).mean() / each.sum().to(errors)


def descend(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], Tensor],
    judge: Callable[[], float],
    steps: int,
    done: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Adam for `steps` calls of `loss`, warmed up and cooled down; the parameters end where `judge` was least.

    Returns what `judge` said of the first and of the kept parameters. A loss that is not finite ends the descent.
    """
    groups = [
        {"params": [one], "lr": _RATE * float(one.detach().square().mean().sqrt().clamp(min=1e-8))}
        for one in parameters
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    warm_up = max(1, round(_WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up), 1.0)
    )
    needed = [one.requires_grad for one in parameters]
    first = least = judge()
    best = [one.detach().clone() for one in parameters]
    every = max(1, -(-steps // _JUDGMENTS))
    try:
        for one in parameters:
            one.requires_grad_(True)
        for step in range(1, steps + 1):
            value = loss()
            if not bool(value.isfinite()):
                break
            for one, gradient in zip(
                parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True
            ):
                one.grad = gradient
            optimizer.step()
            schedule.step()
            done()
            if step % every == 0 or step == steps:
                found = judge()
                if found < least:
                    least, best = found, [one.detach().clone() for one in parameters]
    finally:
        with torch.no_grad():
            for one, kept, flag in zip(parameters, best, needed, strict=True):
                one.copy_(kept)
                one.grad = None
                one.requires_grad_(flag)
    return first, least


def reconstruct(
    original: nn.Module,
    converted: nn.Module,
    units: Sequence[str],
    parameters: Sequence[nn.Parameter],
    fresh: Iterator[Tensor],
    held_out: Iterable[Tensor],
    features: Callable[[nn.Module, Tensor], Tensor],
    steps: int,
    done: Callable[[], None] = lambda: None,
    weights: Weights = lambda _: None,
) -> tuple[float, float]:
    """All of the modules `units` at once, each alone, on `steps` batches of `fresh` images.

    `parameters` are those that learn; `features(model, batch)` runs a model to its final features `[B, ..., C]`. Both
    models must be in eval mode. Returns the relative error of these on `held_out` before and after.
    """
    held = list(held_out)
    with torch.no_grad():
        goals = [features(original, batch) for batch in held]

    def loss() -> Tensor:
        batch = next(fresh)
        with torch.no_grad(), _watched(original, units) as wanted:
            features(original, batch)
        with _watched(converted, units) as got:
            features(converted, batch)
        return torch.stack([relative_error(got[unit], wanted[unit], weights) for unit in units]).mean()

    def judge() -> float:
        with torch.no_grad():
            errors = [
                len(batch) * float(relative_error(features(converted, batch), goal, weights))
                for batch, goal in zip(held, goals, strict=True)
            ]
        return sum(errors) / sum(map(len, held))

    return descend(parameters, loss, judge, steps, done)


@contextmanager
def _watched(model: nn.Module, units: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what those modules give is noted, and no gradient leaves them by their inputs."""
    seen: dict[str, Tensor] = {}
    handles = []
    for unit in units:

        def detached(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))

        def note(_: nn.Module, args: Any, output: Any, unit: str = unit) -> None:
            seen[unit] = first_tensor(output)

        module = model.get_submodule(unit)
        handles.append(module.register_forward_pre_hook(detached, with_kwargs=True))
        handles.append(module.register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
