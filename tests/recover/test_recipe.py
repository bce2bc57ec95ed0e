"""Recipes: the shipped ones load and are the paper's; a mistake is one line that says what to write."""

import itertools
from pathlib import Path

import pytest
import yaml

from armour_surgery.errors import UsageError
from armour_surgery.recover.recipe import Recipe, known_keys
from armour_surgery.recover.recipe_files import load_recipe, recipe_names, recipe_path, to_yaml

PAPER = [name for name in recipe_names() if name.startswith(("deit", "levit"))]


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*settings: str, recipe: str | Path = "recover") -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(recipe, settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_shipped_recipes_are_those_that_are_promised() -> None:
    assert set(recipe_names()) >= {
        "recover",
        "recover_labels",
        "digits_recover",
        "fashion_mnist_recover",
        "fashion_mnist_vit",
        "fashion_mnist_levit",
        "deit_tiny_300ep",
        "deit_tiny_qv_300ep",
        "deit_tiny_distilled_qv_300ep",
        "deit_tiny_distilled_qv_1200ep",
        "deit_tiny_qk_300ep",
        "deit_tiny_qk_diag_300ep",
        "deit_tiny_kv_300ep",
        "levit_128s_500ep",
        "levit_128s_concat_half_500ep",
        "levit_128s_concat_full_500ep",
    }


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_has_a_header_and_survives_writing(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.description
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    header = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for entry in ("command", "hardware", "cost", "expected"):
        assert entry in header
    assert f"--recipe {name}" in header
    assert load_recipe(written(tmp_path, to_yaml(recipe, ["a header"]))) == recipe


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_follow_deit_and_levit(name: str) -> None:
    recipe = load_recipe(name)
    levit, converted = name.startswith("levit"), recipe.model.mode is not None
    assert recipe.model.start == "scratch"
    assert recipe.data.batch_size == (2048 if levit else 1024)
    assert recipe.data.repeats == 3
    assert recipe.data.crop_pct == 0.875
    assert recipe.optimizer.lr == (1e-3 if converted else 5e-4)
    assert recipe.effective_lr == pytest.approx(recipe.optimizer.lr * (4 if levit else 2))
    assert recipe.optimizer.weight_decay == (0.025 if levit else 0.05)
    assert (recipe.optimizer.clip, recipe.optimizer.clip_mode) == ((0.01, "agc") if levit else (None, "norm"))
    assert recipe.model.drop_path == (0.0 if levit else 0.1)
    assert recipe.run.precision == ("fp32" if levit else "fp16")
    assert (recipe.augment.auto, recipe.augment.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (recipe.augment.mixup, recipe.augment.cutmix, recipe.loss.smoothing) == (0.8, 1.0, 0.1)
    assert recipe.ema.decay == 0.99996
    schedule = recipe.schedule
    assert (schedule.per, schedule.warmup_epochs, schedule.warmup_lr, schedule.min_lr) == ("epoch", 5, 1e-6, 1e-5)
    assert f"_{schedule.epochs}ep" in name
    assert ("distilled" in name or levit) == (recipe.teacher == "regnety_160.deit_in1k")
    if recipe.teacher:
        loss = recipe.loss
        assert (loss.labels, loss.logits, loss.logits_kind, loss.logits_head) == (0.5, 0.5, "hard", "token")
    if recipe.model.mode:
        assert recipe.model.mode.replace("-", "_") in name


def test_an_unknown_key_is_named_with_what_was_meant() -> None:
    assert "unknown key optimizer.learning_rate" in refusal("optimizer.learning_rate=1")
    assert "did you mean optimizer.lr?" in refusal("lr=1e-3")
    assert "did you mean optimizer.weight_decay" in refusal("optimizer.weight_decy=0.1")
    assert "did you mean data.batch_size" in refusal("batch_size=4")


def test_a_wrong_type_is_named_with_the_value() -> None:
    assert "data.batch_size is 'many'" in refusal("data.batch_size=many")
    assert "schedule.epochs is 2.5" in refusal("schedule.epochs=2.5")
    assert "run.precision is 'fp8'" in refusal("run.precision=fp8")
    assert "optimizer.lr is -1" in refusal("optimizer.lr=-1")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        (["loss.features=1", "loss.blocks=0"], "loss.blocks=1, or loss.local=false"),
        (["loss.local=false", "loss.features=0", "loss.blocks=0"], "loss.features=1 for images without labels"),
        (["data.batch_size=6", "data.micro_batch=4"], "not a multiple of data.micro_batch=4"),
        (["schedule.warmup_epochs=9"], "shorten the warm-up"),
        (["loss.logits_head=token"], "loss.logits=0.5"),
        (["loss.smoothing=0.1"], "set loss.labels"),
        (["judge.metric=top1"], "judge.metric=cosine"),
        (["model.init=calibrated"], "model.mode=auto"),
        (["model.start=scratch"], "model.trainable=all"),
        (["model.args={depth: 2}"], "model.start=scratch"),
        (["augment.scale=[0.5, 0.2]"], "must rise"),
        (["run.grad_checkpointing=true"], "loss.blocks=0"),
        (
            ["loss.local=false", "loss.labels=1", "loss.features=0", "loss.blocks=0", "judge.metric=cosine"],
            "judge.metric=top1",
        ),
        (
            [
                "loss.local=false",
                "loss.labels=1",
                "loss.features=0",
                "loss.blocks=0",
                "judge.metric=auto",
                "teacher=vit",
            ],
            "remove teacher",
        ),
    ],
)
def test_an_impossible_combination_says_what_to_change(settings: list[str], advice: str) -> None:
    assert advice in refusal(*settings)


def test_set_reaches_every_key_and_reads_numbers_as_people_write_them() -> None:
    recipe = load_recipe(
        "recover", ["optimizer.lr=3e-5", "data.mean=[0.1, 0.2, 0.3]", "data.source=", "run.compile=true", "seed=7"]
    )
    assert (recipe.optimizer.lr, recipe.data.mean, recipe.data.source) == (3e-5, [0.1, 0.2, 0.3], None)
    assert recipe.run.compile
    assert recipe.seed == 7
    assert "is not KEY=VALUE" in refusal("optimizer.lr")
    assert "is a value and no section" in refusal("description.a=1")


def test_known_keys_are_those_of_the_schema() -> None:
    flat = [
        f"{part}.{key}" if isinstance(inner, dict) else part
        for part, inner in Recipe().model_dump().items()
        for key in (inner if isinstance(inner, dict) else [""])
    ]
    assert known_keys() == flat


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    assert "did you mean recover" in refusal(recipe="recovr")
    assert "does not exist" in refusal(recipe=tmp_path / "none.yaml")
    assert "is not YAML" in refusal(recipe=written(tmp_path, "a: [1,"))
    assert "given twice" in refusal(recipe=written(tmp_path, "seed: 1\nseed: 2"))
    assert "holds list" in refusal(recipe=written(tmp_path, "- 1"))
    assert "is not YAML" in refusal(recipe=written(tmp_path, "seed: !!python/object/apply:os.getcwd []"))
    assert "holds what a recipe cannot" in refusal(recipe=written(tmp_path, "seed: .nan"))
    assert "holds what a recipe cannot" in refusal(recipe=written(tmp_path, "seed: 2020-01-01"))


def test_the_rule_of_deit_scales_the_rate_with_the_batch() -> None:
    settings = ["optimizer.lr=5e-4", "optimizer.lr_rule=deit", "data.batch_size=1024"]
    assert load_recipe("recover", settings).effective_lr == pytest.approx(1e-3)
    assert load_recipe("recover", ["optimizer.lr=5e-4", "data.batch_size=1024"]).effective_lr == 5e-4


def test_recipes_are_in_the_wheel() -> None:
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    assert '"recipes" = "armour_surgery/recipes"' in text
    for path in (root / "recipes").glob("*.yaml"):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)
