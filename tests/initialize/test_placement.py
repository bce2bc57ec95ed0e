"""Parts of a model are where it is computed only while they run, and come home as what they were, or as they became.

Types stand for devices: a part of a half precision model is in single precision when it runs.
"""

import copy
import math

import pytest
import torch
import torch.utils._pytree as pytree
from small_models import vit
from tiny_hosts import case
from torch import nn

from armour_surgery import convert
from armour_surgery.benchmarking.memory import held_bytes
from armour_surgery.copies import sharing_copy
from armour_surgery.errors import CalibrationError
from armour_surgery.initialize.output_metric import error_moments
from armour_surgery.initialize.placement import Placement
from armour_surgery.surgery.perform import surgery_of

HALF, WHOLE = torch.bfloat16, torch.float32
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def images(size: int = 32) -> list[torch.Tensor]:
    """Batches of noise."""
    return list(torch.randn(96, 3, size, size, generator=torch.Generator().manual_seed(0)).split(8))


def types_of(model: nn.Module, name: str) -> set[torch.dtype]:
    """The types of a module's tensors."""
    return {tensor.dtype for tensor in model.get_submodule(name).parameters()}


def leaves(output: object) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def test_only_the_block_that_runs_is_there() -> None:
    model = vit(depth=3).to(HALF)
    home = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    placement = Placement(torch.device("cpu"), moves=True)
    there: list[list[str]] = []
    for name in BLOCKS:
        # The hook of a block's part runs when the block has come.
        model.get_submodule(name).attn.register_forward_hook(
            lambda *_: there.append([block for block in BLOCKS if types_of(model, block) == {WHOLE}])
        )
    with placement.attached(model, BLOCKS):
        # What lies beside the blocks stays there, and they do not.
        assert types_of(model, "patch_embed") == types_of(model, "norm") == {WHOLE}
        assert model.pos_embed.dtype == WHOLE
        with torch.no_grad():
            got = model(images()[0])
        assert types_of(model, "blocks") == {HALF}
        with placement.held(model.blocks[1], written=True):
            with torch.no_grad():
                model(images()[0])
                model.blocks[1].mlp.fc1.weight.mul_(2)
            assert types_of(model, "blocks.1") == {WHOLE}
    assert there == [[name] for name in BLOCKS] + [["blocks.0", "blocks.1"], ["blocks.1"], ["blocks.1", "blocks.2"]]
    assert got.dtype == WHOLE
    assert types_of(model, "") == {HALF}
    # Only what was written to is another tensor's memory now.
    moved = [name for name, tensor in model.named_parameters() if tensor.data_ptr() != home[name]]
    assert moved == ["blocks.1.mlp.fc1.weight"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_tensor_that_a_block_shares_with_what_stays_does_so() -> None:
    model = vit(depth=3).to(HALF)
    model.norm.weight = model.blocks[0].norm1.weight
    placement = Placement(torch.device("cpu"), moves=True)
    with placement.attached(model, BLOCKS), torch.no_grad():
        model(images()[0])
        assert types_of(model, "norm") == {WHOLE}
    assert types_of(model, "") == {HALF}


def test_new_tensors_come_home_as_those_of_their_name_were() -> None:
    model = vit(depth=3).to(HALF)
    placement = Placement(torch.device("cpu"), moves=True)
    block = model.blocks[0]
    with placement.attached(model, BLOCKS), placement.held(block, written=True), torch.no_grad():
        weight = block.mlp.fc2.weight
        block.mlp.fc2.weight = nn.Parameter(weight[:, :8] * 3)
        block.mlp.fc1 = nn.Linear(block.mlp.fc1.in_features, 8)
        # It runs with them as often as is wanted.
        assert torch.equal(model(images()[0]), model(images()[0]))
    assert types_of(model, "") == {HALF}
    assert block.mlp.fc2.weight.shape[1] == 8


def test_gradients_go_through_blocks_that_have_gone_home() -> None:
    model = vit(depth=3).to(HALF)
    whole = copy.deepcopy(model).float()
    placement = Placement(torch.device("cpu"), moves=True)

    def moments(of: nn.Module) -> dict[str, torch.Tensor]:
        outputs = {name: of.get_submodule(name).attn.proj.weight for name in BLOCKS}
        found = error_moments(
            of, outputs, images()[:2], lambda model, batch: model.forward_features(batch), lambda _: None
        )
        return {name: one.total.dense() for name, one in found.items()}

    with placement.attached(model, BLOCKS), placement.differentiable():
        got = moments(model)
    wanted = moments(whole)
    assert got.keys() == wanted.keys() == set(BLOCKS)
    for name in BLOCKS:
        assert torch.allclose(got[name], wanted[name], rtol=1e-4, atol=1e-6 * float(wanted[name].abs().max())), name
    assert types_of(model, "") == {HALF}


def test_a_block_that_is_forgotten_keeps_its_shapes_and_no_memory() -> None:
    model = vit(depth=3)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    # Two blocks may share a tensor, and the other one still needs it.
    model.blocks[2].mlp.fc1.bias = model.blocks[0].mlp.fc1.bias
    kept = model.blocks[0].mlp.fc1.bias.detach().clone()
    Placement(torch.device("cpu"), moves=True).forget(model.blocks[0], model.blocks[1:])
    assert {name: tensor.shape for name, tensor in model.named_parameters()} == {
        name: shape for name, shape in shapes.items() if name != "blocks.2.mlp.fc1.bias"
    }
    assert torch.equal(model.blocks[0].mlp.fc1.bias, kept)
    assert model.blocks[0].attn.qkv.weight.untyped_storage().nbytes() == 4


@pytest.mark.parametrize("name", ["vit", "vit-qk-norm", "swin", "levit", "hf-vit", "hf-beit"])
def test_in_place_gives_the_same_weights(name: str) -> None:
    host = case(name)
    model = host.build()
    example = host.example()
    size = next(iter(example.values())).shape[-1]
    given = {"mode": host.auto, "init": "calibrated", "calibration": images(size), "example_input": example}
    wanted = convert(model, **given)
    got = convert(copy.deepcopy(model), inplace=True, **given)
    assert surgery_of(got).fidelity == surgery_of(wanted).fidelity
    assert got.state_dict().keys() == wanted.state_dict().keys()
    for fqn, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[fqn], tensor), fqn
    # Nothing holds on to the old weights.
    assert held_bytes(got) == held_bytes(wanted)


def test_half_precision_with_narrower_mlps() -> None:
    model = vit(depth=3).to(HALF)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    converted = convert(model, init="calibrated", params="-20%", mlp=True, calibration=images())
    surgery = surgery_of(converted)
    assert surgery.mlps
    assert surgery.fidelity is not None
    assert surgery.fidelity.cosine > 0.9
    assert types_of(converted, "") == {HALF}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # What was measured is what was kept, but for rounding to the type.
    with torch.no_grad():
        batch = images()[7].to(HALF)
        near = torch.cosine_similarity(model.forward_features(batch), converted.forward_features(batch), dim=-1)
    assert float(near.mean()) == pytest.approx(surgery.fidelity.cosine, abs=0.01)


@pytest.mark.parametrize("name", ["hf-vit", "levit"])
def test_half_precision_of_hosts_that_ask_for_types_and_keep_caches(name: str) -> None:
    # One casts images to the type of its embedding, the other keeps tables that it made of parameters.
    host = case(name)
    batch = {key: value.to(HALF) for key, value in host.batches()[0].items()}
    size = next(iter(batch.values())).shape[-1]
    model = host.build().to(HALF)
    converted = convert(
        model, host.auto, init="calibrated", calibration=images(size), example_input=batch, inplace=True
    )
    assert types_of(converted, "") == {HALF}
    with torch.no_grad():
        for training in (False, True):
            assert {tensor.dtype for tensor in leaves(converted.train(training)(**batch))} == {HALF}


def test_what_fails_half_way_leaves_types_and_forwards_alone() -> None:
    model = vit(depth=3).to(HALF)
    bad = images()
    bad[3] = bad[3] * math.inf
    with pytest.raises(CalibrationError):
        convert(model, "qv", init="calibrated", calibration=bad)
    assert types_of(model, "") == {HALF}
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_a_sharing_copy_has_its_own_tensors_over_the_same_memory() -> None:
    model = vit(depth=1)
    shared = sharing_copy(model)
    for (name, own), (_, tensor) in zip(model.named_parameters(), shared.named_parameters(), strict=True):
        assert own is not tensor, name
        assert own.data_ptr() == tensor.data_ptr(), name
    shared.cls_token.data = torch.zeros_like(shared.cls_token)
    assert bool(model.cls_token.any())
