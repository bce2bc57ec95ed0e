"""Find every attention of a model by dataflow: run it once, follow q, k and v back to their projections.

Nothing here knows a class or an attribute of any model.
"""

from armour_surgery.discover.find import describe_site, find_sites, trace_call
from armour_surgery.discover.match import result_of
from armour_surgery.discover.nodes import SELF, guard, value_of
from armour_surgery.discover.output import find_output
from armour_surgery.discover.record import could_not_run
from armour_surgery.discover.results import find_results
from armour_surgery.discover.spied import structure_of

__all__ = [
    "SELF",
    "could_not_run",
    "describe_site",
    "find_output",
    "find_results",
    "find_sites",
    "guard",
    "result_of",
    "structure_of",
    "trace_call",
    "value_of",
]
