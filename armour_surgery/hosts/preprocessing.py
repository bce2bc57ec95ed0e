"""What a model wants done to an image before it sees it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from armour_surgery.errors import CalibrationError
from armour_surgery.hosts.libraries import library_of
from armour_surgery.hosts.running import example_input

__all__ = ["Preprocessing", "preprocessing", "write_processor"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# PIL's numbers, which the image processors of transformers store.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
CROP_PCT = 0.875
# transformers' LevitImageProcessor resizes to this times what its size says.
LEVIT_RESIZE = 256 / 224

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize, crop the center, scale to [0, 1], normalize each channel.

    `size` is (channels, height, width) in pixels; `mean` and `std` are per channel, of values in [0, 1]. The image is
    resized to `1 / crop_pct` of the size: so that the shorter side fits ("center"), both sides do ("squash"), or the
    longer one does and the rest is padded ("border").
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = CROP_PCT
    crop_mode: str = "center"

    def tensor(self, image: Image.Image) -> torch.Tensor:
        """The picture as the model wants it: float32 `[C, H, W]`, normalized.

        Raises:
            CalibrationError: the model takes neither gray (1 channel) nor color images (3).
        """
        tensor: torch.Tensor = _eval_transform(self)(self.picture(image))
        return tensor

    def picture(self, image: Image.Image) -> Image.Image:
        """The picture in gray or in color, whichever the model takes; its size stays.

        Raises:
            CalibrationError: the model takes neither gray (1 channel) nor color images (3).
        """
        if self.size[0] not in (1, 3):
            raise CalibrationError(
                f"the model takes {self.size[0]} channels, and a photo has 1 or 3; pass an iterable of float batches "
                f"[B, {', '.join(map(str, self.size))}], or use synthetic images"
            )
        return _in_mode(image, "L" if self.size[0] == 1 else "RGB")

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        """Values in [0, 1] `[..., C, H, W]`, shifted by the mean and divided by the deviation of their channel."""
        mean = image.new_tensor(self.mean).reshape(-1, 1, 1)
        std = image.new_tensor(self.std).reshape(-1, 1, 1)
        return (image - mean) / std


def preprocessing(model: nn.Module, example: Mapping[str, torch.Tensor] | None = None) -> Preprocessing:
    """The model's own preprocessing, with the size of its example input.

    timm keeps it on the model. A model of transformers has an image processor, whose file is read if it lies beside the
    weights or in the cache; otherwise the defaults of its class count, which a checkpoint may have overridden (the
    class that DINOv2 uses defaults to CLIP's mean). For torchvision it is that of the published weights. Any other
    model gets the mean and deviation of ImageNet if it takes 3 channels, and else 0.5.

    `example` holds keyword arguments for `model.forward` as in `hosts.example_input`, which is asked without it. A mean
    for another number of channels is averaged.

    Raises:
        ExampleInputError: there is no `example` and the model is of no known library.
        CalibrationError: the model takes something other than images.
    """
    size = _image_size(model, example_input(model) if example is None else example)
    library = library_of(model)
    config: Config = {}
    if library == "timm":
        config = _timm_config(model=model)
    elif library == "transformers":
        config = _transformers_config(model)
    elif library == "torchvision":
        config = _torchvision_config(model, size)
    mean, std = IMAGENET if size[0] == 3 else ((0.5,), (0.5,))
    interpolation = str(config.get("interpolation"))
    return Preprocessing(
        size,
        _per_channel(config.get("mean") or mean, size[0]),
        _per_channel(config.get("std") or std, size[0]),
        interpolation if interpolation in INTERPOLATIONS.values() else "bicubic",
        float(config.get("crop_pct") or CROP_PCT),
        str(config.get("crop_mode") or "center"),
    )


@lru_cache(maxsize=8)
def _eval_transform(prep: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    from timm.data import create_transform

    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        prep.size,
        is_training=False,
        interpolation=prep.interpolation,
        mean=prep.mean,
        std=prep.std,
        crop_pct=prep.crop_pct,
        crop_mode=prep.crop_mode,
    )
    return transform


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode[0] in "IF":
        # PIL cuts 16 bits and floats off at 255 instead of scaling them.
        values: NDArray[Any] = np.nan_to_num(np.asarray(image, dtype=np.float32))
        # What stands for white is guessed from the brightest value: a share, 8 bits, 16 bits, or that value itself.
        full = next((top for top in (1.0, 255.0, 65535.0) if values.max() <= top), float(values.max()))
        # Integers up to 1 are an almost black picture of 8 bits rather than shares.
        full = 255.0 if full == 1.0 and image.mode[0] == "I" else full
        image = Image.fromarray((values.clip(0) * (255 / full)).round().astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # PIL warns, and drops the transparency, when such a palette becomes gray or color in one go.
        image = image.convert("RGBA")
    return image.convert(mode)


def _image_size(model: nn.Module, example: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # `pixel_values` of five dimensions is a video, whatever else the model takes.
    image = floats.get("pixel_values", next((value for value in floats.values() if value.ndim == 4), None))
    if image is None or image.ndim != 4:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors.items())
        raise CalibrationError(
            f"{type(model).__qualname__} takes {shapes or 'nothing'}, and calibration knows images [B, C, H, W] alone; "
            'use init="wq"'
        )
    _, channels, height, width = image.shape
    return channels, height, width


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    given = tuple(map(float, values))
    return given if len(given) == channels else (sum(given) / len(given),) * channels


def _timm_config(**source: Any) -> Config:
    from timm.data import resolve_data_config

    config: Config = resolve_data_config(**source)
    return config


def _torchvision_config(model: nn.Module, size: tuple[int, int, int]) -> Config:
    """That of the published weights of this family, of the same size if there are some."""
    from torchvision.models import get_model_builder, get_model_weights, list_models

    # A user's subclass is of the family that it derives from.
    module = next(cls.__module__ for cls in type(model).__mro__ if cls.__module__.startswith("torchvision.models."))
    cropped = []
    for name in list_models():
        if get_model_builder(name).__module__ != module or not list(get_model_weights(name)):
            continue
        transforms = get_model_weights(name).DEFAULT.transforms()
        # Detection and segmentation weights have transforms without a crop.
        if hasattr(transforms, "crop_size"):
            cropped.append(transforms)
    cropped.sort(key=lambda transforms: transforms.crop_size[0] != size[1])
    if not cropped:
        return {}
    best = cropped[0]
    return {
        "mean": best.mean,
        "std": best.std,
        "interpolation": best.interpolation.value,
        "crop_pct": best.crop_size[0] / best.resize_size[0],
    }


def _transformers_config(model: nn.Module) -> Config:
    config: Any = model.config
    if (wrapped := getattr(model, "timm_model", None)) is not None:
        return _timm_config(model=wrapped)
    # A converted model's config has a type of its own (see hosts/transformers_marks.py).
    kind = _image_processor(config.model_type.removeprefix("armour_"))
    saved = _saved_processor(getattr(config, "_name_or_path", ""))

    def get(key: str) -> Any:
        return saved[key] if key in saved else getattr(kind, key, None)

    if kind is None and not saved:
        return {}
    size, crop = get("size"), get("crop_size")
    edges = [_edge(size), _edge(crop)]
    crop_pct = get("crop_pct")
    if crop_pct is None:
        crop_pct = min(1.0, edges[1] / edges[0]) if get("do_center_crop") and all(edges) else 1.0
        if str(getattr(kind, "__name__", "")).startswith("Levit"):
            crop_pct /= LEVIT_RESIZE
    # A class that does not normalize leaves the switch at None, next to a mean that it inherited.
    normalized = get("do_normalize") or get("image_mean") is None
    # Old files hold one number; whether it is for a square or for the shorter side is up to the class.
    form = size if isinstance(size, Mapping) else getattr(kind, "size", None)
    return {
        "mean": get("image_mean") if normalized else (0.0,),
        "std": get("image_std") if normalized else (1.0,),
        "interpolation": INTERPOLATIONS.get(get("resample"), "bicubic"),
        "crop_pct": crop_pct,
        "crop_mode": "squash" if isinstance(form, Mapping) and "height" in form else "center",
    }


def write_processor(model: nn.Module, folder: Path) -> None:
    """Write what transformers does to images before this model of its own: the file that came with it, or defaults.

    Nothing is written where transformers has no image processor for the model.
    """
    config: Any = model.config
    saved = _saved_processor(getattr(config, "_name_or_path", ""))
    kind = _image_processor(config.model_type.removeprefix("armour_"))
    if saved:
        text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
    elif kind is not None:
        form = getattr(kind, "size", None)
        edge = getattr(config, "image_size", None)
        squares = isinstance(form, Mapping) and "height" in form and isinstance(edge, int)
        kind(**({"size": {"height": edge, "width": edge}} if squares else {})).save_pretrained(folder)


def _edge(size: Any) -> int:
    """The shorter side that an image processor's `size` asks for, in pixels; 0 if it says nothing."""
    sizes = [value for value in size.values() if isinstance(value, int)] if isinstance(size, Mapping) else [size]
    return min((int(value) for value in sizes if value), default=0)


def _image_processor(model_type: str) -> Any:
    """The class of transformers' image processor for a type of model, or None."""
    from transformers.models.auto import image_processing_auto as auto

    names = getattr(auto, "IMAGE_PROCESSOR_MAPPING_NAMES", {})
    # The image encoder of CLIP and its like has a type of its own, and the processor is registered for the whole.
    known = names.get(model_type) or names.get(re.sub("_vision(_model)?$", "", model_type)) or {}
    # By backend ({"torchvision": ..., "pil": ...}) or, in older versions, as a pair with None for what there is not.
    candidates = known.values() if isinstance(known, Mapping) else filter(None, known)
    for name in sorted(candidates, key=len):
        try:
            processor = auto.get_image_processor_class_from_name(name)
        except Exception:
            # A class that needs a package which is not here says so when it is imported.
            continue
        if processor is not None:
            return processor
    return None


def _saved_processor(name: str) -> dict[str, Any]:
    """The image processor's file in the model's folder or in the hub's cache; empty without one."""
    from huggingface_hub import try_to_load_from_cache

    if not name:
        return {}
    for filename in ("preprocessor_config.json", "processor_config.json"):
        try:
            path: Any = Path(name) / filename if Path(name).is_dir() else try_to_load_from_cache(name, filename)
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            # A processor of several parts (CLIP's of images and text) keeps each under its name.
            settings = content.get("image_processor", content)
            if "image_mean" in settings or "size" in settings:
                return dict(settings)
        except (OSError, ValueError, TypeError, AttributeError):
            # No such file, no such repository name (an HFValidationError is a ValueError), or not JSON.
            continue
    return {}
