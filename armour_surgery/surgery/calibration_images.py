"""The images of one calibration, and how a model is run on them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.calls import run
from armour_surgery.errors import CalibrationError
from armour_surgery.examples import images_in
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.initialize import HELD_OUT
from armour_surgery.initialize.placement import EXACT, Placement
from armour_surgery.measure.fidelity import Answer
from armour_surgery.records import Progress
from armour_surgery.spelled import names_only
from armour_surgery.surgery.order import SYNTHETIC, Images

__all__ = ["CalibrationData"]

# Images in a batch.
_BATCH = 16
# More images than any run will ask for.
_WITHOUT_END = 2**40


def _images_argument(model: nn.Module, example: dict[str, Tensor]) -> str:
    name = images_in(example)
    if name is not None:
        return name
    raise CalibrationError(
        f"calibration knows models that take images [B, C, H, W], and {type(model).__name__} takes "
        f"{', '.join(example)}; use init 'joint-svd'"
    )


class CalibrationData:
    """The images of one calibration, and how a model is run on them."""

    def __init__(
        self,
        model: nn.Module,
        example: dict[str, Tensor],
        images: Images,
        progress: Progress | None,
        placement: Placement | None = None,
    ) -> None:
        self.name = _images_argument(model, example)
        # Names alone, since it is kept with the model, which travels.
        self.source = names_only(images.source) if isinstance(images.source, str) else "images given in Python"
        self.drawn = isinstance(images.source, str) and images.source == SYNTHETIC
        self._images = images
        self._progress = progress
        weight = next(p for p in model.parameters() if p.is_floating_point())
        self._device = weight.device if placement is None else placement.device
        self._dtype = weight.dtype if weight.dtype in EXACT else torch.float32
        self._prep = preprocessing(model, example)
        # Few images are cut into smaller batches: some of them must be left to judge by.
        self._size = max(1, min(_BATCH, images.count // 4))

    def call(self, model: nn.Module, batch: Tensor) -> Any:
        """Run a model."""
        return run(model, {self.name: batch})

    def features(self, model: nn.Module, batch: Tensor) -> Answer:
        """A model's final features and its logits."""
        return hosts.features(model, {self.name: batch})

    def answer(self, model: nn.Module, batch: Tensor) -> Answer:
        """The same without gradients, to compare with."""
        with torch.no_grad():
            return self.features(model, batch)

    def counter(self, what: str, total: int) -> Callable[..., None]:
        """Something to call whenever one more of `total` is done."""
        numbers = itertools.count(1)

        def done(*_: object) -> None:
            if self._progress is not None:
                self._progress(what, next(numbers), total)

        return done

    def batches(self) -> Iterator[Tensor]:
        """The images, every so-many-th batch of pictures that are in no other."""
        count = self._images.count
        drawn = calibration_batches(
            self._images.source,
            self._prep,
            images=count,
            batch_size=self._size,
            apart=min(HELD_OUT, -(-count // self._size)),
        )
        for number, batch in enumerate(drawn, start=1):
            if self._progress is not None:
                self._progress("reading images", min(number * self._size, count), count)
            yield batch.to(self._device, self._dtype)

    def once(self) -> Images:
        """The images, read once and kept, so that they may be asked for again; in batches of which some can judge."""
        count = self._images.count
        read = calibration_batches(self._images.source, self._prep, images=count, batch_size=self._size)
        pieces: list[Tensor] = []
        for batch in read:
            # Sites are measured on the first few images, which must not be one large batch of a caller's.
            pieces += torch.split(batch, self._size)
        return Images(pieces, count)

    def fresh(self, count: int) -> Iterator[Tensor]:
        """Batches without end, none of pictures that judge: other crops and drawings, or what a caller gave once more.

        `count` batches were read before. Where they cannot be read again, images are drawn.
        """
        source = self._images.source
        if isinstance(source, str | Iterator):
            again: Iterator[Tensor] = calibration_batches(
                source if isinstance(source, str) else SYNTHETIC,
                self._prep,
                images=_WITHOUT_END,
                batch_size=self._size,
                seed=1,
                apart=HELD_OUT,
            )
            count = HELD_OUT
        else:
            again = self._pass_after_pass(source, count)
        # Every so-many-th batch judges, counted within a pass as `calibrate` counted it.
        every = min(HELD_OUT, count)
        for number, batch in enumerate(again):
            if number % count % every != every - 1:
                yield batch.to(self._device, self._dtype)

    def _pass_after_pass(self, source: Iterable[Any], count: int) -> Iterator[Tensor]:
        """The first `count` batches of a source that can be read again, over and over."""
        while True:
            read = calibration_batches(source, self._prep, images=self._images.count, batch_size=self._size)
            yield from itertools.islice(read, count)
