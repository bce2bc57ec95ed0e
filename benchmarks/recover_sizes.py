"""What `finetune --recipe recover` adds, without labels, to a DINOv2-S/14 that was made smaller without training.

    python benchmarks/recover_sizes.py --dinov2 dinov2.safetensors --photos photos --minutes 15 --set run.precision=bf16

Attention and MLPs are narrowed by `convert(params=..., mlp=True, rank="auto", init="calibrated")`, and the shipped
recipe learns from the original on the same photos, as a user would run it. Cosine to the original's final tokens on
other photos, before and after. The files are those of equal_sizes.py. `--steps` says how long; `--minutes` times a few
steps first and takes as many as fill them on this machine. `--measured FILE` keeps what each attention and MLP costs
alone, which is most of the work, and reads it the next time.

With few photos, `--few N` takes N of them, to calibrate and to learn; `--learn` says what is learned from, photos,
drawn images or both in turns, each from the same conversion (`--calibrate both` calibrates on both, too):

    python benchmarks/recover_sizes.py --dinov2 dinov2.safetensors --photos photos --pixels 112 --images 384 \\
        --sizes 33 --few 14 --steps 160 --learn photos drawn both

What is measured is added to `--out`, and a Markdown table of all is written beside it.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from calibrated_conversion import command, crops, heading, say
from dinov2_weights import timm_model
from feature_quality import at_size, cosines, final_tokens
from label_free import finetune
from timm.models import save_for_hf
from torch import Tensor, nn

from armour_surgery import convert, load, save, sensitivities
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.files import images_below
from armour_surgery.measure.cost import count_params
from armour_surgery.records import Sensitivity
from armour_surgery.recover.recipe_files import load_recipe

ROOT = Path(__file__).parents[1]
SIZES = (8.5, 15.0, 25.0, 33.0)
# Steps that are timed, after which it is known how many fill the minutes.
TIMED = 6
# Judged so often; the recipe keeps the best.
EPOCHS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--images", type=int, default=256, help="calibration images (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=128, help="crops of test photos (%(default)s)")
    parser.add_argument("--sizes", type=float, nargs="+", default=list(SIZES), help="percent of parameters that go")
    parser.add_argument("--few", type=int, default=0, help="calibrate on and learn from so many photos only")
    parser.add_argument("--calibrate", choices=("photos", "both"), default="photos", help="on what (%(default)s)")
    parser.add_argument("--learn", choices=("photos", "drawn", "both"), nargs="+", default=["photos"], help="from what")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of the recipe; without it as many as the recipe has")
    length.add_argument("--minutes", type=float, help="as many steps as fill them on this machine")
    parser.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="KEY=VALUE", help="of the recipe"
    )
    parser.add_argument("--measured", type=Path, help="file for what each attention and MLP costs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "recover_sizes.json")
    options = parser.parse_args(arguments)
    record = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": []}
    record["environment"] = environment().to_dict()
    with tempfile.TemporaryDirectory() as scratch:
        for row in measured(options, Path(scratch)):
            row["command"] = command(arguments)
            rows = record["rows"]
            rows[:] = [other for other in rows if key(other) != key(row)] + [row]
            rows.sort(key=key)
            options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["pixels"], row["few"], row["calibrated_on"], row["size"], row["learned_from"], row["asked"]


def measured(options: argparse.Namespace, scratch: Path) -> Any:
    """A row for every size."""
    loaded = timm_model(options.dinov2)
    prep = replace(preprocessing(loaded), size=(3, options.pixels, options.pixels))
    model = at_size(loaded, options.pixels).eval()
    save_for_hf(model, str(scratch / "original"), model_args={"img_size": options.pixels}, safe_serialization=True)
    photos = few_photos(options.photos / "calib", options.few, scratch) if options.few else options.photos / "calib"
    sources = {"photos": str(photos), "drawn": "synthetic", "both": f"{photos},synthetic"}
    images = crops(sources[options.calibrate], prep, options.images)
    test = crops(options.photos / "test", prep, options.test_crops)
    wanted = final_tokens(model, test, "x")
    costs = what_each_costs(model, images, options)
    for size in options.sizes:
        goal = round(count_params(model) * (1 - size / 100))
        small = convert(model, init="calibrated", params=goal, measured=costs, **given(images)).eval()
        before = cosines(wanted, final_tokens(small, test, "x"))
        say(f"-{size:g} %: class {before[0]:.4f}, patches {before[1]:.4f}")
        save(small, scratch / "converted")
        for name in options.learn:
            found, seconds = recovered(scratch, name, sources[name], options)
            after = cosines(wanted, final_tokens(load(scratch / "out").eval(), test, "x"))
            say(f"{name}, {found['steps']} steps: class {after[0]:.4f}, patches {after[1]:.4f}, {seconds:.0f} s")
            shutil.rmtree(scratch / "out")
            yield {
                "pixels": options.pixels,
                "few": options.few,
                "images": options.images,
                "calibrated_on": options.calibrate,
                "learned_from": name,
                "test_crops": options.test_crops,
                "size": size,
                "parameters": count_params(small),
                "parameters_before": count_params(model),
                "before": before,
                "after": after,
                "asked": asked(options),
                "steps": found["steps"],
                "images_seen": found["images"],
                "kept": found["kept"],
                "seconds": seconds,
            }
        shutil.rmtree(scratch / "converted")


def given(images: list[Tensor]) -> dict[str, Any]:
    """What measuring and converting are both told."""
    return {"calibration": images, "calibration_images": sum(map(len, images)), "mlp": True, "rank": "auto"}


def asked(options: argparse.Namespace) -> str:
    """The length of the training and the recipe's changes, in words."""
    length = "as in the recipe"
    if options.steps or options.minutes:
        length = f"{options.steps} steps" if options.steps else f"{options.minutes:g} minutes"
    return ", ".join([length, *options.settings])


def few_photos(folder: Path, count: int, scratch: Path) -> Path:
    """A folder with so many of the photos, evenly over their names, which tell their series."""
    files = images_below(folder)
    few = scratch / "few"
    few.mkdir()
    for place in range(count):
        path = files[place * len(files) // count]
        shutil.copy(path, few / path.name)
    return few


def what_each_costs(model: nn.Module, images: list[Tensor], options: argparse.Namespace) -> list[Sensitivity]:
    """Measured once for all sizes, or read from where it was kept."""
    if options.measured is not None and options.measured.exists():
        say(f"what each attention and MLP costs is in {options.measured.name}")
        return [Sensitivity(**one) for one in json.loads(options.measured.read_text(encoding="utf-8"))]
    say("measuring what each attention and MLP costs alone, once for all sizes")
    costs = sensitivities(model, **given(images))
    if options.measured is not None:
        options.measured.write_text(json.dumps([vars(one) for one in costs]), encoding="utf-8")
    return costs


def recovered(scratch: Path, name: str, source: str, options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """What `finetune` says of its run, and the seconds that it took; the model is in `scratch / "out"`."""

    def run(out: str, settings: list[str]) -> dict[str, Any]:
        return finetune(
            scratch / "converted", scratch / out, scratch / "original", source, [*options.settings, *settings]
        )

    batch = load_recipe("recover", options.settings).data.batch_size
    steps = options.steps
    # The recipe keeps 64 images out, to judge by, and few photos have not so many. Of sources that are mixed each gives
    # no more than a quarter by itself.
    settings = [f"data.holdout={max(1, options.few // 4)}"] if options.few and name == "photos" else []
    if options.minutes:
        timed = run("timed", [*settings, f"schedule.max_steps={TIMED}"])
        shutil.rmtree(scratch / "timed")
        # Loading, and judging at the start and at the end; the real run judges three times as often.
        others = 3 * (timed["seconds"] - TIMED * batch / timed["images_per_s"])
        steps = round((60 * options.minutes - others) * timed["images_per_s"] / batch)
        say(f"{timed['images_per_s']} images/s, so {steps} steps fill {options.minutes:g} minutes")
    if steps:
        epochs = min(EPOCHS, steps)
        settings += [f"schedule.epochs={epochs}", f"data.images_per_epoch={steps // epochs * batch}"]
        settings += [f"schedule.warmup_epochs={epochs / 10:g}"]
    began = time.perf_counter()
    found = run("out", settings)
    return found, time.perf_counter() - began


def markdown(record: dict[str, Any]) -> str:
    machine = heading({"environment": record["environment"], "command": ""})[0]
    commands = dict.fromkeys(row["command"] for row in record["rows"])
    lines = ["# The best model of a size, and what recovery without labels adds", "", machine, ""]
    for one in commands:
        lines += [f"`{one}`", ""]
    seen = {row["test_crops"] for row in record["rows"]}
    lines += [
        "DINOv2-S/14, attention and MLPs narrowed; then the recipe `recover` with the original as teacher. Cosine of "
        f"class and patch tokens to the original's on {', '.join(map(str, seen))} crops of other photos, and in "
        "brackets how much of what was missing to 1 came back.",
        "",
        "| pixels | photos | calibrated on | parameters | class | patches | learned from | steps | class | patches |",
        "|---:|---:|---|---:|---:|---:|---|---:|---:|---:|",
    ]
    for row in record["rows"]:
        share = 100 * (row["parameters"] / row["parameters_before"] - 1)
        after = []
        for old, new in zip(row["before"], row["after"], strict=True):
            after.append(f"{new:.4f} ({100 * (new - old) / (1 - old):.0f} %)")
        steps = f"{row['steps']} ({row['asked']}), {row['seconds']:.0f} s, kept: {row['kept']}"
        cells = [str(row["pixels"]), str(row["few"] or "all"), f"{row['images']} crops of {row['calibrated_on']}"]
        cells += [f"{share:.1f} %", f"{row['before'][0]:.4f}", f"{row['before'][1]:.4f}", row["learned_from"], steps]
        lines.append(f"| {' | '.join([*cells, *after])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
