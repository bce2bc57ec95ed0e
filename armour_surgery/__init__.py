"""Rewrite a Vision Transformer's attention so that fewer projections do the work.

discover -> rewrite -> initialize -> save: `convert` runs the story, `inspect` tells what it would work on.
"""

from typing import TYPE_CHECKING, Any

from armour_surgery.plugins.hook import register_with_libraries

if TYPE_CHECKING:
    from armour_surgery.benchmarking.benchmark import benchmark as benchmark
    from armour_surgery.deployment import deploy as deploy
    from armour_surgery.errors import ArmourError as ArmourError
    from armour_surgery.exporting.formats import export as export
    from armour_surgery.likeness.compare import redundancy as redundancy
    from armour_surgery.notes import ArmourWarning as ArmourWarning
    from armour_surgery.records import AttentionSite as AttentionSite
    from armour_surgery.records import SurgeryPlan as SurgeryPlan
    from armour_surgery.saving.folder import load as load
    from armour_surgery.saving.folder import save as save
    from armour_surgery.sharing.upload import push as push
    from armour_surgery.surgery.conversion import convert as convert
    from armour_surgery.surgery.conversion import inspect as inspect
    from armour_surgery.surgery.conversion import plan as plan
    from armour_surgery.surgery.conversion import sensitivities as sensitivities

__version__ = "0.1.0"

_HOME = {
    "ArmourError": "errors",
    "ArmourWarning": "notes",
    "AttentionSite": "records",
    "SurgeryPlan": "records",
    "benchmark": "benchmarking.benchmark",
    "convert": "surgery",
    "deploy": "deployment",
    "export": "exporting.formats",
    "inspect": "surgery",
    "load": "saving",
    "plan": "surgery",
    "push": "sharing",
    "redundancy": "likeness",
    "save": "saving",
    "sensitivities": "surgery",
}

__all__ = [
    "ArmourError",
    "ArmourWarning",
    "AttentionSite",
    "SurgeryPlan",
    "benchmark",
    "convert",
    "deploy",
    "export",
    "inspect",
    "load",
    "plan",
    "push",
    "redundancy",
    "save",
    "sensitivities",
]


register_with_libraries()


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch takes seconds, and `armour-surgery --help` does without it.
    if name not in _HOME:
        raise AttributeError(f"module 'armour_surgery' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"armour_surgery.{_HOME[name]}"), name)
