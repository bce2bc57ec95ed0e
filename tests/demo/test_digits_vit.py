"""The demonstration's model and data are those that its numbers were measured with."""

import json
import sys

import pytest
import torch

from armour_surgery.demo.digits_vit import RECORD, WEIGHTS, accuracy, load_digits_vit
from armour_surgery.errors import ArmourError
from armour_surgery.images.digits import digits_split

pytest.importorskip("sklearn")


def test_the_weights_stay_small_enough_to_ship() -> None:
    assert WEIGHTS.stat().st_size < 1_000_000


def test_the_model_loads_in_float32_and_eval_mode() -> None:
    model = load_digits_vit()
    assert not model.training
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_the_recorded_accuracy_is_measured_again() -> None:
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["test_accuracy"]
    _, _, test_x, test_y = digits_split()
    assert accuracy(load_digits_vit(), test_x, test_y) == pytest.approx(recorded, abs=0.5)


def test_accuracy_is_a_percentage_and_leaves_the_mode_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.9)).train()
    x = torch.eye(4).reshape(4, 1, 2, 2)
    assert accuracy(model, x, torch.tensor([0, 1, 2, 0])) == 75.0
    assert model.training


def test_the_split_is_disjoint_complete_and_repeatable() -> None:
    train_x, train_y, test_x, test_y = digits_split()
    assert (len(train_x), len(train_y), len(test_x), len(test_y)) == (1297, 1297, 500, 500)
    assert train_x.dtype == torch.float32
    assert train_y.dtype == torch.int64
    assert train_x.min() == -1
    assert train_x.max() == 1
    # No two of the 1,797 images are equal, so as many distinct rows means that none is in both halves.
    assert len(torch.unique(torch.cat([train_x, test_x]).flatten(1), dim=0)) == 1797
    assert all(torch.equal(a, b) for a, b in zip(digits_split(), (train_x, train_y, test_x, test_y), strict=True))


def test_the_split_is_the_one_that_the_weights_were_trained_on() -> None:
    _, train_y, _, test_y = digits_split()
    assert train_y[:12].tolist() == [2, 1, 2, 5, 1, 5, 9, 3, 0, 5, 9, 3]
    assert test_y[:12].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8, 4, 5]


def test_the_split_is_stratified() -> None:
    _, train_y, _, test_y = digits_split()
    share = 500 / 1797
    expected = share * torch.bincount(torch.cat([train_y, test_y]), minlength=10)
    assert (torch.bincount(test_y, minlength=10) - expected).abs().max() < 1


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ArmourError, match=r'pip install "armour-surgery\[demo\]"'):
        digits_split()
