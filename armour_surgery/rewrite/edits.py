"""What a rewritten forward asks of its module: fewer rows or columns, projections that are gone, a new grouped one."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from armour_surgery.rewrite.fixed import FixedProjection
from armour_surgery.rewrite.grouped import GroupedProjection

__all__ = [
    "AddFixed",
    "AddGrouped",
    "Edit",
    "KeepAlong",
    "KeepColumns",
    "KeepRows",
    "Remove",
    "apply_edits",
    "edited_names",
    "edits_left",
    "owner_of",
    "removed_name",
    "tensor_named",
]


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
class KeepAlong:
    """Keep what is at `kept` (old places, in their new order) along one axis of a parameter without a module."""

    tensor: str
    axis: int
    kept: tuple[int, ...]


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


@dataclass(frozen=True)
class AddFixed:
    """A new submodule `name`: a projection with a fixed gauge in the place of `heads * width` rows of `weight`.

    Its numbers come afterwards. `start` is the first channel of its block, 0 while nobody knows it.
    """

    name: str
    weight: str
    heads: int
    width: int
    bias: bool
    start: int = 0


Edit = KeepRows | KeepColumns | KeepAlong | Remove | AddGrouped | AddFixed


def edited_names(edit: Edit) -> tuple[str, ...]:
    """Tensors, by name inside the site, that an edit changes or removes."""
    if isinstance(edit, KeepRows):
        return edit.tensors
    if isinstance(edit, KeepColumns):
        return (edit.weight,)
    if isinstance(edit, KeepAlong):
        return (edit.tensor,)
    return (edit.name,) if isinstance(edit, Remove) else ()


def removed_name(edit: Edit) -> str:
    """The module that an edit removes; empty if it removes none."""
    return edit.name if isinstance(edit, Remove) else ""


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds what has this name, and its name there."""
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


def tensor_named(module: nn.Module, name: str) -> torch.Tensor:
    """A parameter or buffer by its name."""
    owner, attribute = owner_of(module, name)
    tensor: torch.Tensor = getattr(owner, attribute)
    return tensor


def _take(tensor: torch.Tensor, indices: torch.Tensor, axis: int = 0, *, views: bool = False) -> torch.Tensor:
    first, count = int(indices[0]), len(indices)
    if views and axis == 0 and torch.equal(indices, torch.arange(first, first + count)):
        return tensor.detach()[first : first + count]
    # Otherwise a copy in any case: a view would keep all rows of the old weight in memory.
    kept = tensor.detach().index_select(axis, indices.to(tensor.device))
    return kept.clone(memory_format=torch.contiguous_format)


def _keep(
    module: nn.Module,
    names: tuple[str, ...],
    axis: int,
    channels: tuple[int, ...],
    sizes: tuple[tuple[str, str], ...],
    *,
    views: bool,
) -> None:
    indices = torch.tensor(channels)
    for name in names:
        owner, attribute = owner_of(module, name)
        tensor = getattr(owner, attribute)
        kept = _take(tensor, indices, axis, views=views)
        if isinstance(tensor, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(kept, requires_grad=tensor.requires_grad))
        else:
            setattr(owner, attribute, kept)
    for path, attribute in sizes:
        owner = module.get_submodule(path)
        # A host that calls F.linear on a parameter of its own has no attribute to state the size.
        if hasattr(owner, attribute):
            setattr(owner, attribute, len(channels))


def apply_edits(module: nn.Module, edits: list[Edit], *, views: bool = False) -> None:
    """Do the edits to a module, in place. New tensors keep dtype, device and requires_grad of the old ones.

    New projections come first: they start from rows that the others then drop. With `views` rows that lie next to each
    other hold the old tensor's memory, and take none themselves: for who gives them other numbers anyway.
    """
    with torch.no_grad():
        for edit in sorted(edits, key=lambda edit: not isinstance(edit, AddGrouped | AddFixed)):
            if isinstance(edit, KeepRows):
                _keep(module, edit.tensors, 0, edit.rows, edit.sizes, views=views)
            elif isinstance(edit, KeepColumns):
                _keep(module, (edit.weight,), 1, edit.columns, edit.sizes, views=views)
            elif isinstance(edit, KeepAlong):
                _keep(module, (edit.tensor,), edit.axis, edit.kept, (), views=views)
            elif isinstance(edit, AddGrouped):
                _add_grouped(module, edit)
            elif isinstance(edit, AddFixed):
                _add_fixed(module, edit)
            else:
                # None, not deleted: hosts ask `if self.bias is not None`, and state_dict leaves it out.
                owner, attribute = owner_of(module, edit.name)
                setattr(owner, attribute, None)


def _add_grouped(module: nn.Module, edit: AddGrouped) -> None:
    rows = torch.tensor(edit.rows)
    weight = _take(tensor_named(module, edit.weight), rows)
    projection, _ = owner_of(module, edit.weight)
    bias: torch.Tensor | None = None
    norm: nn.Module | None = None
    norm_tensors: dict[str, torch.Tensor] = {}
    for name in edit.tensors:
        owner, attribute = owner_of(module, name)
        tensor = _take(getattr(owner, attribute), rows)
        # The projection's bias lies beside its weight; rows of any other module are those of the BatchNorm after it.
        if owner is projection:
            bias = tensor
        else:
            norm, norm_tensors[attribute] = owner, tensor
    norm = norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None
    grouped = GroupedProjection.from_rows(weight, bias, norm, norm_tensors, edit.groups, edit.shuffle, edit.axis)
    setattr(module, edit.name, grouped.train(module.training))


def _add_fixed(module: nn.Module, edit: AddFixed) -> None:
    like = tensor_named(module, edit.weight)
    outputs = edit.heads * edit.width
    rest = nn.Linear(like.shape[1] - edit.width, outputs, edit.bias, device="meta", dtype=like.dtype)
    # Without numbers: drawing some would move the caller's random generator.
    rest.to_empty(device=like.device)
    rest.requires_grad_(like.requires_grad)
    setattr(module, edit.name, FixedProjection(rest, edit.heads, edit.start).train(module.training))


def edits_left(done: list[Edit], wanted: list[Edit]) -> list[Edit]:
    """What is left of the edits that are `wanted` once others were `done`: rows are counted among those that stayed."""
    kept: dict[str, tuple[int, ...]] = {}
    for edit in done:
        if isinstance(edit, KeepRows):
            kept |= dict.fromkeys(edit.tensors, edit.rows)
    left: list[Edit] = []
    for edit in wanted:
        if edit in done:
            continue
        if isinstance(edit, KeepRows) and edit.tensors[0] in kept:
            present = kept[edit.tensors[0]]
            edit = replace(edit, rows=tuple(present.index(row) for row in edit.rows))
        left.append(edit)
    return left
