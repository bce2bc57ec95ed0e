"""What `convert` does, in its steps: discovery and surgery are done once for all ways to choose the weights."""

from torch import Tensor, nn

from armour_surgery.copies import full_copy
from armour_surgery.initialize.site import SiteResult
from armour_surgery.surgery.new_weights import choose_weights
from armour_surgery.surgery.operation import Operation, Prepared, operate
from armour_surgery.surgery.order import CALIBRATION_IMAGES, Images, Order

__all__ = ["initialized"]


def initialized(
    model: nn.Module, operations: list[Operation], init: str, example: dict[str, Tensor], seen: list[Tensor]
) -> tuple[nn.Module, list[SiteResult]]:
    """A converted copy of `model`, and what is told of every site; `seen` are the batches that `calibrated` gets."""
    armour = full_copy(model)
    for operation in operations:
        operate(armour, operation)
    if init == "wq":
        return armour, []
    shapes = {name: value.to("meta") for name, value in example.items()}
    order = Order("auto", init=init, images=Images(seen, CALIBRATION_IMAGES), example=shapes)
    results, _ = choose_weights(model, armour, Prepared(operations, []), order)
    return armour, results
