"""Statistics of tokens, summed up batch by batch: what is kept does not grow with the number of images."""

import torch
from torch import Tensor

from armour_surgery.initialize.closed_form import Metric, make_metric

__all__ = ["Moments", "Regression", "with_one"]

# Ridge strengths that are tried, in units of the inputs' mean energy.
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


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
        self._moment: Tensor | None = None
        self._means: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs [B, N, D]`. Products are made in the inputs' own precision and summed in float64."""
        inputs = with_one(inputs)
        flat = inputs.flatten(0, 1)
        moment = (flat.mT @ flat).double().cpu()
        means = inputs.mean(dim=1, dtype=torch.float64)
        outer = (inputs.shape[1] * means.mT @ means).cpu()
        self._moment = moment if self._moment is None else self._moment + moment
        self._means = outer if self._means is None else self._means + outer
        self.count += len(flat)

    @property
    def moment(self) -> Tensor:
        """`E [x 1]^T [x 1]`, `[D + 1, D + 1]`."""
        assert self._moment is not None
        return self._moment / self.count

    def metric(self, biases: bool) -> Metric:
        """The metric of the tokens, with or without their last entry."""
        assert self._moment is not None
        assert self._means is not None
        centered = (self._moment - self._means) / self.count
        if not biases:
            return make_metric(self.moment[:-1, :-1], centered[:-1, :-1])
        return make_metric(self.moment, centered)


class Regression:
    """Least squares from a present solution on, with held-out data to say how far to go.

    Minimizes `|X W - T|^2 + ridge * mean(diag X^T X) * |W - W_present|^2` over `W [n, E]`. With `biases` the last row
    of W is a constant, and free. Everything is summed relative to the present solution, `T - X W_present`: inputs and
    targets may be large and nearly constant, and their own products would drown what is to be fitted.
    """

    def __init__(self, present: Tensor, biases: bool) -> None:
        self.present = present
        self.biases = biases
        self.moments = [Tensor(), Tensor()]  # of fitting and of held-out inputs
        self.counts = [0.0, 0.0]
        self._cross = [Tensor(), Tensor()]
        self._missing = [0.0, 0.0]
        self._energy = [0.0, 0.0]
        self._sums = [Tensor(), Tensor()]

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
        inputs = with_one(inputs) if self.biases else inputs
        if missing is None:
            missing = targets - inputs @ self.present.to(inputs)
        sums = targets
        if weights is not None:
            weights = weights.to(targets)
            root, sums = weights.sqrt(), targets * weights
            inputs, missing, targets = inputs * root, missing * root, targets * root
        for kind, value in (
            (self.moments, inputs.mT @ inputs),
            (self._cross, inputs.mT @ missing),
            (self._sums, sums.sum(0, dtype=torch.float64)),
        ):
            kind[held_out] = kind[held_out] + value.double().cpu() if kind[held_out].numel() else value.double().cpu()
        self._missing[held_out] += _energy(missing)
        self._energy[held_out] += _energy(targets)
        self.counts[held_out] += len(inputs) if weights is None else float(weights.sum())

    def error(self, change: Tensor, held_out: bool = True) -> float:
        """`|X W - T|^2 / |T - mean T|^2` on held-out (or fitting) data, for `W = W_present + change`."""
        fit = float((change * (self.moments[held_out] @ change - 2 * self._cross[held_out])).sum())
        spread = self._energy[held_out] - float(self._sums[held_out].square().sum()) / self.counts[held_out]
        return max(fit + self._missing[held_out], 0.0) / max(spread, 1e-300)

    def solve(self) -> tuple[Tensor, float]:
        """The ridge solution that does best on held-out data, and its error there; `present` if none does better.

        The error falls and then rises with the ridge's strength, so the search begins in the middle and goes downhill.
        """
        moment = self.moments[0]
        size = moment.diagonal()[: -1 if self.biases else None].mean()
        tried: dict[int, tuple[float, Tensor]] = {}

        def error(place: int) -> float:
            if not 0 <= place < len(_RIDGES):
                return float("inf")
            if place not in tried:
                damping = torch.full((len(moment),), float(_RIDGES[place] * size), dtype=torch.float64)
                if self.biases:
                    damping[-1] *= 1e-6
                lower, failed = torch.linalg.cholesky_ex(moment + torch.diag(damping))
                change = torch.cholesky_solve(self._cross[0], lower)
                tried[place] = (float("inf") if int(failed) else self.error(change), change)
            return tried[place][0]

        place = len(_RIDGES) // 2
        for step in (-1, 1):
            while error(place + step) < error(place):
                place += step
        least = self.error(torch.zeros_like(self.present))
        if error(place) < least:
            return self.present + tried[place][1], error(place)
        return self.present, least
