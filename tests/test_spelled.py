"""Names are put together, and made short, for people."""

from pathlib import Path

import pytest

from armour_surgery.spelled import grouped_names, names_only, shortened


def test_grouped_names() -> None:
    assert grouped_names(["blocks.0.attn", "blocks.1.attn", "blocks.3.attn"]) == "blocks.0-1,3.attn"


@pytest.mark.parametrize(
    ("width", "short"),
    [(13, "blocks.0.attn"), (12, "block\u20260.attn"), (4, "b\u2026tn"), (2, "\u2026n"), (1, "\u2026")],
)
def test_a_long_name_loses_its_middle(width: int, short: str) -> None:
    assert shortened("blocks.0.attn", width) == short
    assert len(short) <= width


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("encoder.layers.encoder_layer_0-11.self_attention", 30, "encoder.la\u20260-11.self_attention"),
        ("stages.2.downsample.attn_downsample", 24, "stages.2.do\u2026n_downsample"),
    ],
)
def test_numbers_stay_where_they_can(text: str, width: int, short: str) -> None:
    assert shortened(text, width) == short


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("synthetic", "synthetic"),
        ("photos", "photos"),
        ("/home/me/photos", "photos"),
        ("/home/me/photos/", "photos"),
        ("../photos", "photos"),
        ("~/photos", "photos"),
        ("a/b/photos", "photos"),
        ("C:\\Users\\me\\photos", "C:photos"),
        ("/home/me/photos,synthetic,/data/more", "photos,synthetic,more"),
        ("/", "/"),
        ("hf:/home/me/vit", "hf:vit"),
        ("local-dir:./vit", "local-dir:vit"),
        ("/home/me/vit.py:MyViT", "vit.py:MyViT"),
        ("hf:google/vit-base-patch16-224", "hf:google/vit-base-patch16-224"),
        ("hf-hub:timm/vit_tiny.in1k", "hf-hub:timm/vit_tiny.in1k"),
        ("hfds/ORG/NAME:/data/cache", "hfds/ORG/NAME:cache"),
        ("torch/cifar10", "torch/cifar10"),
        ("path=/home/me/x.json", "path=x.json"),
        ("/home/me/my photos", "my photos"),
        ("/home/me you/photos", "photos"),
        ("x=1,3,224,224;ids=1,77:long", "x=1,3,224,224;ids=1,77:long"),
        ("", ""),
    ],
)
def test_paths_give_way_to_names(text: str, told: str) -> None:
    assert names_only(text) == told


def test_a_folder_that_is_here_is_no_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_only("hf:mine/vit") == "hf:mine/vit"
    (tmp_path / "mine" / "vit").mkdir(parents=True)
    assert names_only("hf:mine/vit") == "hf:vit"
    assert names_only("mine/vit") == "vit"
