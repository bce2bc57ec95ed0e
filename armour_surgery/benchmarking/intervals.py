"""How sure a median ratio is, and whether it is more than noise.

Rounds that follow each other are alike: a neighbor on the machine is busy for seconds, and a clock rate stays for a
while. A bootstrap over single rounds takes them for independent and promises too much, so whole blocks of rounds are
drawn.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

__all__ = ["CONFIDENCE", "FASTER", "NO_DIFFERENCE", "SLOWER", "TOO_FEW", "median_interval", "verdict"]

# Two runs are equally unsure. For the median of one to fall into the interval of another 9 times out of 10, the
# interval must be sqrt(2) times as wide as one of 90 %: 98 %, and 99 % leaves room.
CONFIDENCE = 0.99
FASTER, SLOWER = "faster", "slower"
NO_DIFFERENCE, TOO_FEW = "no difference beyond noise", "too few rounds to say"

_BLOCKS = 6
_FEWEST = 12
_RESAMPLES = 1000


def median_interval(ratios: Sequence[float]) -> tuple[float, float] | None:
    """Where the median ratio is, with 99 % confidence; None for fewer than 12 rounds, which cannot tell.

    `m exp(-+ t sqrt(b / (b - 1)) s)`: m is the median; s the standard deviation of the logarithm of the medians of
    1000 resamples, each put together from b blocks of rounds that follow each other (a circular block bootstrap:
    Politis and Romano 1992; b is 6, so that a block outlasts most of what makes rounds alike); t the quantile of
    Student's distribution with b - 1 degrees of freedom, because s is known no better than from b blocks.

    The result depends on the ratios alone: the resamples are drawn with a fixed seed.
    """
    if len(ratios) < _FEWEST:
        return None
    length = math.ceil(len(ratios) / _BLOCKS)
    blocks = math.ceil(len(ratios) / length)
    logs = torch.tensor(ratios, dtype=torch.float64).log()
    # A block may begin anywhere and goes on at the front, so that every round is drawn as often as any other.
    starts = torch.randint(len(logs), (_RESAMPLES, blocks, 1), generator=torch.Generator().manual_seed(0))
    drawn = ((starts + torch.arange(length)) % len(logs)).flatten(1)[:, : len(logs)]
    # In logarithms: a ratio and its inverse are equally far from 1.
    spread = float(logs[drawn].quantile(0.5, dim=1).std())
    half = _student((1 + CONFIDENCE) / 2, blocks - 1) * math.sqrt(blocks / (blocks - 1)) * spread
    middle = float(logs.quantile(0.5))
    return math.exp(middle - half), math.exp(middle + half)


def verdict(speedup: float, interval: tuple[float, float] | None, noise: tuple[float, float] | None) -> str:
    """What may be said about a median ratio: FASTER, SLOWER, NO_DIFFERENCE, or TOO_FEW.

    `noise` is the interval of a model held against itself in the same rounds. A difference counts if 1 lies outside
    its own interval and it is larger than the largest that `noise` still allows between equal models.
    """
    if interval is None or noise is None:
        return TOO_FEW
    floor = max(abs(math.log(end)) for end in noise)
    if interval[0] <= 1 <= interval[1] or abs(math.log(speedup)) <= floor:
        return NO_DIFFERENCE
    return FASTER if speedup > 1 else SLOWER


def _student(probability: float, freedom: int) -> float:
    """A quantile of Student's t distribution, by the expansion of Cornish and Fisher: to 0.1 % from 5 degrees on.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / freedom**power for power, term in enumerate(terms, 1))
