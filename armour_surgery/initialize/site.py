"""One site's calibration: the closed forms on the tokens that it gets, then fits to what the original computes.

First the closed forms on the moments of the tokens that the site now gets; then the output projection, fitted to the
real results of attention. Fits go from the present weights as far as held-out images agree, and not at all where they
do not.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.block import Block, refuse_not_finite
from armour_surgery.initialize.closed_form import Head, Metric, loss, rank_losses
from armour_surgery.initialize.moments import Moments, Regression
from armour_surgery.initialize.output_metric import ErrorMoment
from armour_surgery.initialize.problem import (
    Problem,
    candidates,
    has_biases,
    read_head,
    with_biases,
    without_biases,
    write_head,
)
from armour_surgery.initialize.stream import inverse_gain, match_width
from armour_surgery.initialize.taps import Stop, Tap, tokens
from armour_surgery.initialize.walk import first_tensor
from armour_surgery.initialize.weights import applied_weight, batch_norm_affine, read_output, write_output
from armour_surgery.traced import OutputProjection

__all__ = ["Site", "SiteResult"]

# Of the difference between the two streams, the part that one site's output projection is asked to make up for.
_SHARE = 0.5


@dataclass(frozen=True)
class SiteResult:
    """What became of one site: the relative error of its output on held-out images, and what was done.

    `ranks[r - 1]` is the closed form's loss with r shared channels a head, relative to that with all of them; empty
    where their number is not free, and where the site was not taken alone.
    """

    fqn: str
    residual: float
    steps: tuple[str, ...]
    ranks: tuple[float, ...] = ()


class Site:
    """One site's calibration. `errors` says how much those of its output count."""

    def __init__(self, block: Block, problem: Problem, errors: ErrorMoment) -> None:
        self.block, self.problem = block, problem
        self.data, self.store = block.data, block.store
        self.old = block.before.model.get_submodule(problem.fqn)
        self.new = block.after.model.get_submodule(problem.fqn)
        scale = torch.ones(0) if problem.out is None else _after_product(self.old, problem.out)[0]
        # Errors of the output count as if it were multiplied by this, which is divided out again.
        self.root = errors.root(scale)
        self.steps: list[str] = []

    def solve(self, alone: bool) -> SiteResult:
        """Choose the site's weights; those that are there once only, where it is taken `alone`."""
        biases = has_biases(self.old, self.problem)
        moments, metrics = self._seen(biases)
        old = read_head(self.old, self.problem)
        fitted = old if biases else without_biases(old)
        counted = replace(fitted, out=fitted.out @ self.root)
        makers = candidates(self.problem, counted, *metrics)

        def head_of(solution: Head) -> Head:
            head = replace(solution, out=_divided(solution.out, self.root))
            return head if biases else with_biases(self.problem, head, old)

        out = self.problem.narrow_out
        if out is not None:
            name, head = self._best(makers, head_of, out, moments)
            write_head(self.new, self.problem, head, moments)
            error = self._fit_output(head, out)
        else:
            name = list(makers)[-1]
            solution = makers[name]()
            write_head(self.new, self.problem, head_of(solution), moments)
            # Nothing in the site shows what an error comes to, so that of logits and values stands for it.
            error = loss(solution, counted, *metrics, tokens=self.problem.of_values(*metrics)) / 2
        ranks = tuple(rank_losses(counted, *metrics).tolist()) if alone and self.problem.joint else ()
        refuse_not_finite(torch.tensor(error), self.problem.fqn, "gives")
        return SiteResult(self.problem.fqn, error**0.5, (name, *self.steps), ranks)

    def _seen(self, biases: bool) -> tuple[tuple[Tensor, Tensor], tuple[Metric, Metric]]:
        """Moments and metrics of the tokens that Q and K are now made from; where these are the same, so are those."""
        queries, keys = self._moments()
        of_queries = queries.moment, queries.metric(biases)
        of_keys = of_queries if keys is queries else (keys.moment, keys.metric(biases))
        return (of_queries[0], of_keys[0]), (of_queries[1], of_keys[1])

    def _moments(self) -> tuple[Moments, Moments]:
        """Moments of the tokens that Q and K are now made from."""
        queries, keys = Moments(), Moments()
        problem = self.problem
        watched: dict[Tensor, Moments] = {applied_weight(self.new, problem.q.producer, problem.kept): queries}
        apart = not problem.same_tokens and problem.key[0][0] == "k"
        if apart:
            watched[applied_weight(self.new, problem.k.producer, problem.kept)] = keys
        for index, image, held in self.data:
            if not held:
                self.block.until_stop(_moment_taps(watched, len(image)), index, image, problem.fqn)
        for moments in watched.values():
            moments.gather(self.data.processes)
        # What V is made of too has to be known in every direction. Where that is K, Q follows from K, however few ask.
        shared = keys if apart and not self.problem.share("q") else queries
        width = shared.moment.shape[0] if shared.count else 0
        if shared.count <= width:
            raise CalibrationError(
                f"calibration saw {shared.count} tokens at {self.problem.fqn}, too few for its {width} channels; give "
                "more images"
            )
        for moments in watched.values():
            refuse_not_finite(moments.moment, problem.fqn, "gets")
        return queries, keys if apart else queries

    def _best(
        self,
        makers: dict[str, Callable[[], Head]],
        head_of: Callable[[Head], Head],
        out: OutputProjection,
        moments: tuple[Tensor, Tensor],
    ) -> tuple[str, Head]:
        """Compare candidates where it counts: the error of the fitted output on held-out images."""

        def tried() -> Iterator[tuple[float, str, Head]]:
            for name, make in makers.items():
                head = head_of(make())
                error = 0.0
                if len(makers) > 1:
                    write_head(self.new, self.problem, head, moments)
                    error = self._regression(head, out, self.data.trial()).solve()[1]
                yield error, name, head

        # Of all of them, no more than the best is kept.
        _, name, head = min(tried(), key=itemgetter(0))
        return name, head

    def _regression(self, head: Head, out: OutputProjection, batches: Iterable[tuple[int, Tensor, bool]]) -> Regression:
        """The converted heads' results against the original's output and a share of what its stream is off."""
        weight = self.new.get_parameter(out.weight)
        order = torch.tensor(out.channels).flatten()
        scale, shift = _after_product(self.old, out)
        biases = out.bias is not None or out.norm is not None
        present = head.out.flatten(0, 1)
        if biases:
            present = torch.cat([present, read_output(self.new, out)[1][None]])
        regression = Regression(present @ self.root, biases)
        for index, image, held in batches:
            target = tokens(self.store["result", index], weight) * scale.to(weight) + shift.to(weight)
            correction = self._correction(index, target.shape, scale)
            if correction is not None:
                target = target + correction
            target = target @ self.root.to(target)

            def tap(source: Tensor, _: Any, target: Tensor = target, held: bool = held) -> Tensor:
                inputs = tokens(source, weight)[..., order]
                weights = self.data.weights(inputs.shape[1])
                rows = None if weights is None else weights.repeat(len(inputs), 1)
                regression.add(inputs.flatten(0, 1), target.flatten(0, 1).to(inputs.dtype), held, weights=rows)
                raise Stop

            self.block.until_stop({weight: tap}, index, image, self.problem.fqn)
        regression.gather(self.data.processes)
        return regression

    def _correction(self, index: int, shape: torch.Size, scale: Tensor) -> Tensor | None:
        """What the site would have to add for the streams to meet half way; None where its gain is not known."""
        if self.block.gain is None:
            return None
        start = match_width(self.store["start", index], shape[-1])
        present = match_width(first_tensor(self.store["converted", index]), shape[-1])
        if start is None or present is None or start.shape != shape:
            return None
        # The gain was seen from the bare product on; the site's output has the scale of what follows it already.
        return (start - present) * (_SHARE * inverse_gain(self.block.gain / scale)).to(start)

    def _fit_output(self, head: Head, out: OutputProjection) -> float:
        """Fit the output projection on all batches; returns the relative squared error on those held out."""
        regression = self._regression(head, out, self.data)
        solution, error = regression.solve()
        if solution is not regression.present:
            self.steps.append("output projection")
        solution = _divided(solution, self.root)
        offset = solution[-1] if regression.biases else torch.zeros(solution.shape[1], dtype=torch.float64)
        matrix = solution[: head.out.shape[0] * head.out.shape[1]].reshape(head.out.shape)
        write_output(self.new, out, matrix, offset, regression.moment)
        return error


def _divided(out: Tensor, root: Tensor) -> Tensor:
    """`out [..., E]` times the inverse of `root [E, E]`."""
    divided: Tensor = torch.linalg.solve(root, out.flatten(0, -2), left=False)
    return divided.reshape(out.shape)


def _moment_taps(watched: dict[Tensor, Moments], size: int) -> dict[Tensor, Tap]:
    """For a batch of `size` images, taps that add what goes into those weights, until each has had its own."""
    missing = set(watched.values())

    def tap_of(weight: Tensor, moments: Moments) -> Tap:
        def tap(source: Tensor, product: Callable[[], Tensor]) -> Tensor:
            moments.add(_per_image(source, weight, size))
            missing.discard(moments)
            if not missing:
                raise Stop
            return product()

        return tap

    return {weight: tap_of(weight, moments) for weight, moments in watched.items()}


def _after_product(module: nn.Module, out: OutputProjection) -> tuple[Tensor, Tensor]:
    """What follows the output projection's product: scale and shift per channel, in float64."""
    if out.norm is not None:
        return batch_norm_affine(module, out.norm)
    scale = torch.ones(len(module.get_parameter(out.weight)), dtype=torch.float64)
    return scale, torch.zeros_like(scale)


def _per_image(source: Tensor, weight: Tensor, size: int) -> Tensor:
    """The inputs of a projection, tokens of one softmax together; those that a host flattened, image by image."""
    if source.ndim == 2 and len(source) % size == 0:
        return source.reshape(size, -1, source.shape[-1])
    return tokens(source, weight)
