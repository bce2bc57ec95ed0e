"""Train the demo's model again, from nothing, on one CPU thread in a few minutes.

    python -m armour_surgery.demo.train_digits --out armour_surgery/demo/

writes `digits_vit.safetensors` (float16) and `digits_vit.json` (how to build the model, its test accuracy,
the command, the seed, the versions). The same versions on the same kind of machine give the same file.
"""

import argparse
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from armour_surgery.demo.digits_vit import RECORD, WEIGHTS, accuracy
from armour_surgery.hosts import build
from armour_surgery.images.digits import digits_split
from armour_surgery.records import Source

__all__ = ["augment", "initialize", "main", "train"]

ARCHITECTURE = "deit_tiny_patch16_224"
ARGUMENTS: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": 96,
    "depth": 4,
    "num_heads": 3,
    "num_classes": 10,
    "in_chans": 1,
}
TOKENS = ("cls_token", "pos_embed")  # parameters that are no layer's weight
SEED = 0
EPOCHS = 150
WARMUP_EPOCHS = 5
BATCH_SIZE = 64
PEAK_RATE = 2e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_ROTATION = math.radians(12)
MAX_SHIFT = 0.7  # pixels
MAX_ZOOM = 0.1


def initialize(model: nn.Module) -> None:
    """Give a host without weights its first ones; Glorot's matrices learn this much faster than timm's."""
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.zeros(parameter.shape)
        if name in TOKENS:
            nn.init.trunc_normal_(value, std=0.02)
        elif value.ndim > 1:
            nn.init.xavier_uniform_(value.flatten(1))
        elif name.endswith("weight"):
            nn.init.ones_(value)
        weights[name] = value
    model.load_state_dict(weights, strict=True, assign=True)


def augment(images: Tensor) -> Tensor:
    """Rotate, zoom and shift every image a little, each in its own way, on an endless sheet of paper."""
    count, _, _, width = images.shape
    random = torch.rand(4, count) * 2 - 1
    angle = random[0] * MAX_ROTATION
    zoom = 1 + random[1] * MAX_ZOOM
    shift = random[2:] * MAX_SHIFT * 2 / width
    affine = torch.stack(
        [zoom * angle.cos(), -zoom * angle.sin(), shift[0], zoom * angle.sin(), zoom * angle.cos(), shift[1]]
    )
    grid = F.affine_grid(affine.T.reshape(count, 2, 3), list(images.shape), align_corners=False)
    # Paper is -1, and what grid_sample adds around an image is 0: shifted by one, the two are the same.
    return F.grid_sample(images + 1, grid, padding_mode="zeros", align_corners=False) - 1


def train(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Train in place: AdamW, linear warm-up, cosine to zero, weight decay on matrices only."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = matrices if parameter.ndim > 1 and name not in TOKENS else vectors
        group.append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=PEAK_RATE,
    )

    def rate(epoch: int) -> float:
        if epoch < WARMUP_EPOCHS:
            return (epoch + 1) / WARMUP_EPOCHS
        return 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP_EPOCHS) / (EPOCHS - WARMUP_EPOCHS)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        batches = torch.split(torch.randperm(len(x)), BATCH_SIZE)
        for batch in batches:
            loss = F.cross_entropy(model(augment(x[batch])), y[batch], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item()
        schedule.step()
        if (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1:3d} of {EPOCHS}: loss {total / len(batches):.4f}", flush=True)


def main() -> None:
    """Train, save, measure what was saved, and write the record."""
    parser = argparse.ArgumentParser(description="Train the digits model of `armour-surgery demo`.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the two files to")
    out: Path = parser.parse_args().out

    # With more threads sums are taken in another order, and the file is another one.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    train_x, train_y, test_x, test_y = digits_split()
    model = build(Source("timm", ARCHITECTURE, ARGUMENTS))
    initialize(model)
    train(model, train_x, train_y)

    saved = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    (out / WEIGHTS.name).write_bytes(save(saved))
    model.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    record = {
        "architecture": ARCHITECTURE,
        "arguments": ARGUMENTS,
        "test_accuracy": accuracy(model, test_x, test_y),
        "command": "python -m armour_surgery.demo.train_digits --out armour_surgery/demo/",
        "seed": SEED,
        "epochs": EPOCHS,
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("scikit-learn", "timm", "torch")},
        },
    }
    (out / RECORD.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['test_accuracy']:.1f} % of {len(test_y)} test images right; written to {out}")


if __name__ == "__main__":
    main()
