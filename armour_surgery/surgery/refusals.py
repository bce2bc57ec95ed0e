"""Why a site that was understood must be left alone all the same."""

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.copies import meta_copy
from armour_surgery.discover import FoundSite
from armour_surgery.errors import PostconditionError, TraceError
from armour_surgery.initialize.freedom import probe, works_narrow
from armour_surgery.rewrite import Edit, Rewritten, apply_edits, edited_names, removed_name
from armour_surgery.traced import Call, OutputProjection

__all__ = ["refuse_bound_channels", "refuse_changed", "refuse_shared", "try_out"]


def refuse_shared(model: nn.Module, fqn: str, edits: list[Edit]) -> None:
    """Refuse a site whose projections must stay as they are, because something outside the site has them too."""
    site = model.get_submodule(fqn)
    own = [name for name, module in model.named_modules(remove_duplicate=False) if module is site]
    tensors = {
        id(tensor): name
        for name, tensor in [*site.named_parameters(), *site.named_buffers()]
        if any(name in edited_names(edit) or name.startswith(f"{removed_name(edit)}.") for edit in edits)
    }
    everywhere = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everywhere:
        if id(tensor) in tensors and not any(name.startswith(f"{prefix}.") or not prefix for prefix in own):
            raise TraceError(f"its {tensors[id(tensor)]} is shared with {name}, outside this attention")


def refuse_bound_channels(module: nn.Module, found: FoundSite, out: OutputProjection | None, check: bool) -> None:
    """Refuse a site whose heads need all their channels, because no basis but their own is as good.

    Raises:
        TraceError: see above.
    """
    traced, size = found.traced, found.site.key_dim
    assert traced is not None
    if out is None:
        raise TraceError(
            "the projection that reads its heads' results is not inside this module (or is not a single one), and "
            "with a rank it has to become narrower too; leave out rank"
        )
    if not check:
        return
    freedom = probe(module, found.call, traced.q, traced.k, traced.v, out)
    if not freedom.logits:
        raise TraceError(
            f"its output depends on the basis of queries and keys (a norm of them, a rotary position), so they need "
            f"all {size} channels of a head; leave out rank"
        )
    if freedom.values != "linear":
        raise TraceError(
            f"between its heads and {out.weight} stands something that is not linear (an activation, a norm, a gate), "
            f"so values need all {size} channels; leave out rank"
        )


def refuse_changed(module: nn.Module, found: FoundSite, rank: int, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Refuse a site that computes something else with narrow heads, in a case where nothing is lost.

    Raises:
        TraceError: see above.
    """
    traced = found.traced
    assert traced is not None
    shared = traced.k if rewritten.value[0].letter == "k" else traced.q

    def narrow(copied: nn.Module) -> None:
        apply_edits(copied, rewritten.edits)
        object.__setattr__(copied, "__class__", cls)

    if not works_narrow(module, found.call, (traced.q, traced.k, traced.v), shared, rank, narrow):
        raise TraceError(
            f"its forward depends on the number of channels a head has ({found.site.key_dim}) in a way that could not "
            "be followed; leave out rank"
        )


def try_out(skeleton: nn.Module, call: Call, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Run the rewritten module once, without weights: its output must have the original's shapes."""
    original, converted = meta_copy(skeleton), meta_copy(skeleton)
    apply_edits(converted, rewritten.edits)
    object.__setattr__(converted, "__class__", cls)
    with torch.no_grad():
        wanted, got = (
            [
                tuple(leaf.shape)
                for leaf in pytree.tree_leaves(module(*call.args, **call.kwargs))
                if hasattr(leaf, "shape")
            ]
            for module in (original, converted)
        )
    if wanted != got:
        raise PostconditionError(f"{cls.__name__} returns {got}, and its original {wanted}")
