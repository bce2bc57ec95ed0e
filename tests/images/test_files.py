import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from PIL import Image

from armour_surgery.errors import CalibrationError, ExampleInputError
from armour_surgery.hosts import example_input
from armour_surgery.hosts.preprocessing import Preprocessing, preprocessing
from armour_surgery.images.for_calibration import calibration_batches
from armour_surgery.images.synthetic import synthetic_images

PREP = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 1.0)
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}


def collect(source: Any, images: int = 8, *, prep: Preprocessing = PREP, **options: Any) -> torch.Tensor:
    return torch.cat(list(calibration_batches(source, prep, images=images, **options)))


def picture(number: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Noise over a level of its own, by which it can be told from the others."""
    noise = np.random.default_rng(number).integers(0, 9, (size[1], size[0], 3)) + 12 * number
    return Image.fromarray(noise.astype(np.uint8)).convert(mode)


def level(image: torch.Tensor) -> int:
    """The number of the picture that became this input."""
    mean, std = torch.tensor(PREP.mean).reshape(3, 1, 1), torch.tensor(PREP.std).reshape(3, 1, 1)
    return int(((image * std + mean).mean() * 255 / 12).floor())


def photos(folder: Path, count: int, name: str = "{}.png") -> Path:
    for number in range(count):
        path = folder / name.format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


# Synthetic images.


@pytest.mark.parametrize("size", [(3, 48, 48), (1, 32, 32), (3, 8, 8), (5, 17, 40), (2, 1, 7), (1, 1, 1)])
def test_synthetic_images_have_any_size(size: tuple[int, int, int]) -> None:
    images = list(synthetic_images(12, size))
    assert len(images) == 12
    for image in images:
        assert (tuple(image.shape), image.dtype) == (size, torch.float32)
        assert 0 <= image.min() <= image.max() <= 1
        assert size == (1, 1, 1) or image.std() > 0.01


def test_a_synthetic_image_depends_on_seed_number_and_size_alone() -> None:
    before = torch.get_rng_state()
    whole = list(synthetic_images(5, (3, 24, 24), seed=3))
    assert torch.equal(torch.stack(list(synthetic_images(2, (3, 24, 24), 3, start=3))), torch.stack(whole[3:]))
    assert not torch.equal(next(synthetic_images(1, (3, 24, 24), seed=4)), whole[0])
    assert len({float(image.sum()) for image in whole}) == 5
    assert torch.equal(torch.get_rng_state(), before)


def test_synthetic_images_are_varied_and_balanced() -> None:
    images = torch.stack(list(synthetic_images(60, (3, 32, 32))))
    means = images.mean((2, 3))
    assert ((means.mean(0) - 0.48).abs() < 0.08).all()
    assert means.std(0).min() > 0.1
    saturation = (images.amax(1) - images.amin(1)).mean((1, 2))
    assert saturation.min() < 0.1 < 0.3 < saturation.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": -1}, "not -1, 0 and 0"),
        ({"count": 1, "seed": -2}, "not 1, 0 and -2"),
        ({"count": 1, "size": (3, 0, 4)}, r"size \(3, 0, 4\): pass \(channels"),
    ],
)
def test_synthetic_images_of_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        synthetic_images(**arguments)


# The model's preprocessing.


def hf(name: str, **changes: Any) -> torch.nn.Module:
    model: Any = getattr(transformers, f"{name}Model")
    return model(getattr(transformers, f"{name}Config")(**{**VIT, **changes}))


def on_meta(name: str, **options: Any) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = torchvision.models.get_model(name, **options)
    return model


HALF, IMAGENET = (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[Any, ...]]] = {
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", depth=1),
        ((3, 224, 224), HALF, "bicubic", 0.9, "center"),
    ),
    "timm-gray": (
        lambda: timm.create_model("deit_tiny_patch16_224", depth=1, in_chans=1, img_size=(96, 64)),
        ((1, 96, 64), (0.449,), "bicubic", 0.9, "center"),
    ),
    "hf-vit": (lambda: hf("ViT"), ((3, 32, 32), HALF, "bilinear", 1.0, "squash")),
    "hf-deit": (lambda: hf("DeiT"), ((3, 32, 32), HALF, "bicubic", 0.875, "squash")),
    "hf-levit": (
        lambda: transformers.LevitModel(transformers.LevitConfig(image_size=64)),
        ((3, 64, 64), IMAGENET, "bicubic", 0.875, "center"),
    ),
    "hf-clip-vision": (
        lambda: hf("CLIPVision"),
        ((3, 32, 32), (0.48145466, 0.4578275, 0.40821073), "bicubic", 1.0, "center"),
    ),
    "hf-mobilevit": (
        lambda: transformers.MobileViTModel(transformers.MobileViTConfig()),
        ((3, 256, 256), (0.0, 0.0, 0.0), "bicubic", 1.0, "center"),
    ),
    "hf-timm": (
        lambda: transformers.AutoModel.from_config(
            transformers.TimmWrapperConfig(architecture="deit_tiny_patch16_224", model_args={"depth": 1})
        ),
        ((3, 224, 224), IMAGENET, "bicubic", 0.9, "center"),
    ),
    "torchvision": (
        lambda: on_meta("vit_b_16", image_size=64),
        ((3, 64, 64), IMAGENET, "bilinear", 0.875, "center"),
    ),
    "torchvision-large": (
        lambda: on_meta("vit_h_14", image_size=518),
        ((3, 518, 518), IMAGENET, "bicubic", 1.0, "center"),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_preprocessing_is_that_of_the_model(name: str) -> None:
    make, (size, mean, interpolation, crop_pct, crop_mode) = MODELS[name]
    model = make()
    prep = preprocessing(model)
    assert prep.size == size == tuple(next(iter(example_input(model).values())).shape[1:])
    assert prep.mean == pytest.approx(mean)
    assert (prep.interpolation, prep.crop_pct, prep.crop_mode) == (interpolation, pytest.approx(crop_pct), crop_mode)
    assert prep.tensor(picture(3, (40, 30))).shape == size


def test_the_file_beside_the_weights_wins(tmp_path: Path) -> None:
    hf("ViT").save_pretrained(tmp_path)
    for text in ('{"image_mean": [0.1, 0.2, 0.3], "size": 32}', "{"):
        (tmp_path / "preprocessor_config.json").write_text(text)
        prep = preprocessing(transformers.ViTModel.from_pretrained(tmp_path))
        assert prep.mean == ((0.1, 0.2, 0.3) if text != "{" else HALF)
        assert (prep.std, prep.crop_mode) == (HALF, "squash")


def test_models_of_no_library_have_the_size_of_their_example() -> None:
    model = torch.nn.Conv2d(4, 8, 3)
    with pytest.raises(ExampleInputError, match="pass example_input"):
        preprocessing(model)
    prep = preprocessing(model, {"input": torch.empty(2, 4, 8, 12, device="meta")})
    assert (prep.size, prep.mean) == ((4, 8, 12), (0.5,) * 4)
    assert collect("synthetic", 2, prep=prep).shape == (2, 4, 8, 12)
    with pytest.raises(CalibrationError, match=r"takes 4 channels.*batches \[B, 4, 8, 12\]"):
        prep.tensor(picture(0))
    assert preprocessing(model, {"input": torch.empty(2, 3, 8, 8)}).mean == IMAGENET


def test_only_images_can_calibrate() -> None:
    with pytest.raises(CalibrationError, match=r"Linear takes input \[2, 4\].*init=\"wq\""):
        preprocessing(torch.nn.Linear(4, 4), {"input": torch.empty(2, 4)})
    video = {"pixel_values": torch.empty(2, 8, 3, 16, 16)}
    with pytest.raises(CalibrationError, match=r"pixel_values \[2, 8, 3, 16, 16\]"):
        preprocessing(torch.nn.Linear(4, 4), video)


def test_tensor_is_resized_cropped_and_normalized() -> None:
    wide = Image.new("RGB", (60, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (20, 0, 40, 20))
    middle = PREP.tensor(wide)
    assert torch.allclose(middle[..., 1:-1], PREP.normalize(torch.ones(3, 16, 14)))
    squash = Preprocessing((3, 16, 16), PREP.mean, PREP.std, "bilinear", 1.0, "squash").tensor(wide)
    assert squash[0, 8, 0] < 0 < squash[0, 8, 8]
    assert Preprocessing((1, 8, 20), (0.5,), (0.5,)).tensor(wide).shape == (1, 8, 20)
    many = PREP.normalize(torch.full((2, 3, 4, 4), 0.5))
    assert torch.allclose(many[1, :, 0, 0], torch.tensor((0.0, 0.5, 1.0)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "P-clear", "1", "CMYK", "LA", "I;16", "I", "F"])
def test_every_kind_of_picture_is_converted(mode: str, channels: int, tmp_path: Path) -> None:
    prep = Preprocessing((channels, 16, 16), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)
    gray = np.full((16, 16), 200, dtype=np.uint8)
    gray[:8] = 100
    path = tmp_path / ("a.tif" if mode in ("CMYK", "F", "I") else "a.png")
    if mode == "I;16":
        Image.fromarray(gray.astype(np.uint16) * 257).save(path)
    elif mode == "F":
        Image.fromarray(gray.astype(np.float32) / 255).save(path)
    elif mode == "P-clear":
        Image.fromarray(gray).convert("P").save(path, transparency=bytes([255] * 100 + [0]))
    else:
        Image.fromarray(gray).convert(mode).save(path)
    image = collect(tmp_path, 1, prep=prep)
    assert image.shape == (1, channels, 16, 16)
    if mode != "1":
        assert torch.allclose(image[..., :7, :], torch.tensor(100 / 255), atol=0.01)
        assert torch.allclose(image[..., 9:, :], torch.tensor(200 / 255), atol=0.01)


# Folders.


@pytest.mark.parametrize("layout", ["{}.png", "class_{}/x.png", "a/b/c/{}.PNG", "train/{0}/deep/{0}.png"])
def test_folders_have_any_layout(tmp_path: Path, layout: str) -> None:
    photos(tmp_path, 9, layout)
    (tmp_path / "labels.csv").write_text("no image")
    (tmp_path / "._0.png").write_text("a Mac left this")
    batches = calibration_batches(str(tmp_path), PREP, images=9, batch_size=4)
    found = list(batches)
    assert [len(batch) for batch in found] == [4, 4, 1]
    assert (batches.images, batches.skipped) == (9, 0)
    assert sorted(map(level, torch.cat(found))) == list(range(9))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "ppm"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    picture(3).save(tmp_path / f"x.{suffix}")
    assert collect(tmp_path, 1).shape == (1, 3, 16, 16)


def test_files_are_chosen_over_all_folders_by_the_seed(tmp_path: Path) -> None:
    for number in range(8):
        photos(tmp_path / f"class_{number % 2}" if number < 6 else tmp_path / "rare" / str(number), 8)
    chosen = collect(tmp_path, 6)
    assert torch.equal(chosen, collect(tmp_path, 6))
    assert torch.equal(chosen, collect(tmp_path, 12)[:6])
    assert not torch.equal(chosen, collect(tmp_path, 6, seed=1))
    one = tmp_path / "one"
    photos(one / "many", 8)
    for name in ("few", "other"):
        (one / name).mkdir()
        picture(12 if name == "few" else 15).save(one / name / "x.png")
    assert {12, 15} < set(map(level, collect(one, 3)))


def test_few_photos_come_again_as_other_crops(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    images = collect(tmp_path, 30)
    assert torch.equal(images, collect(tmp_path, 30))
    assert len({image.numpy().tobytes() for image in images}) == 30
    assert sorted(map(level, images[:3])) == [0, 1, 2]
    assert all(sorted(map(level, images[start : start + 3])) == [0, 1, 2] for start in range(0, 30, 3))
    ramp = tmp_path / "ramp"
    ramp.mkdir()
    Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).save(ramp / "x.png")
    ascending = [bool(image[0, 0, 0] < image[0, 0, -1]) for image in collect(ramp, 20)]
    assert 3 < sum(ascending) < 17


def test_photos_stand_upright(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (16, 16))
    sideways.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "x.png", exif=exif)
    image = collect(tmp_path, 1)[0, 0]
    assert image[0].min() > image[-1].max()


def test_links_are_followed_once(tmp_path: Path) -> None:
    photos(tmp_path / "elsewhere", 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "class").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert sorted(map(level, collect(tmp_path / "data", 2))) == [0, 1]


def test_damaged_files_are_skipped_and_counted(tmp_path: Path) -> None:
    photos(tmp_path, 4)
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    bomb = bytearray(whole)
    bomb[16:24] = struct.pack(">II", 60000, 60000)
    (tmp_path / "bomb.png").write_bytes(bomb)
    batches = calibration_batches(tmp_path, PREP, images=20)
    assert sorted(map(level, torch.cat(list(batches))[:4])) == [0, 1, 2, 3]
    assert (batches.images, batches.skipped) == (20, 3)


def test_no_readable_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    (tmp_path / "b.jpg").touch()
    with pytest.raises(CalibrationError, match=r"none of the 2 images can be read \(the last: Unidentified"):
        collect(tmp_path)


def test_a_missing_file_among_others_is_skipped(tmp_path: Path) -> None:
    photos(tmp_path, 3)
    batches = calibration_batches(tmp_path, PREP, images=2)
    (tmp_path / "0.png").unlink()
    assert {level(image) for image in torch.cat(list(batches))} == {1, 2}


def test_sources_joined_by_a_comma_give_half_each(tmp_path: Path) -> None:
    drawn = collect("synthetic", 3)
    mixed = collect(f"{photos(tmp_path, 4)}, synthetic", 7)
    assert torch.equal(mixed[1::2], collect("synthetic,synthetic", 6)[1::2])
    assert sorted(map(level, mixed[::2])) == [0, 1, 2, 3]
    assert torch.equal(collect("synthetic,synthetic", 5)[::2], drawn)
    assert len({float(image.sum()) for image in collect("synthetic,synthetic", 6)}) == 6
    comma = photos(tmp_path / "a,b", 2)
    assert sorted(map(level, collect(str(comma), 2))) == [0, 1]


def test_synthetic_source_is_normalized() -> None:
    expected = torch.stack([PREP.normalize(image) for image in synthetic_images(5, PREP.size, seed=9)])
    batches = calibration_batches("synthetic", PREP, images=5, batch_size=2, seed=9)
    assert torch.equal(torch.cat(list(batches)), expected)
    assert batches.images == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such", "folder /no/such does not exist; check the path, or use synthetic"),
        ("synthetic,/no/such", "folder /no/such does not exist"),
        ("synthetic,", "'synthetic,' has an empty part"),
        ("", "'' has an empty part"),
        ("imagenet/val", "folder imagenet/val does not exist"),
        (Path("no_such"), "folder no_such does not exist"),
        (5, "calibration is an int; pass a folder"),
        (None, "calibration is a NoneType"),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration_batches(source, PREP, images=4)


def test_paths_that_are_no_folders_of_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CalibrationError, match=rf"no images in {tmp_path} or below it \(looked for .*\.webp"):
        calibration_batches(tmp_path, PREP, images=4)
    with pytest.raises(CalibrationError, match=r"notes\.txt is a file; pass the folder that holds the images$"):
        calibration_batches(tmp_path / "notes.txt", PREP, images=4)
    photos(tmp_path, 1)
    with pytest.raises(CalibrationError, match=rf"0\.png is one image; pass the folder .*: {tmp_path}$"):
        calibration_batches(str(tmp_path / "0.png"), PREP, images=4)


@pytest.mark.parametrize("option", [{"images": 0}, {"images": -3}, {"batch_size": 0}, {"seed": -1}, {"images": 2.5}])
def test_numbers_that_are_wrong(option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(CalibrationError, match=f"{name} of the calibration must be [01] or more, not {value}"):
        calibration_batches("synthetic", PREP, **{"images": 4, **option})


# Datasets of timm.


def test_a_dataset_of_timm(tmp_path: Path) -> None:
    photos(tmp_path, 5, "train/class_{}/x.png")
    source = f"torch/image_folder:{tmp_path}"
    images = collect(source, 5)
    assert sorted(map(level, images)) == list(range(5))
    again = collect(source, 12)
    assert torch.equal(again[:5], images)
    assert len({image.numpy().tobytes() for image in again}) == 12
    (tmp_path / "train" / "class_2" / "x.png").write_text("x")
    batches = calibration_batches(source, PREP, images=8)
    assert 2 not in map(level, torch.cat(list(batches)))
    assert batches.skipped == 1


def test_a_stream_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
            return ((picture(number), 0) for number in range(3))

    monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
    assert [level(image) for image in collect("torch/stream", 5)] == [0, 1, 2, 0, 1]


def test_datasets_that_timm_cannot_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CalibrationError, match=r"hfds/org/name needs the Python package datasets, .*; install it"):
        calibration_batches("hfds/org/name", PREP, images=4)
    monkeypatch.undo()
    for source, where in (("torch/cifar10", "without a folder"), (f"torch/cifar10:{tmp_path}", f"in {tmp_path}")):
        with pytest.raises(CalibrationError, match=rf"cannot open the dataset torch/cifar10 {where}: .*NAME:FOLDER"):
            calibration_batches(source, PREP, images=4)
    assert capfd.readouterr().out == ""


def test_a_folder_that_is_called_like_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "torch" / "mine", 2)
    monkeypatch.chdir(tmp_path)
    assert sorted(map(level, collect("torch/mine", 2))) == [0, 1]


# Batches that a caller made.

BATCHES = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WRAPPINGS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda batch: batch,
    "tuple": lambda batch: (batch, torch.zeros(4)),
    "list": lambda batch: [batch, ["a", "b", "c", "d"]],
    "one": lambda batch: [batch],
    "dict": lambda batch: {"labels": torch.zeros(4), "pixel_values": batch},
    "features": lambda batch: transformers.BatchFeature({"pixel_values": batch}),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_batches_are_used_as_they_are(wrapping: str) -> None:
    wrap = WRAPPINGS[wrapping]
    drawn: list[int] = []

    def stream() -> Iterator[Any]:
        for number, batch in enumerate(BATCHES):
            drawn.append(number)
            yield wrap(batch)

    batches = calibration_batches(stream(), PREP, images=6)
    assert drawn == []
    found = list(batches)
    assert drawn == [0, 1]
    assert torch.equal(torch.cat(found), BATCHES.flatten(0, 1)[:6])
    assert [len(batch) for batch in found] == [4, 2]
    assert torch.equal(collect([wrap(batch) for batch in BATCHES], 100), BATCHES.flatten(0, 1))


def test_loaders_and_whole_tensors() -> None:
    images = BATCHES.flatten(0, 1)
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(12))
    assert torch.equal(collect(torch.utils.data.DataLoader(dataset, batch_size=5), 8), images[:8])
    assert [len(batch) for batch in calibration_batches(images, PREP, images=9, batch_size=4)] == [4, 4, 1]
    assert torch.equal(collect({"pixel_values": images}, 3), images[:3])
    wanted = images.clone().requires_grad_()
    assert not collect([wanted], 3).requires_grad
    assert collect([images.bfloat16()], 3).dtype == torch.bfloat16
    used = iter([images])
    next(used)
    with pytest.raises(CalibrationError, match="yields no images.*used up before"):
        collect(used)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("x.png", "batch 2 is a str; pass float tensors"),
        ((1, 2), "batch 2 is a tuple of int, int; pass"),
        ([], "batch 2 is a list of nothing"),
        ({"image": 1}, r"batch 2 is a dict with image; pass .*pixel_values"),
        (np.zeros((2, 3, 16, 16)), "batch 2 is a ndarray"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"the type uint8; divide .* mean \(0\.5, 0\.4, 0\.3\) and std"),
        (torch.zeros(3, 16, 16), r"the shape \[3, 16, 16\].*\[B, 3, 16, 16\]; is it a dataset\? pass a DataLoader"),
        (torch.zeros(2, 768), r"the shape \[2, 768\], and the model takes image batches \[B, 3, 16, 16\]$"),
        (torch.zeros(2, 1, 16, 16), r"1 channels \(shape \[2, 1, 16, 16\]\), and the model takes 3"),
        (torch.zeros(2, 3, 16, 32), r"\[2, 3, 16, 32\], and the model takes \[B, 3, 16, 16\]; resize .* to 16x16"),
        (torch.full((2, 3, 16, 16), torch.nan), r"batch 2 \(images 5 to 6\) holds 1536 NaN or infinite"),
        (torch.full((2, 3, 16, 16), torch.inf), "holds 1536 NaN or infinite"),
    ],
)
def test_batches_that_are_wrong(batch: Any, message: str) -> None:
    batches = calibration_batches([BATCHES[0], batch], PREP, images=20)
    assert torch.equal(next(batches), BATCHES[0])
    with pytest.raises(CalibrationError, match=message) as caught:
        next(batches)
    assert "\n" not in str(caught.value)


def test_blank_images(tmp_path: Path) -> None:
    flat = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    with pytest.raises(CalibrationError, match="all 4 calibration images are blank: each has one color"):
        collect([flat])
    assert len(collect([flat, BATCHES[0]], 20)) == 8
    for number in range(3):
        Image.new("RGB", (20, 20), (9 * number, 40, 80)).save(tmp_path / f"{number}.png")
    with pytest.raises(CalibrationError, match="all 5 calibration images are blank"):
        collect(tmp_path, 5)


def test_nothing_is_yielded() -> None:
    for empty in ([], iter(()), [torch.zeros(0, 3, 16, 16)]):
        with pytest.raises(CalibrationError, match="yields no images"):
            collect(empty)
