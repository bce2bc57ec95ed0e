"""How much an error of a site's output counts, by what it does to the model's final features.

A stream has directions that later blocks hardly look at. With `g` the gradient of `<v, f>` by the output projection's
output, `f` the final features at length one and `v` random, `E g g^T` is the mean of `J^T J` over tokens: what an error
`e` of one token comes to in all final features is `e^T (E g g^T) e`. No labels are used, no weight takes a step, and a
few backward passes serve all sites (a Gauss-Newton matrix by random projections, as Hutchinson 1989 for traces).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armour_surgery.initialize.gram import Gram
from armour_surgery.initialize.processes import ALONE, Processes
from armour_surgery.initialize.stream import inverse_gain
from armour_surgery.initialize.taps import Tap, Taps, tokens

__all__ = ["IMAGES", "ErrorMoment", "error_moments", "in_groups"]

# Images that are looked at: thousands of tokens, for a matrix of hundreds of channels.
IMAGES = 32
# Random projections of features in all, more of each image where there are fewer: with one of each, noise made
# conversions of small models worse, not better.
_DRAWS = 4 * IMAGES
# Bytes of such matrices (half of each is kept) that are summed up at a time. A DINOv3-7B has 2.5 times as many.
_ROOM = 2**30


@dataclass
class ErrorMoment:
    """`sum g g^T [E, E]` of an output projection's bare product, up to a factor, over `count` tokens."""

    total: Gram = field(default_factory=Gram)
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Take in gradients `[n, E]`."""
        self.total.add(rows)
        self.count += len(rows)

    def energy(self) -> float:
        """`sum |g|^2`; no number, or infinite, where some gradient is."""
        return float(self.total.diagonal().sum()) if self.count else 0.0

    def root(self, scale: Tensor) -> Tensor:
        """`L [E, E]`, invertible: an error `e` of a site's output counts like `|e L|^2`.

        What follows the bare product multiplies it by `scale [E]`. Few tokens do not show all directions: as many as
        there are channels count half, and the other half is that all directions count alike. Without any they all do.
        """
        if self.count == 0:
            return torch.eye(len(scale), dtype=torch.float64)
        inverse = inverse_gain(scale)
        seen = inverse[:, None] * self.total.dense() * inverse
        size = seen.diagonal().mean()
        identity = torch.eye(len(seen), dtype=torch.float64)
        if not bool(size > 0):  # what is read has next to no scale
            return identity
        alike = len(seen) / (self.count + len(seen))
        values, basis = torch.linalg.eigh((1 - alike) / size * seen + alike * identity)
        root: Tensor = basis * values.sqrt()
        return root


def in_groups(outputs: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Output projections' weights by name, as many at a time as there is memory for."""
    group: dict[str, Tensor] = {}
    taken = 0
    for name, weight in outputs.items():
        size = 8 * len(weight) ** 2 // 2
        if group and taken + size > _ROOM:
            yield group
            group, taken = {}, 0
        group[name] = weight
        taken += size
    if group:
        yield group


def error_moments(
    model: nn.Module,
    outputs: Mapping[str, Tensor],
    images: Iterable[Tensor],
    features: Callable[[nn.Module, Tensor], Tensor],
    weights: Callable[[int], Tensor | None],
    processes: Processes = ALONE,
) -> dict[str, ErrorMoment]:
    """How much errors of each output projection's bare product count; `outputs` are the projections' weights by name.

    `features(model, image)` gives `[1, ..., C]`, and `weights(N)` how much each of N tokens counts, `[N, 1]`, or None.
    Images go one by one, since a whole backward pass has to be in memory; each of `processes` takes its share. The
    model is not changed. What has no gradient, or one that is not finite, is left out; of a model that cannot be
    differentiated that is everything.
    """
    sums = {name: ErrorMoment() for name in outputs}
    failures = 0
    singles = [image for batch in images for image in torch.split(batch, 1)] if outputs else []
    draws = -(-_DRAWS // max(1, len(singles)))
    for number, image in enumerate(singles):
        if not processes.has(number) or failures:
            continue
        try:
            # The same numbers whichever process draws them.
            generator = torch.Generator().manual_seed(number)
            _add_gradients(sums, model, outputs, image, features, weights, generator, draws)
        except RuntimeError:
            failures = 1
    if processes.sum_number(failures):
        # A model made in inference mode, or with an operation that has no derivative: errors then count alike.
        return {}
    for one in sums.values():
        one.total, one.count = one.total.gathered(processes), round(processes.sum_number(one.count))
    return {name: one for name, one in sums.items() if 0 < one.energy() < math.inf}


def _add_gradients(
    sums: dict[str, ErrorMoment],
    model: nn.Module,
    outputs: Mapping[str, Tensor],
    image: Tensor,
    features: Callable[[nn.Module, Tensor], Tensor],
    weights: Callable[[int], Tensor | None],
    generator: torch.Generator,
    draws: int,
) -> None:
    """Add one image's gradients by the outputs of all sites."""
    seen: list[tuple[str, Tensor]] = []

    def tap_of(name: str) -> Tap:
        def tap(_: Tensor, product: Callable[[], Tensor]) -> Tensor:
            output = product()
            if not output.requires_grad:  # the first one, where no parameter asks for gradients
                output.requires_grad_(True)
            seen.append((name, output))
            return output.clone()  # what follows may write into it

        return tap

    with torch.enable_grad(), Taps({weight: tap_of(name) for name, weight in outputs.items()}):
        final = F.normalize(features(model, image), dim=-1)
        counts = weights(final.shape[1]) if final.ndim == 3 else None
        outputs_seen = [output for _, output in seen]
        for draw in range(draws):
            noise = torch.randn(final.shape, generator=generator).to(final)
            if counts is not None:
                noise = noise * counts.to(noise).sqrt()
            gradients = torch.autograd.grad(
                (final * noise).sum(), outputs_seen, retain_graph=draw + 1 < draws, allow_unused=True
            )
            for (name, _), gradient in zip(seen, gradients, strict=True):
                if gradient is not None:
                    sums[name].add(tokens(gradient, outputs[name]).flatten(0, 1))
