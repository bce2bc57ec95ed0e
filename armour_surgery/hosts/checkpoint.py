"""Reading a file of weights, safely and strictly: nothing in it may run, and every key has to fit."""

import argparse
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery.errors import CheckpointError
from armour_surgery.hosts.hub import quiet

__all__ = ["lies_inside", "load_strictly", "mismatch", "mismatch_message", "read_weights"]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# In this order: an averaged copy is what a recipe reports its accuracy for.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Data parallel and torch.compile put these before every key, in either order and sometimes both.
PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a weights file on the CPU, without wrapper (`model`, `state_dict`, EMA) or prefix.

    Raises:
        CheckpointError: the file is missing, truncated, of an unknown kind, or would run code on loading.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} is a folder; name the weights file in it, "
            f"or pass the folder as local-dir:{path} or hf:{path}"
        )
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist; check the path")
    if path.suffix == ".safetensors":
        content = _read_safetensors(path)
    elif path.suffix in PICKLED:
        content = _read_pickled(path)
    else:
        raise CheckpointError(
            f"checkpoint {path} has the ending {path.suffix!r}; known are .safetensors, {', '.join(PICKLED)}"
        )
    return _unwrap(content, path)


def load_strictly(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    *,
    path: str | Path,
    architecture: str,
    num_classes_given: bool,
) -> None:
    """Copy the weights into the model; every key and shape has to fit.

    Raises:
        CheckpointError: they do not; the message names up to three keys of each kind.
    """
    message = mismatch(
        model.state_dict(), weights, path=path, architecture=architecture, num_classes_given=num_classes_given
    )
    if message:
        raise CheckpointError(message)
    model.load_state_dict(weights)


def mismatch(
    expected: dict[str, Any],
    weights: dict[str, torch.Tensor],
    *,
    path: str | Path,
    architecture: str,
    num_classes_given: bool,
) -> str | None:
    """Why these weights do not fit, in a user's words, or None if they do. `expected` has tensors by key."""
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for key, value in expected.items():
        if key in weights and weights[key].shape != value.shape:
            wrong[key] = (tuple(weights[key].shape), tuple(value.shape))
    return mismatch_message(
        missing, unexpected, wrong, path=path, architecture=architecture, num_classes_given=num_classes_given
    )


def mismatch_message(
    missing: Collection[str],
    unexpected: Collection[str],
    wrong: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    path: str | Path,
    architecture: str,
    num_classes_given: bool,
) -> str | None:
    """The same from compared keys; `wrong` maps a key to the file's shape and the model's."""
    if not (missing or unexpected or wrong):
        return None
    parts = []
    if missing:
        parts.append(f"missing {_some(missing)}")
    if unexpected:
        parts.append(f"left over {_some(unexpected)}")
    if wrong:
        shapes = [f"{key} {in_file} instead of {wanted}" for key, (in_file, wanted) in wrong.items()]
        parts.append(f"wrong shape {_some(shapes)}")
    advice = "check that MODEL is the architecture that the file was saved from"
    # A head for other classes differs from the model's in the first dimension of its weight and of its bias, alike.
    classes = {in_file[0] if in_file and in_file[1:] == wanted[1:] else None for in_file, wanted in wrong.values()}
    if not missing and not unexpected and len(classes) == 1 and None not in classes:
        advice = f"the file has a head for {classes.pop()} classes: pass --num-classes with that number"
    elif num_classes_given and wrong:
        advice += " and that --num-classes is the file's own"
    return f"checkpoint {path} does not fit {architecture}: {'; '.join(parts)}; {advice}"


def lies_inside(model: nn.Module, key: str, body: str) -> bool:
    """Whether a left-over tensor is of a part that the model runs, so that the model would compute something else.

    Such are a bias that the config says there is none of, a layer too many, an adapter. A head of its own beside the
    `body` (the name of the model without heads) is not, and neither is what needs no weights or plays no part at
    inference.
    """
    owner, _, leaf = key.rpartition(".")
    while owner:
        for name in (owner, f"{body}.{owner}"):
            module = _module_at(model, name)
            if module is not None and name != body:
                # Tables that older versions stored, and the token of masked patches in pre-training.
                return leaf not in module._buffers and leaf != "mask_token"
        owner = owner.rpartition(".")[0]
    return False


def _module_at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _some(items: Collection[str]) -> str:
    shown = ", ".join(sorted(items)[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error


def _read_pickled(path: Path) -> Any:
    try:
        # Training checkpoints (DeiT's, timm's) keep their options in a Namespace, which is data and nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]), quiet():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is not plain weights: loading it could run code, or it is damaged, so it was not "
            "loaded. Convert it to .safetensors where you trust it, with safetensors.torch.save_file(state_dict, FILE)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        # torch's first sentence says what is wrong; the rest guesses why. A LookupError's text is a stray byte.
        said = str(error).split(". ")[0].splitlines()
        reason = said[0] if said and not isinstance(error, LookupError) else "not a torch file"
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged ({reason}); copy or download it again"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content:
        raise CheckpointError(
            f"checkpoint {path} holds {type(content).__name__} and not a dictionary of tensors; save model.state_dict()"
        )
    weights: dict[str, torch.Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"checkpoint {path} holds {type(value).__name__} under {key!r}, where a tensor is expected; "
                "save model.state_dict() alone, or under 'model' or 'state_dict'"
            )
        weights[key] = value
    for _ in PREFIXES:
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in weights):
                weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights
