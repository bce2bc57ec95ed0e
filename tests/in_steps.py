"""What `convert` does, in its steps: discovery and surgery are done once for all ways to choose the weights."""

from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.initialize.site import SiteResult
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import Operation, operate
from armour_surgery.surgery.order import CALIBRATION_IMAGES, Images

__all__ = ["initialized"]


def initialized(
    model: nn.Module, operations: list[Operation], init: str, example: dict[str, Tensor], seen: list[Tensor]
) -> tuple[nn.Module, list[SiteResult]]:
    """A converted copy of `model`, and what is told of every site; `seen` are the batches that `calibrated` gets."""
    armour = full_copy(model)
    for operation in operations:
        operate(armour, operation, init)
    if init == "wq":
        return armour, []
    images = Images(seen, CALIBRATION_IMAGES) if init == "calibrated" else None
    shapes = {name: value.to("meta") for name, value in example.items()}
    results, _ = choose_weights(model, armour, operations, init, shapes, images, None)
    return armour, results
