"""Batches whose every random number follows from (seed, epoch, position), so that a run can be taken up anywhere.

Whatever the number of workers or processes, image p of epoch e is the same one, augmented the same way. Nothing about
random numbers has to be stored: the number of steps done says it all.
"""

import hashlib
import itertools
import math
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from armour_surgery.errors import DataError
from armour_surgery.images.sources import Pictures, Stream

__all__ = ["Batch", "Layout", "evaluation_batches", "positions", "seeded", "training_batches"]

Transform = Callable[[Image.Image], Tensor]
# (epoch, position in it, index of the image)
Key = tuple[int, int, int]
# (image, label, index, what could not be read on the way to it)
View = tuple[Tensor, int, int, list[str]]
# So many images in a row that cannot be read are no accident.
MOST_BROKEN = 64


@dataclass(frozen=True)
class Batch:
    """Images `[B, C, H, W]`, labels `[B]` (-1 without one), their numbers, and what could not be read."""

    images: Tensor
    labels: Tensor
    numbers: list[int]
    broken: list[str] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        """Called by DataLoader's thread."""
        return Batch(self.images.pin_memory(), self.labels.pin_memory(), self.numbers, self.broken)


@dataclass(frozen=True)
class Layout:
    """How a global batch is spread: `batch = world * accumulate * micro` images make one step."""

    batch: int
    micro: int
    accumulate: int
    rank: int = 0
    world: int = 1


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, Python's, numpy's and torch's random numbers (on the CPU) follow from `key`; outside nothing changes."""
    seed = _number(*key)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed, which would seed the GPUs too, and nobody could put those back at no cost.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def positions(length: int, epoch: int, *, seed: int, repeats: int, count: int) -> list[int]:
    """Which image is at each of the first `count` positions of an epoch, over all processes.

    A new order for every epoch. With `repeats` each image comes so many times in a row, and since processes take
    positions in turns, they get other versions of it (DeiT's repeated augmentation); an epoch then has about
    `length / repeats` different images. An epoch longer than the data goes on with another order.
    """
    indices: list[int] = []
    turn = 0
    while True:
        generator = torch.Generator().manual_seed(_number(seed, epoch, turn))
        order = torch.randperm(length, generator=generator).repeat_interleave(repeats)
        indices += order[: count - len(indices)].tolist()
        if len(indices) >= count:
            return indices
        turn += 1


def _number(*key: int) -> int:
    """A seed of 63 bits, which torch takes, for which keys that are alike are as far apart as any others."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()) >> 1


class _Steps:
    """Batches of (epoch, position, index) for one process, from step `start` on: DataLoader's batch_sampler."""

    def __init__(
        self, pictures: Pictures, layout: Layout, steps_per_epoch: int, start: int, end: int, seed: int, repeats: int
    ) -> None:
        self._pictures, self._layout = pictures, layout
        self._per_epoch, self._range = steps_per_epoch, range(start, end)
        self._seed, self._repeats = seed, repeats

    def __len__(self) -> int:
        return len(self._range) * self._layout.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        layout, known = self._layout, -1
        order: list[int] = []
        for step in self._range:
            epoch, place = divmod(step, self._per_epoch)
            if epoch != known and not self._pictures.endless:
                count = self._per_epoch * layout.batch
                order = positions(len(self._pictures), epoch, seed=self._seed, repeats=self._repeats, count=count)
                known = epoch
            first = place * layout.batch
            keys: list[Key] = []
            # Processes take positions in turns, so that whatever their number a step has the same images.
            for position in range(first + layout.rank, first + layout.batch, layout.world):
                # Endless images are never seen twice: they are numbered on from epoch to epoch.
                offset = epoch * self._per_epoch * layout.batch
                keys.append((epoch, position, offset + position if self._pictures.endless else order[position]))
            for begin in range(0, len(keys), layout.micro):
                yield keys[begin : begin + layout.micro]


class _Views(Dataset[View]):
    """Augmented pictures by (epoch, position, index). One that cannot be read is replaced by the next that can."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self._pictures, self._transform, self._seed = pictures, transform, seed

    def __getitem__(self, key: Key) -> View:
        epoch, position, index = key
        broken: list[str] = []
        while True:
            try:
                picture, label = self._pictures.read(index)
                break
            except Exception as error:
                # Every image format has its own way of being damaged.
                broken.append(f"{self._pictures.name(index)} ({type(error).__name__}: {error})")
                if len(broken) >= min(MOST_BROKEN, len(self._pictures)):
                    raise DataError(
                        f"{len(broken)} images in a row cannot be read, the last: {broken[-1]}; copy them again"
                    ) from error
                index = (index + 1) % len(self._pictures)
        with seeded(self._seed, epoch, position):
            return self._transform(picture), label, index, broken


class _StreamViews(IterableDataset[View]):
    """One pass over a stream, augmented; what was seen before (`skip` per worker) is read and dropped."""

    def __init__(self, stream: Stream, transform: Transform, seed: int, epoch: int) -> None:
        self._stream, self._transform, self._seed, self._epoch = stream, transform, seed, epoch

    def __iter__(self) -> Iterator[View]:
        worker = get_worker_info()
        for position, (picture, label) in enumerate(self._stream.epoch(self._epoch)):
            with seeded(self._seed, self._epoch, worker.id if worker else 0, position):
                yield self._transform(picture), int(label), position, []


def _stacked(views: list[View]) -> Batch:
    images, labels, numbers, broken = zip(*views, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), list(numbers), list(itertools.chain(*broken)))


def _loader(dataset: Any, workers: int, pin: bool, **options: Any) -> "DataLoader[Any]":
    # What a dataset holds are functions, which only a fork hands to a worker.
    fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    context = "fork" if fork else None
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=context,
        worker_init_fn=_ignore_interrupts,
        **options,
    )


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; the one that trains decides when its workers stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_batches(
    data: Pictures | Stream,
    transform: Transform,
    layout: Layout,
    *,
    steps_per_epoch: int,
    start: int,
    end: int,
    seed: int,
    repeats: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Micro-batches of steps `start` to `end`, `layout.accumulate` of them for each step.

    Raises:
        DataError: while iterating: no image can be read, or a stream gives none.
    """
    if isinstance(data, Pictures):
        steps = _Steps(data, layout, steps_per_epoch, start, end, seed, repeats)
        views = _Views(data, transform, seed)
        yield from _loader(views, workers, pin, batch_sampler=steps, collate_fn=_stacked)
        return
    # A stream is read in order alone: what the steps before `start` had of its epoch is read again, and skipped.
    epoch, place = divmod(start, steps_per_epoch)
    skip, left = place * layout.accumulate, (end - start) * layout.accumulate
    while left > 0:
        wanted = min(left, steps_per_epoch * layout.accumulate - skip)
        for batch in itertools.islice(_stream_epoch(data, transform, layout, epoch, seed, workers, pin), skip, None):
            yield batch
            wanted, left = wanted - 1, left - 1
            if not wanted:
                break
        epoch, skip = epoch + 1, 0


def _stream_epoch(
    stream: Stream, transform: Transform, layout: Layout, epoch: int, seed: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """A whole epoch's micro-batches, going round again where the stream is shorter."""
    for turn in itertools.count():
        # Another turn is another epoch to the stream, with a number that no run gets to.
        views = _StreamViews(stream, transform, seed, epoch + 1_000_003 * turn)
        given = 0
        for batch in _loader(views, workers, pin, batch_size=layout.micro, drop_last=True, collate_fn=_stacked):
            given += 1
            yield batch
        if not given:
            raise DataError(
                f"{stream.source} gives fewer than {layout.micro} images to this process; lower data.micro_batch or "
                "data.workers"
            )


class _Plain(Dataset[tuple[Tensor | None, int, int, list[str]]]):
    """Pictures as a model sees them when it is evaluated. One that cannot be read is left out."""

    def __init__(self, pictures: Pictures, transform: Transform) -> None:
        self._pictures, self._transform = pictures, transform

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, int, list[str]]:
        try:
            picture, label = self._pictures.read(index)
            return self._transform(picture), label, index, []
        except DataError:
            # Not about this image but about the data as a whole.
            raise
        except Exception as error:
            # Every image format has its own way of being damaged.
            return None, -1, index, [f"{self._pictures.name(index)} ({type(error).__name__}: {error})"]


def _whole(items: list[tuple[Tensor | None, int, int, list[str]]]) -> Batch:
    """The images of a batch that could be read; it may be left without any."""
    images, labels, numbers, broken = [], [], [], []
    for image, label, number, names in items:
        broken += names
        if image is not None:
            images.append(image)
            labels.append(label)
            numbers.append(number)
    return Batch(torch.stack(images) if images else torch.empty(0), torch.tensor(labels), numbers, broken)


def evaluation_batches(
    data: Pictures | Stream,
    transform: Transform,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Every image once over all processes, the same number of batches in each; some may be empty.

    Of a stream each process reads all, and keeps its share.
    """
    if isinstance(data, Stream):
        mine = itertools.islice(data.epoch(0), rank, limit, world)
        while block := list(itertools.islice(mine, batch_size)):
            yield _whole([(transform(picture), int(label), -1, []) for picture, label in block])
        return
    total = len(data) if limit is None else min(limit, len(data))
    indices = list(range(rank, total, world))
    blocks = [indices[begin : begin + batch_size] for begin in range(0, len(indices), batch_size)]
    views = _Plain(data, transform)
    yield from _loader(views, workers, False, batch_sampler=blocks, collate_fn=_whole)
    # Who has fewer batches goes on with empty ones: a sharded model only runs where all processes run it.
    longest = math.ceil(math.ceil(total / world) / batch_size)
    yield from (_whole([]) for _ in range(longest - len(blocks)))
