"""The outcomes of all architectures, counted."""

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from armour_surgery.coverage.examine import plain_reason
from armour_surgery.coverage.outcome import Outcome

__all__ = ["Coverage", "LibraryCount", "versions"]


@dataclass(frozen=True)
class LibraryCount:
    """How many architectures of a library do what; `refused` counts those with attention of which `auto` converts none,
    by reason: one that has several is counted for each. `failed` are those that could not be examined, with the reason.
    """

    architectures: int
    with_attention: int
    convert_auto: int
    convert_any: int
    exact: int
    refused: dict[str, int]
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The contract's keys, and the reasons of the errors."""
        return {
            "architectures": self.architectures,
            "with_attention": self.with_attention,
            "convert_auto": self.convert_auto,
            "convert_any": self.convert_any,
            "exact": self.exact,
            "refused": self.refused,
            "errors": len(self.failed),
            "error_reasons": self.failed,
        }


@dataclass(frozen=True)
class Coverage:
    """What a survey found out, library by library."""

    versions: dict[str, str]
    outcomes: dict[str, list[Outcome]]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], packages: Sequence[str] = ()) -> "Coverage":
        """The outcomes by library, with the versions that are installed, those of other `packages` too."""
        by_library: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            by_library.setdefault(outcome.library, []).append(outcome)
        return cls(versions(packages), by_library)

    def count(self, library: str) -> LibraryCount:
        """One library's numbers."""
        outcomes = self.outcomes[library]
        attention = [outcome for outcome in outcomes if outcome.attention]
        refused: Counter[str] = Counter()
        for outcome in attention:
            if not outcome.convert_auto:
                refused.update({plain_reason(kind.reason) for kind in outcome.kinds if kind.reason})
        return LibraryCount(
            architectures=len(outcomes),
            with_attention=len(attention),
            convert_auto=sum(outcome.convert_auto for outcome in attention),
            convert_any=sum(outcome.convert_any for outcome in attention),
            exact=sum(outcome.exact for outcome in attention),
            refused=dict(refused.most_common()),
            failed={outcome.name: outcome.error for outcome in outcomes if outcome.error},
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: the contract's keys, and every architecture."""
        libraries = {}
        for library, outcomes in self.outcomes.items():
            listed = [outcome.to_dict() for outcome in outcomes]
            libraries[library] = {**self.count(library).to_dict(), "list": listed}
        return {"versions": self.versions, "libraries": libraries}


def versions(others: Sequence[str] = ()) -> dict[str, str]:
    """The versions that a survey holds for."""
    found = {"python": platform.python_version()}
    for package in ("armour-surgery", "torch", "timm", "transformers", "torchvision", *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
