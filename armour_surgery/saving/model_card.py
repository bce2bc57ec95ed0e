"""The README of a saved folder: where the model came from, what was shared, and how to load it."""

from collections import Counter
from collections.abc import Sequence

from armour_surgery.records import SitePlan, SurgeryPlan

__all__ = ["model_card"]

# Rows that the table of residuals has at most.
_ROWS = 24


def model_card(surgery: SurgeryPlan, name: str) -> str:
    """The model card as Markdown with the metadata block that the hub reads.

    Everything in it follows from the plan; accuracy is stated only where it was measured.
    """
    source = surgery.source
    origin = source.name if source else "a model built in Python"
    license_name = (source.license if source else None) or "unknown"
    modes = Counter((site.mode, site.rank) for site in surgery.sites)
    shared = ", ".join(
        f"{count} x `{mode}`" + (f" with {rank} channels a head" if rank else "")
        for (mode, rank), count in modes.items()
    )
    lines = [
        "---",
        f"license: {license_name if source and source.license else 'other'}",
        *([f"base_model: {origin.partition(':')[2]}"] if origin.startswith("hf-hub:") else []),
        "library_name: armour-surgery",
        "tags: [vision, armour, model-compression]",
        "---",
        f"# {name}",
        "",
        f"`{origin}` after Armour surgery (arXiv 2108.01778): {shared}, initialized with `{surgery.init}`.",
        "",
        "| | before | after | change |",
        "|---|---:|---:|---:|",
        _row("parameters", surgery.params_before, surgery.params_after),
        _row("MACs per image", surgery.macs_before, surgery.macs_after),
        "",
        *_advice(surgery),
        "```python",
        "from armour_surgery import load",
        f'model = load("{name}")  # a model of the class it was before, in eval mode',
        "```",
        "",
        f"Converted: {', '.join(f'`{site.fqn}`' for site in surgery.sites)}.",
        *_residuals(surgery),
    ]
    if surgery.refused:
        lines += ["", "Left as they were:", ""]
        lines += [f"- `{site.fqn}`: {site.reason}" for site in surgery.refused]
    lines += ["", f"License of the base model: {license_name}.", ""]
    return "\n".join(lines)


def _row(label: str, before: int, after: int) -> str:
    change = f"{100 * (after - before) / before:+.1f} %" if before else ""
    return f"| {label} | {before:,} | {after:,} | {change} |"


def _advice(surgery: SurgeryPlan) -> list[str]:
    if surgery.trained is not None:
        return [surgery.trained, ""]
    near = surgery.fidelity
    if near is not None:
        same = f", same first choice on {near.agreement:.1f} %" if near.agreement is not None else ""
        return [
            f"On {near.images} held-out images ({near.source}): cosine to the original's features {near.cosine:.4f}, "
            f"SQNR {near.sqnr_db:.1f} dB{same}. Labels played no part.",
            "",
        ]
    if surgery.init != "wq":
        return []
    return [
        "**It needs training.** `wq` keeps Q's weights and gives them to V as well, so the network receives what it",
        "was not trained for: until it is fine-tuned, its accuracy is near chance.",
        "",
    ]


def _residuals(surgery: SurgeryPlan) -> list[str]:
    """The table of what each site lost; neighbors share a row where there are many."""
    sites = [site for site in surgery.sites if site.residual is not None]
    if surgery.init != "calibrated" or not sites:
        return []
    size = -(-len(sites) // _ROWS)
    groups = [sites[start : start + size] for start in range(0, len(sites), size)]
    return [
        "",
        "Relative error of each attention's output on held-out images (0: nothing was lost):",
        "",
        "| attention | mode | residual | fitted |",
        "|---|---|---:|---|",
        *(_residual_row(group) for group in groups),
    ]


def _residual_row(group: Sequence[SitePlan]) -> str:
    names = [f"`{site.fqn}`".replace("|", r"\|") for site in group]
    modes = dict.fromkeys(_way(site) for site in group)
    values = sorted(site.residual for site in group if site.residual is not None)
    spread = f"{values[0]:.4f}" if len(group) == 1 else f"{values[0]:.4f} to {values[-1]:.4f}"
    steps = dict.fromkeys(step for site in group for step in site.steps)
    name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"| {name} | {', '.join(modes)} | {spread} | {', '.join(steps) or 'nothing'} |"


def _way(site: SitePlan) -> str:
    return f"`{site.mode}`" + (f" rank {site.rank}" if site.rank is not None else "")
