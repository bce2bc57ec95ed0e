"""The model stays what it was: classes, parameters, modes, copies, checkpoints and hooks."""

import copy
from typing import Any

import pytest
import timm
import torch
from before_and_after import SAMPLE, close, pair, sites
from oracle import merge, outputs, randomize, relative_error
from shared_hosts import built, converted_host
from tiny_hosts import CASES
from torch import nn

from armour_surgery.copies import full_copy
from armour_surgery.errors import AlreadyConvertedError, NothingToConvertError
from armour_surgery.surgery.conversion import convert

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
    model, converted = built(name)[0], converted_host(name)
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
    # On a projection that gets narrower or goes, a hook is in the way.
    inside = tuple(f"{fqn}." for fqn in sites(converted_host(name)))
    for fqn, module in model.named_modules():
        if not fqn.startswith(inside):
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
    expected = outputs(full_copy(converted_host(name)), CASES[name].batches()[0])
    close(expected, outputs(model, CASES[name].batches()[0]), 0.0)


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
    other = randomize(full_copy(converted_host(name)), seed=9)
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
    with pytest.warns(UserWarning, match="cannot be saved, .* 'blocks.1' is absent in the model"):
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
    with pytest.warns(UserWarning, match="cannot be saved, .* blocks.0.attn.extra is"):
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
