"""The README of a saved folder: where the model came from, what was shared, and how to load it."""

import json
import re
from collections import Counter
from collections.abc import Sequence

from armour_surgery.hosts.libraries import OWN
from armour_surgery.records import SitePlan, Source, SurgeryPlan
from armour_surgery.report.wording import (
    NEEDS_TRAINING,
    UNTIL_TRAINED,
    fidelity_clause,
    measured_on,
    needs_training,
    verdict,
)
from armour_surgery.saving.licenses import license_lines, license_sentence
from armour_surgery.spelled import change, last_name, names_only, way

__all__ = ["how_to_load", "model_card", "named"]

# Rows that the table of residuals has at most.
_ROWS = 24


def model_card(surgery: SurgeryPlan, name: str) -> str:
    """The model card as Markdown with the metadata block that the hub reads.

    Everything in it follows from the plan; accuracy is stated only where it was measured.
    """
    source = surgery.source
    origin = names_only(source.name) if source else "a model built in Python"
    license_of_base = source.license if source else None
    lines = ["---", *license_lines(license_of_base)]
    if origin.startswith("hf-hub:"):
        lines.append(f"base_model: {origin.removeprefix('hf-hub:')}")
    converted = ", ".join(f"`{site.fqn}`" for site in surgery.sites)
    lines += [
        "library_name: armour-surgery",
        "tags: [vision, armour, model-compression]",
        "---",
        f"# {name}",
        "",
        f"`{origin}`{_weights(source)} after Armour surgery (arXiv 2108.01778): {_shared(surgery)}, initialized with "
        f"`{surgery.init}`.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        _row("parameters", surgery.params_before, surgery.params_after),
        _row("MACs per image", surgery.macs_before, surgery.macs_after),
        "",
        *_advice(surgery),
        "```python",
        *how_to_load(source, name),
        "```",
        "",
        f"Converted: {converted or 'no attention'}.",
        *_narrowed(surgery),
        *_residuals(surgery),
    ]
    if surgery.refused:
        lines += ["", "Left as they were:", ""]
    for site in surgery.refused:
        lines.append(f"- `{site.fqn}`: {site.reason}")
    lines += ["", license_sentence(license_of_base), ""]
    return "\n".join(lines)


def how_to_load(source: Source | None, folder: str) -> list[str]:
    """Lines of Python that load a folder."""
    # As JSON a string is a string in Python too, whatever the folder is called.
    path = json.dumps(folder)
    lines = ["from armour_surgery import load"]
    if source is None or source.library != OWN:
        return [*lines, f"model = load({path})  # a model of the class it was before, in eval mode"]
    file, _, called = source.name.rpartition(":")
    make = called or source.architecture
    if file:
        lines.append(f"from {file.removesuffix('.py')} import {make.partition('.')[0]}  # {file} is the user's own")
    return [
        *lines,
        f"model = load({path}, into={make}())  # no library made this model: the surgery is done on a fresh one",
    ]


def named(card: str, place: str) -> str:
    """The card of a folder with another name for it in the line that loads it; without such a line, as it is."""
    # A function, since in a text backslashes would mean something.
    line = re.compile(r'^(model = load\()"(?:[^"\\]|\\.)*"', re.MULTILINE)
    return line.sub(lambda found: found[1] + json.dumps(place), card)


def _weights(source: Source | None) -> str:
    """Which file the weights came from, where they did: its name, and what tells it from others."""
    if source is None or source.checkpoint is None:
        return ""
    # A name may hold what Markdown would take for the end of the code.
    name = " ".join(last_name(source.checkpoint.path).replace("`", "'").split())
    return f" with the weights of `{name}` (sha256 `{source.checkpoint.sha256}`)"


def _shared(surgery: SurgeryPlan) -> str:
    """`12 x `qv` with 32 channels a head`, and so on."""
    ways = Counter((site.mode, site.rank) for site in surgery.sites)
    parts = []
    for (mode, rank), count in ways.items():
        channels = f" with {rank} channels a head" if rank else ""
        parts.append(f"{count} x `{mode}`{channels}")
    fixed = sum(site.gauge is not None and site.gauge.start is not None for site in surgery.sites)
    if fixed:
        parts.append(f"{fixed} with a fixed gauge")
    if surgery.mlps:
        parts.append(f"{len(surgery.mlps)} narrower MLPs")
    return ", ".join(parts)


def _narrowed(surgery: SurgeryPlan) -> list[str]:
    """Which MLPs have fewer hidden channels."""
    if not surgery.mlps:
        return []
    names = ", ".join(f"`{mlp.fqn}` {mlp.hidden_after:,} of {mlp.hidden_before:,}" for mlp in surgery.mlps)
    return ["", f"Hidden channels of its MLPs: {names}."]


def _row(label: str, before: int, after: int) -> str:
    return f"| {label} | {before:,} | {after:,} | {change(before, after, of_nothing='')} |"


def _advice(surgery: SurgeryPlan) -> list[str]:
    """What the model is good for, with an empty line after it; nothing where nothing is known."""
    if surgery.trained is not None:
        return [surgery.trained, ""]
    near = surgery.fidelity
    if near is not None:
        return [
            f"On {measured_on(near)}: {fidelity_clause(near)}. Labels played no part.",
            verdict(near),
            "",
        ]
    if not needs_training(surgery):
        return []
    return [
        f"**{NEEDS_TRAINING}** `wq` keeps Q's weights and gives them to V as well, so the network receives what it",
        f"was not trained for: {UNTIL_TRAINED}",
        "",
    ]


def _residuals(surgery: SurgeryPlan) -> list[str]:
    """The table of what each site lost; neighbors share a row where there are many."""
    sites = [site for site in surgery.sites if site.residual is not None]
    if surgery.init != "calibrated" or not sites:
        return []
    # Rounded up, so that there are never more rows than there may be.
    size = -(-len(sites) // _ROWS)
    rows = [_residual_row(sites[start : start + size]) for start in range(0, len(sites), size)]
    return [
        "",
        "Relative error of each attention's output on held-out images (0: nothing was lost):",
        "",
        "| attention | mode | residual | fitted |",
        "|---|---|---:|---|",
        *rows,
    ]


def _residual_row(neighbors: Sequence[SitePlan]) -> str:
    first, last = neighbors[0], neighbors[-1]
    values = sorted(site.residual for site in neighbors if site.residual is not None)
    name, spread = _escaped(first.fqn), f"{values[0]:.4f}"
    if len(neighbors) > 1:
        name += f" to {_escaped(last.fqn)}"
        spread += f" to {values[-1]:.4f}"
    # Dictionaries keep the order in which the neighbors have them, each once.
    ways: dict[str, None] = {}
    steps: dict[str, None] = {}
    for site in neighbors:
        ways[way(f"`{site.mode}`", site.rank, separator=" ")] = None
        steps |= dict.fromkeys(site.steps)
    return f"| {name} | {', '.join(ways)} | {spread} | {', '.join(steps) or 'nothing'} |"


def _escaped(fqn: str) -> str:
    # A bar would end the cell, even inside code.
    return f"`{fqn}`".replace("|", r"\|")
