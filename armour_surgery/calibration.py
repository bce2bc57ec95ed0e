"""Between the spine and the initializers: which images, in which precision, and what came of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.errors import CalibrationError
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.initialize import HELD_OUT, SiteResult, calibrate, from_weights
from armour_surgery.initialize.images import calibration_batches
from armour_surgery.measure.fidelity import compare_outputs
from armour_surgery.meta import alias, full_copy
from armour_surgery.operation import Operation, problems_of
from armour_surgery.sites import Fidelity

__all__ = ["Images", "Progress", "choose_weights"]

Progress = Callable[[str, int, int], None]
_BATCH = 16
_EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Images:
    """Where calibration images come from, and how many to use at most."""

    source: str | Iterable[Any]
    count: int


def choose_weights(
    original: nn.Module,
    converted: nn.Module,
    operations: list[Operation],
    init: str,
    example: dict[str, Tensor],
    images: Images | None,
    progress: Progress | None,
) -> tuple[list[SiteResult], Fidelity | None]:
    """Give a converted model its weights, in place; with `images`, also say how near it is to the original then.

    Both models keep their types, modes and devices. What they compute with meanwhile is at least float32.
    """
    modes = {name: module.training for name, module in converted.named_modules()}
    low = any(p.dtype not in _EXACT for p in original.parameters() if p.is_floating_point())
    before = full_copy(original).float() if low else alias(original)
    after = full_copy(converted).float() if low else converted
    before.eval()
    after.eval()
    try:
        problems = problems_of(before, operations)
        if images is None:
            dtype = next(p.dtype for p in before.parameters() if p.is_floating_point())
            given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in example.items()}
            results = from_weights(before, after, problems, init, lambda model: model(**given))
            return results, None
        return _from_images(before, after, problems, example, images, progress)
    finally:
        if low:
            _copy_weights(after, converted)
        for name, module in converted.named_modules():
            module.training = modes[name]


def _from_images(
    before: nn.Module,
    after: nn.Module,
    problems: list[Any],
    example: dict[str, Tensor],
    images: Images,
    progress: Progress | None,
) -> tuple[list[SiteResult], Fidelity]:
    name = next((name for name, value in example.items() if value.is_floating_point() and value.ndim == 4), None)
    if name is None:
        raise CalibrationError(
            f"calibration knows models that take images [B, C, H, W], and {type(before).__name__} takes "
            f"{', '.join(example)}; use init 'joint-svd'"
        )
    parameter = next(p for p in before.parameters() if p.is_floating_point())
    size = max(1, min(_BATCH, images.count // 4))
    batches = calibration_batches(
        images.source,
        preprocessing(before, example),
        images=images.count,
        batch_size=size,
        apart=min(HELD_OUT, -(-images.count // size)),
    )
    finished: list[str] = []

    def done(fqn: str) -> None:
        finished.append(fqn)
        if progress is not None:
            progress("calibrating", len(finished), len(problems))

    def moved() -> Iterable[Tensor]:
        for count, batch in enumerate(batches, start=1):
            if progress is not None:
                progress("reading images", min(count * size, images.count), images.count)
            yield batch.to(parameter)

    results, held_out = calibrate(before, after, problems, moved(), lambda model, batch: model(**{name: batch}), done)
    source = images.source if isinstance(images.source, str) else "images given in Python"
    return results, compare_outputs(
        before, after, held_out, lambda model, batch: hosts.features(model, {name: batch}), source
    )


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Parameters and buffers of one model into another of equal structure, in the other's types."""
    with torch.no_grad():
        tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
        for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
            tensor.copy_(tensors[name])
