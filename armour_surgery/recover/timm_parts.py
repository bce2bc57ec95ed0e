"""Everything that the trainer takes from timm and torchvision; the only file of `recover/` that imports them."""

from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_interp_mode, str_to_pil_interp
from timm.layers import DropPath
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torchvision import transforms

from armour_surgery.errors import UsageError
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.recover.recipe import AugmentPart, EmaPart, LossPart, OptimizerPart, SchedulePart

__all__ = [
    "average_of",
    "build_untrained",
    "clip_gradients",
    "make_mixer",
    "make_optimizer",
    "make_scheduler",
    "set_drop_path",
    "training_transform",
]


def training_transform(prep: Preprocessing, augment: AugmentPart) -> Callable[[Image.Image], Tensor]:
    """Picture to float32 `[C, H, W]`: crop, flip, RandAugment or jitter, normalize, erase. All randomness is global."""
    size = prep.size[1:]
    interpolation = str_to_interp_mode(prep.interpolation)
    steps: list[Any] = [prep.picture]
    if augment.crop == "random-resized":
        scale, ratio = tuple(augment.scale), tuple(augment.ratio)
        steps.append(RandomResizedCropAndInterpolation(size, scale, ratio, prep.interpolation))
    elif augment.crop == "pad":
        steps += [transforms.Resize(size, interpolation), transforms.RandomCrop(size, padding=augment.padding)]
    else:
        edge = round(min(size) / prep.crop_pct)
        steps += [transforms.Resize(edge, interpolation), transforms.CenterCrop(size)]
    if augment.hflip:
        steps.append(transforms.RandomHorizontalFlip(augment.hflip))
    if augment.auto:
        steps.append(_auto_augment(augment.auto, prep))
    elif augment.color_jitter:
        steps.append(transforms.ColorJitter(*(augment.color_jitter,) * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(prep.mean, prep.std)]
    if augment.erase:
        steps.append(RandomErasing(augment.erase, mode=augment.erase_mode, device="cpu"))
    composed: Callable[[Image.Image], Tensor] = transforms.Compose(steps)
    return composed


def _auto_augment(config: str, prep: Preprocessing) -> Any:
    # What a rotation or a shift leaves empty gets the mean color, as in timm's own transforms.
    fill = tuple(min(255, round(255 * value)) for value in prep.mean)
    options = {
        "translate_const": int(min(prep.size[1:]) * 0.45),
        # PIL wants a number for a gray picture.
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": str_to_pil_interp(prep.interpolation),
    }
    try:
        # timm tells the policies apart by how they begin.
        if config.startswith("rand"):
            return rand_augment_transform(config, options)
        return auto_augment_transform(config, options)
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"augment.auto={config!r} is no policy of timm; write for example rand-m9-mstd0.5-inc1"
        ) from error


def make_mixer(augment: AugmentPart, loss: LossPart, classes: int) -> Any:
    """timm's Mixup (and CutMix) over a batch, or None. Labels become soft, smoothed targets `[B, classes]`."""
    if not (augment.mixup or augment.cutmix):
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.mix_switch,
        mode="batch",
        label_smoothing=loss.smoothing,
        num_classes=classes,
    )


def make_optimizer(model: nn.Module, part: OptimizerPart, lr: float) -> torch.optim.Optimizer:
    """One of timm's optimizers over what is trainable; vectors, biases and what the model names do not decay.

    Raises:
        UsageError: timm has no such optimizer.
    """
    options: dict[str, Any] = {"eps": part.eps}
    if "adam" in part.name.lower() or "lamb" in part.name.lower():
        options["betas"] = tuple(part.betas)
    # SGD has neither.
    if "sgd" in part.name.lower():
        options = {}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            opt=part.name,
            lr=lr,
            weight_decay=part.weight_decay,
            layer_decay=part.layer_decay,
            **options,
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise UsageError(f"optimizer.name={part.name!r} cannot be made by timm: {error}") from error
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, part: SchedulePart, steps_per_epoch: int) -> Callable[[int], None]:
    """Sets the learning rates for a step (counted from 0), which are a function of that number alone.

    Per epoch, epoch e has the schedule's value at e - 1, as in DeiT's loop, which steps it after the epoch.
    """
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=part.name,
        num_epochs=part.epochs,
        warmup_epochs=part.warmup_epochs,
        warmup_lr=part.warmup_lr,
        min_lr=part.min_lr,
        step_on_epochs=part.per == "epoch",
        updates_per_epoch=steps_per_epoch,
    )

    def set_rates(step: int) -> None:
        if part.per == "epoch":
            scheduler.step(max(0, step // steps_per_epoch - 1))
        else:
            scheduler.step_update(step)

    return set_rates


def average_of(model: nn.Module, part: EmaPart) -> Any:
    """timm's moving average of weights and buffers, or None."""
    return ModelEmaV3(model, decay=part.decay, use_warmup=part.warmup) if part.decay is not None else None


def clip_gradients(parameters: Iterable[Tensor], part: OptimizerPart) -> None:
    """Clip by norm, by value, or adaptively (AGC), all parameters, if the recipe says so."""
    if part.clip is not None:
        dispatch_clip_grad(parameters, part.clip, mode=part.clip_mode)


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Give the blocks of a timm model stochastic depth, rising linearly from 0 to `rate`, as `drop_path_rate` does.

    Raises:
        UsageError: the model has no place for it.
    """
    blocks: list[tuple[nn.Module, list[str]]] = []
    for module in model.modules():
        # A block has one for each of its branches, or one for both.
        names = [name for name in ("drop_path", "drop_path1", "drop_path2") if hasattr(module, name)]
        if names:
            blocks.append((module, names))
    if not blocks:
        raise UsageError(f"model.drop_path={rate}: {type(model).__name__} has no blocks that can drop; set it to 0")
    for place, (module, names) in enumerate(blocks):
        share = rate * place / max(1, len(blocks) - 1)
        for name in names:
            setattr(module, name, DropPath(share) if share else nn.Identity())


def build_untrained(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with random weights and other arguments for its builder.

    Raises:
        UsageError: timm refuses the arguments.
    """
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **arguments)
    except Exception as error:
        # The builders raise whatever their code runs into.
        raise UsageError(f"timm cannot build {name} with model.args {arguments}: {error}") from error
    return model
