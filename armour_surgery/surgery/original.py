"""Which weights a model had before its surgery: a record of them, and telling them from others.

The tensors count, and not the file that they were read from: a file may hold several models, one model lies in many
files, and a model that was made in Python lies in none.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from armour_surgery.copies import has_weights

__all__ = ["differing_tensors", "tensor_digests", "weights_digest"]

# Hexadecimal digits. Weights are told apart here, nothing is defended, and a plan has hundreds of these.
_DIGITS = 16


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """A digest of every tensor of a model by its name; empty for a model without weights.

    Floats count as float32: a model that was cast up from half precision is the same, one that was cast down is not.
    """
    if not has_weights(model):
        return {}
    digests: dict[str, str] = {}
    for name, value in model.state_dict().items():
        # A module may keep extra state that is no tensor, and what a quantizer keeps is none of numbers.
        if type(value) in (torch.Tensor, nn.Parameter) and not value.is_meta:
            digests[name] = _digest(value)
    return digests


def _digest(value: torch.Tensor) -> str:
    value = value.detach()
    plain = (value.float() if value.is_floating_point() else value).cpu().contiguous()
    found = hashlib.sha256(str(tuple(plain.shape)).encode())
    found.update(plain.numpy().data)
    return found.hexdigest()[:_DIGITS]


def weights_digest(digests: Mapping[str, str]) -> str:
    """One digest of all of them."""
    found = hashlib.sha256()
    for name in sorted(digests):
        found.update(f"{name}={digests[name]};".encode())
    return found.hexdigest()[:_DIGITS]


def differing_tensors(recorded: Mapping[str, str], digests: Mapping[str, str]) -> list[str]:
    """The names of tensors that are not the same in both."""
    changed = [name for name, digest in recorded.items() if digests.get(name) != digest]
    return changed + [name for name in digests if name not in recorded]
