"""transformers' own calls find a converted model after `import armour_surgery`, and never draw weights for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from saved_models import HF, armour, host
from small_models import refused

import armour_surgery
from armour_surgery import convert, load, save
from armour_surgery.errors import SchemaError
from armour_surgery.saving.folder import read_plan

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IMAGES).logits
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained") / "armour"
    armour("hf-vit").save_pretrained(out)  # type: ignore[operator]
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(out)
    return out


def test_a_stock_class_fails_instead_of_drawing_weights(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.ViTForImageClassification.from_pretrained(folder)


def test_config_model_and_processor_by_auto_classes(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (type(config).__name__, config.model_type) == ("ArmourViTConfig", "armour_vit")
    assert config.architectures == ["ArmourViTForImageClassification"]
    assert isinstance(config, transformers.ViTConfig)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is transformers.ViTForImageClassification
    assert torch.equal(logits(model), logits(armour("hf-vit")))
    assert model.surgery.mode == "auto"
    base = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert type(base) is transformers.ViTModel
    with torch.no_grad():
        assert torch.equal(base(IMAGES).last_hidden_state, model.vit(IMAGES).last_hidden_state)
    fresh = transformers.AutoModelForImageClassification.from_config(config)
    assert fresh.state_dict().keys() == model.state_dict().keys()


def test_pipeline_takes_the_folder(folder: Path) -> None:
    run = transformers.pipeline("image-classification", str(folder))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    found = run(picture, top_k=1)
    pixels = run.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = armour("hf-vit").eval()(pixels).logits.softmax(-1)[0]
    assert found[0]["score"] == pytest.approx(float(scores.max()), rel=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_trains_saves_and_resumes(folder: Path, tmp_path: Path) -> None:
    class Pictures(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": IMAGES[index % 3], "labels": index % 5}

    def trainer() -> transformers.Trainer:
        model = transformers.AutoModelForImageClassification.from_pretrained(folder)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[], disable_tqdm=True
        )
        return transformers.Trainer(model, arguments, train_dataset=Pictures())

    first = trainer()
    first.train()
    second = trainer()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(first.model), logits(second.model))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(logits(again), logits(first.model))
    assert not torch.equal(logits(again), logits(armour("hf-vit")))


def test_what_was_loaded_is_saved_and_loaded_like_any_other(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(load(save(model, tmp_path / "ours"))), logits(model))


def test_a_checkpoint_of_older_names_is_converted_and_comes_back(tmp_path: Path) -> None:
    host("hf-vit").save_pretrained(tmp_path / "stock")  # type: ignore[operator]
    converted = convert(transformers.ViTForImageClassification.from_pretrained(tmp_path / "stock").eval(), "kv")
    converted.save_pretrained(tmp_path / "armour")  # type: ignore[operator]
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "armour")
    assert torch.equal(logits(again), logits(converted))


@pytest.mark.parametrize("part", [False, True])
def test_a_tower_inside_a_larger_model(part: bool, tmp_path: Path) -> None:
    text = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 28}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**HF),
        text_config=transformers.LlamaConfig(**text, vocab_size=50, num_key_value_heads=3),
        image_token_index=49,
    )
    model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    if part:
        model.model.vision_tower = convert(model.model.vision_tower, "qv")
    else:
        model = convert(model, "qv")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found = [one.model.vision_tower(IMAGES).last_hidden_state for one in (model, again)]
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="mismatched"):
        transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_library_that_draws_each_projection_s_weights_itself(tmp_path: Path) -> None:
    """SigLIP's code for missing weights reaches for `v_proj.weight`, and there is no `v_proj` any more."""
    torch.manual_seed(0)
    model = convert(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF)).eval(), "qv")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(model(IMAGES).last_hidden_state, again(IMAGES).last_hidden_state)
    drawn: Any = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    assert all(weight.isfinite().all() for weight in drawn.state_dict().values())


@pytest.mark.parametrize("change", [{"sites": 3}, {"example": [["pixel_values", [0, 3, 32, 32], "float32"]]}])
def test_a_surgery_that_is_none_is_refused(change: dict[str, Any], folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.armour_surgery = {**config.armour_surgery, **change}
    message = refused(SchemaError, lambda: transformers.AutoModelForImageClassification.from_config(config))
    assert "the surgery in the config of this ArmourViTForImageClassification is none" in message


def test_the_config_of_a_saved_plan_has_no_copy_of_itself(tmp_path: Path) -> None:
    source = read_plan(save(armour("hf-vit"), tmp_path / "out")).source
    assert source is not None
    assert "armour_surgery" not in source.arguments
    assert armour_surgery.__version__
