"""timm's models: loading, naming, rebuilding."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model, is_model_pretrained, split_model_name_tag
from torch import nn

from armour_surgery.errors import CheckpointError, ModelError, SchemaError, UnknownModelError, UsageError
from armour_surgery.hosts.arguments import refuse_forbidden, spelled
from armour_surgery.hosts.checkpoint import odd_kinds
from armour_surgery.hosts.hub import cached_folder, hub_or_cache, quiet, require_url, unreachable
from armour_surgery.hosts.timm_weights import load_weights
from armour_surgery.hosts.untrusted import refuse_reaching
from armour_surgery.hosts.weights_file import Kind, kinds_in_folder, read_weights
from armour_surgery.records import Source

__all__ = ["build", "example", "jsonable", "known_names", "load", "owns", "source_of"]

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "config.json")
# Builder arguments that fetch, read files, or place the model; a recipe for rebuilding has no business with them.
FORBIDDEN = frozenset(
    [
        "pretrained",
        "pretrained_cfg",
        "pretrained_model_args",
        "pretrained_strict",
        "pretrained_filter_fn",
        "checkpoint_path",
        "cache_dir",
        "device",
        "dtype",
    ]
)
# What a pretrained_cfg says about images and labels; its other keys say where weights come from.
DATA_CONFIG = (
    "crop_mode",
    "crop_pct",
    "fixed_input_size",
    "input_size",
    "interpolation",
    "label_descriptions",
    "label_names",
    "license",
    "mean",
    "num_classes",
    "std",
    "test_crop_pct",
    "test_input_size",
)


def owns(model: nn.Module) -> bool:
    """Whether the class of the model, or one it derives from, is timm's."""
    return any(cls.__module__.startswith("timm.") for cls in type(model).__mro__)


def known_names() -> list[str]:
    """Every architecture that this timm can build."""
    names: list[str] = timm.list_models()
    return names


def load(
    name: str, *, pretrained: bool, checkpoint: str | Path | None, sizes: Mapping[str, Any]
) -> tuple[nn.Module, Source]:
    """A model of timm's own grammar: NAME, NAME.TAG, hf-hub:ORG/NAME or local-dir:DIR.

    `sizes` holds what was asked for of img_size, num_classes, in_chans and other arguments of the builder.
    """
    refuse_forbidden(name, sizes, FORBIDDEN)
    weights = read_weights(checkpoint) if checkpoint is not None else None
    pretrained = pretrained and weights is None
    # Of a folder before timm reads it, which has no bounds; of the hub's files once they are here.
    kinds: dict[str, Kind] = {}
    if name.startswith("hf-hub:"):
        repo = name.removeprefix("hf-hub:")
        model = _create_from_hub(name, repo, pretrained, sizes)
    elif name.startswith("local-dir:"):
        repo = ""
        _require_folder(name.removeprefix("local-dir:"))
        if pretrained:
            kinds = kinds_in_folder(Path(name.removeprefix("local-dir:")))
        model = _create(name, pretrained, sizes)
    else:
        repo = _require_known(name, pretrained)
        model = _create_registered(name, repo, pretrained, sizes)
    if weights is not None:
        load_weights(model, weights, checkpoint or "", name, headless=sizes.get("num_classes") == 0)
    model.eval().float()
    source = source_of(model, sizes)
    revision = None
    if pretrained and repo:
        # A name without a revision means the branch main, which moves: the commit in the cache says what was loaded.
        repo_id, _, asked = repo.partition("@")
        if snapshot := cached_folder(repo_id, asked or None, WEIGHT_FILES):
            revision = snapshot.name
            kinds = kinds_in_folder(snapshot)
    if problem := odd_kinds(kinds, model.state_dict()):
        raise CheckpointError(f"the weights of {name}: the file {problem}")
    return model, Source(
        source.library,
        source.architecture,
        source.arguments,
        {},
        name,
        revision,
        source.license if pretrained else None,
    )


def source_of(model: nn.Module, arguments: Mapping[str, Any]) -> Source:
    """How timm's `create_model` makes such a model, read off the model; `arguments` win over that."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    architecture = cfg.get("architecture")
    if not isinstance(architecture, str) or not is_model(architecture):
        raise ModelError(
            f"{type(model).__qualname__} was not made by timm.create_model (its pretrained_cfg names the architecture "
            f"{architecture!r}), so it cannot be built again; create it with timm.create_model"
        )
    name = _with_tag(architecture, cfg.get("tag"))
    made_with = {key: value for key, value in _made_with(model).items() if key not in FORBIDDEN}
    merged = {**jsonable(made_with), **_read_off(model, cfg), **arguments}
    # The overlay is computed anew: the config may have changed since the model was made.
    merged.pop("pretrained_cfg_overlay", None)
    default = get_pretrained_cfg(name).to_dict()
    overlay = {key: cfg[key] for key in DATA_CONFIG if key in cfg and cfg[key] != default.get(key)}
    if jsonable(overlay):
        merged["pretrained_cfg_overlay"] = jsonable(overlay)
    hub_id, _, revision = str(cfg.get("hf_hub_id") or "").partition("@")
    typed = f"hf-hub:{hub_id}" if cfg.get("source") == "hf-hub" else name
    return Source("timm", name, merged, {}, typed, revision or None, cfg.get("license"))


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """`timm.create_model` without weights, for a name of the registry and arguments that fetch nothing.

    Raises:
        SchemaError: the name is not in the registry or an argument may not be given.
    """
    # A colon or a slash would make create_model take the name for a folder or for one of the hub's.
    if not is_model(split_model_name_tag(architecture)[0]) or set(architecture) & set(":/\\"):
        raise SchemaError(
            f"architecture {architecture!r} is not a timm {timm.__version__} model; is timm older than the folder?"
        )
    refused = sorted(FORBIDDEN & set(arguments))
    if refused:
        raise SchemaError(f"arguments of {architecture} name {refused[0]!r}, which must not come from a folder")
    arguments = dict(arguments)
    overlay = arguments.pop("pretrained_cfg_overlay", {})
    if not isinstance(overlay, dict) or not set(overlay) <= set(DATA_CONFIG):
        raise SchemaError(
            f"pretrained_cfg_overlay of {architecture} may name {', '.join(DATA_CONFIG)} alone, not {overlay!r}"
        )
    refuse_reaching(architecture, arguments)
    # timm compares sizes and means with tuples, and JSON has made lists of them.
    overlay = {key: tuple(value) if isinstance(value, list) else value for key, value in overlay.items()}
    model: nn.Module = timm.create_model(architecture, pretrained=False, pretrained_cfg_overlay=overlay, **arguments)
    return model


def example(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape without batch, and type of what `forward` takes."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    size = _img_size(model) or tuple(cfg.get("input_size", (3, 224, 224)))[1:]
    return {"x": ((_in_chans(model, cfg), *size), torch.float32)}


def _require_known(name: str, pretrained: bool) -> str:
    """The hub repository of a registered model's weights ("" where it has none, or none is wanted)."""
    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        raise UnknownModelError(f"timm {timm.__version__} has no model {name!r}")
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        others = f"known tags: {', '.join(tags)}" if tags else "it has no pretrained weights"
        raise UnknownModelError(f"timm's {architecture} has no weights tagged {tag!r}; {others}") from error
    if not pretrained:
        return ""
    if not is_model_pretrained(name):
        raise ModelError(
            f"timm has no pretrained weights for {name}; pass --no-pretrained for random weights or --checkpoint FILE"
        )
    if cfg.hf_hub_id:
        # timm/ stands for "timm/<the name itself>".
        return str(cfg.hf_hub_id) + (name if str(cfg.hf_hub_id).endswith("/") else "")
    if cfg.url:
        require_url(cfg.url, name)
    return ""


def _require_folder(folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        problem = "has no config.json" if Path(folder).is_dir() else "does not exist"
        raise UnknownModelError(
            f"local-dir:{folder}: the folder {problem}; name a folder that timm's save_pretrained wrote, or one of "
            "hf:DIR"
        )


def _create_from_hub(name: str, repo: str, pretrained: bool, sizes: Mapping[str, Any]) -> nn.Module:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    with hub_or_cache(repo.partition("@")[0]) as answers:
        try:
            return _create(name, pretrained, sizes)
        except ModelError as error:
            if isinstance(error.__cause__, (LocalEntryNotFoundError, ConnectionError)) or not answers:
                raise unreachable(name, "weights" if pretrained else "config") from error
            if isinstance(error.__cause__, (EntryNotFoundError, HfHubHTTPError)):
                raise UnknownModelError(
                    f"the hub has no timm model {repo!r} that you may read; check the name, or log in with "
                    "`hf auth login`"
                ) from error
            raise


def _create_registered(name: str, repo: str, pretrained: bool, sizes: Mapping[str, Any]) -> nn.Module:
    if not repo:
        return _create(name, pretrained, sizes)
    with hub_or_cache(repo.partition("@")[0]) as answers:
        try:
            return _create(name, pretrained, sizes)
        except UsageError:
            raise
        except ModelError as error:
            if not answers:
                raise unreachable(name, "weights") from error
            raise


def _create(name: str, pretrained: bool, sizes: Mapping[str, Any]) -> nn.Module:
    try:
        with quiet():
            model: nn.Module = timm.create_model(name, pretrained=pretrained, **sizes)
    except Exception as error:
        text = str(error)
        # timm's builders pass on what they are given, so the error comes from the constructor and names its argument.
        for option in sizes:
            if isinstance(error, TypeError) and f"'{option}'" in text:
                raise UsageError(f"{name} takes no {option}; leave {spelled(option)} out") from error
        if "size mismatch" in text and "img_size" in sizes:
            raise UsageError(
                f"the pretrained weights of {name} do not fit img_size={sizes['img_size']}; leave --img-size out, or "
                "pass --no-pretrained"
            ) from error
        reason = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        raise ModelError(f"timm could not make {name} with {dict(sizes)}: {reason}") from error
    return model


def _with_tag(architecture: str, tag: Any) -> str:
    if not tag:
        return architecture
    try:
        get_pretrained_cfg(f"{architecture}.{tag}")
    except RuntimeError:
        return architecture
    return f"{architecture}.{tag}"


def _read_off(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Builder arguments which the model shows, where they differ from the builder's default."""
    arguments: dict[str, Any] = {}
    channels, *size = cfg.get("input_size", (3, 224, 224))
    classes = _num_classes(model, cfg)
    if classes is not None and classes != cfg.get("num_classes"):
        arguments["num_classes"] = classes
    if _in_chans(model, cfg) != channels:
        arguments["in_chans"] = _in_chans(model, cfg)
    img_size = _img_size(model)
    if img_size and list(img_size) != size:
        arguments["img_size"] = list(img_size)
    # Rates rise from block to block up to the one that was asked for.
    rates = [vars(layer).get("drop_prob", 0.0) for layer in model.modules() if type(layer).__name__ == "DropPath"]
    if rates and "drop_path_rate" not in _made_with(model):
        arguments["drop_path_rate"] = max(rates)
    return arguments


def _made_with(model: nn.Module) -> dict[str, Any]:
    """The arguments of create_model, which timm keeps; before 1.0.31 plugins/timm_arguments.py does."""
    arguments: dict[str, Any] = getattr(model, "_model_args", {})
    return arguments


def _num_classes(model: nn.Module, cfg: Mapping[str, Any]) -> int | None:
    """Outputs of the classifier that is there now: users replace `model.head` and forget `num_classes`."""
    head = _submodule(model, cfg.get("classifier"))
    if isinstance(head, nn.Identity):
        return 0
    classes = getattr(head, "out_features", getattr(model, "num_classes", None))
    return classes if isinstance(classes, int) else None


def _in_chans(model: nn.Module, cfg: Mapping[str, Any]) -> int:
    declared = getattr(model, "in_chans", None)
    if isinstance(declared, int):
        return declared
    channels = getattr(_submodule(model, cfg.get("first_conv")), "in_channels", None)
    return channels if isinstance(channels, int) else int(cfg.get("input_size", (3, 224, 224))[0])


def _img_size(model: nn.Module) -> tuple[int, ...] | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    # What a model without patches was built for: newer versions of timm write it there.
    size = size or getattr(model, "_traits", {}).get("img_size") or _made_with(model).get("img_size")
    return (size, size) if isinstance(size, int) else tuple(size) if size else None


def _submodule(model: nn.Module, fqn: Any) -> nn.Module | None:
    # Distilled models name two classifiers, of which the first is the main one.
    if isinstance(fqn, (tuple, list)):
        fqn = fqn[0] if fqn else None
    try:
        return model.get_submodule(fqn) if fqn else None
    except AttributeError:
        return None


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that JSON can hold, as JSON holds them."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        try:
            kept[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return kept
