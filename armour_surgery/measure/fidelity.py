"""How near a converted model is to the one it was: features, and first choices where there is a head."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError
from armour_surgery.records import Fidelity

__all__ = ["Answer", "Features", "compare_outputs"]

# What a model makes of a batch: its final features, channels last, and its logits if it has a head.
Answer = tuple[Tensor, Tensor | None]
Features = Callable[[nn.Module, Tensor], Answer]


def compare_outputs(
    answers: Iterable[Answer], converted: nn.Module, batches: Iterable[Tensor], features: Features, source: str
) -> Fidelity:
    """Run a model, which must be in eval mode, on images of which the original gave `answers`; see `Fidelity`.

    Raises:
        CalibrationError: one of them gives features that are not finite.
    """
    images = tokens = same = 0
    cosine = signal = noise = 0.0
    heads = False
    with torch.no_grad():
        for (wanted, first), batch in zip(answers, batches, strict=True):
            got, second = features(converted, batch)
            wanted, got = wanted.double(), got.double()
            for tokens_of, name in ((wanted, "original"), (got, "converted")):
                if not bool(tokens_of.isfinite().all()):
                    raise CalibrationError(
                        f"the {name} {type(converted).__name__} gives NaN or infinite features on held-out images, so "
                        "nothing can be said of it; look at the images and at its weights, or use init 'joint-svd'"
                    )
            cosine += float(torch.cosine_similarity(wanted, got, dim=-1).sum())
            tokens += wanted[..., 0].numel()
            signal += float(wanted.square().sum())
            noise += float((wanted - got).square().sum())
            images += len(batch)
            if first is not None and second is not None:
                heads = True
                same += int((first.argmax(-1) == second.argmax(-1)).sum())
    # Equal outputs have no noise; JSON has no infinity, and 300 dB are about as much as float64 can tell.
    ratio = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else 300.0
    return Fidelity(images, source, cosine / tokens, min(ratio, 300.0), 100 * same / images if heads else None)
