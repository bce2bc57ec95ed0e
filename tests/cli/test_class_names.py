"""`eval` and `finetune` on class folders: a model that knows its classes is right, whatever the folders' order is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from command_line import document, failed, good
from PIL import Image
from saved_models import HF
from timm.models import save_for_hf
from torch import nn
from torch.nn.functional import cross_entropy

from armour_surgery import load
from armour_surgery.hosts.class_names import class_names
from armour_surgery.saving.any_model import load_any
from armour_surgery.saving.folder import read_plan

# The model's order, which no sorting gives.
NAMES = ("dog", "cat", "ant", "bee")
SIZES: dict[str, Any] = {"img_size": 32, "num_classes": len(NAMES)}
PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "do_normalize": True}
LABELS = ["data.batch_size=8", "data.holdout=8", "schedule.epochs=1", "augment.crop=none", "data.workers=0"]
QUICK = ["--recipe", "recover_labels", "--data", "pets", *(word for one in LABELS for word in ("--set", one))]
DATA = ["--data", "pets"]


def picture(place: int, number: int, split: str) -> Image.Image:
    """A color for each class; the last has none."""
    pixels = np.random.default_rng((place, number, len(split))).integers(0, 90, (36, 34, 3), dtype=np.uint8)
    if place < 3:
        pixels[:, :, place] += 150
    return Image.fromarray(pixels)


def trained(model: nn.Module) -> nn.Module:
    """The same, after it has learned which color is which of its classes."""
    images, labels = [], []
    for place in range(len(NAMES)):
        for number in range(8):
            pixels = np.asarray(picture(place, number, "train").resize((32, 32)), dtype=np.float32)
            images.append(torch.from_numpy(pixels).movedim(-1, 0) / 127.5 - 1)
            labels.append(place)
    inputs, wanted = torch.stack(images), torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(40):
        given = model(inputs)
        optimizer.zero_grad()
        cross_entropy(given if isinstance(given, torch.Tensor) else given.logits, wanted).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pets` by class; `hf` and `tiny`, which name their classes, `hf-nameless` and `nameless`, which do not."""
    folder = tmp_path_factory.mktemp("names")
    for split, count in (("train", 10), ("val", 6)):
        for place, name in enumerate(NAMES):
            (folder / "pets" / split / name).mkdir(parents=True)
            for number in range(count):
                picture(place, number, split).save(folder / "pets" / split / name / f"{number}.png")
    torch.manual_seed(0)
    host = trained(timm.create_model("test_vit", **SIZES))
    for name, config in (("tiny", {"label_names": list(NAMES)}), ("nameless", {})):
        save_for_hf(host, str(folder / name), model_args=SIZES, model_config=config, safe_serialization=True)
    model: Any = trained(transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=4)))
    model.save_pretrained(folder / "hf-nameless")
    model.config.id2label = dict(enumerate(NAMES))
    model.config.label2id = {name: number for number, name in enumerate(NAMES)}
    model.save_pretrained(folder / "hf")
    for name in ("hf", "hf-nameless"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    (folder / "map.txt").write_text("\n".join(NAMES), encoding="utf-8")
    return folder


@pytest.fixture
def here(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMOUR_DEBUG", raising=False)
    for path in root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("model", ["hf:hf", "local-dir:tiny"])
def test_a_model_that_names_its_classes_is_right(model: str, here: Path) -> None:
    found = document("eval", model, *DATA)
    assert (found["top1"], found["classes"]) == (100.0, "names")
    assert good("eval", model, *DATA).stderr == ""
    good("convert", model, "--init", "joint-svd", "--mode", "qv", "--out", "armour")
    assert document("eval", "armour", *DATA)["classes"] == "names"


@pytest.mark.parametrize("model", ["hf:hf-nameless", "local-dir:nameless"])
def test_where_nobody_knows_the_names_that_is_said_and_a_class_map_helps(model: str, here: Path) -> None:
    told = good("eval", model, *DATA)
    assert "top-1 0.00 %" in told.stdout
    unknown, order = told.stderr.splitlines()
    assert unknown.startswith("note: nothing is known of the names of the model's classes, so the folders of pets")
    assert order.startswith(f"note: {model} has 0.0 % right, and 100.0 % would be right if the labels meant other")
    assert "--class-map FILE" in unknown
    assert "--class-map FILE" in order
    mapped = good("eval", model, *DATA, "--class-map", "map.txt")
    assert "top-1 100.00 %" in mapped.stdout
    assert mapped.stderr == ""


def test_models_in_two_orders_agree_where_they_say_the_same(here: Path) -> None:
    # `nameless` with its classes in the order of the folders.
    model, _ = load_any("local-dir:nameless")
    turned = [NAMES.index(name) for name in sorted(NAMES)]
    with torch.no_grad():
        for tensor in (model.head.weight, model.head.bias):  # type: ignore[union-attr]
            tensor.copy_(tensor[turned])  # type: ignore[operator, index, arg-type]
    save_for_hf(model, "turned", model_args=SIZES, safe_serialization=True)
    found = document("eval", "hf:hf", *DATA, "--vs", "local-dir:turned")
    assert (found["classes"], found["vs"]["classes"]) == ("names", "folders")
    assert (found["top1"], found["vs"]["top1"], found["vs"]["agreement"]) == (100.0, 100.0, 100.0)


def test_what_contradicts_is_refused(here: Path) -> None:
    for place, name in enumerate(("dog", "cat", "ant", "wasp")):
        Path("wild/val", name).mkdir(parents=True)
        picture(place, 0, "val").save(Path("wild/val", name, "0.png"))
    said = failed("eval", "hf:hf", "--data", "wild").stderr
    assert "1 of the 4 class folders of wild/val have names that the model does not have (wasp;" in said
    assert "--class-map FILE" in said
    Path("wild/val/wasp/0.png").unlink()
    Path("wild/val/wasp").rmdir()
    assert "there is no folder for bee" in failed("eval", "hf:hf", "--data", "wild").stderr
    found = document("eval", "hf:hf", "--data", "wild", "--class-map", "map.txt")
    assert (found["images"], found["top1"], found["classes"]) == (3, 100.0, "class map")
    Path("map.json").write_text('{"dog": 9}', encoding="utf-8")
    assert "gives 'dog' the index 9" in failed("eval", "hf:hf", *DATA, "--class-map", "map.json").stderr
    for option in (["--data", "digits"], ["--data", "synthetic"]):
        failed("eval", "hf:hf", *option, "--class-map", "map.txt", code=1 if option[1] == "synthetic" else 2)
    good("convert", "local-dir:tiny", "--out", "armour")
    assert (
        "has none here" in failed("finetune", "armour", "--recipe", "recover", "--class-map", "map.txt", code=2).stderr
    )


@pytest.mark.parametrize("model", ["hf:hf", "local-dir:tiny"])
def test_training_keeps_labels_and_names_in_the_models_order(model: str, here: Path) -> None:
    good("convert", model, "--init", "wq-refit", "--mode", "qv", "--out", "armour")
    found = document("finetune", "armour", *QUICK, "--out", "out")
    assert (found["classes"], found["end"]["top1"]) == ("names", 100.0)
    names = class_names(load("out"))
    assert names is not None
    assert (names.names, names.said) == (NAMES, True)
    assert document("eval", "out", *DATA)["top1"] == 100.0


@pytest.mark.parametrize(
    ("model", "again"), [("local-dir:nameless", "local-dir:out"), ("hf:hf-nameless", "hf:out"), ("armour", "out")]
)
def test_names_from_a_class_map_are_saved_with_the_model(model: str, again: str, here: Path) -> None:
    options = ["--class-map", "map.txt", *(["--set", "loss.logits=0"] if model != "armour" else [])]
    if model == "armour":
        good("convert", "hf:hf-nameless", "--init", "wq-refit", "--mode", "qv", "--out", "armour")
    assert document("finetune", model, *QUICK, *options, "--out", "out")["classes"] == "class map"
    found = document("eval", again, *DATA)
    assert (found["classes"], found["top1"]) == ("names", 100.0)
    if model == "armour":
        config = read_plan("out").source.arguments  # type: ignore[union-attr]
        assert config["label2id"] == {name: number for number, name in enumerate(NAMES)}


def test_folders_that_were_trained_on_give_the_names_once_they_are_learned(here: Path) -> None:
    """Not before: a model that is wrong on all of them has its classes in another order."""
    good("convert", "local-dir:nameless", "--init", "wq-refit", "--mode", "qv", "--out", "armour")
    last = ["--set", "judge.keep=last"]
    told = good("finetune", "armour", *QUICK, *last, "--set", "optimizer.lr=1e-9", "--out", "wrong")
    assert "note: nothing is known of the names of the model's classes" in told.stderr
    assert class_names(load("wrong")) is None
    rates = ["--set", "optimizer.lr=2e-3", "--set", "schedule.epochs=12", "--set", "loss.logits=0"]
    good("finetune", "armour", *QUICK, *last, *rates, "--out", "right")
    names = class_names(load("right"))
    assert names is not None
    assert names.names == tuple(sorted(NAMES))


def test_a_model_of_no_library_keeps_names_in_its_plan(here: Path) -> None:
    Path("own.py").write_text(
        "import timm\nfrom torch import nn\n\n\nclass Mine(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.img_size, self.in_chans = 32, 3\n"
        "        self.inner = timm.create_model('test_vit', img_size=32, num_classes=4)\n\n"
        "    def forward(self, images):\n        return self.inner(images)\n",
        encoding="utf-8",
    )
    good("convert", "own.py:Mine", "--mode", "qv", "--out", "armour")
    options = ["--into", "own.py:Mine", "--class-map", "map.txt", "--set", "loss.logits=0"]
    good("finetune", "armour", *QUICK, *options, "--out", "out")
    assert read_plan("out").classes == NAMES
    assert document("eval", "out", *DATA, "--into", "own.py:Mine")["classes"] == "names"


def test_a_run_is_not_resumed_with_other_labels(here: Path) -> None:
    good("convert", "local-dir:nameless", "--mode", "qv", "--out", "armour")
    good("finetune", "armour", *QUICK, "--out", "out")
    said = failed("finetune", "armour", *QUICK, "--class-map", "map.txt", "--out", "out", "--resume").stderr
    assert "began with the labels as classes [0, 1, 2, 3], and they are now [2, 3, 1, 0]" in said
