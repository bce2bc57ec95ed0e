"""Weights are told apart by their values: not by their type, their file or the order of their names."""

import timm
import torch
from small_models import Own, surgery_of, vit
from torch import nn

from armour_surgery import convert, plan
from armour_surgery.copies import meta_copy
from armour_surgery.surgery.original import differing_tensors, tensor_digests, weights_digest
from armour_surgery.surgery.perform import surgery_of as plan_of


class Odd(nn.Module):
    """Tensors of every kind that a state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.turned = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))


def test_every_tensor_has_a_digest_of_its_values_and_shape() -> None:
    digests = tensor_digests(Odd())
    assert digests.keys() == Odd().state_dict().keys()
    assert len(set(digests.values())) == len(digests)
    assert tensor_digests(Odd()) == digests
    other = Odd()
    with torch.no_grad():
        other.turned[1, 0] += 1e-6
    assert differing_tensors(digests, tensor_digests(other)) == ["turned"]
    assert weights_digest(digests) != weights_digest(tensor_digests(other))
    assert weights_digest(dict(reversed(digests.items()))) == weights_digest(digests)
    reshaped = {"a": nn.Parameter(torch.zeros(2, 3)), "b": nn.Parameter(torch.zeros(3, 2))}
    shapes = tensor_digests(nn.ParameterDict(reshaped))
    assert shapes["a"] != shapes["b"]


def test_a_wider_type_is_the_same_and_a_narrower_one_is_not() -> None:
    digests = tensor_digests(vit())
    assert tensor_digests(vit().double()) == digests
    halved = vit().bfloat16()
    assert differing_tensors(digests, tensor_digests(halved))
    assert tensor_digests(halved.float()) == tensor_digests(vit().bfloat16())


def test_a_tensor_that_only_one_has_is_a_difference() -> None:
    assert differing_tensors({"a": "1"}, {"a": "1", "b": "2"}) == ["b"]
    assert differing_tensors({"a": "1", "b": "2"}, {"a": "1"}) == ["b"]


def test_a_conversion_keeps_the_record_of_what_was_there_before() -> None:
    digests = tensor_digests(vit())
    assert surgery_of(convert(vit())).original == digests
    assert surgery_of(convert(vit(), inplace=True)).original == digests
    assert surgery_of(convert(vit(), init="joint-svd", mode="qv")).original == digests
    assert plan(vit()).original == digests
    assert surgery_of(convert(meta_copy(timm.create_model("test_vit")))).original == {}


def test_parts_are_recorded_in_the_names_of_the_whole() -> None:
    model = Own()
    digests = tensor_digests(model)
    model.mixer = convert(model.mixer, example_input=torch.zeros(2, 16, 48))
    recorded = plan_of(model).original
    assert recorded
    assert recorded.items() <= digests.items()
    assert {name.partition(".")[0] for name in recorded} == {"mixer"}
