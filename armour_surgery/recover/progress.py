"""What a run knows about itself besides its tensors. It travels in the checkpoint, whose keys are the names here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Best", "RunProgress"]


@dataclass(frozen=True)
class Best:
    """Which weights held-out images judge best so far: their score, and all that was `found` about them.

    They are those after `step` (0 for the ones that training started from), or with `average` the moving average then.
    """

    score: float
    step: int
    average: bool
    found: dict[str, float]


@dataclass
class RunProgress:
    """`start` and `last`: what held-out images said at the start and last. `seconds`: of training alone.

    `broken` counts how often each image that could not be read was passed over, in this process.
    """

    best: Best | None = None
    start: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    broken: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunProgress":
        """Read `to_dict` again, among whatever else a checkpoint says."""
        best = Best(**values["best"]) if values["best"] is not None else None
        return cls(best, values["start"], values["last"], values["seconds"], values["broken"])
