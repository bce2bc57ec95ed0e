"""How alike Q, K and V are, and what sharing them costs: `redundancy`."""

from armour_surgery.likeness.compare import redundancy

__all__ = ["redundancy"]
