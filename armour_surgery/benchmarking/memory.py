"""How much memory a model holds, and how much more a call of it takes."""

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery.freed import give_back

__all__ = ["held_bytes", "peak_growth"]

_PROCESS = Path("/proc/self")
# What to write into clear_refs to have the kernel measure the peak of the resident memory anew (man 5 proc).
_RESET_PEAK = "5"


def held_bytes(module: nn.Module) -> int:
    """Bytes of the module's parameters and buffers; storage that several of them share counts once."""
    sizes = {}
    for tensor in (*module.parameters(), *module.buffers()):
        storage = tensor.untyped_storage()
        sizes[storage.device, storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def peak_growth(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most bytes that `call` had beyond what was there before it; None where the system does not tell.

    On CUDA that is what torch's allocator gave out. On the CPU it is the peak of the process's resident memory, after
    everything free was given back to the system: activations and the workspace of the kernels, in whole pages. It needs
    Linux and glibc. Call once beforehand: what is taken once and kept is not what a call takes.
    """
    # What waits for the collector would be freed during the call and hide a part of what it takes.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    resident = _forget_peak()
    call()
    peak = _status("VmHWM")
    if resident is None or peak is None:
        return None
    # Both are inaccurate by some pages (man 5 proc), so that the difference may be below zero.
    return max(0, peak - resident)


def _forget_peak() -> int | None:
    """Give free memory back and let the system's record of the peak start anew; the resident bytes now."""
    if not give_back():
        return None
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    """Bytes, from a line like `VmRSS:  1668 kB`."""
    try:
        text = (_PROCESS / "status").read_text(encoding="ascii")
    except OSError:
        return None
    line = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(line[1]) if line else None
