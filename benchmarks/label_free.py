"""Label-free recovery of a real model: what `finetune --recipe recover` adds to a calibrated DINOv2-S/14.

    python benchmarks/label_free.py --dinov2 dinov2.safetensors --photos photos --epochs 8

All blocks go to `qv`, calibrated on photos; then `armour-surgery finetune` runs the shipped recipe on the same photos,
as a user would, with the original as teacher. Cosine to the original's final tokens on other photos, before and after.
The files are those of calibrated_conversion.py; `--pixels 224` is five times as dear.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibrated_conversion import command, crops, heading, say, write
from dinov2_weights import timm_model
from feature_quality import at_size, cosines, final_tokens
from timm.models import save_for_hf

from armour_surgery import convert, load, save
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import preprocessing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder that photos.py wrote")
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--images", type=int, default=384, help="photos to calibrate with (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=128, help="crops of other photos (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of the recipe (%(default)s)")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/label_free.json"))
    options = parser.parse_args()

    loaded = timm_model(options.dinov2)
    prep = replace(preprocessing(loaded), size=(3, options.pixels, options.pixels))
    model = at_size(loaded, options.pixels).eval()
    pictures = crops(options.photos / "test", prep, options.test_crops)
    wanted = final_tokens(model, pictures, "x")
    began = time.perf_counter()
    photos = crops(options.photos / "calib", prep, options.images)
    converted = convert(model, "qv", init="calibrated", calibration=photos, calibration_images=options.images)
    seconds = time.perf_counter() - began
    before = cosines(wanted, final_tokens(converted.eval(), pictures, "x"))
    say(f"calibrated: class {before[0]:.4f}, patch {before[1]:.4f}, {seconds:.0f} s")
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        save(converted, root / "converted")
        save_for_hf(model, str(root / "original"), model_args={"img_size": options.pixels}, safe_serialization=True)
        began = time.perf_counter()
        settings = [f"schedule.epochs={options.epochs}", *options.settings]
        found = finetune(root / "converted", root / "out", root / "original", str(options.photos / "calib"), settings)
        seconds = time.perf_counter() - began
        after = cosines(wanted, final_tokens(load(root / "out").eval(), pictures, "x"))
    closed = tuple((new - old) / (1 - old) for old, new in zip(before, after, strict=True))
    record = {
        "command": command(None),
        "environment": environment().to_dict(),
        "pixels": options.pixels,
        "before": before,
        "after": after,
        "closed": closed,
        "seconds": seconds,
        "finetune": {key: found[key] for key in ("steps", "kept") if key in found},
    }
    lines = [
        *heading(record),
        "",
        f"DINOv2-S/14 at {options.pixels} pixels, `qv`, calibrated on {options.images} crops; then the recipe "
        f"`recover` in {seconds:.0f} s, without labels. Cosine on {options.test_crops} crops of other photos.",
        "",
        "| | calibrated | recovered | of what was missing to 1 |",
        "|---|---|---|---|",
    ]
    for place, name in enumerate(("class token", "patch tokens")):
        lines.append(f"| {name} | {before[place]:.4f} | {after[place]:.4f} | {100 * closed[place]:.0f} % |")
    write(record, "\n".join(lines) + "\n", options.out)


def finetune(converted: Path, out: Path, original: Path, data: str, settings: Sequence[str]) -> dict[str, Any]:
    """Run the recipe as a user does, with the timm folder `original` as teacher; what the command says of it."""
    arguments = [sys.executable, "-m", "armour_surgery", "finetune", str(converted), "--recipe", "recover"]
    arguments += ["--data", data, "--teacher", f"local-dir:{original}", "--out", str(out), "--json"]
    for setting in settings:
        arguments += ["--set", setting]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit("finetune failed")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
