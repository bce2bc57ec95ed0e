"""Dropout, drop path and the shells around a single projection do nothing at rest."""

import torch
from torch import Tensor, nn

from armour_surgery.deployment.findings import Findings
from armour_surgery.discover.dataflow import Dataflow, FunctionCall, follow_model, repeat_layout
from armour_surgery.rewrite.edits import owner_of

__all__ = ["remove_idle_modules"]


def remove_idle_modules(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """Modules that hand back what they were given become Identities; a shell around one projection becomes it.

    A shell is what folding a BatchNorm leaves of LeViT's Linear + BatchNorm: besides the projection there is only
    layout in it, which comes to nothing.
    """
    flow = follow_model(model, example)
    replaced: list[str] = []
    for fqn, module in list(model.named_modules()):
        if fqn.startswith(tuple(replaced)):
            continue  # it went with the module around it
        taken, given = flow.inputs.get(fqn, []), flow.outputs.get(fqn, [])
        if not fqn or len(taken) != 1 or len(given) != 1 or isinstance(module, nn.Identity):
            continue
        if flow.is_hooked(fqn):
            continue  # a hook would go with the module that it is on
        inside = [call for call in flow.calls if f"{call.module}.".startswith(f"{fqn}.")]
        # A module with parameters that it did not use this time may use them at another.
        has_parameters = next(module.parameters(), None) is not None
        if not inside and given[0] is taken[0] and isinstance(given[0], Tensor) and not has_parameters:
            _put(model, fqn, nn.Identity())
        elif (core := _only_projection(flow, fqn, inside)) is not None:
            _put(model, fqn, model.get_submodule(core))
        else:
            continue
        replaced.append(f"{fqn}.")
        findings.did(fqn)


def _put(model: nn.Module, fqn: str, module: nn.Module) -> None:
    owner, name = owner_of(model, fqn)
    setattr(owner, name, module)


def _only_projection(flow: Dataflow, fqn: str, inside: list[FunctionCall]) -> str | None:
    """The projection to which everything in a module comes down, if an Identity stands beside it."""
    module = flow.model.get_submodule(fqn)
    linear = [call for call in inside if call.is_linear]
    # Without an Identity nothing was folded, and the shell is as its host wrote it: it stays.
    if len(linear) != 1 or nn.Identity not in map(type, module.children()):
        return None
    core = linear[0]
    own = isinstance(flow.model.get_submodule(core.module), nn.Linear | nn.modules.conv._ConvNd)
    if core.module == fqn or not own or flow.inputs[fqn][0] is not core.source:
        return None
    # Whether the layout around the projection comes to nothing: its numbered output, moved as the host moves it.
    numbers = torch.arange(core.outputs[0].numel()).reshape(core.outputs[0].shape)
    moved = {id(core.outputs[0]): numbers}
    for step in inside:
        if step is core:
            continue
        if not step.is_layout or step.module != fqn or id(step.source) not in moved:
            return None
        moved[id(step.outputs[0])] = repeat_layout(step, moved[id(step.source)])
    result = moved.get(id(flow.outputs[fqn][0]))
    return core.module if result is not None and torch.equal(result, numbers) else None
