"""torchvision's models: loading, naming, rebuilding."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models

from armour_surgery.errors import ModelError, SchemaError, UnknownModelError, UsageError
from armour_surgery.hosts.arguments import refuse_forbidden, spelled
from armour_surgery.hosts.checkpoint import Builder, load_checkpoint
from armour_surgery.hosts.hub import offline, quiet, require_url, unreachable
from armour_surgery.hosts.skeleton import first_difference, meta_parameters
from armour_surgery.hosts.untrusted import refuse_reaching
from armour_surgery.hosts.weights_file import read_weights
from armour_surgery.records import Source

__all__ = ["build", "cheap_arguments", "example", "known_names", "load", "owns", "source_of"]

# Where torchvision's builders call a size by another name than timm's and this tool.
ARGUMENT_NAMES = {"img_size": "image_size"}
# Builder arguments that fetch weights, or say how the fetching is shown.
FORBIDDEN = frozenset(("weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"))

# Frames of the clips that all its video models can take, and some take no others.
_FRAMES = 16


def owns(model: nn.Module) -> bool:
    """Whether the class of the model, or one it derives from, is torchvision's."""
    return any(cls.__module__.startswith("torchvision.models.") for cls in type(model).__mro__)


def known_names() -> list[str]:
    """Every model that this torchvision can build."""
    names: list[str] = list_models()
    return names


def load(
    name: str, *, pretrained: bool, checkpoint: str | Path | None, sizes: Mapping[str, Any]
) -> tuple[nn.Module, Source]:
    """A registered model. `sizes` holds what was asked for of img_size, num_classes and other builder's arguments."""
    typed = f"torchvision:{name}"
    if name not in list_models():
        raise UnknownModelError(f"torchvision {torchvision.__version__} has no model {name!r}")
    if "in_chans" in sizes:
        raise UsageError(f"torchvision's {name} takes no in_chans; leave --in-chans out, or use a timm model")
    if sizes.get("num_classes") == 0:
        raise UsageError(f"torchvision's {name} has no form without a head; leave --num-classes 0 out, or use timm")
    refuse_forbidden(typed, sizes, FORBIDDEN)
    file_weights = read_weights(checkpoint) if checkpoint is not None else None
    arguments = {ARGUMENT_NAMES.get(option, option): value for option, value in sizes.items()}
    try:
        with quiet():
            model = _make(name, arguments)
    except Exception as error:
        # The builders pass on what they are given, so the error comes from the constructor and names its argument.
        for option in sizes:
            if isinstance(error, TypeError) and f"'{ARGUMENT_NAMES.get(option, option)}'" in str(error):
                raise UsageError(f"torchvision's {name} takes no {option}; leave {spelled(option)} out") from error
        raise ModelError(f"torchvision could not make {name} with {arguments}: {error}") from error
    if file_weights is not None:
        load_checkpoint(model, file_weights, path=checkpoint or "", builder=Builder(typed, ("num_classes",)))
    elif pretrained:
        _load_published(model, name, sizes)
    return model.eval().float(), Source("torchvision", name, arguments, {}, typed)


def source_of(model: nn.Module, arguments: Mapping[str, Any]) -> Source:
    """The registered builder that makes such a model, found by trying those of its module."""
    module = type(model).__module__
    candidates = [name for name in list_models() if get_model_builder(name).__module__ == module]
    merged = {**_read_off(model), **arguments}
    for name in candidates:
        try:
            with meta_parameters(), offline(), quiet():
                built = build(name, merged)
        except Exception:
            # A builder that cannot take these arguments (each fails in its own way) is not the one.
            continue
        if first_difference(built, model) is None:
            return Source("torchvision", name, merged, {}, f"torchvision:{name}")
    tried = ", ".join(candidates) or "none is registered for its module"
    raise ModelError(
        f"no torchvision builder makes this {type(model).__qualname__} with the arguments {merged} (tried: {tried})"
    )


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The registered builder without weights.

    Raises:
        SchemaError: the name is not registered or an argument may not be given.
    """
    if architecture not in list_models():
        raise SchemaError(
            f"architecture {architecture!r} is not a torchvision {torchvision.__version__} model; is it "
            "older than the folder?"
        )
    refused = sorted(FORBIDDEN & set(arguments))
    if refused:
        raise SchemaError(f"arguments of {architecture} name {refused[0]!r}, which must not come from a folder")
    refuse_reaching(architecture, arguments)
    return _make(architecture, arguments)


def cheap_arguments(name: str) -> dict[str, Any]:
    """Arguments with which an architecture has the same modules and costs less to run: detectors enlarge images."""
    # SSD has a size of its own.
    if ".models.detection." not in get_model_builder(name).__module__ or name.startswith("ssd"):
        return {}
    proposals = {"rpn_post_nms_top_n_test": 50} if "rcnn" in name else {}
    return {"min_size": 224, **proposals}


def example(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape without batch, and type of what `forward` takes."""
    size = getattr(model, "image_size", 224)
    shape: tuple[int, ...] = (3, size, size)
    if ".models.video." in type(model).__module__:
        shape = (3, _FRAMES, size, size)
    parameters = inspect.signature(model.forward).parameters
    # All that it cannot do without: RAFT takes two images.
    needed = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    return dict.fromkeys(needed, (shape, torch.float32))


def _make(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    # Detection and segmentation builders fetch backbone weights unless they are told not to.
    accepted = inspect.signature(get_model_builder(name)).parameters
    backbone = {"weights_backbone": None} if "weights_backbone" in accepted else {}
    model: nn.Module = get_model(name, weights=None, **backbone, **arguments)
    return model


def _read_off(model: nn.Module) -> dict[str, Any]:
    """Builder arguments which the model shows, where they differ from the builder's default."""
    arguments: dict[str, Any] = {}
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if linears and linears[-1].out_features != 1000:
        arguments["num_classes"] = linears[-1].out_features
    size = getattr(model, "image_size", 224)
    if size != 224:
        arguments["image_size"] = size
    return arguments


def _load_published(model: nn.Module, name: str, sizes: Mapping[str, Any]) -> None:
    typed = f"torchvision:{name}"
    published = get_model_weights(name)
    if not list(published):
        raise ModelError(f"torchvision has no weights for {name}; pass --no-pretrained or --checkpoint FILE")
    weights = published.DEFAULT
    require_url(weights.url, typed)
    try:
        state = weights.get_state_dict(progress=True, check_hash=True)
    except OSError as error:
        raise unreachable(typed, "weights") from error
    expected = model.state_dict()
    if "num_classes" in sizes:
        # A head for other classes starts fresh, as it does in timm and transformers.
        head = _head_name(model)
        for key, value in expected.items():
            if key in state and key.rpartition(".")[0] == head:
                state[key] = value
    try:
        load_checkpoint(model, {"": state}, path=weights.url, builder=Builder(typed))
    except ModelError as error:
        if "img_size" in sizes:
            raise UsageError(
                f"the pretrained weights of {typed} do not fit img_size={sizes['img_size']}; leave --img-size out, or "
                "pass --no-pretrained"
            ) from error
        raise


def _head_name(model: nn.Module) -> str | None:
    """The last linear layer, which is taken for the classifier."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return names[-1] if names else None
