"""How far a block's tokens are from the teacher's, every token by its own size, and how much each of them counts."""

import torch
from torch import Tensor

__all__ = ["token_error", "token_weights"]

# What a class token holds is what a model's head looks at, and it is one among hundreds: learned tokens together count
# like this share of the others.
_LEARNED = 0.3
# No token is taken to be smaller than this, relative to the mean energy of all, or than the second number outright:
# zero tokens, such as padding, would divide by zero. Real tokens are far above (0.04 of the mean is the least that was
# seen, of a mean of 40 and more), so for them neither number plays a part.
_SMALLEST = 1e-6
_TINY = 1e-12


def token_error(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """`|student - teacher|^2 / |teacher|^2` of each token `[..., C]`, averaged over all: 0 when equal.

    A norm follows the stream of most models, so tokens of every size count alike. With `weights`, which need tokens
    `[B, N, C]`, token n of an image counts `weights[n]` times; they are `[N]` or `[N, 1]`.
    """
    energy = teacher.square().sum(-1)
    floor = _SMALLEST * energy.mean() + _TINY
    errors = (student - teacher).square().sum(-1) / torch.maximum(energy, floor)
    if weights is None:
        return errors.mean()
    return (errors @ weights.to(errors)).mean() / weights.sum().to(errors)


def token_weights(learned: Tensor) -> Tensor:
    """How much each token counts, `[N]`, where `learned [N]` tells which ones do not depend on the image.

    These (class tokens, registers) together count like 0.3 of the others, and none of them less than one other does.
    Some tokens must be learned, and some must not.
    """
    count = int(learned.sum())
    share = _LEARNED * (len(learned) - count) / count
    return torch.where(learned, max(1.0, share), 1.0)
