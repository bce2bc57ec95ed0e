"""A converted model as an unconverted one that computes the same: what was shared is stored twice again."""

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.copies import floating_type, meta_copy
from armour_surgery.errors import ExportError
from armour_surgery.initialize.weights import locate, write
from armour_surgery.modes import get_mode
from armour_surgery.records import Source, SurgeryPlan
from armour_surgery.rewrite.edits import (
    AddFixed,
    AddGrouped,
    Edit,
    KeepAlong,
    KeepColumns,
    KeepRows,
    edited_names,
    tensor_named,
)
from armour_surgery.rewrite.fixed import FixedProjection
from armour_surgery.rewrite.grouped import GroupedProjection
from armour_surgery.saving.filling import assign
from armour_surgery.saving.folder import distinct_tensors, rebuildable
from armour_surgery.saving.replay import mlps_of, operations_of
from armour_surgery.surgery.mlps import edits_of
from armour_surgery.surgery.operation import Operation
from armour_surgery.surgery.parts import name_in_whole
from armour_surgery.surgery.perform import surgery_of
from armour_surgery.surgery.rows import copy_shared

__all__ = ["as_stock"]


def as_stock(model: nn.Module, into: nn.Module | None = None) -> tuple[nn.Module, Source]:
    """A model of the original's class and shapes with a converted model's outputs, within rounding, and how it
    is built; on the CPU, in eval mode.

    A projection that serves twice is stored twice, channels that a rank or a narrower MLP took away are zeros, a
    grouped projection is a full one with zeros, and one with a fixed gauge has its identity written out. Converted to
    the same modes again, it is the same model as before.

    Args:
        model: a converted model.
        into: for a model of no library a fresh one, built as it was; it stays as it is.

    Raises:
        ExportError: `into` is needed, or a mode has no such form (`qk-diag` masks what no unconverted model masks).
        SchemaError: `into` is not like the model that was converted.
        FolderError: the model cannot be rebuilt from its library.
    """
    surgery = surgery_of(model)
    for site in surgery.sites:
        if site.mode == "qk-diag":
            raise ExportError(
                f"{site.fqn} is converted to qk-diag, whose mask no {type(model).__name__} has: no weights of the "
                "original's shape compute the same; export to onnx, openvino or pt2, or convert to qk"
            )
    host, source = _fresh(model, surgery, into)
    operations = [(part, one) for part, all_of_it in operations_of(host, surgery).items() for one in all_of_it]
    edits: dict[str, list[Edit]] = {}
    for part, operation in operations:
        _note(edits, name_in_whole(part, operation.fqn), operation.edits)
    for part, narrowings in mlps_of(host, surgery).items():
        for one in narrowings:
            # Zeros in the places of channels that are gone: what follows reads nothing of them.
            _note(edits, part, edits_of(one.found, range(one.kept)))
    tensors, tied = distinct_tensors(model)
    whole = _widened(
        host, {**tensors, **{name: tensors[other] for name, other in tied.items()}}, edits, floating_type(model)
    )
    assign(host, whole, {name: other for name, other in tied.items() if name in whole and other in whole})
    _cast_buffers(host, model)
    for part, operation in operations:
        fqn = name_in_whole(part, operation.fqn)
        stock, converted = host.get_submodule(fqn), model.get_submodule(fqn)
        for edit in operation.edits:
            if isinstance(edit, AddFixed):
                _write_whole(stock, converted, edit, operation)
        copy_shared(stock, operation.found.traced, operation.mode)
        for edit in operation.edits:
            if isinstance(edit, AddGrouped):
                _write_out(stock, converted, edit)
    return host.eval(), source


def _fresh(model: nn.Module, surgery: SurgeryPlan, into: nn.Module | None) -> tuple[nn.Module, Source]:
    """The original without weights, and how it is built."""
    if into is not None:
        return meta_copy(into, buffers=False), hosts.source_of_own(into)
    source = rebuildable(model, surgery, {})
    if source.library == hosts.OWN:
        raise ExportError(
            f"{source.architecture} ({source.name}) is of no library, and only you can build one without the "
            f"conversion: pass into={source.architecture}(), or --into FILE.py:CALLABLE on the command line"
        )
    return hosts.build(source), source


def _cast_buffers(host: nn.Module, model: nn.Module) -> None:
    """Those outside the state dict were built anew, in float32."""
    present = dict(model.named_buffers())
    for name, buffer in list(host.named_buffers()):
        dtype = present[name].dtype if name in present else floating_type(model)
        if buffer.is_floating_point() and buffer.dtype != dtype:
            owner, _, attribute = name.rpartition(".")
            setattr(host.get_submodule(owner), attribute, buffer.to(dtype))


def _note(edits: dict[str, list[Edit]], module: str, of_module: list[Edit]) -> None:
    """Write down by tensor, named in the model, what was done to it."""
    for edit in of_module:
        for name in edited_names(edit):
            edits.setdefault(name_in_whole(module, name), []).append(edit)


def _widened(
    host: nn.Module, present: dict[str, Tensor], edits: dict[str, list[Edit]], floating: torch.dtype
) -> dict[str, Tensor]:
    """The converted model's tensors in the shapes of the host's; zeros where it has none."""
    whole = {}
    for name, place in host.state_dict().items():
        if name not in present:
            whole[name] = torch.zeros(place.shape, dtype=floating if place.is_floating_point() else place.dtype)
            continue
        tensor = present[name]
        for edit in edits.get(name, ()):
            tensor = _spread(tensor, edit, place.shape)
        if tensor.shape != place.shape:
            raise ExportError(
                f"{name} is {tuple(present[name].shape)} in the converted model and {tuple(place.shape)} in the "
                "original, and nothing says where its channels belong; export to onnx, openvino or pt2"
            )
        whole[name] = tensor
    return whole


def _spread(tensor: Tensor, edit: Edit, shape: torch.Size) -> Tensor:
    """Put what an edit kept back where it was, among zeros."""
    if isinstance(edit, KeepRows):
        axis, kept = 0, edit.rows
    elif isinstance(edit, KeepColumns):
        axis, kept = 1, edit.columns
    elif isinstance(edit, KeepAlong):
        axis, kept = edit.axis, edit.kept
    else:
        return tensor
    if tensor.shape[axis] != len(kept):
        return tensor  # another edit put it back already, along the same axis
    sizes = list(tensor.shape)
    sizes[axis] = shape[axis]
    return tensor.new_zeros(sizes).index_copy_(axis, torch.tensor(kept), tensor)


def _write_out(stock: nn.Module, converted: nn.Module, edit: AddGrouped) -> None:
    """A grouped projection as the rows of a full one, with zeros for the inputs that it does not read."""
    grouped = converted.get_submodule(edit.name)
    assert isinstance(grouped, GroupedProjection)
    made, inputs = grouped.reads()
    rows = torch.tensor(edit.rows)
    own = grouped.weight.detach().cpu().flatten(1)[made]
    weight = tensor_named(stock, edit.weight)
    full = own.new_zeros(len(rows), weight.shape[1]).scatter_(1, inputs, own)
    with torch.no_grad():
        weight[rows] = full.reshape(len(rows), *weight.shape[1:])
        beside = edit.weight.rpartition(".")[0]
        for name in edit.tensors:
            owner, _, attribute = name.rpartition(".")
            source = grouped if owner == beside else grouped.norm
            tensor_named(stock, name)[rows] = getattr(source, attribute).detach().cpu()


def _write_whole(stock: nn.Module, converted: nn.Module, edit: AddFixed, operation: Operation) -> None:
    """A projection with a fixed gauge as the rows of a full one."""
    projection = converted.get_submodule(edit.name)
    assert isinstance(projection, FixedProjection)
    traced = operation.found.traced
    role = {"q": traced.q, "k": traced.k, "v": traced.v}[get_mode(operation.mode).gauge]
    stored = locate(stock, role, {}, 0, edit.width)
    write(stock, stored, projection.matrix(), torch.empty(0))
