"""Where systems of equations in float64 are solved."""

import torch

__all__ = ["solves_on"]

# Compute capabilities of GPUs that compute in float64 half as fast as in float32: P100, V100, A100, H100, B200. Others
# do it at a 32nd or 64th of that speed, which is less than a CPU's.
_FAST = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))


def solves_on(device: torch.device) -> torch.device:
    """The device itself if it is a GPU that is fast in float64, and else the CPU."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST:
        return device
    return torch.device("cpu")
