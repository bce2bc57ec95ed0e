"""MLPs with fewer hidden channels: what is done to their tensors, and what that saves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from armour_surgery.discover.dataflow import Dataflow
from armour_surgery.discover.mlps import find_mlps
from armour_surgery.errors import SchemaError
from armour_surgery.initialize import MlpProblem, SiteResult
from armour_surgery.initialize.walk import units_of
from armour_surgery.records import MlpPlan, SurgeryPlan
from armour_surgery.rewrite.edits import Edit, KeepColumns, KeepRows, apply_edits, tensor_named
from armour_surgery.spelled import MLP
from armour_surgery.traced import FoundMlp, FoundSite

__all__ = [
    "Narrowing",
    "edits_of",
    "mlp_plans",
    "narrow_without_images",
    "narrowings_of",
    "parameters_of",
    "params_per_channel",
    "problems_of_mlps",
    "units_in_order",
]


@dataclass(frozen=True)
class Narrowing:
    """An MLP that gets `kept` hidden channels."""

    found: FoundMlp
    kept: int


def edits_of(found: FoundMlp, channels: Sequence[int]) -> list[Edit]:
    """What leaves an MLP these hidden channels; names are those in the model."""
    edits: list[Edit] = []
    for first in found.firsts:
        rows = [piece[channel] for piece in first.pieces for channel in channels]
        edits.append(KeepRows(first.tensors, first.sizes, tuple(rows)))
    sizes = ((found.second, "in_features"), (found.second, "in_channels"))
    return [*edits, KeepColumns(f"{found.second}.weight", sizes, tuple(channels))]


def _take(found: FoundMlp, model: nn.Module, channels: tuple[int, ...]) -> None:
    apply_edits(model, edits_of(found, channels))


def params_per_channel(model: nn.Module, found: FoundMlp) -> int:
    """How many parameters a hidden channel costs."""
    count = tensor_named(model, f"{found.second}.weight")[:, 0].numel()
    parameters = dict(model.named_parameters())
    for first in found.firsts:
        held = [parameters[name] for name in first.tensors if name in parameters]
        count += len(first.pieces) * sum(tensor[0].numel() for tensor in held)
    return count


def problems_of_mlps(narrowings: Iterable[Narrowing]) -> list[MlpProblem]:
    """The MLPs as the initializers see them."""
    return [
        MlpProblem(one.found.fqn, one.found.hidden, one.kept, one.found.second, partial(_take, one.found))
        for one in narrowings
    ]


def units_in_order(
    model: nn.Module, flow: Dataflow, sites: Iterable[FoundSite], mlps: Iterable[FoundMlp]
) -> dict[str, str]:
    """For every attention and MLP of a model the block that it is in, in the order in which blocks run.

    A block is the largest module that holds no other attention, or no other MLP, whichever is larger. `flow` says what
    ran when.
    """
    attentions, hidden = [site.fqn for site in sites], [mlp.fqn for mlp in mlps]
    units = dict(zip(attentions, units_of(model, attentions), strict=True))
    units |= dict(zip(hidden, units_of(model, hidden), strict=True))
    around = set(units.values())
    for fqn, unit in units.items():
        larger = [other for other in around if f"{unit}.".startswith(f"{other}.")]
        units[fqn] = min(larger, key=len)
    run = list(flow.inputs)
    return dict(sorted(units.items(), key=lambda item: run.index(item[1])))


def narrow_without_images(model: nn.Module, narrowings: Iterable[Narrowing]) -> None:
    """Leave every MLP its first hidden channels: for models whose weights come later, or never."""
    for one in narrowings:
        _take(one.found, model, tuple(range(one.kept)))


def mlp_plans(model: nn.Module, narrowings: Iterable[Narrowing], results: Sequence[SiteResult]) -> tuple[MlpPlan, ...]:
    """What was done to MLPs; `model` is the one that has all hidden channels."""
    by_name = {result.fqn: result for result in results}
    plans = []
    for one in narrowings:
        each, found = params_per_channel(model, one.found), one.found
        rest = _params(model, found) - each * found.hidden
        result = by_name.get(found.fqn)
        plans.append(
            MlpPlan(
                fqn=found.fqn,
                hidden_before=found.hidden,
                hidden_after=one.kept,
                params_before=rest + each * found.hidden,
                params_after=rest + each * one.kept,
                residual=None if result is None else result.residual,
                steps=() if result is None else result.steps,
            )
        )
    return tuple(plans)


def _params(model: nn.Module, found: FoundMlp) -> int:
    return sum(parameter.numel() for parameter in parameters_of(model, found))


def parameters_of(model: nn.Module, found: FoundMlp) -> list[nn.Parameter]:
    """What an MLP's projections, and the norms between them, have for parameters."""
    names = {name for first in found.firsts for name in first.tensors}
    names |= {f"{found.second}.weight", f"{found.second}.bias"}
    return [parameter for name, parameter in model.named_parameters() if name in names]


def narrowings_of(host: nn.Module, example: dict[str, Tensor], surgery: SurgeryPlan) -> list[Narrowing]:
    """What a recorded surgery does to the MLPs of a freshly built host.

    Raises:
        SchemaError: the plan names an MLP that the host does not have, or that has other sizes there.
    """
    if not surgery.mlps:
        return []
    found = {mlp.fqn: mlp for mlp in find_mlps(host, example)}
    narrowings = []
    for record in surgery.mlps:
        mlp = found.get(record.fqn)
        if mlp is None:
            raise SchemaError(
                f"the plan narrows the {MLP} {record.fqn!r}, and {type(host).__name__} has no such {MLP}; load the "
                "folder with the version that saved it"
            )
        if mlp.hidden != record.hidden_before or not 0 < record.hidden_after < mlp.hidden:
            raise SchemaError(
                f"the plan narrows {record.fqn!r} from {record.hidden_before} to {record.hidden_after} hidden "
                f"channels, and in a new {type(host).__name__} it has {mlp.hidden}"
            )
        narrowings.append(Narrowing(mlp, record.hidden_after))
    return narrowings
