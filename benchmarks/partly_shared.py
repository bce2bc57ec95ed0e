"""What would be won if late heads shared only some of V's channels with Q, and had the others for themselves.

    python benchmarks/partly_shared.py --dinov2 dinov2.safetensors --photos photos --measured measured.json

The package shares all of a head's channels, or gives all heads fewer. Here, without building it, the closed form for
`V = concat(r of Q's channels, d - r own)`: what it loses, relative to sharing all d, scales what `qv` was measured to
cost alone (as ranks are predicted), and the choice of sites and MLPs is made with these options and without. The file
of `--measured` is that of closed_forms.py. Writes JSON and Markdown.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated_conversion import command, crops, say
from dinov2_weights import timm_model
from torch import Tensor, nn

from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.initialize.closed_form import Head, Metric
from armour_surgery.initialize.moments import Moments
from armour_surgery.measure.cost import count_params
from armour_surgery.records import Sensitivity
from armour_surgery.surgery.selection import frontier

ROOT = Path(__file__).parents[1]
SHARED = (16, 32, 48)
SIZES = (8.5, 15.0, 25.0, 33.0)
# Weight of values against logits, as where the package predicts ranks.
WEIGHT = 0.6
_STEPS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--measured", type=Path, required=True, help="file that closed_forms.py made")
    parser.add_argument("--images", type=int, default=64, help="calibration images (%(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "partly_shared.json")
    options = parser.parse_args(arguments)
    model = timm_model(options.dinov2).eval()
    images = crops(options.photos / "calib", preprocessing(model), options.images)
    lost = {}
    for fqn, (head, metric) in heads_of(model, images).items():
        lost[fqn] = [float(loss(head, metric, count) / loss(head, metric, head.query.shape[-1])) for count in SHARED]
        say(f"{fqn}: {lost[fqn]}")
    measured = [Sensitivity(**one) for one in json.loads(options.measured.read_text(encoding="utf-8"))]
    record = {"command": command(arguments), "lost": lost, "sizes": at_sizes(measured, lost, count_params(model))}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def heads_of(model: nn.Module, images: list[Tensor]) -> dict[str, tuple[Head, Metric]]:
    """Every attention's heads, biases in their last rows and LayerScale in `out`, and the metric of its tokens."""
    blocks: Any = model.blocks
    moments = [Moments() for _ in blocks]
    handles = []
    for block, found in zip(blocks, moments, strict=True):
        handles.append(block.attn.qkv.register_forward_pre_hook(lambda _, args, found=found: found.add(args[0])))
    with torch.no_grad():
        for batch in images:
            model(batch)
    for handle in handles:
        handle.remove()
    heads = {}
    for place, (block, found) in enumerate(zip(blocks, moments, strict=True)):
        count = block.attn.num_heads
        weight = torch.cat([block.attn.qkv.weight, block.attn.qkv.bias[:, None]], dim=1).detach().double()
        query, key, value = weight.reshape(3, count, -1, weight.shape[1]).mT
        out = (block.attn.proj.weight * block.ls1.gamma[:, None]).detach().double().mT
        heads[f"blocks.{place}.attn"] = (
            Head(query, key, value, out.reshape(count, -1, out.shape[1])),
            found.metric(biases=True),
        )
    return heads


def loss(head: Head, metric: Metric, shared: int) -> Tensor:
    """Squared error of logits and values, relative to their size, over all heads, with so many of V's channels Q's.

    Alternating, from two starts: Q serves the logits and what its own channels leave of the values; of Q, those
    directions are shared that serve the values best; V's own channels take most of what these leave.
    """
    small_key = torch.linalg.qr(metric.spread.sqrt()[:, None] * (metric.whiten @ head.key))[1]
    small_out = torch.linalg.qr(head.out.mT)[1]
    # Both products lie in what Wq and Wv span.
    basis = torch.linalg.qr(metric.whiten @ torch.cat([head.query, head.value], dim=-1))[0]
    logits = _unit(basis.mT @ (metric.whiten @ head.query) @ small_key.mT)
    values = WEIGHT * _unit(basis.mT @ (metric.whiten @ head.value) @ small_out.mT)
    d = head.query.shape[-1]
    least = torch.full((len(values),), float("inf"), dtype=values.dtype)
    for served in (values, _beside(values, _first(values, d - shared))):
        for _ in range(_STEPS):
            query = _first(torch.cat([logits, served], dim=-1), d)
            given = query @ _first(query.mT @ served, shared)
            own = _first(_beside(values, given), d - shared)
            left = _beside(values, torch.linalg.qr(torch.cat([given, own], dim=-1))[0])
            error = _beside(logits, query).square().sum((1, 2)) + left.square().sum((1, 2))
            least = torch.minimum(least, error)
            served = _beside(values, own)
    return least.sum()


def _first(matrix: Tensor, count: int) -> Tensor:
    """The left singular vectors of the largest singular values."""
    left: Tensor = torch.linalg.svd(matrix, full_matrices=False)[0][..., :count]
    return left


def _unit(matrix: Tensor) -> Tensor:
    size: Tensor = torch.linalg.matrix_norm(matrix)
    return matrix / size[:, None, None]


def _beside(matrix: Tensor, basis: Tensor) -> Tensor:
    """What lies outside of what an orthonormal basis spans."""
    return matrix - basis @ (basis.mT @ matrix)


def at_sizes(measured: list[Sensitivity], lost: dict[str, list[float]], params: int) -> list[dict[str, Any]]:
    """The loss that the budget predicts at each size, without partly shared sites and with them."""
    more = list(measured)
    for one in measured:
        if one.mode == "qv" and one.rank is None:
            for count, share in zip(SHARED, lost[one.fqn], strict=True):
                saved = one.params_saved * count // 64
                more.append(replace(one, mode="partly", rank=count, params_saved=saved, loss=one.loss * share))
    rows = []
    for size in SIZES:
        goal = round(params * (1 - size / 100))
        without, others = (
            next(point for point in frontier(options, params) if point.params <= goal) for options in (measured, more)
        )
        partly = [(fqn, rank) for fqn, mode, rank in others.sites if mode == "partly"]
        rows.append({"size": size, "without": without.predicted, "with": others.predicted, "partly": partly})
        say(f"-{size:g} %: {without.predicted:.5f}, with partly shared sites {others.predicted:.5f}, {partly}")
    return rows


def markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Heads that share some of V's channels",
        "",
        f"Made by `{record['command']}`; DINOv2-S/14, 64 channels a head. Nothing was converted.",
        "",
        "What the closed form loses, relative to sharing all 64; on a line it would be 0.25, 0.5, 0.75.",
        "",
        f"| site | {' | '.join(f'{count} shared' for count in SHARED)} |",
        f"|---|{'---:|' * len(SHARED)}",
    ]
    for fqn, shares in record["lost"].items():
        lines.append(f"| {fqn} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    lines += [
        "",
        "Loss that the budget predicts:",
        "",
        "| size | as it is | with these options | sites that take one |",
    ]
    lines.append("|---:|---:|---:|---|")
    for row in record["sizes"]:
        taken = ", ".join(f"{fqn} ({rank})" for fqn, rank in row["partly"]) or "-"
        lines.append(f"| -{row['size']:g} % | {row['without']:.5f} | {row['with']:.5f} | {taken} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
