"""Folders as the libraries themselves write and read them."""

import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from armour_surgery.errors import ExportError
from armour_surgery.hosts.building import build
from armour_surgery.records import Source

__all__ = ["MODELING", "auto_class", "read_converted", "read_folder", "write_as_timm", "write_folder"]

# The module of a folder that has the code of its model.
MODELING = "modeling_armour"

_WEIGHTS = "model.safetensors"


def write_folder(model: nn.Module, source: Source, folder: Path) -> str:
    """Write an unconverted model the way its library does; returns the line of Python that loads it.

    timm and transformers write a config beside the weights, transformers what is done to images too. torchvision, and a
    user with a model of no library, load the weights alone.
    """
    library = source.library
    if library == "timm":
        write_as_timm(model, source.arguments, folder)
        return 'timm.create_model("local-dir:FOLDER", pretrained=True)'
    if library == "transformers":
        from armour_surgery.hosts.preprocessing import write_processor

        model.save_pretrained(folder)  # type: ignore[operator]
        write_processor(model, folder)
        return f'transformers.{type(model).__name__}.from_pretrained("FOLDER")'
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    fresh = f"{type(model).__name__}()"
    if library == "torchvision":
        fresh = f"torchvision.models.get_model({source.architecture!r}{_keywords(source.arguments)})"
    return f'model = {fresh}; model.load_state_dict(safetensors.torch.load_file("FOLDER/{_WEIGHTS}"))'


def write_as_timm(model: nn.Module, arguments: Mapping[str, Any], folder: Path) -> None:
    """Write an unconverted timm model the way timm does, so that `local-dir:FOLDER` loads it."""
    from timm.models import save_for_hf

    # timm writes the whole pretrained_cfg beside the arguments.
    kept = {name: value for name, value in arguments.items() if name != "pretrained_cfg_overlay"}
    save_for_hf(model, str(folder), model_args=kept or None, safe_serialization=True)


def read_folder(folder: Path, model: nn.Module, source: Source, fresh: nn.Module | None) -> nn.Module:
    """What the library makes of such a folder, in eval mode; `model` is of the class and type that comes out.

    `fresh` is a model of no library, of which a copy gets the weights.

    Raises:
        ExportError: the library does not take it; the message is the library's.
    """
    with _taken_by(source.library, model):
        if source.library == "timm":
            loaded = _from_timm(folder)
        elif source.library == "transformers":
            loaded = _from_transformers(folder, type(model))
        else:
            loaded = build(source) if fresh is None else copy.deepcopy(fresh)
            loaded.load_state_dict(load_file(folder / _WEIGHTS), strict=True, assign=True)
    return loaded.to(next(model.parameters()).dtype).eval()


def read_converted(folder: Path, model: nn.Module, source: Source, *, by_its_code: bool) -> nn.Module:
    """What the library makes of a folder that `save` wrote of this model of timm or transformers, in eval mode.

    Raises:
        ExportError: the library does not take it; the message is the library's.
    """
    with _taken_by(source.library, model):
        if source.library == "timm":
            return _from_timm(folder).eval()
        import transformers

        config: Any = model.config
        kind = _class_in(folder, type(model)) if by_its_code else getattr(transformers, auto_class(model))
        loaded: nn.Module = kind.from_pretrained(
            folder, local_files_only=True, attn_implementation=config._attn_implementation
        )
        return loaded.eval()


@contextmanager
def _taken_by(library: str, model: nn.Module) -> Iterator[None]:
    """What a library raises while this is open, it raises because it does not take what was written."""
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} of {library} does not load what was written: {type(error).__name__}: {error}; "
            "please report it"
        ) from error


def _from_timm(folder: Path) -> nn.Module:
    import timm

    loaded: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return loaded


def auto_class(model: nn.Module) -> str:
    """The auto class of transformers that finds the class of a converted model by its config."""
    from transformers.models.auto import modeling_auto

    from armour_surgery.hosts.transformers_marks import stock_config_class

    own: Any = model.config
    config = stock_config_class(type(own))
    for name, auto in vars(modeling_auto).items():
        table = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and table is not None and config in table:
            entry = table[config]
            if type(model) in (entry if isinstance(entry, tuple | list) else (entry,)):
                return str(name)
    return "AutoModel"


def _class_in(folder: Path, kind: type) -> Any:
    """The class in a folder's own code, imported as a module that nobody else finds."""
    spec = importlib.util.spec_from_file_location(f"{MODELING}_of_{kind.__name__}", folder / f"{MODELING}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"Armour{kind.__name__}")


def _from_transformers(folder: Path, kind: Any) -> nn.Module:
    loaded, told = kind.from_pretrained(folder, output_loading_info=True, dtype="auto", local_files_only=True)
    absent = sorted({*told["missing_keys"], *told["unexpected_keys"]})
    if absent:
        # transformers fills what is missing with random numbers, and says so in a log.
        raise ValueError(f"keys are missing or left over: {', '.join(absent[:3])}")
    model: nn.Module = loaded
    return model


def _keywords(arguments: dict[str, Any]) -> str:
    return "".join(f", {name}={json.dumps(value)}" for name, value in arguments.items())
