"""How alike the projections of one attention are, entry by entry: the numbers of Figure 1 of the Armour paper.

Two roles A and B, say Q and K, have the weights `[H, D, d]` (heads, tokens' width, channels per head). What is looked
at is `| |A| - |B| |` for every entry, and which share of it is under a small threshold. Entry (h, i, j) of one meets
entry (h, i, j) of the other, so the numbers depend on the basis that each head came in; what sharing costs does not.

Source: arXiv 2108.01778, section 3.2. The text that we have lost its formulas, the threshold among them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from armour_surgery.errors import UsageError

__all__ = [
    "PAIRS",
    "THRESHOLD",
    "PairRedundancy",
    "SiteRedundancy",
    "compare_pair",
    "differences",
    "facing",
    "why_not",
]

# The paper's order: Q and K, K and V, Q and V.
PAIRS = ("qk", "kv", "qv")
THRESHOLD = 0.01


@dataclass(frozen=True)
class PairRedundancy:
    """Two roles of a site. `channels` of each head were compared, the first ones where a role has more.

    `share` is the percentage of entries where `| |A| - |B| |` is below the threshold, and `share_by_chance` what it
    would be if the entries of A met those of B in random order: how much the sizes of the entries alone explain.
    `mean_abs_difference` is the mean of `| |A| - |B| |`.

    `mode` is the one that makes the two roles one here, and `residual` what the best shared weight then costs (as in
    `SitePlan`, after `joint-svd`); both are None where no mode fits, and `refused` says why.
    """

    channels: int
    share: float
    share_by_chance: float
    mean_abs_difference: float
    mode: str | None = None
    residual: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class SiteRedundancy:
    """One attention. `pairs` maps `qk`, `kv` and `qv` to what was found; `skipped`, those not compared to the reason.

    `mode` is what `convert` takes by default, and `residual` what its best shared weight costs; None where it takes
    none. A site that could not be followed has no pairs.
    """

    fqn: str
    kind: str
    num_heads: int
    key_dim: int
    value_dim: int
    pairs: dict[str, PairRedundancy] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    mode: str | None = None
    residual: float | None = None

    def __repr__(self) -> str:
        shares = ", ".join(f"{pair} {compared.share:.1f} %" for pair, compared in self.pairs.items())
        residual = "" if self.residual is None else f", {self.mode} with residual {self.residual:.3f}"
        return f"SiteRedundancy({self.fqn!r}, alike: {shares or 'not compared'}{residual})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)


def why_not(weights: Mapping[str, Tensor], pair: str) -> str | None:
    """Why two roles cannot be compared entry by entry, or None. `weights` maps q, k and v to `[H, D, d]`."""
    first, second = (weights[letter] for letter in pair)
    for axis, what in ((0, "heads"), (1, "input channels")):
        if first.shape[axis] != second.shape[axis]:
            sizes = f"{first.shape[axis]} and {second.shape[axis]}"
            return f"{pair[0].upper()} and {pair[1].upper()} have different numbers of {what} ({sizes})"
    return None


def facing(weights: Mapping[str, Tensor], pair: str) -> tuple[Tensor, Tensor]:
    """`|A|` and `|B|` `[H, D, c]`, of each head the first `c` channels, as many as both have."""
    first, second = (weights[letter].abs() for letter in pair)
    channels = min(first.shape[-1], second.shape[-1])
    return first[..., :channels], second[..., :channels]


def differences(weights: Mapping[str, Tensor], pair: str) -> Tensor:
    """`| |A| - |B| |` `[H, D, c]`."""
    first, second = facing(weights, pair)
    return (first - second).abs()


def compare_pair(weights: Mapping[str, Tensor], pair: str, threshold: float) -> PairRedundancy:
    """The numbers of one pair. `threshold` is in the unit of the weights.

    Raises:
        UsageError: the threshold is not above 0, or a weight is no number.
    """
    if not 0 < threshold < float("inf"):
        raise UsageError(f"threshold {threshold!r} is not above 0; weights differ by some hundredths: {THRESHOLD}, say")
    first, second = facing(weights, pair)
    apart = (first - second).abs()
    if not bool(apart.isfinite().all()):
        raise UsageError("the weights hold values that are no numbers (nan or inf); load others")
    return PairRedundancy(
        channels=apart.shape[-1],
        share=100 * float((apart < threshold).double().mean()),
        share_by_chance=100 * _share_by_chance(first.flatten(), second.flatten(), threshold),
        mean_abs_difference=float(apart.mean()),
    )


def _share_by_chance(first: Tensor, second: Tensor, threshold: float) -> float:
    """The share of all pairs (a of `first`, b of `second`) with |a - b| < threshold, counted exactly."""
    # For each a, how many b lie in a window around it: two searches instead of as many differences as there are pairs.
    ordered = second.sort().values
    below = torch.searchsorted(ordered, first - threshold, right=True)
    within = torch.searchsorted(ordered, first + threshold) - below
    return float(within.double().mean()) / len(ordered)
