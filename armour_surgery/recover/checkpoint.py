"""Checkpoints of a run: one safetensors file with model, average, optimizer and progress. Nothing in it can run.

A file appears whole or not at all: it is written aside, synced and renamed, so the last good one survives a full disk
and a kill. Learning rates, random numbers and the place in the data follow from the number of steps and are not stored.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from armour_surgery.errors import ResumeError, TrainingError
from armour_surgery.recover.distributed import full, like

__all__ = [
    "LAST",
    "Saved",
    "fill",
    "fill_optimizer",
    "optimizer_numbers",
    "optimizer_tensors",
    "read",
    "weights_of",
    "write",
]

LAST = "last.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: tensors by name, and progress as JSON values."""

    tensors: dict[str, Tensor]
    progress: dict[str, Any]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, without it."""
        start = f"{prefix}."
        return {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}


def weights_of(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Whole copies of a model's state on the CPU; all processes have to ask, and all get them."""
    return {f"{prefix}.{name}": full(value).cpu().clone() for name, value in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the place of the parameter and the name of the entry."""
    tensors = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            # Some optimizers count in plain numbers, which double precision tells from their tensors on the way back.
            tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            tensors[f"optimizer.{place}.{key}"] = full(tensor).cpu().clone()
    return tensors


def optimizer_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Numbers that an optimizer keeps for whole groups; some count steps there, in a tensor (a list of one here)."""

    groups = []
    for group in optimizer.param_groups:
        numbers: dict[str, Any] = {}
        for key, value in group.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                numbers[key] = [value.item()]
            # By type, since a switch (a bool is an int) follows from the recipe.
            elif type(value) in (int, float):
                numbers[key] = value
        groups.append(numbers)
    return groups


def fill(model: nn.Module, weights: Mapping[str, Tensor], where: Path) -> None:
    """Put weights into a model of the same structure, sharded or not.

    Raises:
        ResumeError: names or shapes differ.
    """
    state = model.state_dict()
    different = sorted(set(state) ^ set(weights))
    if not different:
        different = [name for name in state if state[name].shape != weights[name].shape]
    if different:
        raise ResumeError(
            f"{where} is of another model ({different[0]} differs); train into another --out, or leave --resume out"
        )
    with torch.no_grad():
        for name, value in state.items():
            value.copy_(like(weights[name], value))


def fill_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: list[dict[str, Any]]
) -> None:
    """Put `optimizer_tensors` and `optimizer_numbers` back."""
    for group, values in zip(optimizer.param_groups, numbers, strict=True):
        for key, value in values.items():
            group[key] = torch.tensor(value[0]) if isinstance(value, list) else value
    parameters = _parameters(optimizer)
    for key, tensor in tensors.items():
        place, _, name = key.partition(".")
        parameter = parameters[int(place)]
        # AdamW counts steps in a tensor on the CPU; moments lie where the parameter does.
        optimizer.state[parameter][name] = like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        if tensor.dtype == torch.float64 and tensor.ndim == 0:
            optimizer.state[parameter][name] = tensor.item()


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, in the order of their groups; a place in it says which one is meant, as no name does."""
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def write(path: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
    """Write a checkpoint; whenever this stops, the file is the old one or the new one.

    Raises:
        TrainingError: it could not be written; the one before is untouched.
    """
    aside = path.with_name(f"{path.name}.partial")
    metadata = {"format": str(FORMAT), "progress": json.dumps(dict(progress), allow_nan=False)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata=metadata)
        # Else a crash of the machine could leave the new name with content that was never written.
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise TrainingError(
            f"could not write the checkpoint {path}: {error}; the one before is whole, so make room and add --resume"
        ) from error


def read(path: Path) -> Saved:
    """Read a checkpoint.

    Raises:
        ResumeError: there is none, it is damaged, or of another format.
    """
    if not path.is_file():
        raise ResumeError(f"there is no checkpoint {path} to go on from; leave --resume out, or name another --out")
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in list(stream.keys())}
        if metadata.get("format") != str(FORMAT):
            raise ValueError(f"format {metadata.get('format')!r} is unknown")
        progress = json.loads(metadata["progress"])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ResumeError(f"the checkpoint {path} cannot be read ({error}); train anew without --resume") from error
    return Saved(tensors, progress)
