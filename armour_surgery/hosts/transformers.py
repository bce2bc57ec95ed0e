"""transformers' models: loading, naming, rebuilding."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from armour_surgery.errors import (
    CheckpointError,
    ModelError,
    SchemaError,
    UnknownModelError,
    UsageError,
)
from armour_surgery.hosts.arguments import OPTIONS, spelled
from armour_surgery.hosts.checkpoint import Selection, announce
from armour_surgery.hosts.hub import hub_or_cache, offline, quiet, unreachable
from armour_surgery.hosts.transformers_inputs import example
from armour_surgery.hosts.transformers_marks import PLAN, PREFIX
from armour_surgery.hosts.transformers_weights import WEIGHT_FILES, load_checkpoint, load_published
from armour_surgery.hosts.untrusted import entries, refuse_reaching
from armour_surgery.hosts.weights_file import read_weights
from armour_surgery.notes import ArmourWarning
from armour_surgery.records import Source

__all__ = ["build", "example", "known_names", "load", "owns", "source_of"]

# What timm and this tool call an entry of a config.
ENTRIES = {"img_size": "image_size", "in_chans": "num_channels"}
# Keys of a config that say where this copy came from.
VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", PLAN)
# Other names can mean kernels that are downloaded.
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
# How transformers writes a number that JSON has not, as an entry of its own.
_NOT_FINITE = "__float__"


def owns(model: nn.Module) -> bool:
    """Whether the model is a PreTrainedModel."""
    return isinstance(model, PreTrainedModel)


def known_names() -> list[str]:
    """The model types that this transformers can build from their default config."""
    return sorted(CONFIG_MAPPING.keys())


def load(
    name: str, *, pretrained: bool, checkpoint: str | Path | None, sizes: Mapping[str, Any]
) -> tuple[nn.Module, Source]:
    """A hub id, a folder, or (without weights) a model type.

    `sizes` holds what was asked for of img_size, num_classes, in_chans and entries of the config.
    """
    tables = read_weights(checkpoint) if checkpoint is not None else None
    pretrained = pretrained and tables is None
    typed = f"hf:{name}"
    if Path(name).is_dir():
        _require_files(name, pretrained)
    elif name in CONFIG_MAPPING:
        if pretrained:
            raise ModelError(
                f"{typed} is a transformers model type and has no weights; pass --no-pretrained for its default config "
                "with random weights, or name a model: hf:ORG/NAME"
            )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownModelError(f"{typed}: the folder does not exist; check the path")
    local = Path(name).is_dir() or name in CONFIG_MAPPING
    fitting: list[Selection] = []
    done = ""
    cls: type[PreTrainedModel] | None = None
    with _silent(bars=not local), _reach(name, local=local) as answers:
        try:
            config, cls = _described(name, sizes)
            own = config
            if "img_size" in sizes:
                own, _ = _described(name, {option: sizes[option] for option in sizes if option != "img_size"})
            if tables is not None:
                headless = sizes.get("num_classes") == 0
                model, fitting, done = load_checkpoint(cls, config, own, tables, str(checkpoint), headless=headless)
            elif pretrained:
                model, done = load_published(cls, config, own, name, sizes)
            else:
                model = cls(config)
            if any(isinstance(module, nn.Linear) and not module.out_features for module in model.modules()):
                raise _needs_head(typed, cls)
        except (ModelError, UsageError):
            raise
        except AttributeError as error:
            if sizes.get("num_classes") == 0 and cls is not None:
                # Some ask their head for its weights, and there is none.
                raise _needs_head(typed, cls) from error
            raise _failed(name, pretrained, answers, error) from error
        except Exception as error:
            raise _failed(name, pretrained, answers, error) from error
    if fitting:
        announce(fitting, fitting, checkpoint)
    if done:
        weights = f"checkpoint {checkpoint} is" if tables is not None else f"the weights of {typed} are"
        warnings.warn(f"{weights} {done}", ArmourWarning, stacklevel=2)
    source = source_of(model, {})
    return model.eval().float(), Source(
        "transformers",
        source.architecture,
        source.arguments,
        {},
        typed,
        source.revision if pretrained else None,
    )


def source_of(model: nn.Module, arguments: Mapping[str, Any]) -> Source:
    """The class and config of the model; `arguments` are config entries that win."""
    cls = type(model)
    config: Any = model.config
    if getattr(transformers, cls.__name__, None) is not cls:
        raise ModelError(
            f"{cls.__module__}.{cls.__qualname__} is not a model class that transformers exports, so it cannot be "
            "built again"
        )
    entries = _entries(config)
    if "num_labels" in arguments:
        # The label names carry the number of labels, and would win over it.
        entries.pop("id2label", None)
        entries.pop("label2id", None)
    merged = {**entries, **arguments}
    # No entry of the config's JSON, and "sdpa" is what a build takes by itself.
    attention = _attention_of(config)
    if attention not in (None, "sdpa"):
        merged["_attn_implementation"] = attention
    origin = getattr(config, "_name_or_path", "") or config.model_type
    return Source("transformers", cls.__name__, merged, {}, f"hf:{origin}", getattr(config, "_commit_hash", None))


def _attention_of(config: Any) -> str | dict[str, Any] | None:
    """The attention that a config asks for; where its parts differ, that of each by name, and its own under ""."""
    own = getattr(config, "_attn_implementation", None)
    told: dict[str, Any] = {"": own} if own in ATTENTION else {}
    for key in getattr(config, "sub_configs", None) or {}:
        attention = _attention_of(getattr(config, key, None))
        if attention is not None:
            told[key] = attention
    # A plain name goes to all parts.
    if told and all(attention == own for attention in told.values()):
        return str(own)
    return told or None


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A model class of transformers with a config made from `arguments`.

    Raises:
        SchemaError: the name is not a model class that transformers exports, or the config would fetch something.
    """
    cls: Any = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    config_class = getattr(cls, "config_class", None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)) or config_class is None:
        raise SchemaError(
            f"architecture {architecture!r} is not a model class of transformers {transformers.__version__}; "
            "is it older than the folder?"
        )
    refuse_reaching(architecture, arguments)
    for key, value in entries(arguments):
        # Configs inside of the config have attentions of their own.
        if key in ATTENTION_KEYS:
            _refuse_unknown_attention(architecture, value)
    values: dict[str, Any] = _with_infinities(arguments)
    attention = values.pop("attn_implementation", None) or values.pop("_attn_implementation", None)
    config = config_class.from_dict(values)
    if attention is not None:
        config._attn_implementation = attention
    model: nn.Module = cls(config)
    return model


def _refuse_unknown_attention(architecture: str, asked: Any) -> None:
    for _, value in entries({"": asked}):  # of all parts
        if value is not None and not isinstance(value, Mapping) and value not in ATTENTION:
            raise SchemaError(
                f"the config of {architecture} asks for the attention {value!r}; known: {', '.join(ATTENTION)}"
            )


@contextmanager
def _silent(*, bars: bool) -> Iterator[None]:
    # transformers' switch covers download bars too, so it is used only where nothing can be downloaded.
    hide = not bars and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()


@contextmanager
def _reach(name: str, *, local: bool) -> Iterator[bool]:
    with offline() if local else hub_or_cache(name) as answers:
        yield answers is not False


def _require_files(folder: str, pretrained: bool) -> None:
    if not (Path(folder) / "config.json").is_file():
        raise UnknownModelError(f"hf:{folder}: the folder has no config.json")
    if pretrained and not any((Path(folder) / name).is_file() for name in WEIGHT_FILES):
        raise UnknownModelError(
            f"hf:{folder}: the folder has no model.safetensors (or pytorch_model.bin); pass --no-pretrained for random "
            "weights, or --checkpoint FILE"
        )


def _described(name: str, sizes: Mapping[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """The config of a folder, a hub id or a model type, with the sizes that were asked for, and the class for it."""
    if not Path(name).is_dir() and name in CONFIG_MAPPING:
        config: PreTrainedConfig = CONFIG_MAPPING[name]()
    else:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    cls = _class_for(config, name, bool(sizes.get("num_classes")))
    return _applied(config, name, sizes), cls


def _class_for(config: PreTrainedConfig, name: str, classify: bool) -> type[PreTrainedModel]:
    """The class that the config was saved from; else the classifier of its type; else its backbone."""
    declared: list[Any] = []
    for architecture in getattr(config, "architectures", None) or ():
        # A config may name a class that only its own repository has.
        if hasattr(transformers, architecture):
            declared.append(getattr(transformers, architecture))
    classifier = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    backbone = MODEL_MAPPING.get(type(config), None)
    if classify:
        declared = [cls for cls in declared if "ForImageClassification" in cls.__name__]
        if not declared and classifier is None:
            raise UsageError(f"hf:{name} has no image classifier in transformers; leave --num-classes out")
    for cls in (*declared, classifier, backbone):
        # Some types map to several classes; the first is the plain one.
        plain: type[PreTrainedModel] | None = cls[0] if isinstance(cls, (tuple, list)) else cls
        if plain is not None:
            return plain
    raise ModelError(f"hf:{name} has the type {config.model_type!r}, for which transformers has no model class")


def _applied(config: PreTrainedConfig, name: str, sizes: Mapping[str, Any]) -> PreTrainedConfig:
    """The config with what was asked for, as `load` has it."""
    others = {key: value for key, value in sizes.items() if key not in OPTIONS and key in config.to_dict()}
    # Made anew, for a config computes some of its entries from others.
    if others and not Path(name).is_dir() and name in CONFIG_MAPPING:
        config = type(config)(**others)
    elif others:
        made: PreTrainedConfig = type(config).from_dict({**_entries(config), **others})
        for origin in ("_name_or_path", "_commit_hash"):
            if hasattr(config, origin):
                setattr(made, origin, getattr(config, origin))
        config = made
    vision: Any = getattr(config, "vision_config", None) or config
    for option in sizes:
        key = ENTRIES.get(option, option)
        if option in others:
            continue
        if option == "num_classes":
            if config.num_labels != sizes[option]:
                config.num_labels = sizes[option]
        elif key in vision.to_dict():
            setattr(vision, key, sizes[option])
        else:
            advice = "use --num-classes" if key == "num_labels" else f"leave {spelled(option)} out"
            raise UsageError(f"hf:{name} takes no {option}: the config of its type has no {key}; {advice}")
    return config


def _needs_head(typed: str, cls: type[PreTrainedModel]) -> UsageError:
    return UsageError(f"{cls.__name__} of {typed} has no form without a head; leave --num-classes 0 out")


def _failed(name: str, pretrained: bool, answers: bool, error: Exception) -> ModelError:
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    typed = f"hf:{name}"
    if isinstance(error, OSError) and not Path(name).is_dir():
        if not answers:
            return unreachable(typed, "config or weights" if pretrained else "config")
        return UnknownModelError(f"the hub has no transformers model {name!r} that you may read: {reason}")
    if isinstance(error, SafetensorError):
        return CheckpointError(
            f"the weights of {typed} are truncated or damaged ({reason}); copy or download them again"
        )
    return ModelError(f"transformers could not make {typed}: {reason}")


def _entries(config: PreTrainedConfig) -> dict[str, Any]:
    """The config as JSON that makes an equal config again: what differs from defaults, if that will do."""
    wanted = _comparable(config.to_dict())
    # The diff is short and readable, but not every config class makes the same values of it again.
    for candidate in (config.to_diff_dict(), config.to_dict()):
        try:
            entries: dict[str, Any] = _comparable(candidate)
            again = type(config).from_dict(_with_infinities(json.loads(json.dumps(entries))))
            if _comparable(again.to_dict()) == wanted:
                return entries
        except (TypeError, ValueError):
            continue
    raise ModelError(f"the {type(config).__name__} of this model cannot be written as JSON and read back equal")


def _comparable(entries: Any) -> Any:
    if isinstance(entries, Mapping):
        comparable = {str(key): _comparable(value) for key, value in entries.items() if key not in VOLATILE}
        if isinstance(kind := comparable.get("model_type"), str):
            # A part that was converted by itself is marked (`transformers_marks`), and is to be built as what it was.
            comparable["model_type"] = kind.removeprefix(PREFIX)
        return comparable
    if isinstance(entries, (list, tuple)):
        return [_comparable(value) for value in entries]
    if isinstance(entries, float) and not math.isfinite(entries):
        return {_NOT_FINITE: str(entries)}
    return json.loads(json.dumps(entries))


def _with_infinities(entries: Any) -> Any:
    """Entries as a config takes them: JSON has no infinity, and they are written as text."""
    if isinstance(entries, Mapping):
        if set(entries) == {_NOT_FINITE}:
            return float(entries[_NOT_FINITE])
        return {key: _with_infinities(value) for key, value in entries.items()}
    return [_with_infinities(value) for value in entries] if isinstance(entries, list) else entries
