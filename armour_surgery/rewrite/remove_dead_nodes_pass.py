"""Take out what nothing reads any more, and put the rest back in order."""

import operator
from collections.abc import Collection

from torch import fx

from armour_surgery.errors import TraceError
from armour_surgery.rewrite.contract import Surgery
from armour_surgery.rewrite.edits import KeepRows, Remove

__all__ = ["RemoveDeadNodesPass", "erase_unused"]


_READS = (getattr, operator.getitem)  # reading a size that is not used has no effect


_HARMLESS = ("dtype", "device")  # what stays true of a tensor with fewer rows


def erase_unused(graph: fx.Graph, kept: Collection[fx.Node]) -> None:
    """Remove nodes that lost their last user; those in `kept` never had one, and may act by side effect."""
    # From the end, so that a node goes before what only it has read.
    for node in reversed(list(graph.nodes)):
        if not node.users and node not in kept and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


class RemoveDeadNodesPass:
    """Remove nodes that lost their last user in this surgery (what never had one may act by side effect: it stays)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.unused = {node for node in graph.nodes if not node.users}

    def requires(self, surgery: Surgery) -> None:
        """Nothing: any graph can be cleaned."""

    def __call__(self, surgery: Surgery) -> bool:
        """Remove and reorder."""
        before = str(surgery.graph)
        erase_unused(surgery.graph, {node for node in self.unused if node.target not in _READS})
        _mend_order(surgery.graph)
        return str(surgery.graph) != before

    def ensures(self, surgery: Surgery) -> None:
        """The graph is sound, and what is to be removed from the module is not read.

        Raises:
            TraceError: the host reads a projection for something else too.
        """
        surgery.graph.lint()
        gone = {edit.name for edit in surgery.edits if isinstance(edit, Remove)}
        for node in surgery.graph.nodes:
            target = str(node.target)
            if node.op in ("get_attr", "call_module") and any(
                target == name or target.startswith(f"{name}.") for name in gone
            ):
                raise TraceError(f"its forward also uses {target} for something other than attention")
        _refuse_other_readers(surgery)


def _refuse_other_readers(surgery: Surgery) -> None:
    """Rows may only go from tensors that nobody but the projection itself reads."""
    chains = {node for producer in surgery.producers() for node in producer.chain}
    for edit in surgery.edits:
        names = set(edit.tensors) if isinstance(edit, KeepRows) else set()
        for node in surgery.graph.nodes:
            target = str(node.target)
            if node.op == "get_attr" and target in names:
                # A concatenated bias is read by the concatenation, which the projection reads.
                users = [user for user in node.users if not (user.target is getattr and user.args[1] in _HARMLESS)]
                readers = {user for reader in users for user in ([reader] if reader in chains else reader.users)}
                alone = readers <= chains
            elif node.op == "call_module" and any(name.startswith(f"{target}.") for name in names):
                alone = node in chains
            else:
                continue
            if not alone:
                raise TraceError(f"its forward also uses {target} for something other than attention")


def _mend_order(graph: fx.Graph) -> None:
    """Move every node that is read before it is computed to right before its first reader."""
    done: set[fx.Node] = set()

    def place_inputs(node: fx.Node, reader: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in done:
                place_inputs(source, reader)
                reader.prepend(source)
                done.add(source)

    for node in list(graph.nodes):
        if node not in done:
            place_inputs(node, node)
            done.add(node)
