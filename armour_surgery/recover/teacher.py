"""Whom a student learns from: the teacher that is found, and how it is asked."""

from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.errors import ArmourError, TeacherError, UsageError
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.records import SurgeryPlan
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.student import Outputs, Runner
from armour_surgery.saving.any_model import NOTHING_SAID, OwnModels, load_any

__all__ = ["Teacher", "find_teacher"]


class Teacher:
    """A frozen model in eval mode that sees the student's images in its own normalization.

    No module of the student's, so that it is in no state dict, no optimizer and no checkpoint.
    """

    def __init__(self, model: nn.Module, affine: tuple[Tensor, Tensor] | None = None) -> None:
        self.runner = Runner(model.eval().requires_grad_(False))
        self._affine = affine

    def to(self, device: torch.device) -> "Teacher":
        """Move it, in place."""
        self.runner.to(device)
        if self._affine is not None:
            self._affine = (self._affine[0].to(device), self._affine[1].to(device))
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, want_features: bool) -> Outputs:
        """What it says about images that are normalized for the student."""
        if self._affine is not None:
            images = images * self._affine[0] + self._affine[1]
        outputs: Outputs = self.runner(images, want_features)
        return outputs


def find_teacher(
    student: nn.Module,
    surgery: SurgeryPlan | None,
    recipe: Recipe,
    own: Preprocessing,
    prep: Preprocessing,
    given: str | nn.Module | None,
    models: OwnModels = NOTHING_SAID,
) -> Teacher | None:
    """The teacher that was given, the recipe's, or the original; None where nothing asks for one.

    `own` is the student's preprocessing by itself, `prep` with what the recipe changes: what images come in.
    `models` is about a teacher of no library.

    Raises:
        UsageError: one was given, and the recipe does not ask for any.
        TeacherError: it is not known or cannot be loaded, or takes other images.
    """
    if not recipe.loss.needs_teacher:
        if given is not None:
            raise UsageError("--teacher is given, and no weight in the recipe's loss asks for one; set loss.logits=0.5")
        return None
    named = given if given is not None else recipe.teacher
    if isinstance(named, nn.Module):
        model = named
    elif named is not None:
        model, _ = load_any(named, own=models)
    else:
        model = _original(student, surgery)
    theirs = preprocessing(model)
    if theirs.size[0] != prep.size[0]:
        raise TeacherError(f"the teacher takes {theirs.size[0]} channels and the student {prep.size[0]}; name another")
    # Made for the same normalization as the student, it takes the recipe's as the student does.
    if (theirs.mean, theirs.std) == (own.mean, own.std):
        return Teacher(model)
    # (image * std + mean - their_mean) / their_std, the student's normalization undone and the teacher's done.
    mean, std = torch.tensor(prep.mean), torch.tensor(prep.std)
    their_mean, their_std = torch.tensor(theirs.mean), torch.tensor(theirs.std)
    scale, shift = std / their_std, (mean - their_mean) / their_std
    return Teacher(model, (scale[:, None, None], shift[:, None, None]))


def _original(student: nn.Module, surgery: SurgeryPlan | None) -> nn.Module:
    """The model that the student was converted from, with the weights that it had."""
    advice = "name it with --teacher"
    if surgery is None or surgery.source is None:
        raise TeacherError(f"nobody knows which model {type(student).__name__} was converted from; {advice}")
    source = surgery.source
    if source.library == hosts.OWN:
        # Nothing that a folder names is called by itself: it may come from anywhere.
        raise TeacherError(
            f"the original, {source.name}, is of no library, and only you can make it with its weights; name what "
            "does with --teacher FILE.py:CALLABLE"
        )
    if source.name == "digits_vit":
        from armour_surgery.demo.digits_vit import load_digits_vit

        return load_digits_vit()
    sizes: dict[str, Any] = {}
    for name in ("img_size", "num_classes", "in_chans"):
        size = source.arguments.get(name)
        if size:
            # A height and a width, as JSON holds them; who loads by name gives one number.
            sizes[name] = size[0] if isinstance(size, list) else size
    try:
        model, _ = hosts.load_model(source.name, **sizes)
    except ArmourError as error:
        raise TeacherError(
            f"the original, {source.name or 'a model built in Python'}, cannot be loaded: {error}; {advice}"
        ) from error
    # After a training any matrix may have moved, and nobody can tell any more.
    if surgery.trained is None and not _share_weights(model, student):
        raise TeacherError(
            f"{source.name} has other weights than the model that the student was converted from (was that given "
            f"--checkpoint or --no-pretrained?); {advice}"
        )
    return model


def _share_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether any matrix that is not constant is the same in both: a conversion leaves most as they are."""
    theirs = dict(second.named_parameters())
    for name, value in first.named_parameters():
        # Biases and norms start out as zeros and ones in every model, and say nothing.
        if value.ndim > 1 and name in theirs and torch.equal(value, theirs[name]) and bool(value.std() > 0):
            return True
    return False
