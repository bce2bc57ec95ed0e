"""Run the model once, without weights, and note which module computes attention and how it was called."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from armour_surgery.altered import names_below, run_weightless, why_altered
from armour_surgery.calls import run, running, without_fast_paths
from armour_surgery.copies import MetaTwins, alias, copy_of_zeros, floating_weight, has_weights, meta_copy
from armour_surgery.discover.watch import watched
from armour_surgery.errors import ArmourError, DiscoveryError, ExampleInputError
from armour_surgery.examples import on_meta, part_of, shapes_of, with_numbers
from armour_surgery.shapes import RememberedShapes
from armour_surgery.traced import Call

__all__ = ["Recording", "could_not_run", "is_builtin", "record"]


@dataclass
class Recording:
    """What one run showed.

    `model` is a copy without weights. `calls` has the calls of every module, in their order. `innermost` lists the
    modules which themselves called a softmax or an attention function, and all that were running at such a moment.
    `unknown` has those which called something that may be attention and cannot be looked into, and the reason that
    tells of it.
    """

    model: nn.Module
    calls: dict[str, list[Call]] = field(default_factory=dict)
    innermost: dict[str, set[str]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def could_not_run(model: nn.Module, example: dict[str, Any], error: Exception) -> DiscoveryError:
    """What to raise where a model did not accept an example, or cannot run without its weights."""
    # What was done to its modules from outside explains more than the example does.
    reason = why_altered(model, names_below(model, ""))
    if reason is not None:
        return DiscoveryError(
            f"{type(model).__name__} could not be examined on a copy without weights ({type(error).__name__}): {reason}"
        )
    shapes = shapes_of(example)
    return ExampleInputError(
        f"{type(model).__name__} could not run on inputs of shape {shapes}: {type(error).__name__}: {error}. "
        "Pass example_input= with what its forward takes"
    )


def is_builtin(module: nn.Module) -> bool:
    """Whether a module is one of torch.nn's own layers (containers are looked into, layers are not)."""
    # By where its class was written: hosts subclass torch's layers and write another forward.
    return type(module).__module__.startswith("torch.nn.") and not isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    )


def _has_a_forward_of_its_own(module: nn.Module) -> bool:
    # nn.Softmax and its like, also in an nn.Sequential, are how their parent computes attention, not a place of their
    # own.
    return not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.MultiheadAttention)


def record(model: nn.Module, example: dict[str, Any]) -> Recording:
    """Run a weightless copy of `model` in eval mode on `example` (keyword arguments) and note its attention.

    Where that fails, since the model looks at numbers (masks, `.item()`, tables that it makes on the CPU), a copy with
    numbers is run: with the model's own weights, or with zeros if it has none, on the example's own numbers or on
    noise. The model itself is not run and not changed.

    Raises:
        ExampleInputError: the model did not accept the example.
        DiscoveryError: it cannot run without its weights; something was done to its modules.
    """
    weightless = on_meta(example)
    try:
        return run_weightless(partial(meta_copy, model), lambda copied: _record(copied, copied, weightless))
    except ArmourError:
        raise
    except Exception:
        part = part_of(example)
    try:
        copied = alias(model) if has_weights(model) else copy_of_zeros(model, part)
        weight = floating_weight(copied.get_submodule(part))
        numbers = with_numbers(example, "cpu" if weight is None else weight.device)
        return _record(copied, meta_copy(model), numbers)
    except Exception as error:
        raise could_not_run(model, example, error) from error


def _record(copied: nn.Module, shown: nn.Module, example: dict[str, Any]) -> Recording:
    """What a run of `copied` shows; the recording is told of `shown`, which is the same without weights."""
    copied.eval()  # timm's LeViT attention returns nothing here
    shown.eval()
    recording = Recording(shown)
    modules = dict(copied.named_modules())
    twins = MetaTwins()

    def entered(fqn: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.calls.setdefault(fqn, []).append(Call(*twins.of((args, dict(kwargs)))))

    with running(copied, entered) as stack:

        def seen(unknown: str | None) -> None:
            for fqn in reversed(stack):
                if _has_a_forward_of_its_own(modules[fqn]):
                    recording.innermost.setdefault(fqn, set()).update(stack)
                    if unknown is not None:
                        recording.unknown[fqn] = unknown
                    return

        with torch.no_grad(), without_fast_paths(), watched(seen), RememberedShapes():
            run(copied, example)
    return recording
