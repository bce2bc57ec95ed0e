"""What `convert` says of a conversion: a JSON document, or tables and advice."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armour_surgery.notes import ArmourWarning

if TYPE_CHECKING:
    from rich.console import Console

    from armour_surgery.records import SurgeryPlan

__all__ = ["document_of", "tell", "warn_of_unmeasured"]


def warn_of_unmeasured(options: Sequence[str]) -> None:
    """Say that a dry run does not follow those options, which choose by what images show."""
    if options:
        warnings.warn(
            f"a dry run shows every attention converted, with all of its channels: what {', '.join(options)} would "
            "choose is measured on images, and it looks at none; `armour-surgery inspect MODEL --calib IMAGES` says "
            "what each attention costs",
            ArmourWarning,
            stacklevel=2,
        )


def document_of(model: str, surgery: "SurgeryPlan", target: Path | None, seconds: float) -> dict[str, Any]:
    """The JSON document; `target` is None where nothing was written."""
    sites = []
    for site in surgery.sites:
        fixed = asdict(site.gauge) if site.gauge is not None else None
        sites.append({"fqn": site.fqn, "mode": site.mode, "rank": site.rank, "residual": site.residual, "gauge": fixed})
    frontier = []
    for point in surgery.frontier:
        choice = {"params": point.params, "predicted": point.predicted, "measured": point.measured}
        frontier.append({**choice, "sites": len(point.sites)})
    return {
        "model": model,
        "mode": surgery.mode,
        "init": surgery.init,
        "out": str(target) if target is not None else None,
        "params_before": surgery.params_before,
        "params_after": surgery.params_after,
        "macs_before": surgery.macs_before,
        "macs_after": surgery.macs_after,
        "sites": sites,
        "mlps": [asdict(mlp) for mlp in surgery.mlps],
        "refused": [asdict(refused) for refused in surgery.refused],
        "fidelity": asdict(surgery.fidelity) if surgery.fidelity is not None else None,
        "max_loss": surgery.max_loss,
        "params_goal": surgery.params_goal,
        "frontier": frontier,
        "seconds": round(seconds, 3),
    }


def tell(console: "Console", model: str, kind: str, surgery: "SurgeryPlan", target: Path | None) -> None:
    """What was done, what it comes to, and what to do next; `kind` is the model's class."""
    from rich.markup import escape

    from armour_surgery.cli.tables import cost_table, fidelity_lines, frontier_table
    from armour_surgery.saving.model_card import how_to_load
    from armour_surgery.views import gauge_lines, refused_lines

    verb = "converted" if target is not None else "would be converted"
    total = len(surgery.sites) + len(surgery.refused)
    narrower = f", {len(surgery.mlps)} MLPs narrowed" if surgery.mlps else ""
    console.print(
        f"[bold]{escape(model)}[/bold] ({kind}): {len(surgery.sites)} of {total} attention sites {verb}{narrower}"
    )
    console.print(cost_table(surgery))
    for line in gauge_lines(surgery):
        console.print(f"  {line}", style="dim", markup=False)
    for line in refused_lines(surgery.refused):
        console.print(f"  left alone: {line}", style="dim", markup=False)
    if surgery.frontier:
        console.print(frontier_table(surgery.frontier, surgery.params_before, surgery.chosen(surgery.frontier)))
    if target is None:
        console.print("Nothing was written (--dry-run).")
        return
    console.print(f"Saved to [bold]{escape(str(target))}[/bold]", soft_wrap=True)
    for line in fidelity_lines(surgery):
        console.print(line, markup=False)
    console.print(_advice(surgery), markup=False)
    for line in ("", *how_to_load(surgery.source, str(target)), ""):
        console.print(f"    {line}".rstrip(), markup=False, soft_wrap=True)


def _advice(surgery: "SurgeryPlan") -> str:
    """What the model is good for now, in a sentence or two."""
    from armour_surgery.report.wording import needs_training, verdict

    if surgery.fidelity is not None:
        return f"\n{verdict(surgery.fidelity)} No labels were used."
    if needs_training(surgery):
        return (
            "\nThis model needs training. Its projections now serve a purpose that they were not trained for (init "
            "wq), so its accuracy is near chance until it is fine-tuned: load it where your recipe creates the model, "
            "and train as you would the original (the paper: from scratch, same recipe, learning rate 1e-3). "
            "--init calibrated gives one that works without training."
        )
    return (
        f"\nIts weights were chosen without images (init {surgery.init}): better than wq, and still in need of "
        "training. --init calibrated gives a model that works without training."
    )
