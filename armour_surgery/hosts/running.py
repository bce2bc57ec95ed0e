"""How a model is fed, and what it gives back."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.calls import run
from armour_surgery.copies import floating_type
from armour_surgery.errors import UsageError
from armour_surgery.examples import arguments_of, part_of, rebuilt
from armour_surgery.hosts.examples import kept_example, shown_example
from armour_surgery.hosts.libraries import adapter, library_of
from armour_surgery.records import SurgeryPlan

__all__ = ["example_input", "features", "has_no_head", "head_size", "head_tensors", "writing_parts"]


def head_size(model: nn.Module) -> int:
    """The size of a model's head; 0 without one."""
    for name in ("num_classes", "num_labels"):
        size = getattr(model, name, getattr(getattr(model, "config", None), name, None))
        if isinstance(size, int):
            return size
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linears[-1].out_features if linears else 0


def has_no_head(model: nn.Module) -> bool:
    """Whether a model says that it has no classes, so that what it gives are features and no logits."""
    return 0 in (getattr(model, "num_classes", None), getattr(model, "num_labels", None))


def head_tensors(model: nn.Module) -> set[str]:
    """The names of the tensors of a model's classifiers: where its library names them, else of its last Linear."""
    names = list(model.state_dict())
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    if library_of(model) == "transformers":
        body = f"{getattr(model, 'base_model_prefix', '')}."
        within = [name for name in names if name.startswith(body)]
        # A body by itself has its tensors without the prefix, and no head.
        return set(names) - set(within) if within else set()
    heads = config.get("classifier") or ()
    if not heads:
        heads = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    heads = (heads,) if isinstance(heads, str) else heads
    return {name for name in names if name.rpartition(".")[0] in heads}


def example_input(model: nn.Module, batch_size: int = 2) -> dict[str, torch.Tensor]:
    """Keyword arguments for `model.forward`: meta tensors of the size that it was built for, or was said to take.

    Whole numbers that say how large images are have their values. For a model that takes images and words, the part of
    it that sees gets them, by names as `examples.py` tells.

    Raises:
        UsageError: batch_size is below 1.
        ExampleInputError: the model is of no known library and does not show what it takes, or it takes something
            other than images.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, not {batch_size}")
    # The model may have been cast: images come in the type of its weights, token numbers stay integers.
    floating = floating_type(model)
    surgery = getattr(model, "surgery", None)
    if library_of(model) is None and isinstance(surgery, SurgeryPlan) and surgery.example_values:
        # Numbers that count (which image is where) hold for the images that they were given with.
        return rebuilt(surgery.example, surgery.example_values, floating)
    known = _known_inputs(model)
    images = next((told[0][0] for told in known.values() if isinstance(told, tuple) and told[0]), None)
    inputs = {}
    for name, told in known.items():
        if isinstance(told, torch.Tensor):
            one = told.to(floating) if told.is_floating_point() else told
            inputs[name] = torch.cat([one] * batch_size)
            continue
        shape, dtype = told
        dtype = floating if dtype.is_floating_point else dtype
        # What does not have as many rows as the first input has images is a table, and no batch.
        sizes = (batch_size, *shape[1:]) if shape and shape[0] == images else shape
        inputs[name] = torch.empty(sizes, dtype=dtype, device="meta")
    return inputs


def _known_inputs(model: nn.Module) -> Mapping[str, torch.Tensor | tuple[tuple[int, ...], torch.dtype]]:
    """Shapes with the batch first and types, or numbers for one image.

    They are as a user said, else as the library does, else as the model shows.
    """
    kept = kept_example(model)
    if kept is not None:
        return kept
    library = library_of(model)
    if library is None:
        return shown_example(model)
    known: dict[str, torch.Tensor | tuple[tuple[int, ...], torch.dtype]] = {}
    for name, told in adapter(library).example(model).items():
        known[name] = told if isinstance(told, torch.Tensor) else ((1, *told[0]), told[1])
    return known


def writing_parts(model: nn.Module) -> list[str]:
    """The text models inside of a model that writes about images, by name."""
    if library_of(model) != "transformers":
        return []
    from armour_surgery.hosts import transformers_inputs

    return transformers_inputs.writing_parts(model)


def features(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A model's final features with channels last, and its logits `[B, classes]`, or None if it has no head.

    timm tells them by `forward_features`, transformers by `last_hidden_state` or the last of `hidden_states`; of any
    other model the first tensor of the output is taken for both.
    """
    model, inputs = model.get_submodule(part_of(inputs)), arguments_of(inputs)
    library = library_of(model)
    if library == "timm" and hasattr(model, "forward_features"):
        (image,) = inputs.values()
        final: torch.Tensor = model.forward_features(image)  # type: ignore[operator]
        classes = getattr(model, "num_classes", 0)
        logits = model.forward_head(final) if classes else None  # type: ignore[operator]
        # Convolutional hosts have their channels first; Swin and its like have four dimensions too, and channels last.
        channels_first = final.ndim == 4 and final.shape[1] == getattr(model, "num_features", None)
        return (final.movedim(1, -1) if channels_first else final), logits
    if library == "transformers":
        output = model(**inputs, output_hidden_states=True)
        hidden: Any = getattr(output, "last_hidden_state", None)
        # A classifier gives hidden states alone, and the last of them may lack the final norm.
        if hidden is None and getattr(output, "hidden_states", None):
            hidden = output.hidden_states[-1]
        scores: Any = None if has_no_head(model) else getattr(output, "logits", None)
        if hidden is not None or scores is not None:
            return (scores if hidden is None else hidden), scores
    first = next(leaf for leaf in pytree.tree_leaves(run(model, inputs)) if isinstance(leaf, torch.Tensor))
    return first, first if first.ndim == 2 else None
