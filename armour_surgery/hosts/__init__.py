"""Loading, naming and rebuilding models of timm, transformers and torchvision.

All that is known about a library is here, and nothing about attention. A library is imported when a model of it is
asked for, and not before.
"""

from armour_surgery.hosts.building import build, compared, describe, mark_converted, outline
from armour_surgery.hosts.libraries import OWN, is_users_class, library_of
from armour_surgery.hosts.naming import load_model, suggest
from armour_surgery.hosts.own import source_of_own
from armour_surgery.hosts.running import example_input, features, writing_parts
from armour_surgery.hosts.wrappers import refuse_wrapped

__all__ = [
    "OWN",
    "build",
    "compared",
    "describe",
    "example_input",
    "features",
    "is_users_class",
    "library_of",
    "load_model",
    "mark_converted",
    "outline",
    "refuse_wrapped",
    "source_of_own",
    "suggest",
    "writing_parts",
]
