"""LayerNorm's own scale and shift go into the projections that read it."""

from torch import Tensor, nn

from armour_surgery.deployment.dataflow import Dataflow, FunctionCall, follow_model
from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import Readers, fold_into_readers, readers_of, tensor_named
from armour_surgery.deployment.removals import Removal, do_removals, survivors

__all__ = ["fold_layer_norm"]


def fold_layer_norm(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """`W (gamma n + beta) + b` is a projection of the bare norm `n`, where everything that reads it is a projection.

    The norms between a model's features and its head stay as they are: their result is what `forward_features` gives.
    """
    flow = follow_model(model, example)
    found: list[tuple[str, list[str], Readers]] = []
    for call in flow.calls:
        if call.name != "layer_norm" or (call.argument(2, "weight"), call.argument(3, "bias")) == (None, None):
            continue
        outcome = _readers(flow, call)
        if isinstance(outcome, str):
            findings.left(call.module, outcome)
        else:
            names = [flow.own_name(call.argument(index, name)) or "" for index, name in _AFFINE]
            found.append((call.module, names, outcome))
    removals = {module: [Removal(name) for name in names if name] for module, names, _ in found}
    kept = survivors(model, example, [removal for own in removals.values() for removal in own])
    for module, names, readers in found:
        if any(removal in kept for removal in removals[module]):
            findings.left(module, "its host cannot do without its scale and shift")
            continue
        scale, shift = (tensor_named(model, name).detach() if name else None for name in names)
        fold_into_readers(model, readers, scale, shift)
        do_removals(model, removals[module])
        findings.did(module)


_AFFINE = ((2, "weight"), (3, "bias"))


def _readers(flow: Dataflow, call: FunctionCall) -> Readers | str:
    """The projections that read a norm; or why its scale and shift must stay."""
    for index, name in _AFFINE:
        tensor = call.argument(index, name)
        if tensor is not None and (flow.own_name(tensor) is None or tensor.ndim != 1):
            return f"its {name} is shared, or runs over more than channels"
    readers = readers_of(flow, call.outputs[0], -1)
    if isinstance(readers, str):
        return readers
    for weights in readers:
        if weights.weight.partition(".")[0] == weights.weight or not _common(call.module, weights.weight):
            return f"its result is the model's features, which {weights.weight} reads as its head"
    return readers


def _common(first: str, second: str) -> str:
    """The innermost module that holds both names."""
    shared: list[str] = []
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)
