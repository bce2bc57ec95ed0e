"""What timm and transformers offer for the original works on what `convert` returns."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from before_and_after import close, leaves, pair, sites
from oracle import merge, outputs, relative_error
from shared_hosts import converted_host
from timm.models import get_notrace_functions, get_notrace_modules
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from tiny_hosts import CASES
from torch import fx, nn

from armour_surgery.copies import full_copy
from armour_surgery.surgery.conversion import convert

TIMM = [name for name in CASES if not name.startswith("hf")]
HF = [name for name in CASES if name.startswith("hf")]


# timm's API.


@pytest.mark.parametrize("name", TIMM)
def test_timm_features(name: str) -> None:
    model, converted = pair(name)
    batch = CASES[name].batches()[0]
    with torch.no_grad():
        close(model.forward_features(batch["x"]), converted.forward_features(batch["x"]))
        expected = model.forward_intermediates(batch["x"])
        assert len(leaves(expected)) > 1
        close(expected, converted.forward_intermediates(batch["x"]))
        if hasattr(model, "get_intermediate_layers"):
            close(model.get_intermediate_layers(batch["x"], 2), converted.get_intermediate_layers(batch["x"], 2))


@pytest.mark.parametrize("name", TIMM)
def test_timm_training_helpers(name: str) -> None:
    model, converted = pair(name)
    if hasattr(model, "no_weight_decay"):
        assert converted.no_weight_decay() == model.no_weight_decay()
    names = {id(p): n for one in (model, converted) for n, p in one.named_parameters()}
    settings = []
    for one in (model, converted):
        groups = param_groups_layer_decay(one, weight_decay=0.05, layer_decay=0.6)
        settings.append(
            {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
        )
        assert len(settings[-1]) == len(list(one.parameters()))
    assert settings[1].items() <= settings[0].items()
    assert len({scale for scale, _ in settings[1].values()}) > 2


def test_distilled_training_still_gives_two_outputs() -> None:
    model, converted = pair("deit-distilled")
    batch = CASES["deit-distilled"].batches()[0]
    for one in (model, converted):
        one.set_distilled_training(True)
        one.train()
    with torch.no_grad():
        expected, got = outputs(model, batch), outputs(converted, batch)
    assert len(got) == 2
    close(expected, got)


@pytest.mark.parametrize("name", ["levit", "levit-conv"])
@pytest.mark.parametrize("mode", ["concat-half", "concat-full", "concat-key", "qk", "grouped", "grouped-shuffled"])
def test_batch_norms_can_still_be_folded(name: str, mode: str) -> None:
    converted = full_copy(converted_host(name, mode)).double()
    # The layers that timm makes for the folded weights have the default type, whatever the model's own is.
    torch.set_default_dtype(torch.float64)
    try:
        folded = reparameterize_model(converted)
    finally:
        torch.set_default_dtype(torch.float32)
    assert folded.surgery == converted.surgery
    for fqn in sites(folded):
        kinds = {n: type(m) for n, m in folded.get_submodule(fqn).named_modules() if "grouped_value" not in n}
        assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds.values()), kinds
    for batch in CASES[name].batches(torch.float64):
        with torch.no_grad():
            close(outputs(converted, batch), outputs(folded, batch), 1e-10)


@pytest.mark.parametrize("name", ["vit", "levit", "hf-vit"])
def test_ema_follows(name: str) -> None:
    _, converted = pair(name)
    ema = ModelEmaV3(converted, decay=0.5, use_warmup=False)
    before = {key: value.clone() for key, value in converted.state_dict().items()}
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    ema.update(converted)
    for key, parameter in converted.named_parameters():
        got = ema.module.get_parameter(key)
        torch.testing.assert_close(got, (before[key] + parameter.detach()) / 2)
    assert set(sites(ema.module)) == set(sites(converted))


class TimmsTracer(fx.Tracer):
    """torch.fx as timm asks to be traced: what it marks is one node."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, tuple(get_notrace_modules())) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("name", TIMM)
def test_what_fx_can_trace_it_still_can(name: str) -> None:
    """A model's own arguments are proxies there, so an attention may be handed a mask of which nothing is known."""
    model, converted = pair(name)
    try:
        TimmsTracer().trace(copy.deepcopy(model))
    except (fx.proxy.TraceError, TypeError) as error:
        pytest.skip(f"fx cannot trace the original: {error}")
    converted = copy.deepcopy(converted)
    for training in (False, True):
        converted.train(training)
        tracer = TimmsTracer()
        # Of a copy: in eval LeViT caches its biases, and here fx's proxies.
        graph = tracer.trace(copy.deepcopy(converted))
        traced = fx.GraphModule(tracer.root, graph).train(training)
        for batch in CASES[name].batches()[:2]:
            with torch.no_grad():
                close(outputs(converted, batch, seed=3), outputs(traced, batch, seed=3), 0.0)


def _checkpoint(model: nn.Module) -> None:
    """transformers gave it a new name."""
    new = getattr(model, "activation_checkpointing_enable", None)
    new() if new else model.gradient_checkpointing_enable({"use_reentrant": False})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "switch"),
    [(name, lambda model: model.set_grad_checkpointing(True)) for name in ("vit", "eva02", "beit", "levit", "swin")]
    + [(name, _checkpoint) for name in ("hf-vit", "hf-beit", "hf-swin", "hf-dinov3")],
)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, switch: Callable[[nn.Module], None]) -> None:
    _, converted = pair(name)
    batch = CASES[name].batches()[0]
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(converted).train()
        if checkpointing:
            switch(model)
        outputs(model, batch)[0].square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["boolean", "additive", "causal"])
def test_a_mask_that_no_conversion_saw(fused: bool, kind: str) -> None:
    model, converted = pair("vit")
    batch = CASES["vit"].batches()[0]
    tokens = 17
    mask = torch.rand(tokens, tokens, generator=torch.Generator().manual_seed(4)) > 0.4
    mask |= torch.eye(tokens, dtype=torch.bool)
    given: dict[str, Any] = {
        "boolean": {"attn_mask": mask},
        "additive": {"attn_mask": torch.zeros(tokens, tokens).masked_fill(~mask, -1e4)},
        "causal": {"is_causal": True},
    }[kind]
    for one in (model, converted):
        for block in one.blocks:
            block.attn.fused_attn = fused
    with torch.no_grad():
        plain = converted(batch["x"])
        expected = model(batch["x"], **given)
        assert relative_error([plain], [expected]) > 1e-3
        close([expected], [converted(batch["x"], **given)])
        close([plain], [converted(batch["x"])])
        close([model(batch["x"])], [plain])
    # What one object learned, its copies and other conversions may share; what it computes, they may not.
    copied = copy.deepcopy(converted)
    with torch.no_grad():
        close([expected], [copied(batch["x"], **given)])


EAGER = [name for name in HF if name not in ("hf-levit", "hf-segformer")]


# transformers' API.


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("when", ["before", "after"])
def test_attention_maps(name: str, when: str) -> None:
    one = CASES[name]
    if when == "before":
        model = one.build()
        model.set_attn_implementation("eager")
        merge(model, one.auto, one.example())
        converted = convert(model, one.auto, example_input=one.example())
    else:
        model, converted = pair(name)
        model.set_attn_implementation("eager")
        converted.set_attn_implementation("eager")
    for batch in one.batches()[:2]:
        with torch.no_grad():
            expected = model(**batch, output_attentions=True).attentions
            maps = converted(**batch, output_attentions=True).attentions
        assert len(maps) == len(expected) > 0
        for a, b in zip(expected, maps, strict=True):
            assert a.shape == b.shape
            assert b.shape[-1] == b.shape[-2] > 1
            torch.testing.assert_close(b.sum(-1), torch.ones_like(b.sum(-1)))
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", HF)
def test_hidden_states(name: str) -> None:
    model, converted = pair(name)
    batch = CASES[name].batches()[0]
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        got = converted(**batch, output_hidden_states=True)
    assert len(got.hidden_states) > 1
    assert type(expected) is type(got)
    close(expected, got)
    with torch.no_grad():
        close(model(**batch, return_dict=False), converted(**batch, return_dict=False))


@pytest.mark.parametrize(("seen", "new"), [(64, 16), (16, 64), (64, 56)])
def test_swin_s_shift_mask_comes_and_goes(seen: int, new: int) -> None:
    """At 16 pixels there is one window and no shift, so no mask; at 56 the windows are padded."""
    one = CASES["hf-swin"]
    model = one.build()
    example = {"pixel_values": torch.empty(2, 3, seen, seen, device="meta")}
    merge(model, "qv", example)
    converted = convert(model, "qv", example_input=example)
    generator = torch.Generator().manual_seed(2)
    for size in (new, seen, new):
        batch = {"pixel_values": torch.randn(3, 3, size, size, generator=generator)}
        for training in (False, True):
            with torch.no_grad():
                close(outputs(model.train(training), batch), outputs(converted.train(training), batch))
