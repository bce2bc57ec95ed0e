"""Hits and agreements are counted right, in batches of any size."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from armour_surgery.images.sources import Pictures
from armour_surgery.measure.accuracy import Choices, agreement, choices, confusion, real_hits, relabelled_hits, top_hits
from armour_surgery.recover.loading import evaluation_batches


def made(top: list[list[int]], labels: list[int], numbers: list[int] | None = None) -> Choices:
    return Choices(numbers or list(range(len(labels))), torch.tensor(labels), torch.tensor(top), [])


def test_counts_by_hand() -> None:
    one = made([[1, 0, 2], [2, 1, 0], [0, 1, 2]], [1, 0, 2], [7, 8, 9])
    two = made([[1, 2, 0], [0, 1, 2]], [1, 0], [9, 7])
    assert top_hits(one) == (1, 3)
    assert agreement(one, two) == (0, 2)
    assert confusion(one, 3).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    real = {"a7": [3, 1], "a8": [], "a9": [2]}
    assert real_hits(one, lambda number: f"val/a{number}", real) == (1, 2, 2)


def test_models_that_number_classes_otherwise_agree_by_what_they_mean() -> None:
    one, two = made([[0], [1], [1]], [0, 1, 1]), made([[2], [0], [3]], [2, 0, 0])
    assert agreement(one, two) == (0, 3)
    assert agreement(one, two, {2: 0, 0: 1}) == (2, 3)


def test_another_order_of_classes_shows() -> None:
    labels = [label for label in range(3) for _ in range(4)]
    turned = made([[(label + 1) % 3] for label in labels], labels)
    assert relabelled_hits(turned) == (0, 6, 6)
    assert relabelled_hits(made([[label] for label in labels], labels)) == (6, 6, 6)
    # One class that is taken for everything is no order.
    assert relabelled_hits(made([[2]] * 12, labels)) == (2, 2, 6)
    assert relabelled_hits(made([[0]], [0])) == (0, 0, 0)


def test_chance_looks_like_no_order() -> None:
    drawn = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 20
    right, would_be, images = relabelled_hits(
        made(torch.randint(20, (400, 1), generator=drawn).tolist(), labels.tolist())
    )
    assert images == 200
    assert abs(would_be - right) < 2 * (would_be + right) ** 0.5


@given(st.integers(1, 30), st.integers(2, 9), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_choices_do_not_depend_on_batches(count: int, classes: int, size: int, seed: int) -> None:
    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))
    pictures = Pictures(
        "n", count, lambda i: (Image.fromarray(np.full((1, 1), i, np.uint8)), int(labels[i])), lambda i: str(i)
    )

    def tensor(picture: Image.Image) -> torch.Tensor:
        return torch.tensor(float(np.asarray(picture)[0, 0])).reshape(1, 1, 1)

    found = choices(lambda images: logits[images.flatten().long()], evaluation_batches(pictures, tensor, size))
    first = int((logits.argmax(1) == labels).sum())
    five = int((logits.topk(min(5, classes)).indices == labels[:, None]).any(1).sum())
    assert top_hits(found) == (first, five)
    assert int(confusion(found, classes).sum()) == count
    assert int(confusion(found, classes).diagonal().sum()) == first
