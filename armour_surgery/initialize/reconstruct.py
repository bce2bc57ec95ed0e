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
from torch.utils.hooks import RemovableHandle

from armour_surgery.initialize.walk import first_tensor
from armour_surgery.measure.token_error import token_error

__all__ = ["Weights", "cut_gradients", "descend", "reconstruct"]

# How often held-out images are looked at.
_JUDGMENTS = 4
# The largest step, relative to the root mean square of a tensor.
_RATE = 0.003
# Share of the steps in which they grow from nothing to that.
_WARM_UP = 0.1

# How much each of so many tokens counts, `[count, 1]`, or None if all count alike.
Weights = Callable[[int], Tensor | None]


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
    optimizer = torch.optim.Adam(list(map(_with_rate, parameters)), betas=(0.9, 0.99))
    warm_up = max(1, round(_WARM_UP * steps))

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    needed = [parameter.requires_grad for parameter in parameters]
    first = least = judge()
    best = _values(parameters)
    every = max(1, -(-steps // _JUDGMENTS))
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for step in range(1, steps + 1):
            value = loss()
            if not bool(value.isfinite()):
                break
            # Not backward(): that would also write gradients into parameters that do not learn.
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
            done()
            if step % every == 0 or step == steps:
                error = judge()
                if error < least:
                    least, best = error, _values(parameters)
    finally:
        with torch.no_grad():
            for parameter, kept, flag in zip(parameters, best, needed, strict=True):
                parameter.copy_(kept)
                parameter.grad = None
                parameter.requires_grad_(flag)
    return first, least


def _with_rate(parameter: nn.Parameter) -> dict[str, Any]:
    """A parameter as a group of its own: Adam moves entries by its rate, so each tensor needs one of its own size."""
    size = float(parameter.detach().square().mean().sqrt().clamp(min=1e-8))
    return {"params": [parameter], "lr": _RATE * size}


def _values(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


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

    def error(got: Tensor, wanted: Tensor) -> Tensor:
        # Only in `[B, N, C]` is it known which axis has the tokens.
        return token_error(got, wanted, weights(wanted.shape[1]) if wanted.ndim == 3 else None)

    def loss() -> Tensor:
        batch = next(fresh)
        with torch.no_grad(), _watched(original, units) as wanted:
            features(original, batch)
        with _watched(converted, units) as got:
            features(converted, batch)
        errors = [error(got[unit], wanted[unit]) for unit in units]
        return torch.stack(errors).mean()

    def judge() -> float:
        errors = []
        with torch.no_grad():
            for batch, goal in zip(held, goals, strict=True):
                errors.append(len(batch) * float(error(features(converted, batch), goal)))
        return sum(errors) / sum(map(len, held))

    return descend(parameters, loss, judge, steps, done)


def cut_gradients(model: nn.Module, fqns: Sequence[str]) -> list[RemovableHandle]:
    """Let no gradient leave those modules of a model by their inputs, until the handles are removed."""

    def detached(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, kwargs))

    handles = []
    for fqn in fqns:
        handles.append(model.get_submodule(fqn).register_forward_pre_hook(detached, with_kwargs=True))
    return handles


@contextmanager
def _watched(model: nn.Module, units: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Inside, what those modules give is noted, and no gradient leaves them by their inputs."""
    seen: dict[str, Tensor] = {}
    handles = cut_gradients(model, units)
    for unit in units:

        def note(_: nn.Module, args: Any, output: Any, unit: str = unit) -> None:
            seen[unit] = first_tensor(output)

        handles.append(model.get_submodule(unit).register_forward_hook(note))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
