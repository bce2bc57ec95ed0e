"""First and fifth choices on labelled images: accuracy, agreement of two models, ReaL accuracy, a confusion plot."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Batch", "Choices", "agreement", "choices", "confusion", "real_hits", "relabelled_hits", "top_hits"]

TOP = 5
# Runs a model on images: logits [B, classes].
Run = Callable[[Tensor], Tensor]


class Batch(Protocol):
    """Images, labels, numbers of images and names of what could not be read."""

    @property
    def images(self) -> Tensor:
        """`[B, C, H, W]`."""

    @property
    def labels(self) -> Tensor:
        """`[B]`."""

    @property
    def numbers(self) -> list[int]:
        """Which images."""

    @property
    def broken(self) -> list[str]:
        """What could not be read."""


@dataclass(frozen=True)
class Choices:
    """A model's choices: for image `numbers[i]` with label `labels[i]` its best classes `top[i]`, the best first.

    `broken` names images that could not be read, and of which there is nothing here.
    """

    numbers: list[int]
    labels: Tensor
    top: Tensor
    broken: list[str]


def choices(run: Run, batches: Iterable[Batch]) -> Choices:
    """Run a model over batches, in eval mode and without gradients, which is the caller's to arrange."""
    numbers: list[int] = []
    broken: list[str] = []
    labels, top = [torch.empty(0, dtype=torch.long)], []
    for batch in batches:
        broken += batch.broken
        if not len(batch.labels):
            continue
        logits = run(batch.images)
        top.append(logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices.cpu())
        labels.append(batch.labels.cpu())
        numbers += batch.numbers
    return Choices(numbers, torch.cat(labels), torch.cat(top) if top else torch.empty(0, TOP, dtype=torch.long), broken)


def top_hits(made: Choices) -> tuple[int, int]:
    """For how many images the label is the first choice, and among the first five."""
    hits = made.top == made.labels[:, None]
    return int(hits[:, :1].sum()), int(hits.any(1).sum())


def agreement(first: Choices, second: Choices, same_class: Mapping[int, int] | None = None) -> tuple[int, int]:
    """On how many images two models have the same first choice, and how many both have seen.

    `same_class` says which of the first's classes one of the second's is, where they are not numbered alike.
    """
    theirs = dict(zip(second.numbers, second.top[:, 0].tolist(), strict=True))
    if same_class is not None:
        # A class that the first does not have, or nobody asked about, is none of its choices.
        theirs = {number: same_class.get(choice, -1) for number, choice in theirs.items()}
    same = both = 0
    for number, choice in zip(first.numbers, first.top[:, 0].tolist(), strict=True):
        # An image that only one of them could read is in neither count.
        if number in theirs:
            both += 1
            same += choice == theirs[number]
    return same, both


def relabelled_hits(made: Choices) -> tuple[int, int, int]:
    """Whether labels mean other classes: first choices that are right, and that would be, of how many images.

    Would be: if each label meant the class that it is taken for most often, and no class were meant twice. That is
    found on every other image of a label and counted on the rest, so that chance does not look like an order.
    """
    pairs = list(zip(made.labels.tolist(), made.top[:, 0].tolist(), strict=True))
    seen: Counter[int] = Counter()
    fitted: Counter[tuple[int, int]] = Counter()
    counted: list[tuple[int, int]] = []
    for label, choice in pairs:
        seen[label] += 1
        if seen[label] % 2:
            fitted[label, choice] += 1
        else:
            counted.append((label, choice))
    meant: dict[int, int] = {}
    taken: set[int] = set()
    # Greedy, and not the best assignment there is: what is far better is better by this too.
    for (label, choice), _ in fitted.most_common():
        if label not in meant and choice not in taken:
            meant[label] = choice
            taken.add(choice)
    right = sum(label == choice for label, choice in counted)
    return right, sum(meant.get(label) == choice for label, choice in counted), len(counted)


def real_hits(made: Choices, name: Callable[[int], str], real: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    """First choice and first five among an image's ReaL labels (arXiv 2006.07159), and how many images have some.

    `name` tells the file of an image by its number; files that are not in `real` count as without labels.
    """
    first = five = counted = 0
    for number, top in zip(made.numbers, made.top.tolist(), strict=True):
        wanted = set(real.get(Path(name(number)).name, ()))
        if wanted:
            counted += 1
            first += top[0] in wanted
            five += bool(wanted & set(top))
    return first, five, counted


def confusion(made: Choices, classes: int) -> Tensor:
    """`[classes, classes]`: how many images of class i (rows) were taken for class j."""
    # A pair (label, choice) as one number, so that counting numbers counts pairs.
    pairs = made.labels * classes + made.top[:, 0] if len(made.labels) else made.labels
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)
