"""One block of a model while it is calibrated: what goes into it, what it gives the stream, and its last layer.

The unit that is run holds an attention, MLPs, or both. What each of them does about its own weights is in `site.py` and
`hidden.py`; the block then fits its last layer (an MLP's second) to the original's stream, so that what leaves it is as
near to that as may be.
"""

from collections.abc import Callable

from torch import Tensor

from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.batches import Batches
from armour_surgery.initialize.last_layer import LastLayer
from armour_surgery.initialize.moments import Regression
from armour_surgery.initialize.placement import Placement
from armour_surgery.initialize.problem import Problem
from armour_surgery.initialize.stream import Branch, as_stream, few, find_branch, inverse_gain, look, match_width
from armour_surgery.initialize.taps import Stop, Tap, Taps, tokens
from armour_surgery.initialize.walk import Store, Walk, first_tensor, with_first_tensor

__all__ = ["Block", "refuse_not_finite"]

# Tokens per unknown of a fit beyond which more are not looked at. With 16 a DINOv2-S at -25 % lost a twelfth more.
_ENOUGH = 64


class Block:
    """One unit of the walk; `problem` is the attention in it that was converted, if one was."""

    def __init__(
        self,
        before: Walk,
        after: Walk,
        number: int,
        problem: Problem | None,
        data: Batches,
        store: Store,
        placement: Placement,
    ) -> None:
        self.before, self.after, self.number = before, after, number
        self.problem, self.data, self.store = problem, data, store
        self.placement = placement
        self.gain: Tensor | None = None  # of the attention's output into the stream, where it has one
        self.last: Branch | None = None  # the layer that ends the block, where it adds to the stream

    def find_branches(self) -> None:
        """How the original's first batch enters its stream: the gain of the site's output, and the block's last layer.

        Both stay None where the stream is not a sum that they are part of.
        """
        index, image, _ = next(iter(self.data))
        arguments = self.store["original", index]
        seen, following = look(self.before, self.number, image, arguments)
        start = few(first_tensor(arguments), len(image))
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
        if self.problem is not None:
            # A site's own projections are fitted otherwise, so they end no block.
            later = [(name, tensor) for name, tensor in later if not name.startswith(f"{self.problem.fqn}.")]
        last = find_branch(few(first_tensor(following), len(image)), [*bases, *inputs], later)
        # Every process looks at another batch, and sees the same but for rounding.
        self.gain, self.last = self.data.processes.first((gain, last[0] if last is not None else None))

    def _place_of_output(self, names: list[str]) -> int | None:
        """Which of those layers is the output projection."""
        out = None if self.problem is None else self.problem.out
        if self.problem is None or out is None:
            return None
        # A parameter of the site itself has no layer of its own; then the site would be the layer.
        layer = f"{self.problem.fqn}.{out.weight.rpartition('.')[0]}".rstrip(".")
        return names.index(layer) if layer in names else None

    def run_original(self) -> None:
        """Note what the original's site and block give."""
        watched = None
        if self.problem is not None and self.problem.out is not None:
            out = self.problem.out
            watched = self.before.model.get_submodule(self.problem.fqn).get_parameter(out.weight)
        for index, image, _ in self.data:
            arguments = self.store["original", index]
            seen: list[Tensor] = []

            def keep(_: Tensor, product: Callable[[], Tensor], seen: list[Tensor] = seen) -> Tensor:
                seen.append(product())
                return seen[-1]

            taps: dict[Tensor, Tap] = {} if watched is None else {watched: keep}
            with Taps(taps):
                following = self.before.run(self.number, image, arguments)
            if seen:
                self.store["result", index] = seen[0]
            self.store["start", index] = first_tensor(arguments)
            self.store["original", index] = following

    def until_stop(self, taps: dict[Tensor, Tap], index: int, image: Tensor, fqn: str) -> None:
        """Run the converted unit on a batch until a tap has seen enough: what comes after it is not needed."""
        try:
            with Taps(taps):
                self.after.run(self.number, image, self.store["converted", index])
        except Stop:
            return
        raise CalibrationError(
            f"{fqn} does not use its weights in a way that calibration can watch; leave it out with exclude={fqn!r}, "
            "or use init 'joint-svd'"
        )

    def tokens_in_all(self) -> int:
        """How many tokens of its stream all images have together."""
        return sum(self.data.sizes) * _token_count(first_tensor(self.store["converted", self.data.first]))

    def stride(self, unknowns: int) -> int:
        """Every how-many-th token is enough for a fit of so many unknowns."""
        return max(1, self.tokens_in_all() // (_ENOUGH * unknowns))

    def finish(self, alone: bool) -> bool:
        """Fit the last layer, and go on to the next block: with the original's stream if it is taken `alone`.

        Whether the last layer was changed.
        """
        for index, _, _ in self.data:
            self.store.drop(("result", index))
            self.store.drop(("start", index))
        fitted, followed = False, False
        if self.last is not None:
            # It may lie beside the unit.
            with self.placement.held(self.after.model.get_submodule(self.last.fqn), written=True):
                fitted, followed = self._fit_last(self.last, keep=not alone)
        if not followed:
            self._advance(alone)
        return fitted

    def _fit_last(self, branch: Branch, keep: bool) -> tuple[bool, bool]:
        """Fit the block's last layer, so that what leaves the block is the original's stream.

        With `keep`, what the next unit gets is worked out from what was seen, if there is memory for it. The result
        says whether the layer was changed, and whether that was worked out.
        """
        module = self.after.model.get_submodule(branch.fqn)
        if not LastLayer.fits(module):
            return False, False
        layer = LastLayer(module)
        count = self.tokens_in_all()
        keep = keep and self.store.has_room(layer.bytes_per_token * count)
        present = layer.read()
        regression = Regression(present, layer.bias is not None)
        if not self._watch_last(layer, branch, regression, self.stride(layer.inputs), keep):
            return False, False
        solution, _ = regression.solve()
        change = solution - present  # before it is written: in float64 these may be the weights themselves
        if solution is not present:
            layer.write(solution)
        if keep:
            self._follow(change * branch.gain, layer.bias is not None)
        return solution is not present, keep

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
        regression.gather(self.data.processes)
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


def _token_count(tensor: Tensor) -> int:
    """How many tokens an image has in a stream, whichever axis its channels are."""
    return tensor[0].numel() // min(tensor.shape[-1], tensor.shape[1])


def refuse_not_finite(numbers: Tensor, fqn: str, does: str) -> None:
    """Refuse numbers that nothing can be fitted to.

    Raises:
        CalibrationError: some are NaN or infinite.
    """
    if not bool(numbers.isfinite().all()):
        raise CalibrationError(
            f"{fqn} {does} NaN, infinite or enormous numbers on these calibration images, so nothing can be fitted to "
            "them; look at the images and at the weights before it, or use init 'joint-svd'"
        )
