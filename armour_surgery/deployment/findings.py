"""What a pass did where, and where it left things alone, collected while it runs."""

from armour_surgery.deployment.records import DeployedPlace, KeptPlace

__all__ = ["Findings"]


class Findings:
    """Notes of one pass, `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.done: list[DeployedPlace] = []
        self.kept: list[KeptPlace] = []

    def did(self, fqn: str) -> None:
        """The pass changed something at `fqn`."""
        self.done.append(DeployedPlace(self.name, fqn))

    def left(self, fqn: str, reason: str) -> None:
        """The pass found its place at `fqn` and left it alone."""
        self.kept.append(KeptPlace(self.name, fqn, reason))
