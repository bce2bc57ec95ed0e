"""What a name of a device means here."""

import torch

from armour_surgery.errors import UsageError

__all__ = ["usable_device"]


def usable_device(device: str | torch.device, option: str) -> torch.device:
    """The device of that name; `auto` is a GPU where CUDA has one, and else the CPU.

    Raises:
        UsageError: torch does not know it, or it is not here; `option` is how the user gave it.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        place = torch.device(name)
        # That torch knows a device's name does not mean that this machine, or this build of torch, has one.
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0]
        raise UsageError(f"{option} cannot be used here: {message}; cpu always can") from error
    return place
