"""Why a loss became something other than a number, as far as can be seen."""

from torch import Tensor, nn

__all__ = ["cause_of_divergence"]


def cause_of_divergence(student: nn.Module, images: Tensor, *, step: int, epoch: int, lr: float, precision: str) -> str:
    """One sentence about the loss of this step (counted from 1), and what to do about it."""
    where = f"the loss is no number at step {step} (epoch {epoch})"
    # Broken images come first: weights that are no numbers may follow from them, and not the other way round.
    if not _finite(images):
        return f"{where}: the images of its batch hold NaN or infinite values; look at the data and data.std"
    broken = next((name for name, weight in student.named_parameters() if not _finite(weight)), None)
    if broken is not None and step > 1:
        return (
            f"{where}: {broken} holds NaN or infinite values, so an earlier step was too large at the learning rate "
            f"{lr:.3g}; lower optimizer.lr, or set optimizer.clip=1.0. The last good checkpoint is untouched"
        )
    if broken is not None:
        return f"{where}: {broken} holds NaN or infinite values from the start; name another MODEL"
    return (
        f"{where}: images and weights are finite, so a value overflowed in the forward pass at the learning rate "
        f"{lr:.3g} in {precision}; lower optimizer.lr, or set run.precision=fp32"
    )


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
