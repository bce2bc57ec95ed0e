"""What a student learns from: labels, a teacher's logits, and what the teacher computes on the way.

Hard token distillation is DeiT's (arXiv 2012.12877, section 4): the class head learns the labels, the distillation head
the teacher's first choice, on the same mixed images. It equals `timm.task.TokenDistillationTask(distill_type="hard")`;
timm's soft distillation divides by images, DeiT's by images times classes, and both are here by name.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from armour_surgery.errors import TeacherError
from armour_surgery.initialize.reconstruct import cut_gradients
from armour_surgery.measure.token_error import token_error, token_weights
from armour_surgery.recover.recipe import LossPart
from armour_surgery.recover.student import Outputs, Runner, blocks_of
from armour_surgery.recover.teacher import Teacher

__all__ = ["Objective", "learned_weights", "relative_error", "soft_distillation"]

# An image whose teacher gives zeros divides by this.
_TINY = 1e-12


def soft_distillation(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    """`T^2 KL(teacher || student)` of logits `[B, classes]` softened by T.

    Summed over classes and averaged over images (`batchmean`), or averaged over both, as DeiT does (`deit`):
    on ImageNet that is a thousandth.
    """
    total = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return total * temperature**2 / (student.numel() if reduction == "deit" else len(student))


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """`|student - teacher|^2 / |teacher|^2` of each image `[B, ...]`, averaged over them: 0 when equal."""
    wanted = teacher.float().flatten(1)
    error = (student.float().flatten(1) - wanted).square().sum(1)
    return (error / wanted.square().sum(1).clamp(min=_TINY)).mean()


def learned_weights(stream: Tensor) -> Tensor | None:
    """How much each token of the stream `[B, N, C]` that enters the first block counts, `[N]`; None if all alike.

    Class tokens and registers are those that are the same in all images.
    """
    if stream.ndim != 3 or len(stream) < 2:
        return None
    learned = (stream == stream[:1]).all(-1).all(0)
    if not learned.any() or learned.all():
        return None
    return token_weights(learned)


class Objective(nn.Module):
    """The loss of a student on a batch: `forward(images, targets)` gives its terms, weighted, and their sum.

    `sites` are the names of the converted attention modules, `mlps` those of narrowed MLPs; the teacher is asked for
    the same names.

    Raises:
        TeacherError: a term needs a teacher and there is none, or the two do not compare.
    """

    def __init__(
        self,
        runner: Runner,
        teacher: Teacher | None,
        loss: LossPart,
        sites: Sequence[str] = (),
        mlps: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.runner = runner
        self._loss = loss
        # In a tuple it is no submodule.
        self._teacher = (teacher,)
        self._mine: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        if loss.needs_teacher and teacher is None:
            raise TeacherError("the recipe distils, and there is no teacher; name one with --teacher")
        self._attention = [*sites, *mlps] if loss.attention else []
        self._blocks = blocks_of(runner.model, sites, mlps) if loss.blocks else []
        if (loss.attention or loss.blocks) and not sites and not mlps:
            raise TeacherError(
                "loss.attention and loss.blocks compare what was converted, and in this model nothing was; set them "
                "to 0"
            )
        self._weights: Tensor | None = None
        self._handles: list[RemovableHandle] = []
        watched = list(dict.fromkeys([*self._attention, *self._blocks]))
        if watched and teacher is not None:
            self._handles += runner.watch(watched, self._mine)
            self._handles += teacher.runner.watch(watched, self._theirs)
        if loss.local and teacher is not None:
            self._handles += cut_gradients(runner.model, self._blocks)
            self._handles.append(teacher.runner.watch_input(self._blocks[0], self._note))

    def release(self) -> None:
        """Take the hooks off both models."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note(self, stream: Tensor) -> None:
        self._weights = learned_weights(stream)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`{"loss": the sum, and each term by name}`; targets are labels `[B]` or soft targets `[B, classes]`."""
        loss, (teacher,) = self._loss, self._teacher
        want_features = loss.features > 0
        try:
            wanted = teacher(images, want_features) if teacher is not None and loss.needs_teacher else None
            got: Outputs = self.runner(images, want_features)
            terms: dict[str, Tensor] = {}
            if loss.labels:
                terms["labels"] = loss.labels * self._of_labels(got, targets)
            if wanted is not None:
                terms |= self._of_teacher(got, wanted)
        finally:
            self._mine.clear()
            self._theirs.clear()
        return {"loss": torch.stack(list(terms.values())).sum(), **{key: term.detach() for key, term in terms.items()}}

    def _of_labels(self, got: Outputs, targets: Tensor) -> Tensor:
        logits = _there(got.logits, "the student").float()
        if targets.ndim == 2:
            return F.cross_entropy(logits, targets)
        return F.cross_entropy(logits, targets, label_smoothing=self._loss.smoothing)

    def _of_teacher(self, got: Outputs, wanted: Outputs) -> dict[str, Tensor]:
        loss = self._loss
        terms: dict[str, Tensor] = {}
        if loss.logits:
            head = got.token if loss.logits_head == "token" else got.logits
            mine, theirs = _there(head, "the student").float(), _there(wanted.logits, "the teacher").float()
            if mine.shape != theirs.shape:
                raise TeacherError(
                    f"the teacher has {theirs.shape[-1]} classes and the student {mine.shape[-1]}; name another "
                    "--teacher, or set loss.logits=0"
                )
            if loss.logits_kind == "hard":
                terms["logits"] = loss.logits * F.cross_entropy(mine, theirs.argmax(-1))
            else:
                terms["logits"] = loss.logits * soft_distillation(mine, theirs, loss.temperature, loss.reduction)
        if loss.features:
            mine, theirs = _there(got.features, "the student"), _there(wanted.features, "the teacher")
            terms["features"] = loss.features * _compared(mine, theirs, "final features")
        for name, weight, fqns in (
            ("attention", loss.attention, self._attention),
            ("blocks", loss.blocks, self._blocks),
        ):
            if weight:
                errors = [self._error(name, self._mine[fqn], self._theirs[fqn], fqn) for fqn in fqns]
                terms[name] = weight * torch.stack(errors).mean()
        return terms

    def _error(self, term: str, mine: Tensor, theirs: Tensor, fqn: str) -> Tensor:
        if term == "blocks" and self._loss.local and mine.ndim == 3:
            _check_shapes(mine, theirs, fqn)
            return token_error(mine.float(), theirs.float(), self._weights)
        return _compared(mine, theirs, fqn)


def _there(tensor: Any, whose: str) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TeacherError(
            f"{whose} gives no logits (it has no head), and the loss needs some; set loss.labels=0, loss.logits=0 and "
            "loss.features=1"
        )
    return tensor


def _compared(mine: Tensor, theirs: Tensor, what: str) -> Tensor:
    _check_shapes(mine, theirs, what)
    return relative_error(mine, theirs)


def _check_shapes(mine: Tensor, theirs: Tensor, what: str) -> None:
    if mine.shape != theirs.shape:
        raise TeacherError(
            f"the teacher's {what} are {list(theirs.shape)} and the student's {list(mine.shape)}; only the original of "
            "a converted model can teach it features"
        )
