"""What an exported model is held against: images, and what the model itself makes of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.calls import run
from armour_surgery.discover.dataflow import tensors_in
from armour_surgery.errors import ExportError
from armour_surgery.examples import images_in, with_numbers
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.measure.difference import largest_difference

__all__ = ["Inputs", "answers", "batches", "largest_error", "other_size"]

Inputs = dict[str, Tensor]

# Batch sizes to compare at: one image has axes of size one, and three are as many as nothing else.
SIZES = (1, 3)


def batches(model: nn.Module, source: object) -> list[Inputs]:
    """Arguments for the model with one image and with three; other arguments than images as the model's example has.

    Args:
        source: what `calibration_batches` takes: a folder of photos, "synthetic", batches.
    """
    filled = [with_numbers(hosts.example_input(model, size), _device(model)) for size in SIZES]
    name = images_in(filled[0])
    if name is not None:
        drawn = calibration_batches(source, preprocessing(model, filled[0]), images=sum(SIZES), batch_size=sum(SIZES))
        images = torch.cat(list(drawn))
        while len(images) < sum(SIZES):  # of a caller's own batches there may be fewer
            images = torch.cat([images, images])
        start = 0
        for size, inputs in zip(SIZES, filled, strict=True):
            inputs[name] = images[start : start + size].to(inputs[name])
            start += size
    return filled


def other_size(model: nn.Module, inputs: Inputs) -> Inputs | None:
    """The same with images of twice the height and width, where the model takes them; None where it does not."""
    name = images_in(inputs)
    if name is None:
        return None
    larger = {**inputs, name: nn.functional.interpolate(inputs[name].float(), scale_factor=2.0).to(inputs[name])}
    try:
        answers(model, larger)
    except Exception:  # whatever a host raises
        return None
    return larger


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors of the model's output, in order."""
    with torch.no_grad():
        return [tensor.detach() for tensor in tensors_in(run(model, inputs))]


def largest_error(
    wanted: list[list[Tensor]], batches: list[Inputs], loaded: Callable[[Inputs], list[Tensor]], what: str
) -> float:
    """The largest relative difference of what was loaded again, over all batches; see `largest_difference`.

    Raises:
        ExportError: it does not run, or gives outputs of another number or shape.
    """
    worst = 0.0
    for expected, inputs in zip(wanted, batches, strict=True):
        try:
            got = loaded(inputs)
        except Exception as error:
            raise ExportError(f"{what} does not run on what the model takes: {_first_line(error)}") from error
        shapes, found = [tuple(t.shape) for t in expected], [tuple(t.shape) for t in got]
        if shapes != found:
            raise ExportError(f"{what} gives outputs of shapes {found}, and the model {shapes}; please report it")
        alike = [after.to(was) for after, was in zip(got, expected, strict=True)]
        worst = max(worst, largest_difference(expected, alike))
    return worst


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
