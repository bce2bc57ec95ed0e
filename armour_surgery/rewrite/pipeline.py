"""Rewrite a traced attention for a mode: graph passes first, edits to the module's tensors after."""

from dataclasses import dataclass

from torch import fx, nn

from armour_surgery.modes import Mode
from armour_surgery.rewrite.add_grouped_projection_pass import AddGroupedProjectionPass
from armour_surgery.rewrite.contract import Part, Pass, Surgery, parts_of, run_passes
from armour_surgery.rewrite.edits import AddGrouped, Edit, apply_edits
from armour_surgery.rewrite.fix_gauge_pass import FixGaugePass
from armour_surgery.rewrite.mask_diagonal_pass import MaskDiagonalPass
from armour_surgery.rewrite.narrow_heads_pass import NarrowHeadsPass
from armour_surgery.rewrite.narrow_projections_pass import NarrowProjectionsPass
from armour_surgery.rewrite.remove_dead_nodes_pass import RemoveDeadNodesPass
from armour_surgery.rewrite.residual import Share
from armour_surgery.rewrite.restore_channels_pass import RestoreChannelsPass
from armour_surgery.rewrite.share_roles_pass import ShareRolesPass
from armour_surgery.traced import Results, TracedSite

__all__ = ["Rewritten", "become", "rewrite"]


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, the edits that its module needs, and which weights took the place of which.

    `key` and `value` say what K and V are made of now.
    """

    graph: fx.Graph
    edits: list[Edit]
    shares: list[Share]
    key: tuple[Part, ...]
    value: tuple[Part, ...]


def become(module: nn.Module, rewritten: Rewritten, cls: type[nn.Module], *, views: bool = False) -> None:
    """Make a module what its graph was rewritten to, in place: its tensors are edited, and it is of that class then.

    `views` as in `apply_edits`.
    """
    apply_edits(module, rewritten.edits, views=views)
    # nn.Module.__setattr__ keeps a book of tensors and modules, and has no business with the class.
    object.__setattr__(module, "__class__", cls)


def rewrite(
    traced: TracedSite, mode: Mode, rank: int | None = None, results: Results | None = None, *, fixed: bool = False
) -> Rewritten:
    """Rewrite the graph of a site, in place, and list what its module needs for it.

    With `rank`, every head has that many channels; `results` then says how its result is read. `fixed` is for a
    projection with a fixed gauge (`Mode.gauge`).

    Raises:
        TraceError: the site does something that this rewrite cannot keep; meant for users.
        PostconditionError: a pass did not keep its promise.
    """
    edits: list[Edit] = []
    shares: list[Share] = []
    surgeries = [_operate(member, mode, rank, results, fixed=fixed) for member in traced.members]
    for surgery in surgeries:
        edits += surgery.edits
        shares += _shares(surgery)
    return Rewritten(traced.trace.graph, edits, shares, surgeries[0].key, surgeries[0].value)


def _operate(traced: TracedSite, mode: Mode, rank: int | None, results: Results | None, *, fixed: bool) -> Surgery:
    """Rewrite one attention of a graph."""
    sizes = {letter: rank or getattr(traced, letter).head_dim for letter in ("q", "k", "v")}
    graph = traced.trace.graph
    surgery = Surgery(
        traced=traced,
        mode=mode,
        graph=graph,
        query=Part("q", 0, sizes["q"]),
        key=parts_of(mode.key, "k", sizes),
        value=parts_of(mode.value, "v", sizes),
        results=results,
        fixed=Part(mode.gauge, 0, sizes[mode.gauge]) if fixed else None,
    )
    # The order matters: a grouped projection starts from V's while that is whole, what has a fixed gauge leaves the
    # projection that it was in, roles are shared among what is left, and only at the end is it known what nothing reads
    # any more.
    passes: list[Pass] = [
        AddGroupedProjectionPass(),
        FixGaugePass(),
        NarrowProjectionsPass(),
        ShareRolesPass(),
        NarrowHeadsPass(),
        RestoreChannelsPass(),
        MaskDiagonalPass(),
        RemoveDeadNodesPass(graph),
    ]
    run_passes(surgery, passes)
    return surgery


def _shares(surgery: Surgery) -> list[Share]:
    """For K and V, where they changed: the rows they had and the rows that serve now."""
    # A grouped projection starts from rows of V's, and is told by them: a part does not know its edit.
    grouped = {edit.rows: edit for edit in surgery.edits if isinstance(edit, AddGrouped)}
    shares = []
    for letter, parts in (("k", surgery.key), ("v", surgery.value)):
        role = surgery.role(letter)
        if parts == (Part(letter, 0, role.head_dim),):
            continue
        filled = 0
        for part in parts:
            replaced = Part(letter, filled, filled + part.size)
            filled += part.size
            rows = surgery.rows(replaced)
            source = surgery.rows(part)
            maker = surgery.role(part.letter).producer
            edit = grouped.get(source)
            groups, shuffle = (edit.groups, edit.shuffle) if edit else (1, False)
            old_axes, new_axes = role.producer.out_axes, maker.out_axes
            old, new = role.producer.weight, maker.weight
            shares.append(Share(old, rows, new, source, groups, shuffle, old_axes, new_axes))
    return shares
