"""The images of one calibration, and how a model is run on them."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from armour_surgery import hosts
from armour_surgery.errors import CalibrationError
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.initialize import HELD_OUT
from armour_surgery.records import Progress
from armour_surgery.surgery.order import Images

__all__ = ["CalibrationData"]

# Images at once: what a site's activations of one batch take stays small, and a batch is still worth its overhead.
_BATCH = 16


class CalibrationData:
    """The images of one calibration, and how a model is run on them."""

    def __init__(self, model: nn.Module, example: dict[str, Tensor], images: Images, progress: Progress | None) -> None:
        name = next((name for name, value in example.items() if value.is_floating_point() and value.ndim == 4), None)
        if name is None:
            raise CalibrationError(
                f"calibration knows models that take images [B, C, H, W], and {type(model).__name__} takes "
                f"{', '.join(example)}; use init 'joint-svd'"
            )
        self.name = name
        self.source = images.source if isinstance(images.source, str) else "images given in Python"
        self._images = images
        self._progress = progress
        self._like = next(p for p in model.parameters() if p.is_floating_point())
        self._prep = preprocessing(model, example)
        self._size = max(1, min(_BATCH, images.count // 4))

    def call(self, model: nn.Module, batch: Tensor) -> Any:
        """Run a model."""
        return model(**{self.name: batch})

    def features(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """A model's final features and its logits."""
        return hosts.features(model, {self.name: batch})

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
            yield batch.to(self._like)

    def once(self) -> Images:
        """The images, read once and kept, so that they may be asked for again."""
        count = self._images.count
        read = calibration_batches(self._images.source, self._prep, images=count, batch_size=self._size)
        return Images(list(read), count)

    def fresh(self, count: int) -> Iterator[Tensor]:
        """Batches without end, none of pictures that judge: other crops and drawings, or what a caller gave once more.

        `count` batches were read before. Where they cannot be read again, images are drawn.
        """
        source = self._images.source
        if isinstance(source, str | Iterator):
            drawn: Iterable[Tensor] = calibration_batches(
                source if isinstance(source, str) else "synthetic",
                self._prep,
                images=2**40,
                batch_size=self._size,
                seed=1,
                apart=HELD_OUT,
            )
            count = HELD_OUT
        else:
            passes = (
                itertools.islice(
                    calibration_batches(source, self._prep, images=self._images.count, batch_size=self._size), count
                )
                for _ in itertools.count()
            )
            drawn = itertools.chain.from_iterable(passes)
        every = min(HELD_OUT, count)
        for number, batch in enumerate(drawn):
            if number % count % every != every - 1:
                yield batch.to(self._like)
