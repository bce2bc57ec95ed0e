"""Dropout, drop path and the shells around a single projection do nothing at rest."""

import torch
from torch import Tensor, nn

from armour_surgery.deployment.dataflow import Dataflow, FunctionCall, follow_model
from armour_surgery.deployment.findings import Findings

__all__ = ["remove_idle_modules"]


def remove_idle_modules(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """Modules that hand back what they were given become Identities; a shell around one projection becomes it.

    A shell is what folding a BatchNorm leaves of LeViT's Linear + BatchNorm: besides the projection there is only
    layout in it, which comes to nothing.
    """
    flow = follow_model(model, example)
    for fqn, module in list(model.named_modules()):
        taken, given = flow.inputs.get(fqn, []), flow.outputs.get(fqn, [])
        if not fqn or len(taken) != 1 or len(given) != 1 or isinstance(module, nn.Identity):
            continue
        idle = given[0] is taken[0] and isinstance(given[0], Tensor) and not any(True for _ in module.parameters())
        inside = [call for call in flow.calls if call.module == fqn or call.module.startswith(f"{fqn}.")]
        if idle and not inside:
            _put(model, fqn, nn.Identity())
            findings.did(fqn)
        elif (core := _only_projection(flow, fqn, inside)) is not None:
            _put(model, fqn, model.get_submodule(core))
            findings.did(fqn)


def _put(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _only_projection(flow: Dataflow, fqn: str, inside: list[FunctionCall]) -> str | None:
    """The projection to which everything in a module comes down, if an Identity stands beside it."""
    module = flow.model.get_submodule(fqn)
    linear = [call for call in inside if call.is_linear]
    if len(linear) != 1 or not any(type(child) is nn.Identity for child in module.children()):
        return None
    core, steps = linear[0], [call for call in inside if not call.is_linear]
    own = isinstance(flow.model.get_submodule(core.module), nn.Linear | nn.modules.conv._ConvNd)
    if core.module == fqn or not own or flow.inputs[fqn][0] is not core.source:
        return None
    if not all(step.is_layout and step.module == fqn for step in steps):
        return None
    result = flow.outputs[fqn][0]
    numbers = torch.arange(core.outputs[0].numel()).reshape(core.outputs[0].shape)
    moved = {id(core.outputs[0]): numbers}
    for step in steps:
        if id(step.source) not in moved:
            return None
        function = torch.Tensor.reshape if step.name == "view" else step.function
        moved[id(step.outputs[0])] = function(moved[id(step.source)], *step.args[1:], **step.kwargs)
    found = moved.get(id(result))
    same = found is not None and found.shape == numbers.shape and bool((found == numbers).all())
    return core.module if same else None
