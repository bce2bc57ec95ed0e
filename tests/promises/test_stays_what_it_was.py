"""The model stays what it was: everything that worked on the original works on what `convert` returns."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from oracle import merge, outputs, randomize, relative_error
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3, reparameterize_model
from tiny_hosts import CASES
from torch import nn

from armour_surgery.errors import AlreadyConvertedError, NothingToConvertError
from armour_surgery.rewrite import ArmourAttention
from armour_surgery.surgery.conversion import convert

TIMM = [name for name in CASES if not name.startswith("hf")]
HF = [name for name in CASES if name.startswith("hf")]
SAMPLE = [
    "vit",
    "deit-distilled",
    "eva",
    "eva02",
    "beit",
    "levit",
    "levit-conv",
    "swin",
    "hf-vit",
    "hf-levit",
    "hf-beit",
]


def merged_host(name: str, mode: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A host in which `mode` merges equal projections, so that its own outputs are what the converted one owes."""
    model = CASES[name].build()
    merge(model, mode or CASES[name].auto, CASES[name].example())
    return model.to(dtype)


@functools.cache
def _pair(name: str, mode: str | None) -> tuple[nn.Module, nn.Module]:
    model = merged_host(name, mode)
    return model, convert(model, mode or CASES[name].auto, example_input=CASES[name].example())


def pair(name: str, mode: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A host and its conversion, which owe each other equal outputs; copies."""
    return copy.deepcopy(_pair(name, mode)[0]), copy.deepcopy(_pair(name, mode)[1])


def converted_host(name: str, **options: Any) -> nn.Module:
    return convert(CASES[name].build(), CASES[name].auto, example_input=CASES[name].example(), **options)


def sites(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ArmourAttention)}


def close(expected: Any, got: Any, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        assert relative_error(leaves(expected), leaves(got)) <= tolerance


def leaves(value: Any) -> list[torch.Tensor]:
    found = torch.utils._pytree.tree_leaves(value.to_tuple() if hasattr(value, "to_tuple") else value)
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


# What it is.


@pytest.mark.parametrize("name", CASES)
def test_every_module_has_the_class_it_had(name: str) -> None:
    model, converted = pair(name)
    assert type(converted) is type(model)
    done = sites(converted)
    assert set(done) == {site.fqn for site in converted.surgery.sites}
    names = dict(model.named_modules())
    for fqn, module in converted.named_modules():
        if fqn in done:
            assert isinstance(module, type(names[fqn]))
            assert type(module) is not type(names[fqn])
            assert set(vars(type(module))) <= set(vars(type(module).__mro__[-1])) | {
                "__module__",
                "__doc__",
                "armour_mode",
                "armour_variants",
                "armour_trace",
                "armour_source",
                "forward",
            }
        elif not fqn.endswith("grouped_value"):
            assert type(module) is type(names[fqn])
    gone = set(names) - set(dict(converted.named_modules()))
    assert all(any(fqn.startswith(f"{site}.") for site in done) for fqn in gone)
    for fqn in gone:  # removed, and nothing was put in its place
        owner, _, attribute = fqn.rpartition(".")
        if owner not in gone:
            assert getattr(converted.get_submodule(owner), attribute) is None


@pytest.mark.parametrize("name", CASES)
def test_no_parameter_is_tied(name: str) -> None:
    model, converted = pair(name)
    storages = [p.untyped_storage().data_ptr() for p in converted.parameters() if p.numel()]
    assert len(set(storages)) == len(storages)
    named = dict(converted.named_parameters(remove_duplicate=False))
    assert len(named) == len(list(converted.parameters()))
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, converted))
    assert (converted.surgery.params_before, converted.surgery.params_after) == (before, after)
    assert after < before
    assert before - after == sum(site.params_before - site.params_after for site in converted.surgery.sites)


@pytest.mark.parametrize("name", CASES)
def test_untouched_parameters_are_bit_identical_and_the_others_are_rows_of_old_ones(name: str) -> None:
    model = CASES[name].build()
    converted = convert(model, CASES[name].auto, example_input=CASES[name].example())
    old = model.state_dict()
    done = tuple(f"{fqn}." for fqn in sites(converted))
    for key, tensor in converted.state_dict().items():
        assert tensor.dtype == old[key].dtype
        if tensor.shape == old[key].shape:
            assert torch.equal(tensor, old[key]), key
            assert tensor.numel() == 0 or tensor.data_ptr() != old[key].data_ptr(), key
        else:
            assert key.startswith(done)
            known = {tuple(row.flatten().tolist()) for row in old[key]}
            rows = [tuple(row.flatten().tolist()) for row in tensor]
            assert set(rows) <= known, key


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module, down to the identity of each object and the contents of each container."""
    result = {}
    for name, module in model.named_modules():
        result[name] = {
            key: (
                id(value),
                dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else None,
            )
            for key, value in vars(module).items()
        }
        result[name]["class"] = (id(type(module)), None)
    return result


@pytest.mark.parametrize(("name", "training"), [(n, False) for n in CASES] + [(n, True) for n in ("levit", "hf-vit")])
def test_the_original_is_left_as_it_was(name: str, training: bool) -> None:
    model = CASES[name].build()
    model.train(training)
    fired = []
    model.register_forward_hook(lambda *_: fired.append(1))
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: fired.append(2))
    before, tensors = snapshot(model), {key: value.clone() for key, value in model.state_dict().items()}
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    classes = {id(type(module)): dict(vars(type(module))) for module in model.modules()}
    converted = convert(model, CASES[name].auto, example_input=CASES[name].example())
    assert not fired
    assert snapshot(model).keys() == before.keys()
    assert snapshot(model) == before
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad
    assert all(dict(vars(type(module))) == classes[id(type(module))] for module in model.modules())
    assert all(module.training == training for module in converted.modules())
    # The hooks came along.
    outputs(converted, CASES[name].batches()[0])
    assert fired


@pytest.mark.parametrize("name", ["vit", "levit", "hf-vit"])
def test_in_place_is_the_same_object(name: str) -> None:
    model = CASES[name].build()
    converted = convert(model, CASES[name].auto, example_input=CASES[name].example(), inplace=True)
    assert converted is model
    close(outputs(converted_host(name), CASES[name].batches()[0]), outputs(model, CASES[name].batches()[0]), 0.0)


def test_the_paper_s_parameter_counts() -> None:
    for architecture, before, after in (
        ("deit_tiny_patch16_224", 5_717_416, 5_272_744),
        ("deit_small_patch16_224", 22_050_664, 20_276_584),
    ):
        with torch.device("meta"):
            model = timm.create_model(architecture)
        converted = convert(model, "qv")
        assert (converted.surgery.params_before, converted.surgery.params_after) == (before, after)
        assert sum(p.numel() for p in converted.parameters()) == after


@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_without_weights_converts_alike(name: str) -> None:
    _, expected = pair(name)
    with torch.device("meta"):
        model = CASES[name].make()
    converted = convert(model, CASES[name].auto, example_input=CASES[name].example())
    assert all(p.is_meta for p in converted.parameters())
    assert {site.residual for site in converted.surgery.sites} == {None}
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    assert {key: value.shape for key, value in converted.state_dict().items()} == shapes
    assert converted.surgery.params_after == expected.surgery.params_after
    assert converted.surgery.macs_after == expected.surgery.macs_after
    assert converted.surgery.macs_after < converted.surgery.macs_before


# Modes, copies and checkpoints.


@pytest.mark.parametrize("name", [name for name in CASES if name != "hf-levit"])  # it has no dropout
def test_dropout_follows_train_and_eval(name: str) -> None:
    _, converted = pair(name)
    batch = CASES[name].batches()[0]
    with torch.no_grad():
        first, second = outputs(converted, batch, seed=1), outputs(converted, batch, seed=2)
        close(first, second, 0.0)
        train = [outputs(copy.deepcopy(converted).train(), batch, seed=seed) for seed in (1, 2, 1)]
        assert relative_error(train[0], train[1]) > 1e-3
        close(train[0], train[2], 0.0)
        close(first, outputs(converted.eval(), batch), 0.0)


@pytest.mark.parametrize("name", ["vit", "eva", "eva02", "beit", "swin", "hf-vit", "hf-beit", "hf-clip", "hf-swin"])
def test_attention_dropout_itself_follows_train(name: str) -> None:
    """With all other dropout taken out, and by the rate that the module has now."""
    _, converted = pair(name)
    batch = CASES[name].batches()[0]
    done = sites(converted)
    for fqn, module in converted.named_modules():
        inside = any(fqn.startswith(f"{site}.") for site in done)
        if isinstance(module, nn.Dropout) and not (inside and "proj" not in fqn):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    with torch.no_grad():
        quiet = outputs(converted, batch)
        assert relative_error(quiet, outputs(converted.train(), batch)) > 1e-3
        for module in converted.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for attribute in ("attn_drop", "dropout", "dropout_prob", "attention_dropout"):
                if isinstance(vars(module).get(attribute), float):
                    setattr(module, attribute, 0.0)
        close(quiet, outputs(converted.train(), batch))


@pytest.mark.parametrize("name", SAMPLE)
def test_copies_keep_the_plan_and_are_not_converted_again(name: str) -> None:
    _, converted = pair(name)
    copied = copy.deepcopy(converted)
    assert copied.surgery == converted.surgery
    assert type(copied.surgery).from_dict(copied.surgery.to_dict()) == converted.surgery
    close(outputs(converted, CASES[name].batches()[0]), outputs(copied, CASES[name].batches()[0]), 0.0)
    for model in (converted, copied):
        with pytest.raises(AlreadyConvertedError, match="converted already"):
            convert(model, example_input=CASES[name].example())


@pytest.mark.parametrize("name", SAMPLE)
def test_state_dicts_go_round(name: str) -> None:
    _, converted = pair(name)
    other = convert(randomize(CASES[name].build(), seed=9), CASES[name].auto, example_input=CASES[name].example())
    batch = CASES[name].batches()[0]
    with torch.no_grad():
        expected = outputs(converted, batch)
        assert relative_error(expected, outputs(other, batch)) > 1e-3
        other.load_state_dict(converted.state_dict(), strict=True)
        close(expected, outputs(other.train().eval(), batch), 0.0)


@pytest.mark.parametrize("name", ["levit", "levit-conv", "hf-levit"])
def test_levit_s_bias_cache_still_caches(name: str) -> None:
    model, converted = pair(name)
    converted.eval()
    batch = CASES[name].batches()[0]
    attentions = [module for module in converted.modules() if hasattr(module, "attention_bias_cache")]
    assert len(attentions) == 3
    with torch.no_grad():
        outputs(converted, batch)
        cached = [next(iter(module.attention_bias_cache.values())) for module in attentions]
        outputs(converted, batch)
        again = [next(iter(module.attention_bias_cache.values())) for module in attentions]
        assert all(a is b for a, b in zip(cached, again, strict=True))
        # What is in the cache is what is used.
        before = outputs(converted, batch)
        for tensor in cached:
            tensor.mul_(torch.linspace(-40, 40, tensor.shape[-1]))
        assert relative_error(before, outputs(converted, batch)) > 1e-4
        converted.train()
        assert all(not module.attention_bias_cache for module in attentions)
        outputs(converted, batch)
        assert all(not module.attention_bias_cache for module in attentions)


# Hooks.


@pytest.mark.parametrize("name", CASES)
def test_the_same_hooks_fire_in_the_same_order(name: str) -> None:
    model, converted = pair(name)
    fired: dict[int, list[str]] = {0: [], 1: []}
    for number, one in enumerate((model, converted)):
        for fqn, module in one.named_modules():
            if not fqn.endswith("grouped_value"):
                module.register_forward_hook(lambda *_, fqn=fqn, number=number: fired[number].append(fqn))
        outputs(one, CASES[name].batches()[0])
    left = dict(converted.named_modules())
    # Inside a site the projections may run in another order; every other module keeps its place.
    done = tuple(f"{fqn}." for fqn in sites(converted))
    for pick in (lambda fqn: not fqn.startswith(done), lambda fqn: fqn.startswith(done)):
        expected, got = ([fqn for fqn in fired[number] if fqn in left and pick(fqn)] for number in (0, 1))
        assert sorted(expected) == sorted(got)
        if not any(fqn.startswith(done) for fqn in expected):
            assert expected == got
    assert set(sites(converted)) <= set(fired[1])


@pytest.mark.parametrize(("name", "child"), [("vit", "qkv"), ("vit", "proj"), ("hf-vit", "attention.q_proj")])
def test_a_hook_may_still_change_what_a_submodule_returns(name: str, child: str) -> None:
    _, converted = pair(name)
    batch = CASES[name].batches()[0]
    fqn, module = next(iter(sites(converted).items()))
    names = [n for n, _ in module.named_modules() if n and n.rpartition(".")[2] == child.rpartition(".")[2]]
    assert names, [n for n, _ in module.named_modules()]
    with torch.no_grad():
        before = outputs(converted, batch)
        handle = module.get_submodule(names[0]).register_forward_hook(lambda _, __, output: output * 0.5)
        assert relative_error(before, outputs(converted, batch)) > 1e-3
        handle.remove()
        close(before, outputs(converted, batch), 0.0)


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
@pytest.mark.parametrize("mode", ["concat-half", "concat-full", "qk", "grouped", "grouped-shuffled"])
def test_batch_norms_can_still_be_folded(name: str, mode: str) -> None:
    converted = convert(CASES[name].build(), mode, example_input=CASES[name].example()).double()
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


# transformers' API.


EAGER = [name for name in HF if name not in ("hf-levit", "hf-segformer")]


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


# Types, devices, layouts, compilation.


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
    model = merged_host("levit-conv").to(memory_format=torch.channels_last)
    converted = convert(model, "concat-half", example_input=CASES["levit-conv"].example())
    with torch.no_grad():
        close([model(x)], [converted(x)])


def test_a_levit_that_ran_before_still_converts() -> None:
    """Its cache then holds tensors that deepcopy refuses."""
    one = CASES["levit"]
    model = merged_host("levit")
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
    close(outputs(converted_host(name), CASES[name].batches()[0]), outputs(converted, CASES[name].batches()[0]))
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


COMPILED = ["vit", "levit", "hf-swin"]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("training", [False, True])
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


# Odd models.


def test_frozen_parameters_stay_frozen() -> None:
    for name in ("vit", "levit", "hf-vit", "eva"):
        model = CASES[name].build()
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(number % 2 == 0)
        flags = {key: p.requires_grad for key, p in model.named_parameters()}
        converted = convert(model, CASES[name].auto, example_input=CASES[name].example())
        assert all(p.requires_grad == flags[key] for key, p in converted.named_parameters())
        assert len({p.requires_grad for p in converted.parameters()}) == 2


def test_a_block_in_two_places_stays_one_block() -> None:
    one = CASES["vit"]
    model = one.build()
    model.blocks[1] = model.blocks[0]
    merge(model, "qv", one.example())
    converted = convert(model, "qv", example_input=one.example())
    assert converted.blocks[0] is converted.blocks[1]
    assert len(converted.surgery.sites) == 1
    assert converted.surgery.params_before - converted.surgery.params_after == 48 * 48 + 48
    with torch.no_grad():
        close(outputs(model, one.batches()[0]), outputs(converted, one.batches()[0]))


def test_a_projection_that_two_attentions_share() -> None:
    """Narrowing it for both would be once too often."""
    one = CASES["vit"]
    model = one.build()
    model.blocks[1].attn.qkv = model.blocks[0].attn.qkv
    with pytest.raises(NothingToConvertError, match="its qkv.weight is shared with blocks.1.attn.qkv.weight"):
        convert(model, "qv", example_input=one.example())


def test_what_a_user_put_on_the_modules_comes_along() -> None:
    one = CASES["vit"]
    model = one.build()
    attention = model.blocks[0].attn
    attention.register_buffer("seen", torch.arange(5))
    attention.register_buffer("scratch", torch.ones(3), persistent=False)
    attention.register_parameter("extra", nn.Parameter(torch.ones(2)))
    attention.note = {"a": [1, 2]}
    converted = convert(model, "qv", example_input=one.example())
    got = converted.blocks[0].attn
    assert torch.equal(got.seen, attention.seen)
    assert torch.equal(got.scratch, attention.scratch)
    assert "blocks.0.attn.seen" in converted.state_dict()
    assert "blocks.0.attn.scratch" not in converted.state_dict()
    assert torch.equal(got.extra, attention.extra)
    assert got.note == {"a": [1, 2]}
    assert got.note is not attention.note


def test_the_code_is_readable() -> None:
    for name in SAMPLE:
        code = next(iter(sites(pair(name)[1]).values())).code
        assert code.startswith("def forward(self, ")
        assert "_self" not in code
        compile(code, name, "exec")
