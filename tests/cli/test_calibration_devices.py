"""Where calibration images are run: `--device`, and torchrun's processes, of which one speaks and writes."""

import json
from pathlib import Path

import pytest
from command_line import bad, document
from processes import in_torchrun

from armour_surgery import load

CALIBRATED = ("--init", "calibrated", "--calib-images", "64")


def test_torchrun_converts_in_two_processes_and_one_of_them_writes(tiny: str, here: Path) -> None:
    # On a machine with one GPU, `auto` has none for the second process.
    found = json.loads(in_torchrun("convert", tiny, *CALIBRATED, "--out", "two", "--device", "cpu", "--json"))
    alone = document("convert", tiny, *CALIBRATED, "--out", "one", "--device", "cpu")
    assert found["fidelity"]["cosine"] == pytest.approx(alone["fidelity"]["cosine"], rel=1e-4)
    two, one = load("two").state_dict(), load("one").state_dict()
    for name, tensor in one.items():
        assert float((two[name] - tensor).abs().max()) < 1e-6, name


def test_random_weights_are_the_first_process_s(here: Path) -> None:
    arguments = ("vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--model-kwargs", "depth=1")
    found = json.loads(in_torchrun("inspect", *arguments, "--calib", "synthetic", "--device", "cpu", "--json"))
    assert [one["loss"] > 0 for one in found["sensitivities"] if one["mode"] == "qv"] == [True]


def test_a_device_is_for_images_and_has_to_be_here(tiny: str, here: Path) -> None:
    assert "device says where images are run, and init 'wq' runs none" in bad(
        "convert", tiny, "--device", "cpu", code=2
    )
    assert "--device='tpu' cannot be used here" in bad("convert", tiny, *CALIBRATED, "--device", "tpu", code=2)
    assert "--device cpu is where --calib runs images" in bad("inspect", tiny, "--device", "cpu", code=2)
