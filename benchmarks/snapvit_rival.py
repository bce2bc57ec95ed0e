"""SnapViT's way to a smaller ViT (Simoncini et al., arXiv 2510.17700), written after the paper, and made strong.

Structures that go are hidden channels of MLPs and whole attention heads. All are ranked once, for every size, by

    local score x factor of its block / parameters that it holds

- The local score is a diagonal Hessian of a label-free loss, from squared gradients: several views of an image are
  embedded, and each view is to be told from another by cross-entropy between softmaxes of normalized embeddings (DINO's
  loss without its head, the original its own teacher).
- The factors, one for each MLP and one for each attention, stand for what the diagonal does not see. xNES (exponential
  natural evolution strategies, Glasmachers et al. 2010) finds them: it draws factors, prunes the model by them to
  several sizes, and follows those whose embeddings stay next to the original's.

Smaller than in the authors' code, so that a search takes minutes on 2 cores: 32 images of 6 views for scores
(there 1000 of 12); 4 images and one of four sizes to judge factors by, others in each generation (there 1000 at four);
one factor for an attention (there one for each head). Not smaller: 24 generations of 13 points (there 50 in all).

Made strong, where the authors do otherwise: `fc2` and `proj` are fitted again by ridge also while factors are judged
(theirs are afterwards, and only if asked); scores start relative to their block and factors are searched as logarithms
(theirs start at 1.2 to 0.8 times the bare scores, which differ thirtyfold among DINOv2-S's MLPs); class and
patch tokens are judged, as the benchmark does (theirs: principal components of the class token); channels and heads are
in one ranking by what a parameter costs (theirs: two, with two shares that the user gives).
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from feature_quality import final_tokens
from mlp_rivals import input_moments, keep_channels, mlps_of, ridge
from torch import Tensor, nn
from torchvision.transforms.v2 import RandomResizedCrop

from armour_surgery.measure.cost import count_params

Kept = dict[str, Tensor]
Refits = dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]
# Shares of the parameters that go where factors are judged.
_SHARES = (0.085, 0.15, 0.25, 0.33)
# The deviation of the factors' logarithms at the start.
_SPREAD = 0.4
# What a block keeps at least, of its channels and of its heads.
_LEAST_CHANNELS, _LEAST_HEADS = 0.05, 0.2


@dataclass(frozen=True)
class Part:
    """An MLP's channels or an attention's heads: their scores, what one holds, and how many stay at least."""

    scores: Tensor
    price: int
    least: int


@dataclass(frozen=True)
class Searched:
    """What one search finds for all sizes: ranked structures, and moments of what goes into output projections."""

    parts: dict[str, Part]
    factors: Tensor
    attended: dict[str, Tensor]


def attentions_of(model: nn.Module) -> dict[str, Any]:
    """timm's attentions by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "proj", None), nn.Linear)
    }


def views(image: Tensor, small: int) -> Tensor:
    """Two crops of much of an image and `small` crops of little of it, all as large as the image `[3, H, W]`."""
    size = image.shape[-2:]
    much, little = RandomResizedCrop(size, scale=(0.25, 1.0)), RandomResizedCrop(size, scale=(0.05, 0.25))
    return torch.stack([much(image) for _ in range(2)] + [little(image) for _ in range(small)])


def view_loss(embeddings: Tensor) -> Tensor:
    """Cross-entropy of every view's embedding `[views, D]` to those of the first two views; these are not taught."""
    embeddings = F.normalize(embeddings, dim=-1)
    taught = embeddings[:2].detach().softmax(-1)
    losses = -taught @ embeddings.log_softmax(-1).T
    # A view is not its own teacher.
    return losses.sum() - losses.diagonal().sum()


def kept_of(parts: dict[str, Part], factors: Tensor, parameters: int) -> Kept:
    """The structures that stay where at least so many parameters are to go, one factor for each part."""
    values, prices = [], []
    for part, factor in zip(parts.values(), factors, strict=True):
        value = part.scores * factor / part.price
        # These stay whatever the factor is.
        value[part.scores.topk(part.least).indices] = torch.inf
        values.append(value)
        prices.append(torch.full((len(value),), part.price))
    value, price = torch.cat(values), torch.cat(prices)
    order = value.argsort()
    gone = price[order].cumsum(0)
    able = int(price[value.isfinite()].sum())
    if parameters > able:
        raise ValueError(f"only {able} of {parameters} parameters can go: each block keeps some channels and heads")
    last = int((gone < parameters).sum())
    spare = int(gone[last]) - parameters
    stays = torch.ones(len(value), dtype=torch.bool)
    stays[order[: last + 1]] = False
    # A head is worth many channels: where it came last, the best of the channels come back.
    for place in order[:last].flip(0).tolist():
        if price[place] <= spare:
            stays[place] = True
            spare -= int(price[place])
    chosen = stays.split([len(part.scores) for part in parts.values()])
    return {name: one.nonzero().flatten() for name, one in zip(parts, chosen, strict=True)}


def shrink(original: nn.Module, kept: Kept, refits: Refits) -> nn.Module:
    """A copy with those channels and heads; the layers that read them are fitted again where `refits` has a way."""
    # Weights are never written into, so that a copy shares those that stay as they are: thousands are made.
    model: Any = copy.deepcopy(original, {id(weight): weight for weight in original.parameters()})
    mlps = mlps_of(original)
    for name, stays in kept.items():
        module = model.get_submodule(name)
        if name in mlps:
            keep_channels(module, stays)
            reader, inputs = module.fc2, stays
        else:
            inputs = keep_heads(module, stays)
            reader = module.proj
        if name in refits:
            weight, bias = refits[name](inputs)
            reader.weight, reader.bias = nn.Parameter(weight), nn.Parameter(bias)
    return model.eval()


def keep_heads(attention: Any, kept: Tensor) -> Tensor:
    """Leave an attention those heads, with the weights that they have. Returns which inputs `proj` is left."""
    size = attention.head_dim
    inputs = (kept[:, None] * size + torch.arange(size)).flatten()
    rows = (torch.arange(3)[:, None] * attention.attn_dim + inputs).flatten()
    qkv, proj = attention.qkv, attention.proj
    qkv.weight = nn.Parameter(qkv.weight.detach()[rows])
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(qkv.bias.detach()[rows])
    proj.weight = nn.Parameter(proj.weight.detach()[:, inputs])
    attention.num_heads, attention.attn_dim = len(kept), len(inputs)
    qkv.out_features, proj.in_features = len(rows), len(inputs)
    return inputs


def xnes(
    loss: Callable[[Tensor, int], float], start: Tensor, spread: float, generations: int, generator: torch.Generator
) -> Tensor:
    """Exponential natural evolution strategy: the mean `[d]` of a Gaussian that steps to a smaller loss, averaged over
    the later half of so many generations.

    `loss(point, generation)` may differ from one generation to the next: only points of one are compared. The Gaussian
    is `mean + scale shape N(0, I)`, `det shape = 1`; ranks give points their weights, and the natural gradient of the
    weighted log-likelihood moves mean, scale and shape. Sizes of population and steps are the standard ones.
    """
    dimensions = len(start)
    population = 4 + int(3 * math.log(dimensions))
    rate = 0.6 * (3 + math.log(dimensions)) / dimensions**1.5
    ranks = torch.arange(1, population + 1, dtype=start.dtype)
    weights = (math.log(population / 2 + 1) - ranks.log()).clamp(min=0)
    weights = weights / weights.sum() - 1 / population
    identity = torch.eye(dimensions, dtype=start.dtype)
    mean, scale, shape = start, spread, identity
    means = []
    for generation in range(generations):
        steps = torch.randn(population, dimensions, generator=generator, dtype=start.dtype)
        points = mean + scale * steps @ shape.T
        losses = torch.tensor([loss(point, generation) for point in points])
        steps = steps[losses.argsort()]
        of_mean = weights @ steps
        # The weights sum to nothing, so that the identity that each square is compared to falls away.
        of_shape = steps.T @ (weights[:, None] * steps)
        of_scale = float(of_shape.trace()) / dimensions
        mean = mean + scale * shape @ of_mean
        scale *= math.exp(rate / 2 * of_scale)
        shape = shape @ torch.linalg.matrix_exp(rate / 2 * (of_shape - of_scale * identity))
        means.append(mean)
    # Few points that see few images make means wander about the best; that evens out.
    return torch.stack(means[generations // 2 :]).mean(dim=0)


def squared_gradients(original: nn.Module, images: Iterable[Tensor], small: int) -> dict[str, Tensor]:
    """The local scores: of every MLP's channels and every attention's heads, the mean over images `[3, H, W]` of the
    squared gradients of a channel's row of `fc1`, and of a head's rows of V, that the loss of an image's views has.
    """
    model: Any = copy.deepcopy(original).requires_grad_(False)
    mlps, attentions = mlps_of(model), attentions_of(model)
    for layer in [mlp.fc1 for mlp in mlps.values()] + [attention.qkv for attention in attentions.values()]:
        layer.weight.requires_grad_(True)
    scores: dict[str, Tensor] = {}
    # Crops are drawn by torch's own numbers: the same in every run, and those of others as if none had been.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for image in images:
            model.zero_grad()
            view_loss(model.forward_features(views(image, small))[:, 0]).backward()
            for name, mlp in mlps.items():
                scores[name] = scores.get(name, 0.0) + mlp.fc1.weight.grad.square().mean(dim=1)
            for name, attention in attentions.items():
                values = attention.qkv.weight.grad[2 * attention.attn_dim :]
                scores[name] = scores.get(name, 0.0) + values.square().reshape(attention.num_heads, -1).mean(dim=1)
    return scores


def parts_of(original: nn.Module, scores: dict[str, Tensor]) -> dict[str, Part]:
    """Structures with their scores, each block's divided by their sum: factors start from 1."""
    parts = {}
    mlps = mlps_of(original)
    for name, score in scores.items():
        module: Any = original.get_submodule(name)
        if name in mlps:
            price, least = module.fc1.in_features + 1 + module.fc2.out_features, _LEAST_CHANNELS
        else:
            size, inputs = module.head_dim, module.qkv.in_features
            price, least = size * (3 * (inputs + 1) + module.proj.out_features), _LEAST_HEADS
        parts[name] = Part((score / score.sum()).double(), price, max(1, int(least * len(score))))
    return parts


def search(
    original: nn.Module,
    batches: list[Tensor],
    moments: dict[str, Tensor],
    *,
    scored: int = 32,
    small: int = 4,
    seen: int = 4,
    generations: int = 24,
) -> Searched:
    """Scores and factors, once for all sizes, from calibration images and the moments of the MLPs' hidden channels.

    `scored` images are seen for scores, each as two large views and `small` small ones, and `seen` others by each
    generation.
    """
    images = torch.cat(batches)
    spread = torch.linspace(0, len(images) - 1, scored).round().long()
    parts = parts_of(original, squared_gradients(original, images[spread], small))
    attentions = attentions_of(original)
    attended = input_moments(original, {n: a.proj for n, a in attentions.items()}, batches, lambda m, x: m(x))
    refits = refits_of(original, {**moments, **attended}, torch.float32)
    whole = count_params(original)

    @lru_cache(maxsize=1)
    def shown(generation: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(seen) * (len(images) // seen) + generation
        chosen = images[places % len(images)]
        return chosen, final_tokens(original, [chosen], "x")

    @torch.no_grad()
    def loss(point: Tensor, generation: int) -> float:
        chosen, wanted = shown(generation)
        # Only the points of a generation are compared: each judges one size, by turns, at a fourth of the time.
        share = _SHARES[generation % len(_SHARES)]
        model = shrink(original, kept_of(parts, point.exp(), round(share * whole)), refits)
        similarity = F.cosine_similarity(wanted, final_tokens(model, [chosen], "x"), dim=-1)
        return 1 - float(similarity[:, 0].mean() + similarity[:, 1:].mean()) / 2

    start = torch.zeros(len(parts), dtype=torch.float64)
    found = xnes(loss, start, _SPREAD, generations, torch.Generator().manual_seed(0))
    return Searched(parts, found.exp(), attended)


def refits_of(original: nn.Module, moments: dict[str, Tensor], dtype: torch.dtype) -> Refits:
    """How `fc2` and `proj` are fitted again, by the names of MLPs and attentions."""
    readers = {name: mlp.fc2 for name, mlp in mlps_of(original).items()}
    readers |= {name: attention.proj for name, attention in attentions_of(original).items()}
    return {name: ridge(readers[name], moment, dtype) for name, moment in moments.items()}


def prune_by_evolution(
    original: nn.Module, parameters: int, searched: Searched, moments: dict[str, Tensor]
) -> nn.Module:
    """The model of at most so many parameters by what `search` found; `fc2` and `proj` are fitted again by ridge."""
    kept = kept_of(searched.parts, searched.factors, count_params(original) - parameters)
    return shrink(original, kept, refits_of(original, {**moments, **searched.attended}, torch.float64))
