"""Surgery on one site: prepared on a copy without weights, tried out there, and only then done on the model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from armour_surgery.copies import MetaTwins, floating_weight, meta_copy
from armour_surgery.discover import describe_site, find_results, structure_of, trace_call
from armour_surgery.errors import ArmourError, PostconditionError, SpecializationError, TraceError
from armour_surgery.hosts.attention_interface import names_attention_function
from armour_surgery.measure.cost import count_params
from armour_surgery.modes import choose, choose_rank, get_mode
from armour_surgery.records import RefusedSite
from armour_surgery.rewrite import (
    AddFixed,
    Edit,
    Rewritten,
    Variant,
    become,
    edited_names,
    edits_left,
    make_class,
    render,
    residual,
    rewrite,
)
from armour_surgery.surgery.mlps import Narrowing
from armour_surgery.surgery.refusals import (
    refuse_bound_channels,
    refuse_bound_gauge,
    refuse_changed,
    refuse_computed,
    refuse_hooked,
    refuse_open_end,
    refuse_shared,
    refuse_without_closed_form,
    runs,
    try_out,
)
from armour_surgery.traced import Call, FoundSite, OutputProjection, SeenSite, TracedSite

__all__ = ["Change", "Fixing", "Operation", "Prepared", "SharedRewrites", "fix", "operate", "prepare"]


@dataclass(frozen=True)
class Fixing:
    """What fixes a site's gauge: the whole rewriting, and the class that its module becomes.

    `start` is the first channel of the block, None until the weights are chosen (`gauge.py`).
    """

    rewritten: Rewritten
    cls: type[nn.Module]
    start: int | None = None

    @property
    def edits(self) -> list[Edit]:
        """The edits, with the block in its place."""
        return [
            replace(edit, start=self.start or 0) if isinstance(edit, AddFixed) else edit
            for edit in self.rewritten.edits
        ]


@dataclass(frozen=True)
class Operation:
    """What is ready to be done at one site, and the class that its module becomes. `rank` None is the full one.

    `fixing` is there where the gauge is to be fixed afterwards.
    """

    found: FoundSite
    mode: str
    rank: int | None
    rewritten: Rewritten
    cls: type[nn.Module]
    fixing: Fixing | None = None

    @property
    def fqn(self) -> str:
        """The site's name inside the model."""
        return self.found.fqn

    @property
    def edits(self) -> list[Edit]:
        """All that is done to the module's tensors; those of a fixed gauge once it is known which."""
        known = self.fixing is not None and self.fixing.start is not None
        return self.fixing.edits if known and self.fixing is not None else self.rewritten.edits

    @property
    def layout(self) -> str:
        """A digest of which rows stay, in which order: what `SitePlan.layout` records."""
        return hashlib.sha256(repr(self.edits).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Prepared:
    """What can be done to a model as it was asked, and the sites that stay as they are.

    `mlps` are to get fewer hidden channels; `units` then has the block of every attention and MLP (`mlps.py`).
    """

    operations: list[Operation]
    refused: list[RefusedSite]
    mlps: list[Narrowing] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """What an operation changed at its site: parameters, and the residual that `SitePlan` tells of after `wq`."""

    params_before: int
    params_after: int
    residual: float | None


def prepare(
    model: nn.Module,
    sites: Sequence[SeenSite],
    requested: str | Mapping[str, str],
    ranks: int | Mapping[str, int] | None = None,
    *,
    refit: bool = False,
    hooks: bool = True,
    gauge: bool = False,
) -> Prepared:
    """Rewrite every site on a weightless copy of its module; sites that are alike share one class.

    `requested` is one mode for all, or one by site name. `refit` says that new weights will be stored throughout the
    sites, so that none may be computed from others, `hooks` that hooks on what gets narrower stand in the way, and
    `gauge` that the gauge is fixed afterwards.

    Raises:
        UsageError: a rank is none of a site's.
    """
    operations: list[Operation] = []
    refused: list[RefusedSite] = []
    rewrites = SharedRewrites(model, check=True)
    for site in sites:
        if isinstance(site, RefusedSite):
            refused.append(site)
            continue
        mode, reason = choose(site.site, requested if isinstance(requested, str) else requested[site.fqn])
        if mode is None:
            refused.append(RefusedSite(site.fqn, reason))
            continue
        try:
            rank = choose_rank(site.site, mode, ranks)
            if refit or gauge or rank is not None:
                refuse_computed(model, site.fqn)
                refuse_without_closed_form(site)
            operation = rewrites.operation(site, mode, rank, gauge=gauge)
            edits = operation.rewritten.edits + (operation.fixing.edits if operation.fixing else [])
            refuse_shared(model, site.fqn, edits)
            if hooks:
                refuse_hooked(model, site.fqn, edits)
        except TraceError as error:
            refused.append(RefusedSite(site.fqn, str(error)))
        else:
            operations.append(operation)
    return Prepared(operations, refused)


def operate(model: nn.Module, operation: Operation, *, compares: bool = False, views: bool = False) -> Change:
    """Do one site's surgery on the model itself; a fixed gauge with it, where it is known which.

    With `compares` the change says how far apart the roles that become one are. `views` as in `apply_edits`.
    """
    module = model.get_submodule(operation.fqn)
    params_before = count_params(module)
    # With fewer channels no old row has a new one in its place.
    lost = residual(module, operation.rewritten.shares) if compares and operation.rank is None else None
    become(module, operation.rewritten, operation.cls, views=views)
    if operation.fixing is not None and operation.fixing.start is not None:
        fix(module, operation)
    return Change(params_before, count_params(module), lost)


def fix(module: nn.Module, operation: Operation) -> None:
    """Give a site that is converted the shapes of a fixed gauge; its numbers come afterwards."""
    assert operation.fixing is not None
    left = edits_left(operation.rewritten.edits, operation.fixing.edits)
    become(module, replace(operation.fixing.rewritten, edits=left), operation.fixing.cls)


class SharedRewrites:
    """The operations on the sites of one model, each kind of site rewritten once.

    `check` tries out with numbers whether a site may have heads of fewer channels. That was done already where a
    recorded surgery is done again.
    """

    def __init__(self, model: nn.Module, *, check: bool) -> None:
        self._model = model
        self._check = check
        self._outcomes: dict[tuple[object, ...], tuple[Rewritten, type[nn.Module]] | TraceError] = {}
        # In train mode, by fingerprint: the same for all modes that are tried on a site.
        self._in_training: dict[str, TracedSite] = {}

    def operation(self, found: FoundSite, mode: str, rank: int | None, *, gauge: bool = False) -> Operation:
        """What is to be done at a site; with `gauge`, also what fixes its gauge afterwards.

        Raises:
            TraceError: it cannot be rewritten, or one that is like it could not be.
        """
        fixing = Fixing(*self._outcome(found, mode, rank, fixed=True)) if gauge else None
        return Operation(found, mode, rank, *self._outcome(found, mode, rank, fixed=False), fixing)

    def _outcome(
        self, found: FoundSite, mode: str, rank: int | None, *, fixed: bool
    ) -> tuple[Rewritten, type[nn.Module]]:
        kind = mode, rank, fixed, found.fingerprint
        if kind not in self._outcomes:
            try:
                self._outcomes[kind] = self._rewrite(found, mode, rank, fixed=fixed)
            except TraceError as error:
                self._outcomes[kind] = error
        outcome = self._outcomes[kind]
        if isinstance(outcome, TraceError):
            raise outcome
        return outcome

    def _rewrite(
        self, found: FoundSite, mode: str, rank: int | None, *, fixed: bool
    ) -> tuple[Rewritten, type[nn.Module]]:
        """The edits and the class, tried out: without weights always, with them where `rank` may lose something."""
        module = self._model.get_submodule(found.fqn)
        out = None
        if fixed:
            refuse_bound_gauge(module, found, get_mode(mode), check=self._check)
        if rank is not None:
            out = refuse_open_end(found)
            if self._check:
                refuse_bound_channels(module, found, out)
        rewriter = _SiteRewriter(found, module, mode, rank, out, fixed=fixed)
        rewritten, cls = rewriter.rewrite(partial(self._trained, found))
        try:
            try_out(rewriter.skeleton, found.call, rewritten, cls)
        except (RuntimeError, ValueError, ArmourError) as error:
            if rank is None:
                raise
            raise TraceError(
                f"its forward counts on {found.site.key_dim} channels a head ({error}); leave out rank"
            ) from error
        # Whatever narrow heads lose they lose without a fixed gauge too, whose numbers are not there yet.
        if rank is not None and self._check and not fixed:
            refuse_changed(module, found, rank, rewritten, cls)
        return rewritten, cls

    def _trained(self, found: FoundSite, skeleton: nn.Module) -> TracedSite:
        """The call of a site, followed in train mode, in which the skeleton is."""
        if found.fingerprint not in self._in_training:
            self._in_training[found.fingerprint] = trace_call(skeleton, found.call, found.inside)
        return self._in_training[found.fingerprint]


class _SiteRewriter:
    """Rewrites the attention of one kind of site: for the call that was seen, and later for calls of other kinds.

    `skeleton` is the site's module without weights. The class that it makes keeps it for as long as there are models
    of that class: a call with other flags or shapes is traced on it when it comes.
    """

    def __init__(
        self,
        found: FoundSite,
        module: nn.Module,
        mode: str,
        rank: int | None,
        out: OutputProjection | None,
        *,
        fixed: bool,
    ) -> None:
        self.skeleton = meta_copy(module)
        self._host = type(module)
        self._found = found
        self._mode = get_mode(mode)
        self._rank = rank
        self._out = out
        self._fixed = fixed
        self._edits: list[Edit] = []

    def rewrite(self, trained: Callable[[nn.Module], TracedSite]) -> tuple[Rewritten, type[nn.Module]]:
        """The edits and the class, whose forward knows the call that was seen in eval mode and in train mode.

        `trained` follows the call in train mode. In eval mode discovery has followed it.

        Raises:
            TraceError: the site does something that cannot be kept.
        """
        self.skeleton.eval()  # timm's LeViT attention returns nothing here
        rewritten, eval_variant = self._rewrite_graph(self.skeleton, self._found.traced.copied())
        variants = [eval_variant]
        self.skeleton.train()
        try:
            followed = trained(self.skeleton).copied()
        except TraceError:
            if runs(self.skeleton, self._found.call):
                raise
            # The host takes other calls while it trains (RF-DETR several groups of queries): these are followed when
            # they come.
            self.skeleton.eval()
        else:
            in_training, train_variant = self._rewrite_graph(self.skeleton, followed)
            if in_training.edits != rewritten.edits:
                raise TraceError("its train mode and its eval mode use its projections differently")
            variants.append(train_variant)
        self._edits = rewritten.edits
        return rewritten, make_class(self._host, self._mode.name, variants, self.specialize)

    def specialize(self, converted: nn.Module, call: Call) -> Variant:
        """One more branch of the class's forward, for a call of a kind that was not seen before.

        Raises:
            SpecializationError: the call cannot be followed.
            PostconditionError: it needs other weights than the module has.
        """
        case = meta_copy(self.skeleton)
        now, then = floating_weight(converted), floating_weight(case)
        if now is not None and then is not None and now.dtype != then.dtype:
            case.to(now.dtype)  # what forward computes from a type has to be of the present one
        edited = {name for edit in self._edits for name in edited_names(edit)}
        for fqn, child in case.named_modules():
            _copy_settings(converted, fqn, child, edited)
        try:
            seen = Call(*MetaTwins().of((call.args, call.kwargs)))
            rewritten, variant = self._rewrite_graph(case, trace_call(case, seen, self._found.inside))
        except TraceError as error:
            raise SpecializationError(
                f"{type(converted).__name__} is called in a way that it was not converted for, and cannot follow: "
                f"{error}. Convert the model with an example_input that leads to this call"
            ) from error
        if rewritten.edits != self._edits:
            raise PostconditionError(
                f"{self._host.__name__} needs other weights for this call than it was converted for"
            )
        return variant

    def _rewrite_graph(self, module: nn.Module, traced: TracedSite) -> tuple[Rewritten, Variant]:
        """Rewrite the graph of one call of a module, in place, and print it."""
        # A mode fits a call, not a module: shared self- and cross-attention reads the same tokens in one of them alone.
        reason = describe_site(self._found.fqn, traced).refused.get(self._mode.name)
        if reason is not None:
            raise TraceError(f"{self._mode.name} does not fit it: {reason}")
        results = None if self._out is None else find_results(traced, dict(module.named_modules()), self._out)
        rewritten = rewrite(traced, self._mode, self._rank, results, fixed=self._fixed)
        return rewritten, render(rewritten.graph, traced.trace.signature)


def _copy_settings(converted: nn.Module, fqn: str, child: nn.Module, edited: set[str]) -> None:
    """What a user may have set since the conversion: flags and numbers such as `training`, `fused_attn`, dropout's `p`,
    the attention function that a transformers config names, and tables of other sizes with the numbers that say so."""
    try:
        current = converted.get_submodule(fqn)
    except AttributeError:  # a projection that the conversion removed
        return
    for name, value in vars(current).items():
        plain = type(value) in (bool, float) and type(vars(child).get(name)) is type(value)
        if plain or names_attention_function(value):
            object.__setattr__(child, name, value)
    for name in structure_of(child).keys() & structure_of(current).keys():
        object.__setattr__(child, name, getattr(current, name))
    for held in ("_parameters", "_buffers"):
        for name, tensor in getattr(current, held).items():
            known = getattr(child, held).get(name)
            untouched = known is not None and tensor is not None and (f"{fqn}.{name}" if fqn else name) not in edited
            if untouched and tensor.shape != known.shape:
                twin = torch.empty_like(tensor, device="meta")
                getattr(child, held)[name] = nn.Parameter(twin) if held == "_parameters" else twin
