"""One way to run the models of all libraries: images in; logits, final features and what sites compute out."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from armour_surgery import hosts
from armour_surgery.calls import run
from armour_surgery.errors import TeacherError, UsageError
from armour_surgery.hosts.running import has_no_head

__all__ = [
    "Outputs",
    "Runner",
    "blocks_of",
    "evaluating",
    "freeze_norms",
    "freeze_rest",
    "prepare",
    "train_only",
]


class Outputs(NamedTuple):
    """`logits` and `token` (the distillation head's) are `[B, classes]`, `features` has channels last."""

    logits: Tensor | None
    token: Tensor | None
    features: Tensor | None


class Runner(nn.Module):
    """A model and how it is fed. Its parameters are the model's, under `model.`.

    With `two_heads` a model that has a distillation head gives both heads' logits while it trains; else their mean.
    """

    def __init__(self, model: nn.Module, two_heads: bool = False) -> None:
        super().__init__()
        self.model = model
        self.two_heads = two_heads
        example = hosts.example_input(model)
        images = [name for name, value in example.items() if value.is_floating_point() and value.ndim == 4]
        parameters = inspect.signature(model.forward).parameters
        others = [
            name for name in example if name in parameters and parameters[name].default is inspect.Parameter.empty
        ]
        if not images or others not in ([], images[:1]):
            raise UsageError(
                f"{type(model).__name__} takes {', '.join(example)}, and can be trained and evaluated here only if it "
                "takes images [B, C, H, W] alone"
            )
        self.argument = images[0]

    def forward(self, images: Tensor, want_features: bool = False) -> Outputs:
        """Run the model, in whatever mode it is in."""
        inputs = {self.argument: images}
        both = self.two_heads and self.training
        # `hosts.features` asks for the logits alone, and here both heads are wanted.
        if want_features and both and hosts.library_of(self.model) == "transformers":
            raw: Any = self.model(**inputs, output_hidden_states=True)
            features: Any = raw.hidden_states[-1]
        elif want_features:
            features, raw = hosts.features(self.model, inputs)
        else:
            features, raw = None, run(self.model, inputs)
        logits, token = (None, None) if has_no_head(self.model) else _heads(raw, both)
        return Outputs(logits, token, features)

    def watch(self, fqns: Sequence[str], seen: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep what those modules give, in `seen`, until the handles are removed.

        Raises:
            TeacherError: there is no such module, or it computes nothing (a ModuleList).
        """
        modules = dict(self.model.named_modules())
        handles = []
        for fqn in fqns:
            if fqn not in modules:
                raise TeacherError(
                    f"{type(self.model).__name__} has no module {fqn!r}, so what it computes there cannot be compared; "
                    "name the original as --teacher, or set loss.attention=0 and loss.blocks=0"
                )
            if type(modules[fqn]).forward is nn.Module.forward:
                raise TeacherError(
                    f"the attention of {type(self.model).__name__} lies in {fqn}, a {type(modules[fqn]).__name__} that "
                    "is never called, so there are no blocks to compare; compare the attention itself: set "
                    "loss.blocks=0, loss.local=false and loss.attention=1"
                )

            def keep(_: nn.Module, args: Any, output: Any, fqn: str = fqn) -> None:
                # Attention of transformers gives its weights too, after what it computes.
                seen[fqn] = output if isinstance(output, Tensor) else output[0]

            handles.append(modules[fqn].register_forward_hook(keep))
        return handles

    def watch_input(self, fqn: str, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Tell what goes into a module each time that it is called, until the handle is removed."""

        def note(_: nn.Module, args: Any, kwargs: Any) -> None:
            tell(next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))

        return self.model.get_submodule(fqn).register_forward_pre_hook(note, with_kwargs=True)


def _heads(raw: Any, both: bool) -> tuple[Tensor | None, Tensor | None]:
    """The logits of the head, and of the distillation head, in what a model gave."""
    if raw is None or isinstance(raw, Tensor):
        return raw, None
    if isinstance(raw, tuple):
        return raw[0], raw[1]
    if both and getattr(raw, "distillation_logits", None) is not None:
        return raw.cls_logits, raw.distillation_logits
    logits: Tensor | None = getattr(raw, "logits", None)
    return logits, None


def _block_of(fqn: str) -> str:
    """The module that a site lies in."""
    return fqn.rpartition(".")[0]


def blocks_of(model: nn.Module, sites: Sequence[str], mlps: Sequence[str] = ()) -> list[str]:
    """The modules that converted attentions and MLPs lie in, in the model's order; of nested ones the outermost.

    An MLP in a list, which nobody calls, is its own block: so is a layer of transformers, whose two projections have
    no module around them but the layer.
    """
    modules = dict(model.named_modules())
    found = {_block_of(site) for site in sites}
    for mlp in mlps:
        around = _block_of(mlp)
        found.add(mlp if type(modules[around]).forward is nn.Module.forward else around)
    order = {name: place for place, name in enumerate(modules)}
    return sorted((name for name in found if not _inside_another(name, found)), key=lambda name: order.get(name, 0))


def _inside_another(name: str, others: Iterable[str]) -> bool:
    """Whether one of those modules holds this one; the empty name is the model's."""
    return any(other != name and (not other or name.startswith(f"{other}.")) for other in others)


def prepare(model: nn.Module, *, token: bool, grad_checkpointing: bool) -> None:
    """Tell a model to give both heads while it trains, and to trade time for memory.

    Raises:
        UsageError: it cannot do one of them.
    """
    # timm has a switch; models of transformers give both sets of logits at any time.
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(token)  # type: ignore[operator]
    elif token and not hasattr(model, "distillation_classifier") and not hasattr(model, "classifier_distill"):
        raise UsageError(
            f"loss.logits_head=token needs a model with a distillation head, and {type(model).__name__} has none; "
            "set loss.logits_head=main, or take a deit_*_distilled_* or levit_* model"
        )
    if not grad_checkpointing:
        return
    # timm's name for it, and transformers'.
    switch = getattr(model, "set_grad_checkpointing", None) or getattr(model, "gradient_checkpointing_enable", None)
    if switch is None:
        raise UsageError(f"run.grad_checkpointing: {type(model).__name__} does not offer it; set it to false")
    switch()


def train_only(model: nn.Module, fqns: Sequence[str]) -> None:
    """Freeze everything but the parameters below these modules."""
    below = tuple(f"{fqn}." for fqn in fqns)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(below))


def freeze_rest(model: nn.Module, trainable: str, sites: Sequence[str], mlps: Sequence[str]) -> None:
    """Freeze what a recipe's `model.trainable` leaves as it is; `sites` and `mlps` name what was converted.

    Raises:
        UsageError: nothing would be left to train.
    """
    if trainable == "all":
        return
    learning = [*sites, *mlps] if trainable == "converted" else list(sites)
    if not learning:
        what = "attention or MLP" if trainable == "converted" else "attention"
        raise UsageError(
            f"model.trainable={trainable}: {type(model).__name__} has no converted {what}; set it to "
            f"{'converted, or to all' if mlps else 'all'}"
        )
    train_only(model, learning)


def freeze_norms(model: nn.Module) -> None:
    """Let BatchNorm use its running statistics, and leave them as they are, as LeViT does when it is fine-tuned."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextmanager
def evaluating(runner: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside, the mode it was in afterwards."""
    was = runner.training
    # LeViT keeps attention biases that it computed in eval mode; going through train mode lets go of old ones.
    runner.train()
    runner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        runner.train(was)
