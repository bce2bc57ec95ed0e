"""How good the features of a converted DINOv2 are: near to the original's, and of use for retrieval."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armour_surgery.hosts import features

NEIGHBORS, TEMPERATURE = 20, 0.07


@dataclass(frozen=True)
class Gallery:
    """Normalized class tokens `[n, D]` of labeled images, and their labels `[n]`."""

    tokens: Tensor
    labels: Tensor


def final_tokens(model: nn.Module, batches: Iterable[Tensor], argument: str) -> Tensor:
    """The tokens after the last norm `[n, 1 + patches, D]`, the class token first."""
    with torch.inference_mode():
        return torch.cat([features(model, {argument: batch})[0] for batch in batches])


def cosines(wanted: Tensor, got: Tensor) -> tuple[float, float]:
    """Mean cosine similarity of class tokens, and of patch tokens, both `[n, 1 + patches, D]`."""
    similarity = F.cosine_similarity(wanted, got, dim=-1)
    return float(similarity[:, 0].mean()), float(similarity[:, 1:].mean())


def at_size(model: nn.Module, size: int) -> nn.Module:
    """A copy of the model for square images of another size; one that takes any size is returned as it is."""
    if not hasattr(model, "set_input_size"):
        return model
    other = copy.deepcopy(model)
    other.set_input_size(size)
    return other


def gray_batches(
    images: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...], batch_size: int = 50
) -> Iterable[Tensor]:
    """Gray images, uint8 `[n, h, w]`, as normalized color batches `[B, 3, size, size]`."""
    shift, scale = torch.tensor(mean).reshape(-1, 1, 1), torch.tensor(std).reshape(-1, 1, 1)
    for chosen in images.split(batch_size):
        pictures = F.interpolate(chosen[:, None].float() / 255, (size, size), mode="bicubic", antialias=True)
        yield (pictures.clamp(0, 1) - shift) / scale


def gallery_of(model: nn.Module, batches: Iterable[Tensor], labels: Tensor, argument: str) -> Gallery:
    """The class tokens that a model gives images."""
    with torch.inference_mode():
        found = [features(model, {argument: batch})[0][:, 0] for batch in batches]
    return Gallery(F.normalize(torch.cat(found), dim=-1), labels)


def knn_accuracy(queries: Gallery, gallery: Gallery) -> float:
    """Top-1 of DINO's weighted vote: the 20 nearest of the gallery, each counting `exp(cosine / 0.07)`."""
    similarity, nearest = (queries.tokens @ gallery.tokens.T).topk(NEIGHBORS, dim=1)
    votes = torch.zeros(len(queries.labels), int(gallery.labels.max()) + 1)
    votes.scatter_add_(1, gallery.labels[nearest], (similarity / TEMPERATURE).exp())
    return float((votes.argmax(1) == queries.labels).float().mean())
