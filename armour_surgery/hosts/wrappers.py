"""Modules that libraries put around a model: to spread it, to compile it, to average it, to adapt it."""

from torch import nn

from armour_surgery.errors import UsageError

__all__ = ["refuse_wrapped"]

_SHARDED = ""
# By library and class, where the model inside is. By name, since a library need not be there; a subclass is one too.
_INSIDE = {
    ("torch", "DataParallel"): ".module",
    ("torch", "DistributedDataParallel"): ".module",
    ("torch", "AveragedModel"): ".module",
    ("torch", "OptimizedModule"): "._orig_mod",
    ("torch", "FullyShardedDataParallel"): _SHARDED,
    ("timm", "ModelEmaV2"): ".module",
    ("timm", "ModelEmaV3"): ".module",
    ("peft", "PeftModel"): ".merge_and_unload()",
    ("peft", "BaseTuner"): ".merge_and_unload()",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that a library's wrapper is around, or that is TorchScript.

    Raises:
        UsageError: see above; the message says how to unwrap it.
    """
    kind = type(model).__name__
    inside, path = model, ""
    while (step := _step_into(inside)) is not None:
        if step == _SHARDED:
            raise UsageError(
                f"this {kind} holds a model in shards; pass the model as it was before it was sharded, and shard the "
                "result"
            )
        path += step
        if step.endswith("()"):
            break
        inside = getattr(inside, step[1:])
    if path:
        raise UsageError(f"this {kind} is a wrapper around a model; unwrap it first: pass model{path}")
    for name, module in model.named_modules():
        # By name too: what torch.jit makes are modules in little more than their class, and of several classes.
        if ("torch", "ScriptModule") in _classes(module):
            where = f"{name} in this {kind}" if name else f"this {kind}"
            raise UsageError(
                f"{where} is TorchScript, whose code cannot be followed or changed; pass the model that it was made "
                "from, before torch.jit.script or torch.jit.trace"
            )


def _step_into(model: nn.Module) -> str | None:
    """Where a wrapper has its model; None where it is no wrapper."""
    return next((_INSIDE[owner] for owner in _classes(model) if owner in _INSIDE), None)


def _classes(module: nn.Module) -> list[tuple[str, str]]:
    """The classes that a module is of: where each is from, and its name."""
    return [(owner.__module__.partition(".")[0], owner.__name__) for owner in type(module).__mro__]
