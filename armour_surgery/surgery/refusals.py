"""Why a site that was understood must be left alone all the same."""

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.altered import names_below, why_computed, why_hooked
from armour_surgery.copies import copy_of_zeros, meta_copy
from armour_surgery.errors import NothingToConvertError, PostconditionError, TraceError
from armour_surgery.hosts.attention_interface import chunks_in_one_call
from armour_surgery.initialize.freedom import probe, works_narrow
from armour_surgery.initialize.gauge import why_unwritable
from armour_surgery.modes import Mode
from armour_surgery.records import RefusedSite
from armour_surgery.rewrite import Edit, KeepRows, Rewritten, become, edited_names, removed_name
from armour_surgery.shapes import RememberedShapes
from armour_surgery.traced import Call, FoundSite, OutputProjection

__all__ = [
    "nothing_fits",
    "refuse_bound_channels",
    "refuse_bound_gauge",
    "refuse_changed",
    "refuse_computed",
    "refuse_hooked",
    "refuse_open_end",
    "refuse_shared",
    "refuse_without_closed_form",
    "runs",
    "try_out",
]


def nothing_fits(model: nn.Module, mode: str, refused: list[RefusedSite]) -> NothingToConvertError:
    """The error for a model of which no site can be converted; it names up to three different reasons."""
    reasons = list(dict.fromkeys(f"{site.fqn}: {site.reason}" for site in refused))
    listed = "; ".join(reasons[:3])
    if len(reasons) > 3:
        listed += f"; and {len(reasons) - 3} more"
    return NothingToConvertError(
        f"mode {mode!r} fits none of the {len(refused)} attention sites of {type(model).__name__}: {listed}. "
        "`armour-surgery inspect` lists the modes that fit"
    )


def refuse_shared(model: nn.Module, fqn: str, edits: list[Edit]) -> None:
    """Refuse a site whose projections must stay as they are, because something outside the site has them too.

    Raises:
        TraceError: see above.
    """
    site = model.get_submodule(fqn)
    edited: dict[int, str] = {}
    for name, tensor in [*site.named_parameters(), *site.named_buffers()]:
        for edit in edits:
            if name in edited_names(edit) or name.startswith(f"{removed_name(edit)}."):
                edited[id(tensor)] = name
    # The site itself may have several names, and under each of them its tensors are its own.
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if module is site:
            inside.append(f"{name}." if name else "")
    everywhere = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everywhere:
        if id(tensor) in edited and not name.startswith(tuple(inside)):
            raise TraceError(f"its {edited[id(tensor)]} is shared with {name}, outside this attention")


def refuse_computed(model: nn.Module, fqn: str) -> None:
    """Refuse a site of which some weights are computed at every call, where new ones have to be stored.

    Raises:
        TraceError: see above.
    """
    reason = why_computed(model, names_below(model, fqn))
    if reason is not None:
        raise TraceError(reason)


def refuse_without_closed_form(found: FoundSite) -> None:
    """Refuse a site where new weights cannot be chosen head by head from those of its projections.

    Several heads of Q may share one of K, or Q is not what one projection makes; there may be several attentions, or
    projections that are no layers.

    Raises:
        TraceError: see above.
    """
    q, k, reason = found.traced.q, found.traced.k, found.traced.unprojected
    if reason:
        raise TraceError(f"{reason}, and closed forms need those weights; use init 'wq' without a rank and train")
    if q.num_heads != k.num_heads:
        raise TraceError(
            f"it has {q.num_heads} heads of Q for {k.num_heads} of K, and only init 'wq' without a rank is there for "
            "that; use it and train"
        )
    if found.traced.others:
        raise TraceError(
            f"it holds {len(found.traced.members)} attentions with projections of their own, and only init 'wq' "
            "without a rank is there for that; use it and train"
        )
    for role in (q, k, found.traced.v):
        if role.producer.out_axes:
            raise TraceError(
                f"it multiplies by {role.producer.fqn} without a layer, and only init 'wq' without a rank is there for "
                "that; use it and train"
            )


def refuse_hooked(model: nn.Module, fqn: str, edits: list[Edit]) -> None:
    """Refuse a site in which somebody's hook is on a module that gets another width, or goes.

    Hooks on the site itself stay, and see what they saw before.

    Raises:
        TraceError: see above.
    """
    site = model.get_submodule(fqn)
    inside = dict(site.named_modules())
    for edit in edits:
        changed: list[str] = []
        removed = removed_name(edit)
        if removed and removed in inside:
            changed += names_below(site, removed)
        else:
            for name in edited_names(edit):
                # A container around a projection (LeViT's Linear and BatchNorm) hands out what the projection makes.
                while name := name.rpartition(".")[0]:
                    changed.append(name)
        names = [f"{fqn}.{name}" if fqn else name for name in changed]
        reason = why_hooked(model, names, inputs=not isinstance(edit, KeepRows))
        if reason is not None:
            raise TraceError(reason)


def refuse_open_end(found: FoundSite) -> OutputProjection:
    """The projection that a rank makes narrower; refuse a site that has none.

    Raises:
        TraceError: see above.
    """
    if found.output is None:
        raise TraceError(
            "the projection that reads its heads' results is not inside this module (or is not a single one), and "
            "with a rank it has to become narrower too; leave out rank"
        )
    return found.output


def refuse_bound_channels(module: nn.Module, found: FoundSite, out: OutputProjection) -> None:
    """Refuse a site whose heads need all their channels, because no basis but their own is as good.

    Raises:
        TraceError: see above.
    """
    traced, size = found.traced, found.site.key_dim
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


def refuse_bound_gauge(module: nn.Module, found: FoundSite, mode: Mode, *, check: bool) -> None:
    """Refuse a site in which the basis that a mode leaves open cannot be chosen, or not be stored.

    `check` tries changes of basis out with numbers.

    Raises:
        TraceError: see above.
    """
    traced, out = found.traced, found.output
    refuse_without_closed_form(found)
    if out is None:
        raise TraceError(
            "the projection that reads its heads' results is not inside this module (or is not a single one), and with "
            "a fixed gauge it has to read another basis; leave out gauge"
        )
    roles = {"q": traced.q, "k": traced.k, "v": traced.v}
    for letter in ("v",) if mode.gauge == "v" else ("q", "k"):
        # A bias of K adds one number to all logits of a query: whatever it is, the softmax takes it out again.
        biases = letter != "k" or "k" in mode.value
        reason = why_unwritable(module, roles[letter], biases=biases)
        if reason is not None:
            raise TraceError(f"{reason}, and a fixed gauge needs another basis; leave out gauge")
    if out.norm is not None:
        raise TraceError(f"{out.norm} follows {out.weight}, and a fixed gauge needs another basis; leave out gauge")
    if not check:
        return
    freedom = probe(module, found.call, traced.q, traced.k, traced.v, out)
    if mode.gauge != "v" and not freedom.logits:
        raise TraceError(
            "its output depends on the basis of queries and keys (a norm of them, a rotary position), so their gauge "
            "cannot be fixed; leave out gauge"
        )
    if freedom.values != "linear":
        raise TraceError(
            f"between its heads and {out.weight} stands something that is not linear (an activation, a norm, a gate), "
            "so the gauge of values cannot be fixed; leave out gauge"
        )


def refuse_changed(module: nn.Module, found: FoundSite, rank: int, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Refuse a site that computes something else with narrow heads, in a case where nothing is lost.

    Raises:
        TraceError: see above.
    """
    traced = found.traced
    shared = traced.k if rewritten.value[0].letter == "k" else traced.q

    def narrow(copied: nn.Module) -> None:
        become(copied, rewritten, cls)

    if not works_narrow(module, found.call, (traced.q, traced.k, traced.v), shared, rank, narrow):
        raise TraceError(
            f"its forward depends on the number of channels a head has ({found.site.key_dim}) in a way that could not "
            "be followed; leave out rank"
        )


def try_out(skeleton: nn.Module, call: Call, rewritten: Rewritten, cls: type[nn.Module]) -> None:
    """Run the rewritten module once, without weights: its output must have the original's shapes.

    Raises:
        TraceError: the original ran neither without numbers nor on zeros.
        PostconditionError: it has others.
    """
    on_cpu = Call(*pytree.tree_map(_zeros, (call.args, call.kwargs)))
    with torch.no_grad(), RememberedShapes(), chunks_in_one_call(skeleton):
        # Some hosts run on no device without numbers (one that asks autocast about the device, say).
        for copy, given in ((meta_copy, call), (copy_of_zeros, on_cpu)):
            try:
                wanted = _shapes(copy(skeleton)(*given.args, **given.kwargs))
            except Exception as error:
                reason = f"it runs with numbers alone ({type(error).__name__}: {error})"
                continue
            converted = copy(skeleton)
            become(converted, rewritten, cls)
            got = _shapes(converted(*given.args, **given.kwargs))
            break
        else:
            raise TraceError(reason)
    if wanted != got:
        raise PostconditionError(f"{cls.__name__} returns {got}, and its original {wanted}")


def runs(skeleton: nn.Module, call: Call) -> bool:
    """Whether a module takes a call at all, in its present state."""
    args, kwargs = pytree.tree_map(_zeros, (call.args, call.kwargs))
    try:
        with torch.no_grad(), chunks_in_one_call(skeleton):
            copy_of_zeros(skeleton)(*args, **kwargs)
    except Exception:  # whatever the host's code raises
        return False
    return True


def _zeros(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in pytree.tree_leaves(result) if hasattr(leaf, "shape")]
