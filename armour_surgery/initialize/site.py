"""One site's calibration: the closed forms on the tokens that it gets, then fits to what the original computes.

First the closed forms on the moments of the tokens that the site now gets; then the output projection, fitted to the
real results of attention; then the last layer of the block (an MLP's second), fitted to the original's stream. Fits go
from the present weights as far as held-out images agree, and not at all where they do not.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.closed_form import Head, loss, rank_losses
from armour_surgery.initialize.last_layer import LastLayer
from armour_surgery.initialize.moments import Moments, Regression
from armour_surgery.initialize.problem import (
    Problem,
    candidates,
    has_biases,
    read_head,
    with_biases,
    without_biases,
    write_head,
)
from armour_surgery.initialize.stream import Branch, as_stream, find_branch, inverse_gain, look, match_width
from armour_surgery.initialize.taps import Stop, Tap, Taps, tokens
from armour_surgery.initialize.walk import Store, Walk, first_tensor, with_first_tensor
from armour_surgery.initialize.weights import applied_weight, batch_norm_affine, read_output, write_output
from armour_surgery.traced import OutputProjection

__all__ = ["Site", "SiteResult"]

# Of the difference between the two streams, the part that one site's output projection is asked to make up for.
_SHARE = 0.5
# Tokens per unknown of a fit beyond which more are not looked at.
_ENOUGH = 16


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
    """One site's calibration."""

    def __init__(self, before: Walk, after: Walk, number: int, problem: Problem, data: Batches, store: Store) -> None:
        self.before, self.after, self.number = before, after, number
        self.problem, self.data, self.store = problem, data, store
        self.old = before.model.get_submodule(problem.fqn)
        self.new = after.model.get_submodule(problem.fqn)
        self.steps: list[str] = []
        self.gain: Tensor | None = None  # of the site's output into the stream, where it has one

    def solve(self, alone: bool) -> SiteResult:
        """Choose the site's weights, and go on to the next: with the original's stream if it is taken `alone`."""
        self.gain, last = self._find_branches()
        self._run_original()
        queries, keys = self._moments()
        moments = queries.moment, keys.moment
        biases = has_biases(self.old, self.problem)
        metrics = queries.metric(biases), keys.metric(biases)
        old = read_head(self.old, self.problem)
        fitted = old if biases else without_biases(old)
        solutions = heads = candidates(self.problem, fitted, *metrics)
        if not biases:
            heads = {name: with_biases(self.problem, head, old) for name, head in solutions.items()}
        out = self.problem.narrow_out
        name = self._best(heads, out, moments)
        self.steps.append(name)
        write_head(self.new, self.problem, heads[name], moments)
        if out is not None:
            error = self._fit_output(heads[name], out)
        else:
            # Nothing in the site shows what an error comes to, so that of logits and values stands for it.
            error = loss(solutions[name], fitted, *metrics, tokens=self.problem.of_values(*metrics)) / 2
        for index, _, _ in self.data:
            self.store.drop(("result", index))
            self.store.drop(("start", index))
        if last is None or not self._fit_last(last, keep=not alone):
            self._advance(alone)
        ranks = tuple(rank_losses(fitted, *metrics).tolist()) if alone and self.problem.joint else ()
        self._refuse_not_finite(torch.tensor(error), "gives")
        return SiteResult(self.problem.fqn, error**0.5, tuple(self.steps), ranks)

    def _refuse_not_finite(self, numbers: Tensor, does: str) -> None:
        if not bool(numbers.isfinite().all()):
            raise CalibrationError(
                f"{self.problem.fqn} {does} NaN, infinite or enormous numbers on these calibration images, so nothing "
                "can be fitted to them; look at the images and at the weights before it, or use init 'joint-svd'"
            )

    def _find_branches(self) -> tuple[Tensor | None, Branch | None]:
        """How the original's first batch enters its stream: the gain of the site's output, and the block's last layer.

        Both are None where the stream is not a sum that they are part of.
        """
        _, image, _ = next(iter(self.data))
        arguments = self.store["original", 0]
        seen, following = look(self.before, self.number, image, arguments)
        start = first_tensor(arguments)
        inputs = [tensor for _, tensor in seen.inputs]
        bases = [start]
        gain = None
        later = seen.outputs
        place = self._place_of_output([name for name, _ in seen.outputs])
        if place is not None:
            later = seen.outputs[place + 1 :]
            for tensor in inputs:
                # The first module that gets the sum (a norm, mostly) shows the stream in the middle of the block.
                branch = find_branch(tensor, [start], [seen.outputs[place]])
                if branch is not None:
                    gain = branch[0].gain
                    bases.append(tensor)
                    break
        # A site's own projections are fitted otherwise, so they end no block.
        later = [(name, tensor) for name, tensor in later if not name.startswith(f"{self.problem.fqn}.")]
        last = find_branch(first_tensor(following), [*bases, *inputs], later)
        return gain, last[0] if last is not None else None

    def _place_of_output(self, names: list[str]) -> int | None:
        """Which of those layers is the output projection."""
        out = self.problem.out
        if out is None:
            return None
        # A parameter of the site itself has no layer of its own; then the site would be the layer.
        layer = f"{self.problem.fqn}.{out.weight.rpartition('.')[0]}".rstrip(".")
        return names.index(layer) if layer in names else None

    def _run_original(self) -> None:
        """Note what the original's site and block give."""
        out = self.problem.out
        for index, image, _ in self.data:
            arguments = self.store["original", index]
            seen: list[Tensor] = []

            def keep(_: Tensor, product: Callable[[], Tensor], seen: list[Tensor] = seen) -> Tensor:
                seen.append(product())
                return seen[-1]

            taps: dict[Tensor, Tap] = {self.old.get_parameter(out.weight): keep} if out else {}
            with Taps(taps):
                following = self.before.run(self.number, image, arguments)
            if seen:
                self.store["result", index] = seen[0]
            self.store["start", index] = first_tensor(arguments)
            self.store["original", index] = following

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
                self._until_stop(_moment_taps(watched, len(image)), index, image)
        # What V is made of too has to be known in every direction. Where that is K, Q follows from K, however few ask.
        shared = keys if apart and not self.problem.share("q") else queries
        width = shared.moment.shape[0] if shared.count else 0
        if shared.count <= width:
            raise CalibrationError(
                f"calibration saw {shared.count} tokens at {self.problem.fqn}, too few for its {width} channels; give "
                "more images"
            )
        for moments in watched.values():
            self._refuse_not_finite(moments.moment, "gets")
        return queries, keys if apart else queries

    def _until_stop(self, taps: dict[Tensor, Tap], index: int, image: Tensor) -> None:
        """Run the converted unit on a batch until a tap has seen enough: what comes after it is not needed."""
        try:
            with Taps(taps):
                self.after.run(self.number, image, self.store["converted", index])
        except Stop:
            return
        raise CalibrationError(
            f"{self.problem.fqn} does not use its weights in a way that calibration can watch; leave it out with "
            f"exclude={self.problem.fqn!r}, or use init 'joint-svd'"
        )

    def _best(self, heads: dict[str, Head], out: OutputProjection | None, moments: tuple[Tensor, Tensor]) -> str:
        """Compare candidates where it counts: the error of the fitted output on held-out images."""
        if len(heads) == 1 or out is None:
            return list(heads)[-1]
        errors: dict[str, float] = {}
        for name, head in heads.items():
            write_head(self.new, self.problem, head, moments)
            errors[name] = self._regression(head, out, self.data.trial()).solve()[1]
        return min(errors, key=errors.__getitem__)

    def _regression(self, head: Head, out: OutputProjection, batches: Iterable[tuple[int, Tensor, bool]]) -> Regression:
        """The converted heads' results against the original's output and a share of what its stream is off."""
        weight = self.new.get_parameter(out.weight)
        order = torch.tensor(out.channels).flatten()
        scale, shift = _after_product(self.old, out)
        biases = out.bias is not None or out.norm is not None
        present = head.out.flatten(0, 1)
        if biases:
            present = torch.cat([present, read_output(self.new, out)[1][None]])
        regression = Regression(present, biases)
        for index, image, held in batches:
            target = tokens(self.store["result", index], weight) * scale.to(weight) + shift.to(weight)
            correction = self._correction(index, target.shape, scale)
            if correction is not None:
                target = target + correction

            def tap(source: Tensor, _: Any, target: Tensor = target, held: bool = held) -> Tensor:
                inputs = tokens(source, weight)[..., order]
                weights = self.data.weights(inputs.shape[1])
                rows = None if weights is None else weights.repeat(len(inputs), 1)
                regression.add(inputs.flatten(0, 1), target.flatten(0, 1).to(inputs.dtype), held, weights=rows)
                raise Stop

            self._until_stop({weight: tap}, index, image)
        return regression

    def _correction(self, index: int, shape: torch.Size, scale: Tensor) -> Tensor | None:
        """What the site would have to add for the streams to meet half way; None where its gain is not known."""
        if self.gain is None:
            return None
        start = match_width(self.store["start", index], shape[-1])
        present = match_width(first_tensor(self.store["converted", index]), shape[-1])
        if start is None or present is None or start.shape != shape:
            return None
        # The gain was seen from the bare product on; the site's output has the scale of what follows it already.
        return (start - present) * (_SHARE * inverse_gain(self.gain / scale)).to(start)

    def _fit_output(self, head: Head, out: OutputProjection) -> float:
        """Fit the output projection on all batches; returns the relative squared error on those held out."""
        regression = self._regression(head, out, self.data)
        solution, error = regression.solve()
        if solution is not regression.present:
            self.steps.append("output projection")
        offset = solution[-1] if regression.biases else torch.zeros(solution.shape[1], dtype=torch.float64)
        matrix = solution[: head.out.shape[0] * head.out.shape[1]].reshape(head.out.shape)
        write_output(self.new, out, matrix, offset, regression.moment)
        return error

    def _fit_last(self, branch: Branch, keep: bool) -> bool:
        """Fit the block's last layer, so that what leaves the block is the original's stream.

        With `keep`, what the next unit gets is worked out from what was seen, if there is memory for it; the result
        says whether it was.
        """
        module = self.after.model.get_submodule(branch.fqn)
        if not LastLayer.fits(module):
            return False
        layer = LastLayer(module)
        count = sum(self.data.sizes) * _token_count(first_tensor(self.store["converted", 0]))
        keep = keep and self.store.has_room(layer.bytes_per_token * count)
        present = layer.read()
        regression = Regression(present, layer.bias is not None)
        if not self._watch_last(layer, branch, regression, max(1, count // (_ENOUGH * layer.inputs)), keep):
            return False
        solution, _ = regression.solve()
        change = solution - present  # before it is written: in float64 these may be the weights themselves
        if solution is not present:
            self.steps.append("last layer")
            layer.write(solution)
        if keep:
            self._follow(change * branch.gain, layer.bias is not None)
        return keep

    def _watch_last(self, layer: LastLayer, branch: Branch, regression: Regression, stride: int, keep: bool) -> bool:
        """Take in every `stride`-th token of the layer, against what its output lacks for the original's stream.

        With `keep`, the inputs and what the next unit gets are stored. False where a stream has no such tokens.
        """
        inverse = inverse_gain(branch.gain).to(layer.weight)
        for index, image, held in self.data:
            with layer.watched() as seen:
                following = self.after.run(self.number, image, self.store["converted", index])
            if not seen:  # a forward that somebody put on it runs another model's weight
                return False
            inputs, output = (tokens(tensor, layer.weight) for tensor in seen[0])
            width = output.shape[-1]
            goal = match_width(first_tensor(self.store["original", index]), width)
            present = match_width(first_tensor(following), width)
            if goal is None or present is None:
                return False
            # Each batch begins at another token, so that no place in the image is left out.
            chosen, rows = self.data.thinned(inputs.shape[:2], index % stride, stride)
            lacking = (goal.flatten(0, 1)[chosen] - present.flatten(0, 1)[chosen]) * inverse
            regression.add(inputs.flatten(0, 1)[chosen], output.flatten(0, 1)[chosen] + lacking, held, lacking, rows)
            if keep:
                self.store["hidden", index], self.store["following", index] = inputs, following
        return True

    def _follow(self, change: Tensor, biases: bool) -> None:
        """What the next unit gets, now that the last layer's weights differ by `change [n (+ 1), E]`."""
        for index, _, _ in self.data:
            inputs, following = self.store["hidden", index], self.store["following", index]
            self.store.drop(("hidden", index))
            self.store.drop(("following", index))
            stream, difference = first_tensor(following), change.to(inputs)
            moved = inputs @ difference[: inputs.shape[-1]]
            moved = moved + difference[-1] if biases else moved
            self.store["converted", index] = with_first_tensor(following, stream + as_stream(moved, stream))

    def _advance(self, alone: bool) -> None:
        """Store what the next unit gets, from the original if the site is taken `alone`."""
        for index, image, _ in self.data:
            if alone:
                self.store["converted", index] = self.store["original", index]
            else:
                following = self.after.run(self.number, image, self.store["converted", index])
                self.store["converted", index] = following


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


def _token_count(tensor: Tensor) -> int:
    """How many tokens an image has in a stream, whichever axis its channels are."""
    return tensor[0].numel() // min(tensor.shape[-1], tensor.shape[1])


def _per_image(source: Tensor, weight: Tensor, size: int) -> Tensor:
    """The inputs of a projection, tokens of one softmax together; those that a host flattened, image by image."""
    if source.ndim == 2 and len(source) % size == 0:
        return source.reshape(size, -1, source.shape[-1])
    return tokens(source, weight)
