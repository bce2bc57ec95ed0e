"""One call of a module as a graph, by whichever tracer can follow it."""

from collections.abc import Callable

from torch import nn

from armour_surgery.discover.recorded import trace_by_running
from armour_surgery.discover.symbolic import trace_symbolically
from armour_surgery.errors import TraceError
from armour_surgery.traced import Call, Trace

__all__ = ["trace"]


def trace(module: nn.Module, call: Call, opaque: Callable[[str, nn.Module], bool]) -> Trace:
    """The graph of `module` for one recorded call, in the module's present state (train or eval).

    `opaque(name, submodule)` says which submodules stay calls. torch.nn's own layers always do. The module is copied
    without its weights; it is neither run nor changed.

    Raises:
        TraceError: the forward does something that a graph cannot hold; the message says what.
    """
    try:
        # First, since it keeps flags, factors and sizes as the host wrote them.
        return trace_symbolically(module, call, opaque)
    except TraceError as reason:
        try:
            return trace_by_running(module, call, opaque)
        except TraceError as other:
            # It gets further than proxies do, and what stops it is more often what a user can act on.
            raise other from reason
