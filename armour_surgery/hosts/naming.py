"""MODEL, as users write it, and the model that it names."""

import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from armour_surgery.errors import FolderError, ModelError, UnknownModelError, UsageError
from armour_surgery.hosts.arguments import check_arguments, spelled
from armour_surgery.hosts.building import compared
from armour_surgery.hosts.checkpoint import Builder, load_checkpoint
from armour_surgery.hosts.examples import Written, keep_example
from armour_surgery.hosts.libraries import Library, adapter, is_users_class
from armour_surgery.hosts.own import is_own, load_own
from armour_surgery.hosts.weights_file import digest_of, read_weights
from armour_surgery.records import Source, WeightsFile

__all__ = ["load_model", "suggest"]

# hf-hub and local-dir are of timm's own grammar, and are handed on with the name.
PREFIXES: dict[str, Library] = {
    "timm": "timm",
    "hf-hub": "timm",
    "local-dir": "timm",
    "hf": "transformers",
    "torchvision": "torchvision",
}
GRAMMAR = "NAME or timm:NAME, hf-hub:ORG/NAME, local-dir:DIR, hf:ID_OR_DIR, torchvision:NAME, FILE.py:CALLABLE"


def load_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    img_size: int | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    example: Sequence[Written] = (),
) -> tuple[nn.Module, Source]:
    """The model that MODEL names, in float32 and eval mode, and how to build it again.

    `checkpoint` is a file of weights which replaces the pretrained ones; every key in it has to fit. Weights come from
    there, from the library's cache, from the hub, or (`pretrained=False`) are random. A user's own model stays in the
    type and has the weights that its callable gives it. `num_classes=0` is a model without a head. `arguments` are more
    of the builder's (for transformers: of the config), and `example` is what the model is to be fed where nobody knows
    that. The source that is returned says all of this again, so that the same can be loaded once more.

    Raises:
        UsageError: a size is below 1 (below 0: num_classes), the architecture does not take it or one of the arguments,
            or FILE.py:CALLABLE names what there is not.
        UnknownModelError: no library knows the name; the message suggests up to three.
        HubUnreachableError: config or weights are not on this machine and the hub does not answer.
        CheckpointError: the file is unreadable, could run code, or belongs to another architecture.
        ModelError: the name is ambiguous, has no weights, or the library refused it.
    """
    given = {"img_size": img_size, "num_classes": num_classes, "in_chans": in_chans}
    sizes = {option: value for option, value in given.items() if value is not None}
    for option, value in sizes.items():
        least = "0 (no head)" if option == "num_classes" else "1"
        if value < int(least[0]):
            raise UsageError(f"{option} must be {least} or more, not {value}; see --{option.replace('_', '-')}")
    for option, value in (arguments or {}).items():
        if option in sizes:
            raise UsageError(f"--model-kwargs {option}={value!r} and --{option.replace('_', '-')} say it twice")
        sizes[option] = value
    check_arguments(name, sizes)
    if is_own(name) and name.partition(":")[0] not in PREFIXES:
        model, source = _own(name, checkpoint, sizes)
        keep_example(model, example)
        return model, replace(source, checkpoint=_file(checkpoint))
    library, rest = _parse(name)
    try:
        model, source = adapter(library).load(rest, pretrained=pretrained, checkpoint=checkpoint, sizes=sizes)
    except UnknownModelError as error:
        close = suggest(name)
        if not close:
            raise
        raise UnknownModelError(f"{error}; did you mean {' or '.join(close)}?") from error
    keep_example(model, example)
    return model, replace(source, options=sizes, checkpoint=_file(checkpoint))


def _file(checkpoint: str | Path | None) -> WeightsFile | None:
    return None if checkpoint is None else WeightsFile(str(checkpoint), digest_of(Path(checkpoint)))


def _own(name: str, checkpoint: str | Path | None, arguments: Mapping[str, Any]) -> tuple[nn.Module, Source]:
    if arguments:
        option = spelled(next(iter(arguments)))
        raise UsageError(
            f"MODEL {name!r} is called with no arguments, so there is nothing that {option} could go to; write a "
            "function without arguments in the file that passes them"
        )
    model, source = load_own(name)
    if checkpoint is not None:
        load_checkpoint(model, read_weights(checkpoint), path=checkpoint, builder=Builder(name))
    if not is_users_class(model):
        # A function that fills a library's model: what comes of it is loaded without the user's file.
        with suppress(FolderError):
            described, difference = compared(model)
            return model, source if difference else described
    return model, source


def suggest(name: str) -> list[str]:
    """Up to three MODEL strings that look like `name`, the closest first. Empty for paths and hub ids."""
    prefix, _, rest = name.rpartition(":")
    if "/" in rest or prefix not in ("", "timm", "torchvision"):
        return []
    known: dict[str, str] = {}
    if prefix != "timm":
        for bare in adapter("torchvision").known_names():
            known[bare] = f"torchvision:{bare}"
    if prefix != "torchvision":
        # After torchvision's, since a name without a prefix is timm's.
        for bare in adapter("timm").known_names():
            known[bare] = bare
    wanted = rest.partition(".")[0]
    if wanted in known:
        return [known[wanted]] if known[wanted] != name else []
    return [known[close] for close in difflib.get_close_matches(wanted, known, n=3) if known[close] != name]


def _parse(name: str) -> tuple[Library, str]:
    """The library and what its adapter calls the model."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in PREFIXES:
        if not rest:
            raise UsageError(f"MODEL {name!r} ends at its prefix; write {GRAMMAR}")
        library = PREFIXES[prefix]
        return library, name if prefix in ("hf-hub", "local-dir") else rest
    if not name.strip():
        raise UsageError(f"MODEL is empty; write {GRAMMAR}")
    path = Path(name).expanduser()
    if path.is_file():
        raise UnknownModelError(
            f"{name} is a file; name its architecture as MODEL and pass the file with --checkpoint {name}"
        )
    if path.is_dir():
        return _parse_folder(name, path)
    if colon:
        raise UnknownModelError(f"MODEL {name!r} has the unknown prefix {prefix!r}; write {GRAMMAR}")
    if "/" not in name:
        return "timm", name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UnknownModelError(f"{name}: there is no such folder; check the path, or write {GRAMMAR}")
    if name.startswith("timm/"):
        return "timm", f"hf-hub:{name}"
    raise ModelError(
        f"{name} is not a folder here, and on the hub it could be of two libraries; write hf:{name} for transformers "
        f"or hf-hub:{name} for timm"
    )


def _parse_folder(name: str, path: Path) -> tuple[Library, str]:
    """A folder of transformers or timm, told apart by its config.json."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        config = {}
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path / 'config.json'} cannot be read as JSON ({error}); copy or download it again"
        ) from error
    keys = config if isinstance(config, dict) else {}
    for key, prefix in (("model_type", "hf"), ("architecture", "local-dir")):
        if key not in keys:
            continue
        if "/" not in name and name in adapter("timm").known_names():
            raise ModelError(f"{name} is a folder here and a timm model; write {prefix}:./{name} or timm:{name}")
        return PREFIXES[prefix], str(path) if prefix == "hf" else f"local-dir:{path}"
    if "/" not in name and name in adapter("timm").known_names():
        return "timm", name
    raise UnknownModelError(
        f"{name} is a folder without surgery.json and without a config.json of transformers or timm; name a folder "
        f"that save, save_pretrained or this tool wrote, or write {GRAMMAR}"
    )
