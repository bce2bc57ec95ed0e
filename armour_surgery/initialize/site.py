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
from armour_surgery.initialize.closed_form import Head, rank_losses
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
from armour_surgery.initialize.stream import Branch, as_stream, find_branch, look, match_width
from armour_surgery.initialize.taps import Stop, Taps, tokens
from armour_surgery.initialize.walk import Store, Walk, first_tensor, with_first_tensor
from armour_surgery.initialize.weights import batch_norm_affine, read_output, write_output

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
        self.mid: Tensor | None = None  # gain of the site's output into the stream
        self.last: Branch | None = None

    def solve(self, alone: bool) -> SiteResult:
        """Choose the site's weights, and go on to the next: with the original's stream if it is taken `alone`."""
        self._run_original()
        queries, keys = self._moments()
        head, biases = self._head()
        metrics = queries.metric(biases), keys.metric(biases)
        found = candidates(self.problem, head, *metrics)
        if not biases:
            old = read_head(self.old, self.problem)
            found = {name: with_biases(self.problem, one, old) for name, one in found.items()}
        name, residual = self._best(found, (queries.moment, keys.moment))
        self.steps.append(name)
        ranks = tuple(rank_losses(head, *metrics).tolist()) if alone and self.problem.joint else ()
        write_head(self.new, self.problem, found[name], (queries.moment, keys.moment))
        if self.problem.out is not None:
            residual = self._fit_output(found[name])
        for index, _, _ in self.data:
            self.store.drop(("result", index))
            self.store.drop(("start", index))
        if self.last is None or not self._fit_last(self.last, keep=not alone):
            self._advance(alone)
        return SiteResult(self.problem.fqn, residual**0.5, tuple(self.steps), ranks)

    def _head(self) -> tuple[Head, bool]:
        """The original's weights, without the rows of biases where Q cannot have one."""
        head = read_head(self.old, self.problem)
        biases = has_biases(self.old, self.problem)
        return (head if biases else without_biases(head)), biases

    def _run_original(self) -> None:
        """Note what the original's site and block give, and on the first batch, how that enters the stream."""
        out = self.problem.out
        for index, image, _ in self.data:
            arguments = self.store["original", index]
            if index == 0:
                self._find_branches(image, arguments)
            seen: list[Tensor] = []

            def keep(_: Tensor, product: Callable[[], Tensor], seen: list[Tensor] = seen) -> Tensor:
                seen.append(product())
                return seen[-1]

            taps: dict[Tensor, Any] = {self.old.get_parameter(out.weight): keep} if out else {}
            with Taps(taps):
                following = self.before.run(self.number, image, arguments)
            if seen:
                self.store["result", index] = seen[0]
            self.store["start", index] = first_tensor(arguments)
            self.store["original", index] = following

    def _find_branches(self, image: Tensor, arguments: Any) -> None:
        seen, following = look(self.before, self.number, image, arguments)
        out, fqn = self.problem.out, self.problem.fqn
        start = first_tensor(arguments)
        names = [name for name, _ in seen.outputs]
        layer = f"{fqn}.{out.weight.rpartition('.')[0]}".rstrip(".") if out else ""
        bases = [start]
        position = -1
        if layer in names:
            position = names.index(layer)
            own = [seen.outputs[position]]
            for _, tensor in seen.inputs:
                found = find_branch(tensor, [start], own)
                if found is not None:
                    self.mid = found[0].gain
                    bases.append(tensor)
                    break
        later = [one for one in seen.outputs[position + 1 :] if not one[0].startswith(f"{fqn}.")]
        found = find_branch(first_tensor(following), [*bases, *(tensor for _, tensor in seen.inputs)], later)
        self.last = found[0] if found is not None else None

    def _moments(self) -> tuple[Moments, Moments]:
        """Moments of the tokens that Q and K are now made from."""
        queries, keys = Moments(), Moments()
        query_weight = self.new.get_parameter(self.problem.q.producer.weight)
        key_name = self.problem.k.producer.weight
        apart = not self.problem.same_tokens and self.problem.key[0][0] == "k"
        for index, image, held in self.data:
            if held:
                continue
            missing = {"q", "k"} if apart else {"q"}

            def take(letter: str, moments: Moments, missing: set[str] = missing, size: int = len(image)) -> Any:
                def tap(source: Tensor, product: Callable[[], Tensor]) -> Tensor:
                    moments.add(_per_image(source, query_weight, size))
                    missing.discard(letter)
                    if not missing:
                        raise Stop
                    return product()

                return tap

            taps: dict[Tensor, Any] = {query_weight: take("q", queries)}
            if apart:
                taps[self.new.get_parameter(key_name)] = take("k", keys)
            self._until_stop(taps, index, image)
        width = queries.moment.shape[0] if queries.count else 0
        if queries.count <= width:
            raise CalibrationError(
                f"calibration saw {queries.count} tokens at {self.problem.fqn}, too few for its {width} channels; give "
                "more images"
            )
        return queries, keys if apart else queries

    def _until_stop(self, taps: dict[Tensor, Any], index: int, image: Tensor) -> None:
        try:
            with Taps(taps):
                self.after.run(self.number, image, self.store["converted", index])
        except Stop:
            return
        raise CalibrationError(
            f"{self.problem.fqn} does not use its weights in a way that calibration can watch; leave it out with "
            f"exclude={self.problem.fqn!r}, or use init 'joint-svd'"
        )

    def _best(self, found: dict[str, Head], moments: tuple[Tensor, Tensor]) -> tuple[str, float]:
        """Compare candidates where it counts: the error of the fitted output on held-out images."""
        errors: dict[str, float] = {}
        if len(found) == 1 or self.problem.out is None:
            return list(found)[-1], float("nan")
        for name, head in found.items():
            write_head(self.new, self.problem, head, moments)
            errors[name] = self._regression(head, self.data.trial()).solve()[1]
        name = min(errors, key=lambda one: errors[one])
        return name, errors[name]

    def _affine(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """What follows the output projection's product: scale and shift per channel."""
        out = self.problem.out
        assert out is not None
        if out.norm is None:
            one = torch.ones(len(module.get_parameter(out.weight)), dtype=torch.float64)
            return one, torch.zeros_like(one)
        return batch_norm_affine(module, out.norm)

    def _present(self, head: Head, biases: bool) -> Tensor:
        out = self.problem.narrow_out
        assert out is not None
        flat = head.out.flatten(0, 1)
        return torch.cat([flat, read_output(self.new, out)[1][None]]) if biases else flat

    def _regression(self, head: Head, batches: Iterable[tuple[int, Tensor, bool]]) -> Regression:
        """The converted heads' results against the original's output and a share of what its stream is off."""
        out = self.problem.narrow_out
        assert out is not None
        weight = self.new.get_parameter(out.weight)
        order = torch.tensor(out.channels).flatten()
        scale, shift = (one.to(weight) for one in self._affine(self.old))
        biases = out.bias is not None or out.norm is not None
        regression = Regression(self._present(head, biases), biases)
        for index, image, held in batches:
            target = tokens(self.store["result", index], weight) * scale + shift
            wanted = self._correction(index, target.shape)
            if wanted is not None:
                target = target + wanted

            def tap(source: Tensor, _: Any, target: Tensor = target, held: bool = held) -> Tensor:
                inputs = tokens(source, weight)[..., order]
                each = self.data.weights(inputs.shape[1])
                rows = None if each is None else each.repeat(len(inputs), 1)
                regression.add(inputs.flatten(0, 1), target.flatten(0, 1).to(inputs.dtype), held, weights=rows)
                raise Stop

            self._until_stop({weight: tap}, index, image)
        return regression

    def _correction(self, index: int, shape: torch.Size) -> Tensor | None:
        """What the site would have to add for the streams to meet half way; None where its gain is not known."""
        if self.mid is None:
            return None
        start = match_width(self.store["start", index], shape[-1])
        present = match_width(first_tensor(self.store["converted", index]), shape[-1])
        scale, _ = self._affine(self.old)
        gain = self.mid / scale
        if start is None or present is None or start.shape != shape:
            return None
        usable = gain.abs() > 1e-3 * gain.abs().max()
        return (start - present) * (_SHARE * torch.where(usable, 1 / gain, torch.zeros_like(gain))).to(start)

    def _fit_output(self, head: Head) -> float:
        out = self.problem.narrow_out
        assert out is not None
        regression = self._regression(head, self.data)
        solution, error = regression.solve()
        if solution is not regression.present:
            self.steps.append("output projection")
        offset = solution[-1] if regression.biases else torch.zeros(solution.shape[1], dtype=torch.float64)
        matrix = solution[: head.out.shape[0] * head.out.shape[1]].reshape(head.out.shape)
        moment = regression.moments[0] / regression.counts[0]
        write_output(self.new, out, matrix, offset, moment)
        return error

    def _fit_last(self, branch: Branch, keep: bool) -> bool:
        """Fit the block's last layer, so that what leaves the block is the original's stream.

        With `keep`, what the next unit gets is worked out from what was seen, if there is memory for it; the result
        says whether it was.
        """
        layer = self.after.model.get_submodule(branch.fqn)
        weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
        if weight[0].numel() != weight.shape[1]:
            return False
        current = weight.detach().double().flatten(1).mT.cpu()
        if bias is not None:
            current = torch.cat([current, bias.detach().double().cpu()[None]])
        regression = Regression(current, bias is not None)
        unknowns = weight.shape[1]
        count = sum(self.data.sizes) * _token_count(first_tensor(self.store["converted", 0]))
        stride = max(1, count // (_ENOUGH * unknowns))
        usable = branch.gain.abs() > 1e-3 * branch.gain.abs().max()
        inverse = torch.where(usable, 1 / branch.gain, torch.zeros_like(branch.gain)).to(weight)
        keep = keep and self.store.has_room(weight.element_size() * count * (unknowns + len(weight)))
        for index, image, held in self.data:
            seen: list[tuple[Tensor, Tensor]] = []

            def tap(source: Tensor, product: Callable[[], Tensor], seen: list[Any] = seen) -> Tensor:
                output = product()
                seen.append((source, output))
                return output

            with Taps({weight: tap}):
                following = self.after.run(self.number, image, self.store["converted", index])
            inputs, output = (tokens(one, weight) for one in seen[0])
            width = output.shape[-1]
            goal = match_width(first_tensor(self.store["original", index]), width)
            present = match_width(first_tensor(following), width)
            if goal is None or present is None:
                return False
            chosen, rows = self.data.thinned(inputs.shape[:2], index % stride, stride)
            lacking = (goal.flatten(0, 1)[chosen] - present.flatten(0, 1)[chosen]) * inverse
            regression.add(inputs.flatten(0, 1)[chosen], output.flatten(0, 1)[chosen] + lacking, held, lacking, rows)
            if keep:
                self.store["hidden", index], self.store["following", index] = inputs, following
        solution, _ = regression.solve()
        change = solution - current  # before it is written: in float64 these may be the weights themselves
        if solution is not current:
            self.steps.append("last layer")
            with torch.no_grad():
                weight.copy_((solution[:-1] if bias is not None else solution).mT.reshape(weight.shape))
                if bias is not None:
                    bias.copy_(solution[-1])
        if keep:
            self._follow(change * branch.gain, bias is not None)
        return keep

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
        for index, image, _ in self.data:
            self.store["converted", index] = (
                self.store["original", index]
                if alone
                else self.after.run(self.number, image, self.store["converted", index])
            )


def _token_count(tensor: Tensor) -> int:
    """How many tokens an image has in a stream, whichever axis its channels are."""
    return tensor[0].numel() // min(tensor.shape[-1], tensor.shape[1])


def _per_image(source: Tensor, weight: Tensor, size: int) -> Tensor:
    """The inputs of a projection, tokens of one softmax together; those that a host flattened, image by image."""
    if source.ndim == 2 and len(source) % size == 0:
        return source.reshape(size, -1, source.shape[-1])
    return tokens(source, weight)
