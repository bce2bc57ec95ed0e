"""The modes: one declarative entry each. What K and V are made of, and when that is possible.

A role is a sequence of *parts*: `"q"`, `"k"`, `"v"` take the channels that the site has for that role (as many as are
still missing), `"grouped"` and `"grouped-shuffled"` make the missing channels with a grouped 1x1 convolution.
`V = concat(Q, V_rest)` is `value=("q", "v")`: the first key_dim channels of each head are Q, the others stay V's own.

Source: Armour paper, eq. 2 (`qv`), Table 1 (`qk`, `qk-diag`, `kv`), Fig. 3 (`concat-half`, `concat-full`),
section 4, last paragraph (`grouped`). `concat-key` is not in the paper: its first half with K in Q's place, for
attention in which Q and V are made from different tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from armour_surgery.errors import TraceError, UsageError
from armour_surgery.records import AttentionSite

__all__ = ["AUTO", "MODES", "Mode", "choose", "choose_rank", "get_mode", "judge"]

AUTO = "auto"
# What `auto` takes, the first that fits: the paper's own modes, and `kv` where Q and V have nothing in common.
_AUTO_ORDER = ("qv", "concat-half", "kv")


@dataclass(frozen=True)
class Mode:
    """One way of sharing. `fits` returns the reason why a site cannot take it, or None."""

    name: str
    formula: str
    key: tuple[str, ...]
    value: tuple[str, ...]
    fits: Callable[[AttentionSite], str | None]
    mask_diagonal: bool = False

    @property
    def gauge(self) -> str:
        """The role whose projection a fixed gauge makes smaller: the one that serves twice.

        Where Q serves as K, no change of basis but a rotation keeps their products, and it is V.
        """
        return "v" if self.key == ("q",) else self.value[0]

    @property
    def has_rank(self) -> bool:
        """Whether Q, K and V of a head may have fewer channels than key_dim: V is all of Q, or all of K."""
        return self.key == ("k",) and self.value in (("q",), ("k",))


def _same_tokens(site: AttentionSite, a: str, b: str) -> str | None:
    # Modes judge sites that were followed alone: these have all three projections.
    if site.unprojected and "q" in (a, b):
        return site.unprojected
    first = site.projections[a]
    second = site.projections[b]
    letters = f"{a.upper()} and {b.upper()}"
    if first.tokens != second.tokens:
        # Where one token asks (class attention, pooling), nothing is sampled: that is not what the paper speaks of.
        if site.kind == "downsampling" and min(first.tokens, second.tokens) > 1:
            return (
                f"downsampling attention: {a.upper()} is made from {first.tokens} tokens and {b.upper()} from "
                f"{second.tokens}, so one projection cannot serve as both (the paper leaves these blocks alone too)"
            )
        return f"{letters} are made from different tokens ({first.tokens} and {second.tokens})"
    if site.reads[a] != site.reads[b]:
        return f"{letters} are projected from different inputs ({site.reads[a]} and {site.reads[b]})"
    if first.num_heads != second.num_heads:
        return f"{letters} have different numbers of heads ({first.num_heads} and {second.num_heads})"
    return None


def _same_size(site: AttentionSite, a: str, b: str, hint: str) -> str | None:
    first = site.projections[a]
    second = site.projections[b]
    if first.head_dim != second.head_dim:
        return (
            f"{a.upper()} has {first.head_dim} channels a head and {b.upper()} has {second.head_dim}; "
            f"this mode needs equal sizes{hint}"
        )
    return None


def _fits_qv(site: AttentionSite) -> str | None:
    wide = " (concat-half fits wider values)" if site.value_dim > site.key_dim else ""
    return _same_tokens(site, "q", "v") or _same_size(site, "q", "v", wide)


def _fits_qk(site: AttentionSite) -> str | None:
    return _same_tokens(site, "q", "k")


def _fits_kv(site: AttentionSite) -> str | None:
    return _same_tokens(site, "k", "v") or _same_size(site, "k", "v", "")


def _is_wide(site: AttentionSite, than: str, otherwise: str) -> str | None:
    if site.value_dim <= site.key_dim:
        return (
            f"V is not wider than {than} ({site.value_dim} and {site.key_dim} channels a head), so nothing is left to "
            f"concatenate; use {otherwise}"
        )
    return None


def _fits_wide_value(site: AttentionSite) -> str | None:
    return _is_wide(site, "Q", "qv") or _same_tokens(site, "q", "v")


def _fits_concat_full(site: AttentionSite) -> str | None:
    if site.value_dim > site.key_dim and site.value_dim < 2 * site.key_dim:
        return (
            f"V has {site.value_dim} channels a head, fewer than Q and K together ({2 * site.key_dim}); use concat-half"
        )
    return _fits_wide_value(site) or _same_tokens(site, "k", "v")


def _fits_concat_key(site: AttentionSite) -> str | None:
    return _is_wide(site, "K", "kv") or _same_tokens(site, "k", "v")


def _fits_grouped(site: AttentionSite) -> str | None:
    reason = _fits_wide_value(site)
    if reason is None and site.v is not None and not site.plain_value_projection:
        return f"{site.v.fqn} is not a plain Linear or 1x1 convolution, so it has no grouped form"
    return reason


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("qv", "softmax(Q K^T) Q", ("k",), ("q",), _fits_qv),
        Mode("qk", "softmax(Q Q^T) V", ("q",), ("v",), _fits_qk),
        Mode("qk-diag", "softmax(Q Q^T without its diagonal) V", ("q",), ("v",), _fits_qk, mask_diagonal=True),
        Mode("kv", "softmax(Q K^T) K", ("k",), ("k",), _fits_kv),
        Mode("concat-half", "softmax(Q K^T) concat(Q, V_rest)", ("k",), ("q", "v"), _fits_wide_value),
        Mode("concat-full", "softmax(Q K^T) concat(Q, K)", ("k",), ("q", "k", "v"), _fits_concat_full),
        Mode("concat-key", "softmax(Q K^T) concat(K, V_rest)", ("k",), ("k", "v"), _fits_concat_key),
        Mode("grouped", "softmax(Q K^T) concat(Q, grouped(x))", ("k",), ("q", "grouped"), _fits_grouped),
        Mode(
            "grouped-shuffled",
            "softmax(Q K^T) concat(Q, shuffle(grouped(x)))",
            ("k",),
            ("q", "grouped-shuffled"),
            _fits_grouped,
        ),
    )
}


def get_mode(name: str) -> Mode:
    """The mode of that name.

    Raises:
        UsageError: there is no such mode; the message lists the names.
    """
    if not isinstance(name, str) or name not in MODES:
        raise UsageError(f"unknown mode {name!r}; choose one of {AUTO}, {', '.join(MODES)}")
    return MODES[name]


def judge(site: AttentionSite) -> tuple[tuple[str, ...], dict[str, str]]:
    """Ask every mode whether it fits: the names that do, and the reasons of those that do not."""
    reasons = {name: mode.fits(site) for name, mode in MODES.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return tuple(name for name in reasons if name not in refused), refused


def choose(site: AttentionSite, requested: str) -> tuple[str | None, str]:
    """The mode for this site under `requested`, or None and the reason.

    `auto` takes `qv` where V is as wide as Q, `concat-half` where it is wider, `kv` where neither fits and K and V are
    alike, and nothing else.
    """
    candidates = _AUTO_ORDER if requested == AUTO else (get_mode(requested).name,)
    for name in candidates:
        if name in site.modes:
            return name, ""
    if requested != AUTO:
        return None, site.refused[requested]
    # Of the two that make V from Q, the one for this width of V has the reason that says something.
    of_query = "concat-half" if site.value_dim > site.key_dim else "qv"
    reasons = site.refused[of_query], site.refused["kv"]
    if reasons[0] == reasons[1]:
        return None, reasons[0]
    return None, f"not {of_query}: {reasons[0]}; and not kv: {reasons[1]}"


def choose_rank(site: AttentionSite, mode: str, requested: int | Mapping[str, int] | None) -> int | None:
    """How many channels a head gets at this site: None for as many as it has, key_dim.

    `requested` is one number for all sites, or one by site; a site that is not in the mapping keeps what it has.

    Raises:
        UsageError: the number is not from 1 to key_dim.
        TraceError: there is no rank to choose in this mode, or at this site.
    """
    rank = requested.get(site.fqn) if isinstance(requested, Mapping) else requested
    if rank is None:
        return None
    if not MODES[mode].has_rank:
        names = " and ".join(fitting.name for fitting in MODES.values() if fitting.has_rank)
        raise TraceError(f"a rank can be chosen in modes {names}, and this attention takes {mode}; leave out rank")
    if site.unprojected:
        raise TraceError(f"with a rank queries become narrower too, but {site.unprojected}; leave out rank")
    if not 1 <= rank <= site.key_dim:
        raise UsageError(
            f"rank {rank} does not fit {site.fqn}, whose heads have {site.key_dim} channels (key_dim): give a whole "
            f"number from 1 to {site.key_dim}"
        )
    return rank if rank < site.key_dim else None
