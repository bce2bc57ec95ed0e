"""Rewrite a traced attention for a mode: graph passes first, edits to the module's tensors after."""

from armour_surgery.rewrite.edits import (
    AddFixed,
    AddGrouped,
    Edit,
    KeepRows,
    edited_names,
    edits_left,
    removed_name,
)
from armour_surgery.rewrite.emit import ArmourAttention, Variant, make_class, render, write_forward
from armour_surgery.rewrite.generated import Generated, generated_class
from armour_surgery.rewrite.pipeline import Rewritten, become, rewrite
from armour_surgery.rewrite.residual import residual
from armour_surgery.rewrite.torch_attention import answers_of, taking_nested

__all__ = [
    "AddFixed",
    "AddGrouped",
    "ArmourAttention",
    "Edit",
    "Generated",
    "KeepRows",
    "Rewritten",
    "Variant",
    "answers_of",
    "become",
    "edited_names",
    "edits_left",
    "generated_class",
    "make_class",
    "removed_name",
    "render",
    "residual",
    "rewrite",
    "taking_nested",
    "write_forward",
]
