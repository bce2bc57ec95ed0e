"""Images for training: where they come from, what is wrong with some, and that a place in them can be found again."""

import gc
import gzip
import io
import random
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler

from armour_surgery.errors import DataError, UsageError
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.images.sources import (
    Pictures,
    Stream,
    check_labels,
    has_split,
    held_out,
    open_pictures,
    open_stream,
    subset,
)
from armour_surgery.recover.loading import (
    Batch,
    Layout,
    evaluation_batches,
    positions,
    seeded,
    training_batches,
)
from armour_surgery.recover.recipe import AugmentPart
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.timm_parts import training_transform
from armour_surgery.recover.workload import count_steps, make_layout

SIZE = (3, 12, 10)
PREP = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


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


def numbered(count: int) -> Pictures:
    """Picture i is 4 x 4 pixels of value i."""
    return Pictures(
        "numbers", count, lambda i: (Image.fromarray(np.full((4, 4), i, np.uint8)), i % 3), lambda i: f"number {i}"
    )


def pixel(picture: Image.Image) -> torch.Tensor:
    noise = random.random() + float(np.random.random()) + float(torch.rand(()))
    return torch.tensor([float(np.asarray(picture)[0, 0]), noise]).reshape(2, 1, 1)


# Sources


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
    assert [Path(name).name for name in names[::2]] == ["0.png", "1.png", "2.png"]
    assert names[1::2] == ["drawn image 0", "drawn image 1", "drawn image 2"]
    assert pictures.read(0)[0].size == (14, 16)


def idx(folder: Path, prefix: str, count: int) -> None:
    images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8)
    (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", count, 28, 28) + images.tobytes())
    )
    labels = bytes(i % 10 for i in range(count))
    (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", count) + labels)
    )


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


# Batches


def batches_of(
    pictures: Pictures | Stream, *, start: int = 0, end: int = 6, steps: int = 3, workers: int = 0, **layout: int
) -> list[Batch]:
    shape = Layout(**{"batch": 4, "micro": 2, "accumulate": 2, **layout})
    return list(
        training_batches(pictures, pixel, shape, steps_per_epoch=steps, start=start, end=end, seed=5, workers=workers)
    )


def content(batches: list[Batch]) -> list[list[float]]:
    return [batch.images.flatten().tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_taken_up_in_the_middle_sees_the_same_images_augmented_the_same_way(workers: int) -> None:
    whole = content(batches_of(numbered(13)))
    assert len({tuple(batch) for batch in whole}) == len(whole) == 12
    torch.manual_seed(99)
    random.seed(99)
    assert content(batches_of(numbered(13), start=4, workers=workers)) == whole[8:]


def test_two_processes_share_what_one_would_see() -> None:
    one = content(batches_of(numbered(13), micro=4, accumulate=1))
    two = [content(batches_of(numbered(13), micro=2, accumulate=1, rank=rank, world=2)) for rank in (0, 1)]
    for whole, *parts in zip(one, *two, strict=True):
        assert sorted(whole) == sorted(parts[0] + parts[1])


def test_an_epoch_has_every_image_once_and_the_next_another_order() -> None:
    def order(epoch: int, **options: int) -> list[int]:
        return positions(12, epoch, **{"seed": 1, "repeats": 1, "count": 12, **options})

    assert sorted(order(0)) == list(range(12)) != order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, seed=2)
    assert order(0, count=30)[:12] == order(0)
    assert set(Counter(order(0, count=24)).values()) == {2}


@given(length=st.integers(300, 900), world=st.sampled_from([1, 2, 4]))
@settings(max_examples=10, deadline=None)
def test_repeated_augmentation_is_deits(length: int, world: int) -> None:
    """DeiT's sampler deals the same positions out to processes; only the order of images is drawn otherwise."""
    count = length // 256 * 256
    ours = positions(length, 0, seed=0, repeats=3, count=count)
    assert all(len(set(ours[i : i + 3])) == 1 for i in range(0, count - 2, 3))
    images = list(dict.fromkeys(ours))
    for rank in range(world):
        sampler = RepeatAugSampler(range(length), num_replicas=world, rank=rank, shuffle=False)
        theirs = list(sampler)
        mine = ours[rank::world][: len(theirs)]
        assert [images.index(i) for i in mine] == theirs[: len(mine)]
        assert len(mine) == len(theirs)


def test_endless_pictures_are_new_in_every_epoch() -> None:
    endless = Pictures("e", 12, numbered(200).read, lambda i: str(i), endless=True)
    numbers = [number for batch in batches_of(endless) for number in batch.numbers]
    assert numbers == list(range(24))


def broken_at(count: int, *bad: int) -> Pictures:
    good = numbered(count)

    def read(index: int) -> tuple[Image.Image, int]:
        if index in bad:
            raise OSError("truncated")
        return good.read(index)

    return Pictures("some", count, read, good.name)


def test_a_broken_image_is_named_and_replaced_while_training() -> None:
    batches = batches_of(broken_at(12, 7), end=3)
    names = [name for batch in batches for name in batch.broken]
    assert names == ["number 7 (OSError: truncated)"]
    assert sum(len(batch.labels) for batch in batches) == 12
    assert 7 not in [number for batch in batches for number in batch.numbers]
    with pytest.raises(DataError, match="images in a row cannot be read, the last: number"):
        batches_of(broken_at(6, *range(6)), end=1, steps=1)


def test_a_broken_image_is_named_and_left_out_when_judging() -> None:
    batches = list(evaluation_batches(broken_at(10, 2, 4, 5), pixel, 2))
    assert [number for batch in batches for number in batch.numbers] == [0, 1, 3, 6, 7, 8, 9]
    assert len([name for batch in batches for name in batch.broken]) == 3
    assert [len(batch.labels) for batch in batches] == [2, 1, 0, 2, 2]


@given(count=st.integers(1, 23), world=st.integers(1, 4), size=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_judging_sees_every_image_once_in_equally_many_batches(count: int, world: int, size: int) -> None:
    parts = [list(evaluation_batches(numbered(count), pixel, size, rank=rank, world=world)) for rank in range(world)]
    assert sorted(number for part in parts for batch in part for number in batch.numbers) == list(range(count))
    assert len({len(part) for part in parts}) == 1


def stream(count: int | None = 10) -> Stream:
    def epoch(number: int) -> "object":
        return iter([(numbered(256).read((10 * number + i) % 256)[0], i % 3) for i in range(10)])

    return Stream("wds/some", count, epoch)  # type: ignore[arg-type]


def test_a_stream_goes_round_and_is_taken_up_where_it_was() -> None:
    whole = content(batches_of(stream(), steps=3, end=6))
    assert len(whole) == 12
    assert content(batches_of(stream(), steps=3, start=2, end=6)) == whole[4:]
    assert whole[0][0] == 0.0
    assert whole[6][0] == 10.0
    judged = [list(evaluation_batches(stream(), pixel, 2, rank=rank, world=2)) for rank in (0, 1)]
    assert sorted(b.images[i, 0].item() for part in judged for b in part for i in range(len(b.labels))) == list(
        range(10)
    )


def write_shards(root: Path, shards: int, images: int) -> None:
    """A dataset for webdataset: pictures whose gray value is their number."""
    number = 0
    for shard in range(shards):
        with tarfile.open(root / f"some-{shard}.tar", "w") as archive:
            for _ in range(images):
                picture = io.BytesIO()
                Image.new("RGB", (5, 4), (number, number, number)).save(picture, "PNG")
                for name, content_ in ((f"{number:04d}.png", picture.getvalue()), (f"{number:04d}.cls", b"1")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content_)
                    archive.addfile(entry, io.BytesIO(content_))
                number += 1


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_processes_share_a_stream_to_train_and_each_reads_all_of_it_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("webdataset")
    write_shards(tmp_path, 4, 3)
    split = "some-{0..3}.tar|12"

    def numbers(kind: str, rank: int) -> list[int]:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        found = open_stream(f"wds/:{tmp_path}", kind, named_split=split, batch_size=2, seed=0)
        assert found is not None
        assert found.count == 12
        assert [p.getpixel((0, 0)) for p, _ in found.epoch(1)] == [p.getpixel((0, 0)) for p, _ in found.epoch(1)]
        if kind == "train":
            return [picture.getpixel((0, 0))[0] for picture, _ in found.epoch(0)]
        batches = evaluation_batches(found, lambda p: torch.tensor(p.getpixel((0, 0))), 2, rank=rank, world=2)
        return [int(image[0]) for batch in batches for image in batch.images]

    shares = [numbers("train", rank) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(12))
    judged = [numbers("val", rank) for rank in (0, 1)]
    gc.collect()  # while its warnings are let through
    assert len(judged[0]) == len(judged[1]) == 6
    assert sorted(judged[0] + judged[1]) == list(range(12))


def test_seeded_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    with seeded(4, 2):
        first = (random.random(), float(np.random.random()), float(torch.rand(())))
    with seeded(4, 2):
        assert first == (random.random(), float(np.random.random()), float(torch.rand(())))
    with seeded(4, 3):
        assert first != (random.random(), float(np.random.random()), float(torch.rand(())))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


# Plans and transforms


def test_a_plan_that_does_not_come_out_even_says_so() -> None:
    def recipe(*settings: str) -> "object":
        return load_recipe("recover", settings)

    layout = make_layout(recipe("data.batch_size=24", "data.micro_batch=4"), 1, 2)  # type: ignore[arg-type]
    assert layout == Layout(24, 4, 3, 1, 2)
    for settings_, world, text in (
        (["data.batch_size=5"], 2, "does not divide among 2 processes"),
        (["data.batch_size=8", "data.micro_batch=8"], 2, "does not divide the 4 images"),
        (["data.batch_size=3", "augment.mixup=0.8"], 1, "make data.micro_batch even"),
    ):
        with pytest.raises(UsageError, match=text):
            make_layout(recipe(*settings_), 0, world)  # type: ignore[arg-type]
    per_epoch = "data.images_per_epoch=null"
    assert count_steps(numbered(33), recipe(per_epoch)) == 2  # type: ignore[arg-type]
    with pytest.raises(DataError, match="has 5 images to train on"):
        count_steps(numbered(5), recipe(per_epoch))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="data.images_per_epoch=N"):
        count_steps(stream(None), recipe(per_epoch))  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["random-resized", "pad", "none"])
def test_transforms_give_what_the_model_takes(channels: int, crop: str) -> None:
    prep = Preprocessing((channels, 12, 10), (0.4,) * channels, (0.2,) * channels)
    augment = AugmentPart(crop=crop, auto="rand-m9-mstd0.5-inc1", erase=1.0, padding=2)  # type: ignore[arg-type]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 14, 3), dtype=np.uint8))
    transform = training_transform(prep, augment)
    with seeded(1):
        first = transform(picture)
    assert first.shape == (channels, 12, 10)
    assert first.dtype is torch.float32
    with seeded(1):
        assert torch.equal(first, transform(picture))
    with seeded(2):
        assert not torch.equal(first, transform(picture))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="augment.auto='rand-q9'"):
        training_transform(PREP, AugmentPart(auto="rand-q9"))


def test_a_subset_keeps_its_names() -> None:
    part = subset(numbered(9), [4, 2])
    assert [part.name(i) for i in range(len(part))] == ["number 4", "number 2"]
