"""Two small models trained on Fashion-MNIST from scratch, so that accuracy can be measured without a download.

    python benchmarks/fashion_mnist.py train vit --epochs 16 --lr 2e-3 --out benchmarks/weights/fashion_vit.safetensors
    python benchmarks/fashion_mnist.py test vit benchmarks/weights/fashion_vit.safetensors

The data is Debian's package: `apt-get install dataset-fashion-mnist`, or `apt-get download
dataset-fashion-mnist` and `dpkg -x` with `--data` on the folder that holds the .gz files. Matrices are
stored in half precision; the accuracy in the record beside the file was measured with what it holds, computed
in single precision.
"""

import argparse
import gzip
import json
import math
import os
import shlex
import struct
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from timm.layers import HybridEmbed
from timm.models.levit import ConvNorm, Levit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530
CLASSES = 10


def vit() -> nn.Module:
    """49 tokens from three convolutions, as in "Early convolutions help transformers see better", and a class token."""
    width = 64
    return VisionTransformer(
        img_size=28,
        patch_size=1,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=width,
        depth=6,
        num_heads=2,
        mlp_ratio=2.0,
        embed_layer=partial(HybridEmbed, backbone=stem(width)),
    )


def levit() -> nn.Module:
    """LeViT-128S at about half its width: 7 x 7 tokens, then 4 x 4, then 2 x 2; V twice as wide as Q and K."""
    widths = (64, 96, 128)
    model = Levit(
        img_size=28,
        in_chans=1,
        num_classes=CLASSES,
        embed_dim=widths,
        key_dim=16,
        num_heads=(2, 3, 4),
        depth=(2, 2, 2),
        attn_ratio=2.0,
        mlp_ratio=2.0,
        stem_backbone=stem(widths[0]),
        stem_stride=4,
    )
    # Where the images of a timm model are described; nothing else in a LeViT tells their size.
    model.pretrained_cfg = {"input_size": (1, 28, 28)}
    return model


def stem(width: int) -> nn.Module:
    """A quarter of the size in each direction; timm's stems divide by 8 and 16, which is too much for 28 pixels."""
    return nn.Sequential(
        ConvNorm(1, width // 4, 3, stride=1, padding=1),
        nn.Hardswish(),
        ConvNorm(width // 4, width // 2, 3, stride=2, padding=1),
        nn.Hardswish(),
        ConvNorm(width // 2, width, 3, stride=2, padding=1),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": vit, "levit": levit}


def main(arguments: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a model from scratch")
    command.add_argument("model", choices=MODELS)
    command.add_argument("--epochs", type=int, required=True)
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--weight-decay", type=float, default=0.05)
    command.add_argument("--warmup", type=float, default=1.0, help="epochs of warm-up (%(default)s)")
    command.add_argument("--ema", type=float, default=0.999, help="decay of the weights' average; 0 is none")
    command.add_argument("--bf16", action="store_true", help="forward and backward in bfloat16 (autocast)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--data", type=Path, default=DATA)
    command.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    command.add_argument("--start", type=Path, help="weights to begin with, instead of random ones")
    command.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint, if there is one")
    command = commands.add_parser("test", help="accuracy of stored weights on the test images")
    command.add_argument("model", choices=MODELS)
    command.add_argument("file", type=Path)
    command.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args(arguments)

    try:
        if options.command == "test":
            model = load(options.model, options.file)
            print(f"{accuracy(model, *read_split(options.data, 'test')):.4f}")
            return
        given = sys.argv[1:] if arguments is None else arguments
        train(
            options.model,
            options.out,
            read_split(options.data, "train"),
            read_split(options.data, "test"),
            epochs=options.epochs,
            batch_size=options.batch_size,
            lr=options.lr,
            weight_decay=options.weight_decay,
            warmup=options.warmup,
            ema=options.ema,
            bf16=options.bf16,
            seed=options.seed,
            start=options.start,
            resume=options.resume,
            command=shlex.join(["python", "benchmarks/fashion_mnist.py", *without_data(given)]),
        )
    except DataError as error:
        raise SystemExit(f"error: {error}") from None


class DataError(Exception):
    """The data set is not there, or not what it should be."""


def read_split(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 [n, 28, 28], and labels, int64 [n], of the split `train` or `test`."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    prefix = "train" if split == "train" else "t10k"
    images = read_idx(Path(folder) / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(Path(folder) / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    if images.shape[1:] != (28, 28) or len(images) != len(labels):
        raise DataError(f"{folder}: {split} has images {list(images.shape)} and labels {list(labels.shape)}")
    return images, labels.long()


def read_idx(path: Path, dimensions: int) -> Tensor:
    """A gzipped IDX file of bytes: two zeros, 8 for uint8, the number of dimensions, the sizes, the data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        hint = "`apt-get install dataset-fashion-mnist`, or name the folder with --data"
        raise DataError(f"{path} is not there: {hint}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is not an IDX file of bytes with {dimensions} dimensions")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        raise DataError(f"{path} says {sizes} and holds {len(content) - header} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(sizes)


def build(name: str) -> nn.Module:
    """The untrained model, `vit` or `levit`."""
    return MODELS[name]()


def load(name: str, file: str | Path) -> nn.Module:
    """The model with stored weights, in single precision and eval mode."""
    model = build(name)
    model.load_state_dict(load_file(file))
    return model.eval()


def normalize(images: Tensor) -> Tensor:
    """Float input [n, 1, 28, 28] of uint8 images [n, 28, 28]."""
    return (images.unsqueeze(1).float() / 255 - MEAN) / STD


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Top-1 accuracy of `model`, in eval mode, on uint8 images; its mode is put back."""
    training = model.training
    model.eval()
    right = sum(
        int((model(normalize(x)).argmax(-1) == y).sum())
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    model.train(training)
    return right / len(labels)


def augment(images: Tensor, generator: torch.Generator, padding: int = 2) -> Tensor:
    """A random crop of each padded image, and half of them mirrored; uint8 to uint8."""
    count, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def train(
    name: str,
    out: Path,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    warmup: float = 1.0,
    ema: float = 0.999,
    bf16: bool = False,
    seed: int = 0,
    start: Path | None = None,
    resume: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train from random weights or from `start`; after every epoch the weights are at `out`, with a record beside them.

    What is needed to go on after an interruption is at `out` + `.checkpoint` until the last epoch is done.
    Test accuracy is only reported: no choice is made with it.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = training
    # How the weights to begin with were made: their file may be the one that is written.
    began = None if start is None else read_record(start)
    model = build(name) if start is None else load(name, start)
    for module in model.modules():
        # On CPUs the fused kernel's backward is slower than plain attention, in bfloat16 by far.
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
    decayed = [parameter for key, parameter in model.named_parameters() if decays(key, parameter)]
    rest = [parameter for key, parameter in model.named_parameters() if not decays(key, parameter)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    steps = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmed_cosine(round(warmup * steps), epochs * steps))

    checkpoint = out.with_name(out.name + ".checkpoint")
    first, seconds = 0, 0.0
    earlier: list[dict[str, Any]] = []
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if averaged is not None:
        parts["averaged"] = averaged
    if resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for key, part in parts.items():
            part.load_state_dict(saved[key])
        generator.set_state(saved["generator"])
        first, seconds, began = saved["epoch"], saved["seconds"], saved["start"]
        # Another command, say with other --epochs, means another schedule from here on: the record tells.
        earlier = saved["earlier"]
        if saved["command"] != command:
            earlier.append({"command": saved["command"], "until_epoch": first})

    out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {}
    for epoch in range(first, epochs):
        clock = time.perf_counter()
        model.train()
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: steps * batch_size]
        for batch in order.split(batch_size):
            x = normalize(augment(images[batch], generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if averaged is not None:
                averaged.update_parameters(model)
            total += loss.item()
        seconds += time.perf_counter() - clock

        state = {key: part.state_dict() for key, part in parts.items()}
        state |= {"generator": generator.get_state(), "epoch": epoch + 1, "seconds": seconds}
        state |= {"command": command, "earlier": earlier, "start": began}
        replace(checkpoint, lambda path, state=state: torch.save(state, path))
        store(averaged.module if averaged is not None else model, out)
        record = {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "command": command,
            "epochs": epoch + 1,
            "seed": seed,
            "test_accuracy": accuracy(load(name, out), *test),
            "seconds": round(seconds),
            "torch": torch.__version__,
        }
        if began:
            record["start"] = began
        if earlier:
            record["earlier"] = earlier
        replace(out.with_suffix(".json"), lambda path, record=record: write_json(path, record))
        line = f"epoch {epoch + 1}/{epochs}, loss {total / steps:.4f}, test {record['test_accuracy']:.4f}"
        print(f"{line}, {seconds:.0f} s", file=sys.stderr, flush=True)
    checkpoint.unlink(missing_ok=True)
    return record


def decays(key: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not key.endswith(("pos_embed", "cls_token", "attention_biases"))


def warmed_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def store(model: nn.Module, file: Path) -> None:
    """Matrices in half precision, vectors (norms, biases) as they are."""
    state = model.state_dict()
    tensors = {key: value.half() if value.ndim > 1 else value for key, value in state.items()}
    replace(file, lambda path: path.write_bytes(save(tensors)))


def replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file so that at any time the name has the old content or the new."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


def read_record(weights: Path) -> Any:
    """What was written beside stored weights."""
    path = weights.with_suffix(".json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}, the record of {weights.name}, cannot be read: {error}") from None


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def without_data(arguments: Sequence[str]) -> list[str]:
    """The command line as it is repeated elsewhere: without --data and --resume."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--resume" and not argument.startswith("--data"):
            kept.append(argument)
        skip = argument == "--data"
    return kept


if __name__ == "__main__":
    main()
