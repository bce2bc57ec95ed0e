"""Find the sites, choose a mode for each, rewrite them, and keep the plan on the model: `convert`."""

from armour_surgery.surgery.conversion import convert, inspect, plan, sensitivities

__all__ = ["convert", "inspect", "plan", "sensitivities"]
