"""What a rewritten forward asks of its module: fewer rows or columns, projections that are gone, a new grouped one."""

from dataclasses import dataclass

import torch
from torch import nn

from armour_surgery.rewrite.grouped import GroupedProjection

__all__ = ["AddGrouped", "Edit", "KeepColumns", "KeepRows", "Remove", "apply_edits", "edited_names", "removed_name"]


@dataclass(frozen=True)
class KeepRows:
    """Keep `rows` (old output channels, in their new order) of a projection's tensors, and state the new number."""

    tensors: tuple[str, ...]
    sizes: tuple[tuple[str, str], ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class KeepColumns:
    """Keep `columns` (old input channels, in their order) of a weight `[E, C, ..]`, and state the new number."""

    weight: str
    sizes: tuple[tuple[str, str], ...]
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Remove:
    """A parameter, buffer or module that nothing reads any more; its name stays and holds None."""

    name: str


@dataclass(frozen=True)
class AddGrouped:
    """A new submodule `name`: a grouped projection that starts from rows `rows` of tensor `weight`.

    `tensors` are the other tensors with a row per channel, such as a bias or a BatchNorm's.
    """

    name: str
    weight: str
    tensors: tuple[str, ...]
    rows: tuple[int, ...]
    groups: int
    shuffle: bool
    axis: int


Edit = KeepRows | KeepColumns | Remove | AddGrouped


def edited_names(edit: Edit) -> tuple[str, ...]:
    """Tensors, by name inside the site, that an edit changes or removes."""
    if isinstance(edit, KeepRows):
        return edit.tensors
    if isinstance(edit, KeepColumns):
        return (edit.weight,)
    return (edit.name,) if isinstance(edit, Remove) else ()


def removed_name(edit: Edit) -> str:
    """The module that an edit removes; empty if it removes none."""
    return edit.name if isinstance(edit, Remove) else ""


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def _take(tensor: torch.Tensor, indices: torch.Tensor, axis: int = 0) -> torch.Tensor:
    kept = tensor.detach().index_select(axis, indices.to(tensor.device))
    return kept.clone(memory_format=torch.contiguous_format)


def _keep(
    module: nn.Module, names: tuple[str, ...], axis: int, channels: tuple[int, ...], sizes: tuple[tuple[str, str], ...]
) -> None:
    indices = torch.tensor(channels)
    for name in names:
        owner, attribute = _owner(module, name)
        tensor = getattr(owner, attribute)
        kept = _take(tensor, indices, axis)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, attribute, kept)
    for path, attribute in sizes:
        owner = module.get_submodule(path)
        if hasattr(owner, attribute):
            setattr(owner, attribute, len(channels))


def apply_edits(module: nn.Module, edits: list[Edit]) -> None:
    """Do the edits to a module, in place. New tensors keep dtype, device and requires_grad of the old ones.

    Grouped projections come first: they start from rows that the others then drop.
    """
    with torch.no_grad():
        for edit in sorted(edits, key=lambda one: not isinstance(one, AddGrouped)):
            if isinstance(edit, KeepRows):
                _keep(module, edit.tensors, 0, edit.rows, edit.sizes)
            elif isinstance(edit, KeepColumns):
                _keep(module, (edit.weight,), 1, edit.columns, edit.sizes)
            elif isinstance(edit, Remove):
                owner, attribute = _owner(module, edit.name)
                setattr(owner, attribute, None)
            else:
                rows = torch.tensor(edit.rows)
                tensors = {name: _take(_get(module, name), rows) for name in (edit.weight, *edit.tensors)}
                norms = {name.rpartition(".")[0] for name in edit.tensors} - {edit.weight.rpartition(".")[0]}
                norm = module.get_submodule(norms.pop()) if norms else None
                grouped = GroupedProjection.from_rows(
                    tensors[edit.weight],
                    {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name != edit.weight},
                    norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None,
                    edit.groups,
                    edit.shuffle,
                    edit.axis,
                )
                setattr(module, edit.name, grouped.train(module.training))


def _get(module: nn.Module, name: str) -> torch.Tensor:
    owner, attribute = _owner(module, name)
    tensor: torch.Tensor = getattr(owner, attribute)
    return tensor
