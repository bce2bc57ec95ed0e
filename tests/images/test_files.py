"""Folders of images: any layout and format, chosen by the seed, damaged files skipped and counted."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import PREP, collect, level, photos, picture
from PIL import Image

from armour_surgery.errors import CalibrationError
from armour_surgery.images.for_calibration import calibration_batches


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
