"""The format of a saved folder: `save` and `load`."""

from armour_surgery.saving.folder import load, save

__all__ = ["load", "save"]
