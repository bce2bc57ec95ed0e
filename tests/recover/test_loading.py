"""Batches for training and judging: a place in them is found again, and processes share them without a gap."""

import gc
import io
import random
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import numbered, stream
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler

from armour_surgery.errors import DataError
from armour_surgery.images.sources import Pictures, Stream, open_stream
from armour_surgery.recover.loading import Batch, Layout, evaluation_batches, positions, seeded, training_batches


def pixel(picture: Image.Image) -> torch.Tensor:
    noise = random.random() + float(np.random.random()) + float(torch.rand(()))
    return torch.tensor([float(np.asarray(picture)[0, 0]), noise]).reshape(2, 1, 1)


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
