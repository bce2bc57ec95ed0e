"""Whom a student learns from: the teacher that is found, and how it is asked."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.errors import TeacherError, UsageError
from armour_surgery.hosts.own import is_own
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.records import Source, SurgeryPlan
from armour_surgery.recover.original import check_original, load_original, note_other
from armour_surgery.recover.recipe import Recipe
from armour_surgery.recover.student import Outputs, Runner
from armour_surgery.saving.any_model import NOTHING_ASKED, NOTHING_SAID, Asked, OwnModels, load_any
from armour_surgery.saving.occupied import is_saved_folder

__all__ = ["NO_TEACHER", "GivenTeacher", "Teacher", "find_teacher"]


@dataclass(frozen=True)
class GivenTeacher:
    """What a user says of the teacher: MODEL or a module, and how it is to be built and filled.

    Without a model, `asked` is about the recipe's teacher, or else about the original.
    """

    model: str | nn.Module | None = None
    asked: Asked = NOTHING_ASKED


NO_TEACHER = GivenTeacher()


class Teacher:
    """A frozen model in eval mode that sees the student's images in its own normalization.

    No module of the student's, so that it is in no state dict, no optimizer and no checkpoint. `name` is for people.
    """

    def __init__(self, model: nn.Module, affine: tuple[Tensor, Tensor] | None = None, name: str = "") -> None:
        self.runner = Runner(model.eval().requires_grad_(False))
        self.name = name
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
    given: GivenTeacher = NO_TEACHER,
    models: OwnModels = NOTHING_SAID,
) -> Teacher | None:
    """The teacher that was given, the recipe's, or the original; None where nothing asks for one.

    The original has to have the weights that the student was converted from. Of another model that was named it is
    said (`ArmourWarning`) that it is another. `own` is the student's preprocessing by itself, `prep` with what the
    recipe changes: what images come in. `models` is about a teacher of no library.

    Raises:
        UsageError: one was given, and the recipe does not ask for any.
        TeacherError: it is not known or cannot be loaded, is not the original, or takes other images.
    """
    if not recipe.loss.needs_teacher:
        if given.model is not None or given.asked.checkpoint is not None:
            raise UsageError("--teacher is given, and no weight in the recipe's loss asks for one; set loss.logits=0.5")
        return None
    named = given.model if given.model is not None else recipe.teacher
    source: Source | None = None
    if named is None:
        model, source = load_original(student, surgery, given.asked)
        name = f"the original, {source.name}"
        check_original(model, source, student, surgery, judges_head=recipe.loss.logits > 0)
    elif isinstance(named, nn.Module):
        model, name = named, type(named).__name__
    else:
        model, source = load_any(named, asked=_as_converted(named, surgery, given.asked), own=models)
        name = named
    theirs = preprocessing(model)
    if theirs.size[0] != prep.size[0]:
        raise TeacherError(f"the teacher takes {theirs.size[0]} channels and the student {prep.size[0]}; name another")
    # A student that begins with random weights has no original to keep to.
    if named is not None and surgery is not None and recipe.model.start == "weights":
        note_other(model, source, surgery, name)
    # Made for the same normalization as the student, it takes the recipe's as the student does.
    if (theirs.mean, theirs.std) == (own.mean, own.std):
        return Teacher(model, name=name)
    # (image * std + mean - their_mean) / their_std, the student's normalization undone and the teacher's done.
    mean, std = torch.tensor(prep.mean), torch.tensor(prep.std)
    their_mean, their_std = torch.tensor(theirs.mean), torch.tensor(theirs.std)
    scale, shift = std / their_std, (mean - their_mean) / their_std
    return Teacher(model, (scale[:, None, None], shift[:, None, None]), name)


def _as_converted(name: str, surgery: SurgeryPlan | None, asked: Asked) -> Asked:
    """What is asked of a teacher: the original by its name comes as it was, but for what is said otherwise."""
    if is_saved_folder(name) and asked.checkpoint is not None:
        raise UsageError(f"the teacher {name} has its weights in it; leave --teacher-checkpoint {asked.checkpoint} out")
    if is_saved_folder(name) or is_own(name):
        # They are what they are; sizes were meant for the student.
        return replace(asked, img_size=None, num_classes=None)
    source = surgery.source if surgery is not None else None
    if source is None or source.name != name or not source.options:
        return asked
    return replace(
        asked,
        img_size=asked.img_size if asked.img_size is not None else source.options.get("img_size"),
        num_classes=asked.num_classes if asked.num_classes is not None else source.options.get("num_classes"),
    )
