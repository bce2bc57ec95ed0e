"""Types, memory formats, gradients and compilers work on what `convert` returns as on the original."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from before_and_after import SAMPLE, close, pair
from oracle import outputs
from shared_hosts import converted_host, merged
from tiny_hosts import CASES
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.deployment import deploy
from armour_surgery.saving.folder import load, save
from armour_surgery.surgery.conversion import convert, inspect, plan


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays(name: str, dtype: torch.dtype) -> None:
    one = CASES[name]
    model, converted = pair(name)
    example = {key: value.to(dtype) for key, value in one.example().items()}
    batch = one.batches(dtype)[0]
    model, cast = model.to(dtype), converted.to(dtype)
    fresh = convert(model, one.auto, example_input=example)
    with torch.no_grad():
        expected = outputs(model, batch)
        for other in (cast, fresh):
            assert {p.dtype for p in other.parameters()} == {dtype}
            got = outputs(other, batch)
            assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
            close([tensor.double() for tensor in expected], [tensor.double() for tensor in got], 2e-2)


def test_levit_runs_in_channels_last() -> None:
    model, converted = pair("levit-conv")
    x = CASES["levit-conv"].batches()[0]["x"].to(memory_format=torch.channels_last)
    with torch.no_grad():
        close([model(x)], [converted.to(memory_format=torch.channels_last)(x)])
    model = full_copy(merged("levit-conv")[0]).to(memory_format=torch.channels_last)
    converted = convert(model, "concat-half", example_input=CASES["levit-conv"].example())
    with torch.no_grad():
        close([model(x)], [converted(x)])


def test_a_levit_that_ran_before_still_converts() -> None:
    """Its cache then holds tensors that deepcopy refuses."""
    one = CASES["levit"]
    model = full_copy(merged("levit")[0])
    outputs(model, one.batches()[0])
    converted = convert(model, "concat-half", example_input=one.example())
    close(outputs(model, one.batches()[0]), outputs(converted, one.batches()[0]))


@pytest.mark.parametrize("name", ["vit", "levit", "hf-vit", "hf-beit"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_are_recorded_convert_works_and_training_does_after(name: str, context: Any) -> None:
    model = CASES[name].build()
    with context():
        converted = convert(model, CASES[name].auto, example_input=CASES[name].example())
    assert all(p.requires_grad for p in converted.parameters())
    expected = outputs(full_copy(converted_host(name)), CASES[name].batches()[0])
    close(expected, outputs(converted, CASES[name].batches()[0]))
    outputs(converted.train(), CASES[name].batches()[0])[0].square().mean().backward()


@pytest.mark.parametrize("name", CASES)
def test_gradients_reach_every_parameter_that_they_reached(name: str) -> None:
    model, converted = pair(name)
    reached = []
    for one in (model, converted):
        loss = sum(tensor.square().mean() for tensor in outputs(one, CASES[name].batches()[0]))
        loss.backward()
        reached.append({key for key, p in one.named_parameters() if p.grad is not None and bool(p.grad.any())})
    left = dict(converted.named_parameters())
    assert {key for key in reached[0] if key in left} <= reached[1]


# In training as at rest generated code has one branch for it, so one host is enough for that.
@pytest.mark.parametrize(("name", "training"), [("vit", False), ("vit", True), ("levit", False), ("hf-swin", False)])
def test_it_compiles_as_one_graph(name: str, training: bool) -> None:
    torch._dynamo.reset()
    model, converted = pair(name)
    model.train(training)
    converted.train(training)
    compiled = torch.compile(copy.deepcopy(converted), backend="eager", fullgraph=True)
    with torch.no_grad():
        for batch in CASES[name].batches()[:2]:
            close(outputs(model, batch), outputs(compiled, batch))


def test_it_compiles_ahead_of_time_with_any_batch() -> None:
    torch._dynamo.reset()
    _, converted = pair("vit")
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (4, 7, 11):
            x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
            close([converted(x)], [compiled(x)])
    converted.train()
    compiled(x).square().mean().backward()
    assert all(p.grad is not None for p in converted.parameters())


@pytest.mark.parametrize(("name", "init"), [("vit", "joint-svd"), ("levit", "wq"), ("hf-vit", "wq")])
def test_the_users_default_device_makes_no_difference(name: str, init: str) -> None:
    """The meta device shows what would be made there; `torch.set_default_device("cuda")` goes the same way."""
    one = CASES[name]
    model, example = one.build(), one.example()
    expected = convert(model, one.auto, init=init, example_input=example)
    with torch.device("meta"):
        assert [site.fqn for site in inspect(model, example_input=example)]
        assert plan(model, one.auto, init=init, example_input=example).params_after == expected.surgery.params_after
        converted = convert(model, one.auto, init=init, example_input=example)
    assert converted.surgery == expected.surgery
    state = expected.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in converted.state_dict().items())


def test_a_folder_and_a_deployed_model_under_another_default_device(tmp_path: Path) -> None:
    _, converted = pair("vit")
    batch = CASES["vit"].batches()[0]
    with torch.device("meta"):
        loaded = load(save(converted, tmp_path / "saved"))
        deployed = deploy(converted.eval())
    with torch.no_grad():
        expected = outputs(converted, batch)
        close(expected, outputs(loaded, batch), 0.0)
        close(expected, outputs(deployed, batch))


def test_a_call_of_a_new_kind_under_another_default_device() -> None:
    converted = full_copy(converted_host("vit"))
    attention, other = converted.blocks[0].attn, converted.blocks[1].attn
    other.load_state_dict(attention.state_dict())
    x, mask = torch.randn(2, 5, 48), torch.eye(5, dtype=torch.bool)
    with torch.device("meta"):
        got = attention.eval()(x, attn_mask=mask)
    close([got], [other.eval()(x, attn_mask=mask)], 0.0)


@pytest.mark.parametrize("sizes", ["one", "any"])
def test_a_call_of_a_new_kind_while_it_is_exported(sizes: str) -> None:
    """The branch for it is then made under torch.export's modes, from fakes whose sizes may be symbols."""
    # A conversion of its own: copies share the branches that one of them learned.
    converted = convert(CASES["vit"].build(), "qv", example_input=CASES["vit"].example())
    attention, other = converted.blocks[0].attn.eval(), converted.blocks[1].attn.eval()
    other.load_state_dict(attention.state_dict())
    tokens = torch.export.Dim.DYNAMIC if sizes == "any" else torch.export.Dim.STATIC
    shapes = {"x": {0: tokens, 1: tokens}, "attn_mask": {0: tokens, 1: tokens}}
    generator = torch.Generator().manual_seed(6)
    x, mask = torch.randn(3, 5, 48, generator=generator), torch.randn(5, 5, generator=generator)
    branches = len(attention.armour_variants)
    program = torch.export.export(attention, (x,), {"attn_mask": mask}, dynamic_shapes=shapes, strict=False)
    assert len(attention.armour_variants) == branches + 1
    with torch.no_grad():
        close([other(x, attn_mask=mask)], [program.module()(x, attn_mask=mask)], 1e-6)
        if sizes == "any":
            x, mask = torch.randn(2, 7, 48, generator=generator), torch.randn(7, 7, generator=generator)
            close([other(x, attn_mask=mask)], [program.module()(x, attn_mask=mask)], 1e-6)


class Masked(nn.Module):
    """An attention in a model, so that torch compiles its forward as a part of the model's."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x + self.attention(x, attn_mask=mask)


def test_a_call_of_a_new_kind_while_it_is_compiled() -> None:
    """transformers hands a mask over while torch compiles, and none else: the branch for it is made in between."""
    converted = convert(CASES["vit"].build(), "qv", example_input=CASES["vit"].example())
    attention, other = converted.blocks[0].attn.eval(), converted.blocks[1].attn.eval()
    other.load_state_dict(attention.state_dict())
    x, mask = torch.randn(3, 5, 48), torch.randn(5, 5)
    branches = len(attention.armour_variants)
    torch._dynamo.reset()
    compiled = torch.compile(Masked(attention), backend="aot_eager")
    with torch.no_grad():
        first = compiled(x, mask)
        assert len(attention.armour_variants) == branches + 1
        breaks = dict(torch._dynamo.utils.counters["graph_break"])
        later = [compiled(x, mask) for _ in range(2)]
        assert dict(torch._dynamo.utils.counters["graph_break"]) == breaks  # it is one graph from now on
        close([Masked(other)(x, mask)] * 3, [first, *later], 1e-6)
    assert len(attention.armour_variants) == branches + 1
