"""Images for training: where they come from, what is wrong with some, and what is held out of them."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import PREP, SIZE, numbered
from PIL import Image

from armour_surgery.errors import DataError
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.images.sources import (
    Pictures,
    check_labels,
    has_split,
    held_out,
    open_pictures,
    open_stream,
    subset,
)


def photo(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def by_class(root: Path, counts: dict[str, int]) -> Path:
    for place, (name, count) in enumerate(counts.items()):
        for number in range(count):
            photo(root / name / f"{number}.png", seed=100 * place + number)
    return root


def opened(source: str | Path, split: str = "train", *, labelled: bool = True, **options: object) -> Pictures:
    return open_pictures(str(source), split, size=SIZE, labelled=labelled, **options)  # type: ignore[arg-type]


def refusal(source: str | Path, split: str = "train", *, labelled: bool = True, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        opened(source, split, labelled=labelled, **options)
    return str(caught.value)


@pytest.mark.parametrize(("link", "target"), [("ant/up", "ant"), ("ant/up", "."), ("up", "."), ("up", "..")])
def test_a_photo_beside_a_link_to_its_parent_counts_once(tmp_path: Path, link: str, target: str) -> None:
    root = by_class(tmp_path / "photos", {"ant": 2, "bee": 3})
    (root / link).symlink_to(root / target)
    assert len(opened(root, labelled=False)) == 5
    pictures = opened(root)
    assert pictures.classes == ("ant", "bee")
    assert [pictures.read(i)[1] for i in range(len(pictures))] == [0, 0, 1, 1, 1]
    # Calibration shows every photo as it is before crops of those seen before, which no other photo equals.
    (shown,) = calibration_batches(str(root), PREP, images=6)
    photos = torch.stack([PREP.tensor(pictures.read(i)[0]) for i in range(5)]).flatten(1)
    assert [int((photos == image.flatten()).all(1).sum()) for image in shown] == [1] * 5 + [0]


def test_a_folder_by_class_and_its_validation_split_share_their_numbers(tmp_path: Path) -> None:
    by_class(tmp_path / "train", {"ant": 2, "bee": 3, "cow": 1})
    by_class(tmp_path / "val", {"bee": 1, "cow": 2})
    train = opened(tmp_path)
    assert train.classes == ("ant", "bee", "cow")
    assert [train.read(i)[1] for i in range(len(train))] == [0, 0, 1, 1, 1, 2]
    val = opened(tmp_path, "val", classes=train.classes)
    assert [val.read(i)[1] for i in range(len(val))] == [1, 2, 2]
    assert val.name(0).endswith("val/bee/0.png")


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    assert "is no folder" in refusal(tmp_path / "none")
    flat = tmp_path / "flat"
    photo(flat / "a.png")
    assert "one folder per class" in refusal(flat)
    empty = by_class(tmp_path / "empty", {"ant": 1})
    (empty / "bee").mkdir()
    assert "bee has no images" in refusal(empty)
    only_val = tmp_path / "only_val"
    by_class(only_val / "val", {"ant": 1})
    assert "no train/" in refusal(only_val)
    assert "has no folder 'dev'" in refusal(only_val, "val", named_split="dev")
    assert "'dog'" in refusal(by_class(tmp_path / "odd", {"dog": 1}), "val", classes=("ant", "bee"))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "no images in" in refusal(nothing, labelled=False)
    assert "have no labels" in refusal("synthetic")
    with pytest.raises(DataError, match="3 classes and the model's head has 7"):
        check_labels(opened(by_class(tmp_path / "three", {"a": 1, "b": 1, "c": 1})), 7)


def test_any_layout_does_where_no_labels_are_needed(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "deep" / "er" / "b.jpg")
    photo(tmp_path / ".hidden" / "c.png")
    (tmp_path / "._a.png").write_bytes(b"what Macs leave")
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    pictures = opened(tmp_path, labelled=False)
    assert [Path(pictures.name(i)).name for i in range(len(pictures))] == ["a.png", "b.jpg"]
    assert pictures.read(0)[1] == -1
    assert not has_split(str(tmp_path), "val", None)


def test_drawn_images_never_end_and_are_the_same_again() -> None:
    pictures = opened("synthetic", labelled=False, per_epoch=5, seed=3)
    assert len(pictures) == 5
    assert pictures.endless
    assert np.array_equal(pictures.read(11)[0], pictures.read(11)[0])
    assert not np.array_equal(pictures.read(11)[0], pictures.read(12)[0])
    training, judged = held_out(pictures, 2)
    assert not np.array_equal(training.read(0)[0], judged.read(0)[0])


def test_joined_sources_take_turns(tmp_path: Path) -> None:
    for number in range(3):
        photo(tmp_path / f"{number}.png", number)
    pictures = opened(f"{tmp_path},synthetic", labelled=False, per_epoch=4)
    names = [pictures.name(i) for i in range(len(pictures))]
    assert [Path(name).name for name in names[::2]] == ["0.png", "1.png", "2.png", "0.png"]
    # Few photos are no reason to draw few.
    assert names[1::2] == [f"drawn image {number}" for number in range(4)]
    assert pictures.read(0)[0].size == (14, 16)


@pytest.mark.parametrize("holdout", [64, 0.3])
def test_no_photo_of_joined_sources_judges_and_trains(tmp_path: Path, holdout: float) -> None:
    for number in range(19):
        photo(tmp_path / f"{number:02}.png", number)
    training, judged = held_out(opened(f"{tmp_path},synthetic", labelled=False, per_epoch=40), holdout)
    seen = {training.name(i) for i in range(len(training))}
    others = {judged.name(i) for i in range(len(judged))}
    assert seen.isdisjoint(others)
    photos = {name for name in others if name.endswith(".png")}
    assert len(photos) == (2 if holdout == 64 else 6)
    assert len(others - photos) == (32 if holdout == 64 else 12)


@pytest.mark.parametrize("labelled", [False, True])
def test_photos_that_calibration_is_not_fitted_to_judge_first(tmp_path: Path, labelled: bool) -> None:
    for number in range(19):
        photo(tmp_path / "ant" / f"{number:02}.png", number)
    pictures = opened(tmp_path, labelled=labelled)
    judged = {Path(name).stem for name in map(held_out(pictures, 2)[1].name, range(2))}
    assert judged == {"07", "15"}
    more = held_out(pictures, 5)[1]
    assert {"07", "15"} < {Path(more.name(index)).stem for index in range(5)}
    # Those are what calibration shows apart: its second batch here.
    apart = list(calibration_batches(str(tmp_path), PREP, images=4, batch_size=2, apart=2))[1]
    wanted = torch.stack([PREP.tensor(pictures.read(index)[0]) for index in (7, 15)])
    assert all(any(torch.equal(one, other) for other in wanted) for one in apart)


def idx(folder: Path, prefix: str, count: int) -> None:
    images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", count, 28, 28) + images.tobytes())
    )
    labels = bytes(i % 10 for i in range(count))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", count) + labels)
    )


def test_pipes_among_images_are_unreadable_and_nobody_waits_for_them(tmp_path: Path) -> None:
    by_class(tmp_path / "train", {"ant": 2, "bee": 1})
    os.mkfifo(tmp_path / "train" / "ant" / "9.png")
    for source in (str(tmp_path), f"torch/image_folder:{tmp_path}"):
        pictures = opened(source)
        assert len(pictures) == 4
        with pytest.raises(ValueError, match=r"9\.png is a pipe"):
            pictures.read(2)
        batches = calibration_batches(source, PREP, images=6)
        assert len(torch.cat(list(batches))) == 6
        assert batches.skipped == 1
    idx(tmp_path, "train", 3)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    os.mkfifo(tmp_path / "train-labels-idx1-ubyte.gz")
    assert "ubyte.gz is a pipe" in refusal(tmp_path)


def test_fashion_mnist_files(tmp_path: Path) -> None:
    idx(tmp_path, "train", 20)
    idx(tmp_path, "t10k", 10)
    train, test = opened(tmp_path), opened(tmp_path, "val")
    assert (len(train), len(test), len(train.classes)) == (20, 10, 10)
    picture, label = train.read(13)
    assert (picture.size, picture.mode, label) == ((28, 28), "L", 3)
    assert np.asarray(picture)[0, 0] == 13 * 28 * 28 % 256
    assert has_split(str(tmp_path), "val", None)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    assert f"{path} cannot be read" in refusal(tmp_path)


def test_digits_are_those_of_the_demo() -> None:
    from armour_surgery.images.digits import digits_split

    train_x, train_y, test_x, _ = digits_split()
    train, test = opened("digits"), opened("digits", "val")
    assert (len(train), len(test)) == (len(train_x), len(test_x))
    picture, label = train.read(5)
    assert label == int(train_y[5])
    assert np.abs(np.asarray(picture) / 127.5 - 1 - train_x[5, 0].numpy()).max() < 0.005


def test_timm_datasets_that_are_indexed(tmp_path: Path) -> None:
    by_class(tmp_path / "train", {"ant": 2, "bee": 1})
    pictures = opened(f"torch/image_folder:{tmp_path}")
    assert [pictures.read(i)[1] for i in range(len(pictures))] == [0, 0, 1]
    assert "cannot open" in refusal("torch/nothing_like_it")
    assert "write PREFIX/NAME:FOLDER" in refusal(f"torch/cifar10:{tmp_path}")


def test_hugging_face_datasets_need_their_package_and_say_so() -> None:
    assert "hfds/nobody/nothing" in refusal("hfds/nobody/nothing")
    with pytest.raises(DataError, match="hfids/nobody/nothing"):
        open_stream("hfids/nobody/nothing", "train", named_split=None, batch_size=2, seed=0)
    assert open_stream("hfds/a/b", "train", named_split=None, batch_size=2, seed=0) is None


@given(count=st.integers(2, 40), share=st.floats(0.05, 0.9))
@settings(max_examples=25, deadline=None)
def test_what_is_held_out_is_not_trained_on(count: int, share: float) -> None:
    pictures = numbered(count)
    try:
        training, judged = held_out(pictures, share)
    except DataError:
        assert share > 1 - 1 / count
        return
    values = [int(np.asarray(part.read(i)[0])[0, 0]) for part in (training, judged) for i in range(len(part))]
    assert sorted(values) == list(range(count))
    assert held_out(pictures, share)[1].name(0) == judged.name(0)


def test_holding_everything_out_is_refused() -> None:
    with pytest.raises(DataError, match="none to train on"):
        held_out(numbered(5), 5)


def test_a_subset_keeps_its_names() -> None:
    part = subset(numbered(9), [4, 2])
    assert [part.name(i) for i in range(len(part))] == ["number 4", "number 2"]
