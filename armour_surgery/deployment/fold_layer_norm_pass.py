"""LayerNorm's own scale and shift go into the projections that read it."""

from dataclasses import dataclass

from torch import Tensor, nn

from armour_surgery.altered import innermost
from armour_surgery.deployment.findings import Findings
from armour_surgery.deployment.folding import Readers, fold_into_readers, readers_of
from armour_surgery.deployment.removals import Removal, do_removals, survivors
from armour_surgery.discover.dataflow import Dataflow, FunctionCall, follow_model
from armour_surgery.rewrite.edits import tensor_named

__all__ = ["fold_layer_norm"]

# Arguments of F.layer_norm: where they are, and what they are called.
_AFFINE = ((2, "weight"), (3, "bias"))


def fold_layer_norm(model: nn.Module, example: dict[str, Tensor], findings: Findings) -> None:
    """`W (gamma n + beta) + b` is a projection of the bare norm `n`, where everything that reads it is a projection.

    The norms between a model's features and its head stay as they are: their result is what `forward_features` gives.
    """
    flow = follow_model(model, example)
    folds: list[_Fold] = []
    for call in flow.calls:
        if call.name != "layer_norm" or (call.argument(2, "weight"), call.argument(3, "bias")) == (None, None):
            continue
        outcome = _readers(flow, call)
        if isinstance(outcome, str):
            findings.left(call.module, outcome)
        else:
            weight, bias = flow.own_name(call.argument(2, "weight")), flow.own_name(call.argument(3, "bias"))
            folds.append(_Fold(call.module, weight, bias, outcome))
    removals: list[Removal] = []
    for fold in folds:
        removals += fold.removals
    # One run without any of them tells whether their hosts can do without.
    kept = survivors(model, example, removals)
    for fold in folds:
        if not set(kept).isdisjoint(fold.removals):
            findings.left(fold.module, "its host cannot do without its scale and shift")
            continue
        scale = None if fold.weight is None else tensor_named(model, fold.weight).detach()
        shift = None if fold.bias is None else tensor_named(model, fold.bias).detach()
        fold_into_readers(model, fold.readers, scale, shift)
        do_removals(model, fold.removals)
        findings.did(fold.module)


@dataclass(frozen=True)
class _Fold:
    """A norm that can go into what reads it: the names of its parameters, where it has them."""

    module: str
    weight: str | None
    bias: str | None
    readers: Readers

    @property
    def removals(self) -> list[Removal]:
        return [Removal(name) for name in (self.weight, self.bias) if name is not None]


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
        # A norm inside a block shares at least that block's name with what reads it; the last norm and the head do not.
        if "." not in weights.weight or not innermost([call.module, weights.weight]):
            return f"its result is the model's features, which {weights.weight} reads as its head"
    return readers
