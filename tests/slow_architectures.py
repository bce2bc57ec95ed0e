"""Architectures that other processes build: one that is as it should be, and some that are not.

They are here, and not beside their test, since another process has to be able to import them.
"""

import os
import time

import torch
from own_attentions import D, Hidden, PerHead
from torch import Tensor, nn

__all__ = ["load"]

_HELD: list[Tensor] = []


def load(library: str, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "hangs":
        time.sleep(3600)
    if name == "dies":
        os._exit(9)
    if name == "raises":
        raise ValueError("no such\nthing")
    if name.startswith("holds"):
        _HELD.append(torch.empty(13 << 27))  # 6.5 GiB, which are never touched
    return Hidden(PerHead()), {"x": torch.empty(2, 7, D, device="meta")}
