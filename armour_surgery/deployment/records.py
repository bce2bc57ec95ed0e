"""What `deploy` did to a model, and what it left as it was."""

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["DeployedPlace", "Deployment", "KeptPlace"]


@dataclass(frozen=True)
class DeployedPlace:
    """One thing that `deploy` did: the pass, by name, and the module or parameter it was about."""

    name: str
    fqn: str


@dataclass(frozen=True)
class KeptPlace:
    """A place that a pass of `deploy` looked at and left as it was, and why."""

    name: str
    fqn: str
    reason: str


@dataclass(frozen=True)
class Deployment:
    """Everything that `deploy` did to a model. It rides on the model as `model.deployment`.

    `passes` are the names of those that ran, in their order; `runtime` says what they were chosen for, and `compiled`
    that this is torch.compile.
    `error` is the largest difference of the model's outputs to what they were before, relative to the largest output,
    on a batch of noise; None where there were no weights to try.
    """

    passes: tuple[str, ...]
    compiled: bool
    done: tuple[DeployedPlace, ...]
    kept: tuple[KeptPlace, ...]
    error: float | None
    runtime: str = "torch"

    def count(self, name: str) -> int:
        """How many places a pass changed."""
        return sum(place.name == name for place in self.done)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)
