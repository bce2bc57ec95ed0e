"""The records that the stages hand to each other: plain, frozen, comparable, and writable as JSON.

Shapes and words: B batch, N tokens, D embed_dim, H num_heads, d key_dim (per head), e value_dim (per head).
A *site* is one module whose forward holds an attention core; its *projections* are the modules that make q, k and v.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from armour_surgery.spelled import MLP, millions, shortened
from armour_surgery.tabular import Table, Tabular
from armour_surgery.views import plan_table

__all__ = [
    "AttentionSite",
    "ConvertedPart",
    "Fidelity",
    "FrontierPoint",
    "GaugePlan",
    "MlpPlan",
    "Progress",
    "Projection",
    "RefusedSite",
    "Sensitivity",
    "SitePlan",
    "Source",
    "SurgeryPlan",
    "WeightsFile",
]

# Told while long work goes on: what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
# The numbers of a tensor, or what is none.
ExampleValue = tuple[int, ...] | bool | int | float | str | None
# Letters of a reason that a record shows of itself.
_REASON = 70


@dataclass(frozen=True)
class Projection:
    """Where the queries, keys or values of a site come from.

    `fqn` names the module (or the parameter, where the host calls `F.linear` on one) inside the model.
    `channels[h][j]` is the output channel of that projection which is dimension j of head h.
    `tokens` is how many tokens it projects per image in the example that was run.
    """

    fqn: str
    channels: tuple[tuple[int, ...], ...]
    tokens: int

    @property
    def num_heads(self) -> int:
        """Heads that this projection feeds."""
        return len(self.channels)

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return len(self.channels[0])

    def __repr__(self) -> str:
        # Thousands of channels would fill a screen with numbers.
        width = self.head_dim if self.channels else 0
        return f"Projection({self.fqn!r}, {self.num_heads} heads x {width}, {self.tokens} tokens)"


@dataclass(frozen=True)
class AttentionSite:
    """One attention of a model: what `inspect` shows and what a mode is chosen by.

    `kind` is self-attention, downsampling, reduced keys or cross-attention. `reads` names, for each role, the tensor
    that its projection is applied to; equal names mean the same tensor. `plain_value_projection` says that V comes
    from one Linear or 1x1 convolution. `modes` are the names that fit, `refused` maps every other mode to the reason
    in a user's words. `key_dim` and `value_dim` are per head. `q`, `k`, `v` are None when the site could not be
    followed at all; then `num_heads` and the sizes are 0 and every mode carries the same reason. Where only `q` is
    None, `unprojected` says why it is not the output of one projection, and modes fit that leave it alone.
    """

    fqn: str
    kind: str
    num_heads: int
    key_dim: int
    value_dim: int
    q: Projection | None
    k: Projection | None
    v: Projection | None
    reads: dict[str, str] = field(default_factory=dict)
    plain_value_projection: bool = False
    modes: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    unprojected: str = ""

    @property
    def projections(self) -> dict[str, Projection]:
        """The projection of each role by its letter; empty for a site that could not be followed."""
        roles = {"q": self.q, "k": self.k, "v": self.v}
        return {letter: role for letter, role in roles.items() if role is not None}

    def __repr__(self) -> str:
        sizes = f"{self.num_heads} heads, {self.key_dim} x {self.value_dim}, " if self.num_heads else ""
        if self.modes:
            modes = f"modes {', '.join(self.modes)}"
        else:
            modes = f"no mode: {shortened(next(iter(self.refused.values()), 'not known why'), _REASON)}"
        return f"AttentionSite({self.fqn!r}, {self.kind}, {sizes}{modes})"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the contract's keys, and the name of each role's projection."""
        roles = {letter: role.fqn for letter, role in self.projections.items()}
        return {
            "fqn": self.fqn,
            "kind": self.kind,
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "modes": list(self.modes),
            "refused": dict(self.refused),
            "projections": roles,
        }


@dataclass(frozen=True)
class WeightsFile:
    """A file that weights were read from: its path as it was given, and the sha256 of what is in it."""

    path: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """How to build the unconverted host again, from its library alone.

    `library` is timm, transformers or torchvision. `architecture` is a timm or torchvision model name, or a
    transformers class name. `arguments` are the builder's keyword arguments (timm, torchvision) or the config
    (transformers); JSON values only. `attributes` are plain values that differ from a fresh build
    (`{"blocks.0.attn.attn_drop.p": 0.1}`) and are put back after it. A model of no library has the library `own`: its
    `architecture` is its class, `name` says what made it (`vit.py:MyViT`), and nobody but its user can build it.

    `name`, `options` and `checkpoint` are how the weights came: MODEL, what of `hosts.load_model`'s sizes and arguments
    was given with it (None where the model was not loaded by name), and the file that was read, if one was.
    """

    library: str
    architecture: str
    arguments: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    revision: str | None = None
    license: str | None = None
    options: dict[str, Any] | None = None
    checkpoint: WeightsFile | None = None


@dataclass(frozen=True)
class GaugePlan:
    """What fixing a site's gauge came to.

    In the projection that serves twice, the weights that read the channels from `start` on (as many as a head has) are
    the identity, and not stored. `start` is None where no such block is conditioned well enough; the gauge is then as
    it was. `condition` is the best block's condition number, the largest of all heads'. `error` is the relative error
    of logits and values, computed in the model's own type on noise, and `error_before` what it would be otherwise.
    They are None where there were no weights.
    """

    start: int | None
    condition: float | None = None
    error: float | None = None
    error_before: float | None = None


@dataclass(frozen=True)
class SitePlan:
    """What was done at one site. MACs are for one image; `residual` is unitless, 0 means nothing was lost.

    `residual` after `wq` is the relative Frobenius distance between the weight that the site had for the merged role
    and the one it has now, `||W_old - W_shared|| / ||W_old||`; after `calibrated` the relative error of the site's
    output on held-out images; after `wq-refit` and `joint-svd` the relative error of logits and values that the
    weights imply. None where there were no weights to compare. `steps` names what was fitted.
    `layout` is a digest of which rows were kept, in which order: weights only fit a surgery of equal layout.
    `rank` is the number of channels that queries, keys and values of a head have now; None means key_dim, as before.
    After `wq` with a rank, `residual` is what it is after `wq-refit`. `gauge` is there where it was to be fixed.
    """

    fqn: str
    mode: str
    init: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    residual: float | None
    layout: str
    steps: tuple[str, ...] = ()
    rank: int | None = None
    gauge: GaugePlan | None = None


@dataclass(frozen=True)
class MlpPlan:
    """An MLP that has fewer hidden channels than before.

    `residual` is the relative error of its output on the tokens that it was fitted to, as its closed form leaves it;
    None where there were no weights. `steps` names what was fitted.
    """

    fqn: str
    hidden_before: int
    hidden_after: int
    params_before: int
    params_after: int
    residual: float | None
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class RefusedSite:
    """A site that was left as it was, and why."""

    fqn: str
    reason: str


@dataclass(frozen=True)
class Fidelity:
    """How near a converted model is to its original, on images that nothing was fitted to.

    `images` of `source` were compared: the mean `cosine` of the final features' tokens, their signal to noise ratio in
    decibels (`sqnr_db = 10 log10 |f|^2 / |f - g|^2`), and, where there is a head, the share of images with the same
    first choice, in percent.
    """

    images: int
    source: str
    cosine: float
    sqnr_db: float
    agreement: float | None


@dataclass(frozen=True)
class Sensitivity:
    """What converting one site alone, in one way, wins and costs.

    `rank` is the number of shared channels per head, None for all of them; of an MLP (`mode` is then "mlp") the number
    of hidden channels. `params_saved` counts parameters of the
    model. `residual` is the relative error of the site's output on held-out images. `loss` is the model's:
    1 - the mean cosine of its final features' tokens to the original's, with this site alone converted.
    """

    fqn: str
    mode: str
    rank: int | None
    params_saved: int
    residual: float
    loss: float


@dataclass(frozen=True)
class FrontierPoint:
    """A choice of conversions: how many parameters the model then has, and its loss (as in `Sensitivity`).

    `predicted` is the sum of what its sites cost alone. `measured` is the loss of that conversion on held-out images,
    None where it was not tried. `sites` names what is converted: (fqn, mode, rank).
    """

    params: int
    predicted: float
    measured: float | None
    sites: tuple[tuple[str, str, int | None], ...]

    def __repr__(self) -> str:
        measured = "not measured" if self.measured is None else f"measured {self.measured:.5f}"
        predicted = f"{len(self.sites)} converted, predicted {self.predicted:.5f}"
        return f"FrontierPoint({millions(self.params)}, {predicted}, {measured})"


@dataclass(frozen=True)
class ConvertedPart:
    """A module inside of a model that was converted by itself: its name, and what it was fed (as in `SurgeryPlan`)."""

    fqn: str
    example: tuple[tuple[str, tuple[int, ...], str], ...]
    example_values: tuple[tuple[str, ExampleValue], ...] = ()


@dataclass(frozen=True, repr=False)
class SurgeryPlan(Tabular):
    """Everything that `convert` did (or, from `plan`, would do). It rides on the model as `model.surgery`.

    `sensitivities` and `frontier` are what was weighed for a budget, `max_loss` or `params_goal`; empty without one.
    `mlps` are those with fewer hidden channels now.
    `example` has the (name, shape, type) of every tensor that the model was run on, and `example_values` by name what
    of it counts as numbers: whole numbers in their order, and what is no tensor.
    `trained` is a sentence about the training that came afterwards; `fidelity` then no longer holds and is None.
    `parts` are the modules that were converted instead of the whole model; `sites` are then named from the model, and
    MACs, example and fidelity are theirs.
    `original` has a digest of every tensor that the model had before (`surgery.original`); empty where there were no
    weights, and in folders of older versions. `classes` are the names of the head's classes where training settled
    them and the model's own library has no place for such.
    """

    mode: str
    init: str
    sites: tuple[SitePlan, ...]
    refused: tuple[RefusedSite, ...]
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    example: tuple[tuple[str, tuple[int, ...], str], ...] = ()
    source: Source | None = None
    fidelity: Fidelity | None = None
    max_loss: float | None = None
    sensitivities: tuple[Sensitivity, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()
    trained: str | None = None
    example_values: tuple[tuple[str, ExampleValue], ...] = ()
    parts: tuple[ConvertedPart, ...] = ()
    original: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    mlps: tuple[MlpPlan, ...] = ()
    params_goal: int | None = None

    @property
    def loss(self) -> float:
        """The loss (as in `Sensitivity`) of the whole conversion; not a number where nothing was measured."""
        return math.nan if self.fidelity is None else 1 - self.fidelity.cosine

    def chosen(self, points: Iterable[FrontierPoint]) -> FrontierPoint | None:
        """The point of a frontier whose sites are those that were converted."""
        converted = {(site.fqn, site.mode, site.rank) for site in self.sites}
        converted |= {(mlp.fqn, MLP, mlp.hidden_after) for mlp in self.mlps}
        return next((point for point in points if set(point.sites) == converted), None)

    def table(self) -> Table:
        """What a session and a notebook show of it."""
        return plan_table(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SurgeryPlan":
        """Rebuild a plan from `to_dict`'s output.

        Raises:
            KeyError, TypeError: a key is missing, unknown, or of the wrong kind.
        """
        # JSON has lists where records have tuples, which compare and hash.
        sites = []
        for site in data["sites"]:
            gauge = GaugePlan(**site["gauge"]) if site.get("gauge") else None
            sites.append(SitePlan(**{**site, "steps": tuple(site.get("steps", ())), "gauge": gauge}))
        parts = []
        for part in data.get("parts", ()):
            values = _values(part.get("example_values", ()))
            parts.append(ConvertedPart(part["fqn"], _examples(part["example"]), values))
        frontier = []
        for point in data.get("frontier", ()):
            frontier.append(FrontierPoint(**{**point, "sites": tuple(map(tuple, point["sites"]))}))
        source, fidelity = data["source"], data.get("fidelity")
        records = {
            "sites": tuple(sites),
            "refused": tuple(RefusedSite(**site) for site in data["refused"]),
            "example": _examples(data["example"]),
            "example_values": _values(data.get("example_values", ())),
            "parts": tuple(parts),
            "source": _source(source) if source else None,
            "fidelity": Fidelity(**fidelity) if fidelity else None,
            "sensitivities": tuple(Sensitivity(**option) for option in data.get("sensitivities", ())),
            "frontier": tuple(frontier),
            "classes": tuple(data.get("classes", ())),
            "mlps": tuple(MlpPlan(**{**mlp, "steps": tuple(mlp.get("steps", ()))}) for mlp in data.get("mlps", ())),
        }
        return cls(**{**data, **records})


def _source(data: dict[str, Any]) -> Source:
    file = data.get("checkpoint")
    return Source(**{**data, "checkpoint": WeightsFile(**file) if file else None})


def _examples(entries: Iterable[Any]) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    return tuple((name, tuple(shape), dtype) for name, shape, dtype in entries)


def _values(entries: Iterable[Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in entries)
