"""What a model is run on can be written down and read again, numbers and nesting with it."""

import json

import torch

from armour_surgery.examples import batch_of, rebuilt, recorded


def test_nesting_whole_numbers_and_flags_are_kept() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 4]], dtype=torch.int32)
    images = [torch.empty(3, 8, 10), {"mask": torch.tensor([True, False])}]
    example = {"part:images": images, "grid": grid, "interpolate": True, "size": None}
    shapes, values = json.loads(json.dumps(recorded(example)))
    again = rebuilt(shapes, values, torch.float64)
    image, masked = again["part:images"]
    assert (image.shape, image.dtype, image.device.type) == ((3, 8, 10), torch.float64, "meta")
    assert torch.equal(masked["mask"], torch.tensor([True, False]))
    assert torch.equal(again["grid"], grid)
    assert again["grid"].dtype == torch.int32
    assert (again["interpolate"], again["size"]) == (True, None)


def test_images_are_counted_by_their_sizes_where_they_are_packed() -> None:
    assert batch_of({"pixel_values": torch.empty(48, 12), "grid": torch.tensor([[1, 4, 6], [1, 4, 6]])}) == 2
    assert batch_of({"x": torch.empty(5, 3, 8, 8), "mask": torch.empty(1, 4, 4)}) == 5
