"""Do a recorded surgery again."""

import torch
from torch import nn

from armour_surgery import hosts
from armour_surgery.discover import find_sites
from armour_surgery.errors import SchemaError
from armour_surgery.modes import choose_rank
from armour_surgery.records import SurgeryPlan
from armour_surgery.surgery.operation import Operation, Outcomes, layout_of, operate, rewrite_alike

__all__ = ["replay"]


def replay(host: nn.Module, surgery: SurgeryPlan) -> nn.Module:
    """Do a recorded surgery again on a freshly built host, in place; its weights come afterwards.

    Raises:
        SchemaError: the plan names a site that the host does not have, or a mode that does not fit there.
        UsageError: the plan gives a site a rank that it cannot have.
    """
    own = next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.float32)
    example = {}
    for name, shape, recorded in surgery.example:
        # A fresh build is in float32, whatever the converted model was cast to.
        dtype: torch.dtype = getattr(torch, recorded)
        example[name] = torch.empty(shape, dtype=own if dtype.is_floating_point else dtype, device="meta")
    found = {one.site.fqn: one for one in find_sites(host, example)}
    done: Outcomes = {}
    operations = []
    for site in surgery.sites:
        one = found.get(site.fqn)
        if one is None or site.mode not in one.site.modes:
            reason = one.site.refused.get(site.mode, "there is no such mode") if one else "it has no such attention"
            raise SchemaError(f"the plan converts {site.fqn!r} to {site.mode!r}, but in {type(host).__name__} {reason}")
        rank = choose_rank(one.site, site.mode, site.rank)
        rewritten, cls = rewrite_alike(host, one, site.mode, rank, done, check=False)
        if layout_of(rewritten) != site.layout:
            raise SchemaError(
                f"the plan keeps the channels of {site.fqn!r} in an order that this version of armour-surgery does not "
                "produce; load the folder with the version that saved it"
            )
        operations.append(Operation(site.fqn, site.mode, rank, rewritten, cls, one))
    for operation in operations:
        operate(host, operation, surgery.init)
    host.surgery = surgery  # type: ignore[assignment]
    hosts.mark_converted(host)
    return host
