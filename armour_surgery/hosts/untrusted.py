"""What a folder's arguments must not say: where files lie, what to fetch, which code to run."""

from collections.abc import Iterator, Mapping
from typing import Any

from armour_surgery.errors import SchemaError

__all__ = ["entries", "refuse_reaching"]

# Keys that read files, fetch, or run foreign code wherever a library finds them.
REACHING = frozenset(
    [
        "auto_map",
        "cache_dir",
        "checkpoint_path",
        "custom_pipelines",
        "pretrained",
        "pretrained_cfg_overlay",
        "quantization_config",
        "trust_remote_code",
        "use_pretrained_backbone",
    ]
)
# What transformers hands on to timm's builders, and what those take although its name sounds like weights.
FOR_TIMM = ("model_args", "backbone_kwargs")
SIZES_FOR_TIMM = ("pretrained_window_sizes",)
# Keys whose value is the name of another model, which must be one of a registry.
NAMES = ("architecture", "backbone")


def refuse_reaching(architecture: str, arguments: Mapping[str, Any]) -> None:
    """Look through the arguments of a builder, or a config, at every depth.

    Raises:
        SchemaError: a key or a value would read a file, fetch something, or run code that is not the library's.
    """
    for key, value in entries(arguments):
        if not value:
            continue  # what is off, empty or absent reaches nothing
        forbidden = [key] if _reaches(key) else []
        if key in FOR_TIMM and isinstance(value, Mapping):
            forbidden += [name for name in value if value[name] and _reads_files(name)]
        if forbidden:
            raise SchemaError(f"arguments of {architecture} name {forbidden[0]!r}, which must not come from a folder")
        if key in NAMES and isinstance(value, str) and set(value) & set(":/\\"):
            raise SchemaError(
                f"arguments of {architecture} take the {key} {value!r} from elsewhere, which a folder must not; "
                "models of the library's own registry are built"
            )


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key at every depth with its value; what stands in a list comes with the key of the list."""
    # No recursion: how deep a folder's values go is up to whoever wrote it.
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, outer = waiting.pop()
        inner: list[tuple[str, Any]] = []
        if isinstance(outer, Mapping):
            inner = [(str(name), item) for name, item in outer.items()]
        elif isinstance(outer, list | tuple):
            inner = [(key, item) for item in outer]
        yield from inner
        waiting.extend(inner)


def _reaches(key: str) -> bool:
    return key in REACHING or key.endswith("name_or_path")


def _reads_files(key: str) -> bool:
    """Whether timm's builders may read a file under such a name: all that do say one of these words."""
    return key not in SIZES_FOR_TIMM and any(word in key for word in ("pretrained", "checkpoint", "cfg"))
