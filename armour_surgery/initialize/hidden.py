"""Fewer hidden channels in an MLP, in closed form: which of them stay, and what its second layer then is.

With `h` the hidden channels on real tokens, `W` the second layer and `C` the covariance of `h`, channels go one after
the other, each time those that cost least *after* the others have taken over what they can: `|w_j|^2 / (C^-1)_jj`, as
in optimal brain surgery (Hassibi and Stork 1993; for whole channels of MLPs e.g. Kurtic et al. 2023, ZipLM). What is
left takes the weights of least squares.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.block import Block, refuse_not_finite
from armour_surgery.initialize.gram import added, nothing
from armour_surgery.initialize.last_layer import LastLayer
from armour_surgery.initialize.moments import with_one
from armour_surgery.initialize.site import SiteResult
from armour_surgery.initialize.solving import solves_on
from armour_surgery.initialize.taps import Stop, Tap, tokens

__all__ = ["STEP", "Elimination", "MlpProblem", "eliminate", "narrow"]

# Numbers of channels are multiples of this: what hardware likes.
STEP = 8
# Ridge, in units of the channels' mean variance: channels that hardly vary are not told apart by rounding.
_RIDGE = 1e-3


@dataclass(frozen=True)
class MlpProblem:
    """An MLP that gets `kept` of its `hidden` channels; `take(model, channels)` leaves it these, in place."""

    fqn: str
    hidden: int
    kept: int
    second: str
    take: Callable[[nn.Module, tuple[int, ...]], None]


@dataclass(frozen=True)
class Elimination:
    """`order` has the hidden channels, those that stay longest last. `lost[k]` is the share of the MLP's squared output
    that is gone with k channels left, `k` a multiple of `STEP`."""

    order: tuple[int, ...]
    lost: dict[int, float]

    def kept(self, count: int) -> tuple[int, ...]:
        """The channels that stay where so many do, in their old order."""
        return tuple(sorted(self.order[len(self.order) - count :]))


def eliminate(moment: Tensor, weight: Tensor, least: int = 0) -> Elimination:
    """Let hidden channels go, the cheapest first, eight at a time, until no more than `least` are left.

    Args:
        moment: `[n, n]`, second moment of the hidden channels (covariance, where a bias makes up for constants).
        weight: `[n, E]`, the second layer, each output channel scaled by how much it counts.
    """
    count = len(moment)
    alive = torch.arange(count, device=moment.device)
    damped = moment + _damping(moment)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    present = weight.clone()
    total = float((weight * (moment @ weight)).sum())
    lost, spent, order = {count: 0.0}, 0.0, []
    # The first step leaves a multiple; where the number is none, it takes fewer.
    size = count % STEP or STEP
    while len(alive) > max(size, least):
        price = present.square().sum(1) / inverse.diagonal()
        going = torch.topk(price, size, largest=False).indices
        rest = torch.ones_like(alive, dtype=torch.bool)
        rest[going] = False
        block = inverse[going][:, going]
        solved = torch.linalg.solve(block, present[going])
        spent += float((present[going] * solved).sum())
        across = inverse[rest][:, going]
        present = present[rest] - across @ solved
        inverse = inverse[rest][:, rest] - across @ torch.linalg.solve(block, across.mT)
        order += alive[going].tolist()
        alive = alive[rest]
        lost[len(alive)] = min(spent / max(total, 1e-300), 1.0)
        size = STEP
    return Elimination((*order, *alive.tolist()), lost)


def _damping(moment: Tensor) -> Tensor:
    size = moment.diagonal().mean().clamp(min=1e-30)
    return torch.eye(len(moment), dtype=moment.dtype, device=moment.device) * (_RIDGE * size)


def narrow(block: Block, problem: MlpProblem, alone: bool) -> SiteResult:
    """Choose the hidden channels of an MLP in the stream as it now is, and refit its second layer; in place.

    Taken `alone`, one that gets too few tokens stays as it is, and its result has no `ranks`.

    Raises:
        CalibrationError: the images have fewer tokens than the MLP has channels, or what it gets is not finite.
    """
    layer = LastLayer(block.after.model.get_submodule(problem.second))
    sums, count = _moment(block, problem, layer)
    if alone and count <= problem.hidden:
        return SiteResult(problem.fqn, 0.0, ())  # nothing can be said of it, and others can still be measured
    if count <= problem.hidden:
        raise CalibrationError(
            f"calibration saw {count:.0f} tokens at {problem.fqn}, too few for its {problem.hidden} hidden channels; "
            "give more images, or leave it out with exclude"
        )
    matrix, mean = layer.read(), sums[-1, :-1]
    weight, biased = matrix[: problem.hidden], layer.bias is not None
    moment = sums[:-1, :-1] - mean[:, None] * mean if biased else sums[:-1, :-1]
    # What an output channel's error comes to in the stream.
    adds = block.last is not None and block.last.fqn == problem.second
    gain = block.last.gain.to(weight) if block.last is not None and adds else torch.ones_like(weight[0])
    place = solves_on(layer.weight.device)
    # Taken alone it shows what any number of channels would lose.
    found = eliminate(moment.to(place), (weight * gain).to(place), least=0 if alone else problem.kept)
    kept = found.kept(problem.kept)
    places = torch.tensor(kept)
    damped = moment + _damping(moment)
    new = torch.linalg.solve(damped[places][:, places], damped[places] @ weight)
    rows = [new]
    if biased:
        # What the channels that went gave on average is a constant.
        rows.append((matrix[-1] + mean @ weight - mean[places] @ new)[None])
    problem.take(block.after.model, kept)
    LastLayer(block.after.model.get_submodule(problem.second)).write(torch.cat(rows))
    left = _left(weight * gain, torch.zeros_like(weight).index_copy(0, places, new) * gain, moment)
    curve = tuple(found.lost.get(count, 1.0) for count in range(1, problem.hidden + 1)) if alone else ()
    return SiteResult(problem.fqn, left**0.5, ("hidden channels",), curve)


def _left(weight: Tensor, new: Tensor, moment: Tensor) -> float:
    """The share of an MLP's squared output that other weights do not give."""
    error = weight - new
    whole = (weight * (moment @ weight)).sum().clamp(min=1e-300)
    return max(float((error * (moment @ error)).sum() / whole), 0.0)


def _moment(block: Block, problem: MlpProblem, layer: LastLayer) -> tuple[Tensor, float]:
    """`E [h 1]^T [h 1]` of the hidden channels with a last entry 1, `[n + 1, n + 1]`, and of how many tokens."""
    stride = block.stride(problem.hidden)
    total, count = nothing(), 0.0
    for index, image, held in block.data:
        if held:
            continue
        seen: list[Tensor] = []

        def tap(source: Tensor, _: Callable[[], Tensor], seen: list[Tensor] = seen) -> Tensor:
            seen.append(tokens(source, layer.weight))
            raise Stop

        watched: dict[Tensor, Tap] = {layer.weight: tap}
        block.until_stop(watched, index, image, problem.fqn)
        chosen, rows = block.data.thinned(seen[0].shape[:2], index % stride, stride)
        inputs = with_one(seen[0].flatten(0, 1)[chosen])
        weighted = inputs if rows is None else inputs * rows.to(inputs)
        total = added(total, inputs.mT @ weighted)
        count += float(len(inputs)) if rows is None else float(rows.sum())
    total, count = block.data.processes.sum(total), block.data.processes.sum_number(count)
    refuse_not_finite(total, problem.fqn, "gets")
    return total / count, count
