"""What was found out about one architecture."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["EXACT", "Outcome", "SiteKind"]

# The largest relative difference in float64 that rounding explains.
EXACT = 1e-9


@dataclass(frozen=True)
class SiteKind:
    """Attention of one kind: `count` sites of an architecture that are equal but for their weights and their names.

    `host` is the class of the module and `fqn` the first of the sites. `auto` is the mode that `auto` takes, or None.
    `modes` maps every mode that was tried and converts to the largest relative difference between the converted module
    and the original, in float64, where the merged projections are equal: None where there is nothing to compare
    (`qk-diag`). `refused` maps others to their reasons, `auto` among them. `broken` names modes that `inspect` promised
    all the same, and `failed` says what happened where converting, or running what came of it, raised.
    """

    host: str
    fqn: str
    count: int
    auto: str | None = None
    modes: dict[str, float | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    broken: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether every mode that converts changes nothing where it must not."""
        return not self.failed and all(error is None or error <= EXACT for error in self.modes.values())

    @property
    def reason(self) -> str | None:
        """Why `auto` leaves it alone; None where it does not."""
        return None if self.auto else self.refused["auto"]


@dataclass(frozen=True)
class Outcome:
    """One architecture. `error` says why it could not be examined; then it is in no other count.

    `attention` says whether it computes softmax(QK)V somewhere, converted or not.
    """

    library: str
    name: str
    attention: bool = False
    kinds: tuple[SiteKind, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def convert_auto(self) -> bool:
        """Whether `auto` converts at least one site."""
        return any(kind.auto for kind in self.kinds)

    @property
    def convert_any(self) -> bool:
        """Whether some mode converts at least one site."""
        return any(kind.modes for kind in self.kinds)

    @property
    def exact(self) -> bool:
        """Whether it converts, and everything that converts is exact."""
        return self.convert_any and all(kind.exact for kind in self.kinds)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; the library is told around it."""
        document = asdict(self)
        del document["library"]
        return document
