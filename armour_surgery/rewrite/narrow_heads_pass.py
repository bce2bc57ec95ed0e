"""Let heads have fewer channels than they had: logits keep their scale, and results are laid out for the new width."""

from torch import fx

from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.hosts.attention_interface import is_interface
from armour_surgery.rewrite.contract import Surgery, width_of
from armour_surgery.rewrite.edits import KeepColumns
from armour_surgery.rewrite.relayout import arrange
from armour_surgery.rewrite.share_roles_pass import is_expressible
from armour_surgery.traced import Atom, Handover, OutputProjection

__all__ = ["NarrowHeadsPass"]

# How Linear and convolutions state what they read.
_INPUTS = ("in_features", "in_channels")


class NarrowHeadsPass:
    """State the scale where the core would take it from the number of channels, and narrow the output projection."""

    def requires(self, surgery: Surgery) -> None:
        """Every role meets its users at nodes that can be laid out anew.

        Raises:
            TraceError: the host needs its projections' outputs whole.
        """
        if surgery.results is not None and not is_expressible(surgery):
            raise TraceError(
                "its forward uses the output of its projections in a way that needs all their channels, so it has no "
                "rank to choose; leave out rank"
            )

    def __call__(self, surgery: Surgery) -> bool:
        """Rewrite; does nothing where heads keep their width."""
        if surgery.results is None:
            return False
        modified = _state_scale(surgery)
        for handover in surgery.results.handovers:
            modified = _lay_out(surgery, handover) or modified
        surgery.edits.append(_columns(surgery, surgery.results.projection))
        return modified

    def ensures(self, surgery: Surgery) -> None:
        """The core's scale no longer follows the number of channels."""
        if surgery.results is not None and _scale_name(surgery) and _scale(surgery) is None:
            raise PostconditionError("the logits would be scaled by another number of channels")


def _scale_name(surgery: Surgery) -> str | None:
    """The argument of the core that tells its scale; None where the host scales by itself."""
    core = surgery.traced.core
    if core.kind == "softmax":
        return None
    return "scaling" if is_interface(core.node.target) else "scale"


def _scale(surgery: Surgery) -> object:
    name = _scale_name(surgery)
    return surgery.traced.core.node.kwargs.get(name) if name else None


def _state_scale(surgery: Surgery) -> bool:
    """`1 / sqrt(key_dim)` of the original, where the host leaves it to the attention function."""
    name = _scale_name(surgery)
    if name is None or _scale(surgery) is not None:
        return False
    surgery.traced.core.node.update_kwarg(name, surgery.role("q").head_dim ** -0.5)
    return True


def _lay_out(surgery: Surgery, handover: Handover) -> bool:
    """Lead from the start of a handover to its readers by views of the new width; old views die."""
    sizes: dict[Atom, int] = {"h": surgery.role("v").num_heads, "j": width_of(surgery.value)}
    steps = arrange(handover.start.layout, handover.layout, sizes) if handover.start.layout is not None else None
    if steps is None:
        raise TraceError(
            f"its heads' results reach {handover.readers[0]} in a layout that cannot be made narrower; leave out rank"
        )
    # Before the first reader, and not where the old views were: those are still there, and die when nothing reads them.
    node: fx.Node = handover.start.node
    for method, arguments in steps:
        with surgery.graph.inserting_before(handover.readers[0]):
            node = surgery.graph.call_method(method, (node, *arguments))
    if node is handover.node:
        return False
    for reader in handover.readers:
        reader.replace_input_with(handover.node, node)
    return True


def _columns(surgery: Surgery, out: OutputProjection) -> KeepColumns:
    """Which input channels the output projection keeps: of every head those that are still made."""
    width = width_of(surgery.value)
    kept: list[int] = []
    for head in out.channels:
        kept += head[:width]
    owner = out.weight.rpartition(".")[0]
    sizes = tuple((owner, name) for name in _INPUTS) if owner else ()
    return KeepColumns(out.weight, sizes, tuple(sorted(kept)))
