"""Calibration images come from every source that is named, and a source that is none is refused."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from pictures import PREP, collect, level, photos, picture
from PIL import Image

from armour_surgery.errors import CalibrationError
from armour_surgery.images.for_calibration import calibration_batches

# Sources and their names.


def test_sources_joined_by_a_comma_give_half_each(tmp_path: Path) -> None:
    drawn = collect("synthetic", 3)
    mixed = collect(f"{photos(tmp_path, 4)}, synthetic", 7)
    assert torch.equal(mixed[1::2], collect("synthetic,synthetic", 6)[1::2])
    assert sorted(map(level, mixed[::2])) == [0, 1, 2, 3]
    assert torch.equal(collect("synthetic,synthetic", 5)[::2], drawn)
    assert len({float(image.sum()) for image in collect("synthetic,synthetic", 6)}) == 6
    comma = photos(tmp_path / "a,b", 2)
    assert sorted(map(level, collect(str(comma), 2))) == [0, 1]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such", "folder /no/such does not exist; check the path, or use synthetic"),
        ("synthetic,/no/such", "folder /no/such does not exist"),
        ("synthetic,", "'synthetic,' has an empty part"),
        ("", "'' has an empty part"),
        ("imagenet/val", "folder imagenet/val does not exist"),
        (Path("no_such"), "folder no_such does not exist"),
        (5, "calibration is an int; pass a folder"),
        (None, "calibration is a NoneType"),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_batches(source, PREP, images=4)


def test_paths_that_are_no_folders_of_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CalibrationError, match=rf"no images in {tmp_path} or below it \(looked for .*\.webp"):
        calibration_batches(tmp_path, PREP, images=4)
    with pytest.raises(CalibrationError, match=r"notes\.txt is a file; pass the folder that holds the images$"):
        calibration_batches(tmp_path / "notes.txt", PREP, images=4)
    photos(tmp_path, 1)
    with pytest.raises(CalibrationError, match=rf"0\.png is one image; pass the folder .*: {tmp_path}$"):
        calibration_batches(str(tmp_path / "0.png"), PREP, images=4)


@pytest.mark.parametrize("option", [{"images": 0}, {"images": -3}, {"batch_size": 0}, {"seed": -1}, {"images": 2.5}])
def test_numbers_that_are_wrong(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(CalibrationError, match=f"{name} of the calibration must be [01] or more, not {value}"):
        calibration_batches("synthetic", PREP, **{"images": 4, **option})


# Datasets of timm.


def test_a_dataset_of_timm(tmp_path: Path) -> None:
    photos(tmp_path, 5, "train/class_{}/x.png")
    source = f"torch/image_folder:{tmp_path}"
    images = collect(source, 5)
    assert sorted(map(level, images)) == list(range(5))
    again = collect(source, 12)
    assert torch.equal(again[:5], images)
    assert len({image.numpy().tobytes() for image in again}) == 12
    (tmp_path / "train" / "class_2" / "x.png").write_text("x")
    batches = calibration_batches(source, PREP, images=8)
    assert 2 not in map(level, torch.cat(list(batches)))
    assert batches.skipped == 1


def test_a_stream_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            return ((picture(number), 0) for number in range(3))

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    assert [level(image) for image in collect("torch/stream", 5)] == [0, 1, 2, 0, 1]


def test_datasets_that_timm_cannot_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"hfds/org/name needs the Python package datasets, .*; install it"):
        calibration_batches("hfds/org/name", PREP, images=4)
    monkeypatch.undo()
    for source, where in (("torch/cifar10", "without a folder"), (f"torch/cifar10:{tmp_path}", f"in {tmp_path}")):
        with pytest.raises(CalibrationError, match=rf"cannot open the dataset torch/cifar10 {where}: .*NAME:FOLDER"):
            calibration_batches(source, PREP, images=4)
    assert capfd.readouterr().out == ""


def test_a_folder_that_is_called_like_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "torch" / "mine", 2)
    monkeypatch.chdir(tmp_path)
    assert sorted(map(level, collect("torch/mine", 2))) == [0, 1]


BATCHES = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WRAPPINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda batch: batch,
    "tuple": lambda batch: (batch, torch.zeros(4)),
    "list": lambda batch: [batch, ["a", "b", "c", "d"]],
    "one": lambda batch: [batch],
    "dict": lambda batch: {"labels": torch.zeros(4), "pixel_values": batch},
    "features": lambda batch: transformers.BatchFeature({"pixel_values": batch}),
}


# Batches that a caller made.


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_batches_are_used_as_they_are(wrapping: str) -> None:
    wrap = WRAPPINGS[wrapping]
    drawn: list[int] = []

    def stream() -> Iterator[Any]:
        for number, batch in enumerate(BATCHES):
            drawn.append(number)
            yield wrap(batch)

    batches = calibration_batches(stream(), PREP, images=6)
    assert drawn == []
    found = list(batches)
    assert drawn == [0, 1]
    assert torch.equal(torch.cat(found), BATCHES.flatten(0, 1)[:6])
    assert [len(batch) for batch in found] == [4, 2]
    assert torch.equal(collect([wrap(batch) for batch in BATCHES], 100), BATCHES.flatten(0, 1))


def test_loaders_and_whole_tensors() -> None:
    images = BATCHES.flatten(0, 1)
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(12))
    assert torch.equal(collect(torch.utils.data.DataLoader(dataset, batch_size=5), 8), images[:8])
    assert [len(batch) for batch in calibration_batches(images, PREP, images=9, batch_size=4)] == [4, 4, 1]
    assert torch.equal(collect({"pixel_values": images}, 3), images[:3])
    wanted = images.clone().requires_grad_()
    assert not collect([wanted], 3).requires_grad
    assert collect([images.bfloat16()], 3).dtype == torch.bfloat16
    used = iter([images])
    next(used)
    with pytest.raises(CalibrationError, match="yields no images.*used up before"):
        collect(used)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("x.png", "batch 2 is a str; pass float tensors"),
        ((1, 2), "batch 2 is a tuple of int, int; pass"),
        ([], "batch 2 is a list of nothing"),
        ({"image": 1}, r"batch 2 is a dict with image; pass .*pixel_values"),
        (np.zeros((2, 3, 16, 16)), "batch 2 is a ndarray"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"the type uint8; divide .* mean \(0\.5, 0\.4, 0\.3\) and std"),
        (torch.zeros(3, 16, 16), r"the shape \[3, 16, 16\].*\[B, 3, 16, 16\]; is it a dataset\? pass a DataLoader"),
        (torch.zeros(2, 768), r"the shape \[2, 768\], and the model takes image batches \[B, 3, 16, 16\]$"),
        (torch.zeros(2, 1, 16, 16), r"1 channels \(shape \[2, 1, 16, 16\]\), and the model takes 3"),
        (torch.zeros(2, 3, 16, 32), r"\[2, 3, 16, 32\], and the model takes \[B, 3, 16, 16\]; resize .* to 16x16"),
        (torch.full((2, 3, 16, 16), torch.nan), r"batch 2 \(images 5 to 6\) holds 1536 NaN or infinite"),
        (torch.full((2, 3, 16, 16), torch.inf), "holds 1536 NaN or infinite"),
    ],
)
def test_batches_that_are_wrong(batch: Any, message: str) -> None:
    batches = calibration_batches([BATCHES[0], batch], PREP, images=20)
    assert torch.equal(next(batches), BATCHES[0])
    with pytest.raises(CalibrationError, match=message) as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_blank_images(tmp_path: Path) -> None:
    flat = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    with pytest.raises(CalibrationError, match="all 4 calibration images are blank: each has one color"):
        collect([flat])
    assert len(collect([flat, BATCHES[0]], 20)) == 8
    for number in range(3):
        Image.new("RGB", (20, 20), (9 * number, 40, 80)).save(tmp_path / f"{number}.png")
    with pytest.raises(CalibrationError, match="all 5 calibration images are blank"):
        collect(tmp_path, 5)


def test_nothing_is_yielded() -> None:
    for empty in ([], iter(()), [torch.zeros(0, 3, 16, 16)]):
        with pytest.raises(CalibrationError, match="yields no images"):
            collect(empty)
