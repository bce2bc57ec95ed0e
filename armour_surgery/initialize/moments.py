"""Statistics of tokens, summed up batch by batch: what is kept does not grow with the number of images."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from armour_surgery.freed import give_back
from armour_surgery.initialize.closed_form import Metric, make_metric
from armour_surgery.initialize.gram import Gram, added, nothing
from armour_surgery.initialize.processes import Processes
from armour_surgery.initialize.solving import solves_on

__all__ = ["Moments", "Regression", "with_one"]

# Ridge strengths that are tried, in units of the inputs' mean energy.
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# Columns of a solution that are worked out at a time.
_COLUMNS = 256
# Bytes of a system's matrix from which on freed memory goes back to the system first.
_LARGE = 2**24
# What rounding leaves of the energy of numbers in single precision, and some orders more.
_ROUNDING = 1e-10


def with_one(inputs: Tensor) -> Tensor:
    """`[..., D] -> [..., D + 1]`: a last entry 1, for biases."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def _energy(values: Tensor) -> float:
    """The sum of squares, summed in float64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


class Moments:
    """The second moment of tokens with a last entry 1, and that of tokens centered over each sequence."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = nothing()  # of [x 1]^T [x 1]
        self._sum_of_means = nothing()  # of the same for each sequence's mean, once per token

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs [B, N, D]`. Products are made in the inputs' own precision and summed in float64."""
        inputs = with_one(inputs)
        flat = inputs.flatten(0, 1)
        self._sum = added(self._sum, flat.mT @ flat)
        means = inputs.mean(dim=1, dtype=torch.float64)
        self._sum_of_means = added(self._sum_of_means, inputs.shape[1] * means.mT @ means)
        self.count += len(flat)

    def gather(self, processes: Processes) -> None:
        """Take in what the other processes have seen."""
        self._sum, self._sum_of_means = processes.sum(self._sum), processes.sum(self._sum_of_means)
        self.count = round(processes.sum_number(self.count))

    @property
    def moment(self) -> Tensor:
        """`E [x 1]^T [x 1]`, `[D + 1, D + 1]`."""
        return self._sum / self.count

    def metric(self, biases: bool) -> Metric:
        """The metric of the tokens, with or without their last entry."""
        centered = (self._sum - self._sum_of_means) / self.count
        if not biases:
            return make_metric(self.moment[:-1, :-1], centered[:-1, :-1])
        return make_metric(self.moment, centered)


@dataclass
class _Sums:
    """What a regression has seen of one kind of images; X the inputs, T the targets, M what T lacks now."""

    count: float = 0.0
    moment: Gram = field(default_factory=Gram)  # X^T X
    cross: Tensor = field(default_factory=nothing)  # X^T M
    targets: Tensor = field(default_factory=nothing)  # T, summed over rows
    missing: float = 0.0  # |M|^2
    energy: float = 0.0  # |T|^2

    def gathered(self, processes: Processes) -> "_Sums":
        """Those of all processes."""
        return _Sums(
            processes.sum_number(self.count),
            self.moment.gathered(processes),
            processes.sum(self.cross),
            processes.sum(self.targets),
            processes.sum_number(self.missing),
            processes.sum_number(self.energy),
        )


class Regression:
    """Least squares from a present solution on, with held-out data to say how far to go.

    Minimizes `|X W - T|^2 + ridge * mean(diag X^T X) * |W - W_present|^2` over `W [n, E]`. With `biases` the last row
    of W is a constant, and free. Everything is summed relative to the present solution, `T - X W_present`: inputs and
    targets may be large and nearly constant, and their own products would drown what is to be fitted.
    """

    def __init__(self, present: Tensor, biases: bool) -> None:
        self.present = present
        self.biases = biases
        self._fitted = _Sums()
        self._held_out = _Sums()
        self._place = torch.device("cpu")
        self._make_room()

    @property
    def moment(self) -> Tensor:
        """`E x^T x` of the inputs that are fitted to, `[n, n]`."""
        return self._fitted.moment.dense() / self._fitted.count

    def add(
        self,
        inputs: Tensor,
        targets: Tensor,
        held_out: bool,
        missing: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Take in `inputs [T, n]` and `targets [T, E]`, of which the present solution lacks `missing [T, E]`.

        `weights [T, 1]` say how much each row counts.
        """
        self._place = solves_on(inputs.device)
        inputs = with_one(inputs) if self.biases else inputs
        if missing is None:
            missing = targets - inputs @ self.present.to(inputs)
        weighted = targets
        count = float(len(inputs))
        if weights is not None:
            weights = weights.to(targets)
            count = float(weights.sum())
            weighted = targets * weights
            # A row times the root of its weight counts so many times in all products.
            root = weights.sqrt()
            inputs, missing, targets = inputs * root, missing * root, targets * root
        sums = self._held_out if held_out else self._fitted
        sums.count += count
        sums.moment.add(inputs)
        sums.cross = added(sums.cross, inputs.mT @ missing)
        sums.targets = sums.targets + weighted.sum(0, dtype=torch.float64).cpu()
        sums.missing += _energy(missing)
        sums.energy += _energy(targets)

    def _make_room(self) -> None:
        """Before much memory is taken, let go of what is free: for a ViT-g that was a fifth of a calibration's peak."""
        if 8 * len(self.present) ** 2 >= _LARGE:
            give_back()

    def gather(self, processes: Processes) -> None:
        """Take in what the other processes have seen."""
        self._fitted, self._held_out = self._fitted.gathered(processes), self._held_out.gathered(processes)

    def _error(self, change: Tensor) -> float:
        """`|X W - T|^2 / |T - m|^2` on held-out data, for `W = W_present + change`; m is the mean of what is fitted to.

        The mean of held-out targets would explain them all too well: of one image, they may hardly differ from it.
        """
        sums, mean = self._held_out, self._fitted.targets / self._fitted.count
        # |M - X change|^2 - |M|^2, without the rows themselves.
        fit = 0.0
        for some, cross in zip(torch.split(change, _COLUMNS, 1), torch.split(sums.cross, _COLUMNS, 1), strict=True):
            fit += float((some * sums.moment.times(some).sub_(cross, alpha=2)).sum())
        spread = sums.energy - float(mean @ (2 * sums.targets - sums.count * mean))
        # Where all targets are alike, what is left of their size is rounding, and so is the error.
        return max(fit + sums.missing, 0.0) / max(spread, _ROUNDING * sums.energy, 1e-300)

    def _ridge(self, strength: float) -> tuple[float, Tensor]:
        """The change that is best for the fitted data, held back by so much, and its error on held-out data."""
        moment = self._fitted.moment
        # The constant is one and no channel: it does not count for the inputs' size, and is all but free.
        size = moment.diagonal()[: -1 if self.biases else None].mean()
        damping = torch.full((len(moment),), float(strength * size), dtype=torch.float64)
        if self.biases:
            damping[-1] *= 1e-6
        damped = moment.lower(self._place)
        damped.diagonal().add_(damping.to(self._place))
        # Into the same memory, since for wide layers this matrix is what takes most of it.
        info = torch.empty(0, dtype=torch.int32, device=self._place)
        lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, info))
        change = torch.empty_like(self._fitted.cross)
        # Some columns at a time, and not by `cholesky_solve`, which copies the factor.
        wanted = torch.split(self._fitted.cross, _COLUMNS, 1)
        for some, cross in zip(torch.split(change, _COLUMNS, 1), wanted, strict=True):
            half = torch.linalg.solve_triangular(lower, cross.to(self._place), upper=False)
            some.copy_(torch.linalg.solve_triangular(lower.mT, half, upper=True))
        return (float("inf") if int(failed) else self._error(change)), change

    def solve(self) -> tuple[Tensor, float]:
        """The ridge solution that does best on held-out data, and its error there; `present` if none does better.

        The error falls and then rises with the ridge's strength, so the search begins in the middle and goes downhill.
        """
        self._make_room()
        tried: dict[int, float] = {}
        best: tuple[float, Tensor] | None = None

        def error(place: int) -> float:
            nonlocal best
            if not 0 <= place < len(_RIDGES):
                return float("inf")
            if place not in tried:
                tried[place], change = self._ridge(_RIDGES[place])
                if best is None or tried[place] < best[0]:
                    best = tried[place], change
            return tried[place]

        place = len(_RIDGES) // 2
        for step in (-1, 1):
            while error(place + step) < error(place):
                place += step
        # With no change at all.
        least = self._error(torch.zeros_like(self.present))
        if best is not None and best[0] < least:
            return self.present + best[1], best[0]
        return self.present, least
