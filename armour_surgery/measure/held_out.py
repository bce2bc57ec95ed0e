"""What held-out images say about a model while it is trained: accuracy, and likeness to a teacher."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from armour_surgery.measure.accuracy import Batch

__all__ = ["held_out_scores"]

# Runs a model on images: its final features, channels last, and its logits if it has a head.
Run = Callable[[Tensor], tuple[Tensor, Tensor | None]]


def held_out_scores(
    student: Run,
    teacher: Run | None,
    batches: Iterable[Batch],
    *,
    labelled: bool,
    blank: Tensor,
    total: Callable[[Sequence[float]], list[float]],
) -> dict[str, float]:
    """Scores by name, more being better: `top1` and `top5` in percent where there are labels; with a teacher the mean
    `cosine` of the final features' tokens, and the share of the same first choice, `agreement`, in percent.

    `total` sums over processes, which all run the same number of batches: an empty one runs `blank` images instead.
    """
    images = tokens = counted = first = five = same = cosine = 0.0
    for batch in batches:
        # The models of all processes run together or wait for each other for ever.
        empty = not len(batch.labels)
        features, logits = student(blank if empty else batch.images)
        wanted, theirs = teacher(blank if empty else batch.images) if teacher is not None else (None, None)
        if empty:
            continue
        images += len(batch.labels)
        if labelled and logits is not None:
            hits = logits.topk(min(5, logits.shape[-1])).indices.cpu() == batch.labels[:, None]
            first, five = first + int(hits[:, 0].sum()), five + int(hits.any(1).sum())
        if wanted is not None:
            alike = torch.cosine_similarity(features.double(), wanted.double(), dim=-1)
            cosine, tokens = cosine + float(alike.sum()), tokens + alike.numel()
        if logits is not None and theirs is not None:
            same, counted = same + int((logits.argmax(-1) == theirs.argmax(-1)).sum()), counted + len(batch.labels)
    images, tokens, counted, first, five, same, cosine = total([images, tokens, counted, first, five, same, cosine])
    scores: dict[str, float] = {}
    if labelled and images:
        scores |= {"top1": 100 * first / images, "top5": 100 * five / images}
    if tokens:
        scores["cosine"] = cosine / tokens
    if counted:
        scores["agreement"] = 100 * same / counted
    return scores
