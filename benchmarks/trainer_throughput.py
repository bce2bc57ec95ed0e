"""What the trainer costs beside a bare loop over the same model, images, transform and loss, in turns.

    python benchmarks/trainer_throughput.py --rounds 9 --steps 20 > trainer_throughput.json

Each round times the one and then the other; the paired ratios are what counts, since machines are shared.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from armour_surgery.hosts.preprocessing import preprocessing
from armour_surgery.images.sources import Pictures, open_pictures
from armour_surgery.recover.distributed import Process
from armour_surgery.recover.recipe_files import load_recipe
from armour_surgery.recover.timm_parts import training_transform
from armour_surgery.recover.trainer import Task, train

SIZE = 96


def build() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("deit_tiny_patch16_224", img_size=SIZE, num_classes=10)
    return model


class Views(Dataset):
    """The same pictures in the same transform, and nothing else."""

    def __init__(self, pictures, transform) -> None:
        self.pictures, self.transform = pictures, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int):
        picture, _ = self.pictures.read(index)
        return self.transform(picture), index % 10


def bare(pictures, transform, batch: int, steps: int, device: torch.device) -> float:
    model = build().train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    batches = iter(DataLoader(Views(pictures, transform), batch_size=batch, shuffle=True, drop_last=True))
    begin = 0.0
    for step in range(steps + 1):
        if step == 1:
            begin = time.perf_counter()
        images, labels = next(batches)
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return steps * batch / (time.perf_counter() - begin)


def trained(pictures, transform, batch: int, steps: int, device: torch.device) -> float:
    settings = [f"data.batch_size={batch}", "data.source=null", "model.trainable=all", "loss.labels=1"]
    settings += [
        "loss.features=0",
        "loss.blocks=0",
        "loss.local=false",
        "judge.metric=auto",
        "judge.keep=last",
        "data.holdout=0",
    ]
    settings += [f"data.images_per_epoch={batch * (steps + 1)}", "schedule.epochs=1", "optimizer.lr=1e-4"]
    times = []
    with tempfile.TemporaryDirectory() as out:
        task = Task(
            build(),
            load_recipe("recover", settings),
            pictures,
            transform,
            lambda _: {"top1": 0.0},
            Path(out),
            classes=10,
        )
        train(task, Process(0, 1, device), watch=lambda values: times.append((values["step"], time.perf_counter())))
    began, ended = next(at for step, at in times if step == 1), max(at for step, at in times if step == steps + 1)
    return steps * batch / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    drawn = open_pictures("synthetic", "train", size=(3, SIZE, SIZE), labelled=False, per_epoch=256)
    kept = [drawn.read(index)[0] for index in range(len(drawn))]
    count = options.batch_size * (options.steps + 1)
    pictures = Pictures("drawn", count, lambda index: (kept[index % len(kept)], index % 10), str)
    transform = training_transform(preprocessing(build()), load_recipe("recover").augment)
    pairs = []
    for number in range(options.rounds):
        arguments = (pictures, transform, options.batch_size, options.steps, device)
        one, two = bare(*arguments), trained(*arguments)
        pairs.append({"bare": round(one, 1), "trainer": round(two, 1), "ratio": round(two / one, 4)})
        print(f"round {number + 1}: {pairs[-1]}", file=sys.stderr, flush=True)
    ratios = sorted(pair["ratio"] for pair in pairs)
    print(json.dumps({"unit": "images/s", "median_ratio": statistics.median(ratios), "ratios": ratios}, indent=1))


if __name__ == "__main__":
    main()
