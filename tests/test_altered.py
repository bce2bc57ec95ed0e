"""What was done to a module from outside is told with a way out that works."""

import functools
import types
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from oracle import randomize
from own_attentions import Plain
from small_models import refused, vit
from torch import nn
from torch.nn.utils import parametrizations, prune

from armour_surgery import convert, deploy, inspect
from armour_surgery.altered import why_computed, why_stuck
from armour_surgery.errors import DiscoveryError, NothingToConvertError
from armour_surgery.surgery.conversion import plan
from armour_surgery.surgery.perform import surgery_of

Alter = Callable[[nn.Module], object]


class Block(nn.Module):
    """Attention and an MLP around a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(20)
        self.attn = Plain()
        self.fc = nn.Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.fc(x)


def stack(*alters: tuple[Alter, str]) -> nn.Sequential:
    """One block that is as it was, and one more for each of the alterations, of what that name says in it."""
    model = randomize(nn.Sequential(*(Block() for _ in range(len(alters) + 1))))
    for block, (alter, place) in zip(list(model)[1:], alters, strict=True):
        alter(block.get_submodule(place))
    return model.eval()


EXAMPLE = {"input": torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(0))}


def kept(model: nn.Module, **arguments: object) -> dict[str, str]:
    """The sites that a plan leaves alone, and why."""
    return {site.fqn: site.reason for site in plan(model, "qv", example_input=EXAMPLE, **arguments).refused}


def do_as_told(model: nn.Module, reason: str) -> None:
    """What a reason says between backticks is typed as it stands."""
    exec(reason.split("`")[1], {"torch": torch, "model": model})


def computed_weight(old: Callable[[nn.Module], nn.Module], layer: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="deprecated"):
        old(layer)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)


def pruned_bias(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "bias", 0.3)


COMPUTED: dict[str, Alter] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": functools.partial(computed_weight, nn.utils.weight_norm),
    "old spectral norm": nn.utils.spectral_norm,
    "pruned": pruned,
    "pruned bias": pruned_bias,
}


def wrapped(attention: nn.Module) -> None:
    """As attention maps are collected: a function that holds on to the module."""
    own = attention.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        result = own(x)
        attention.seen = result.shape
        return result

    attention.forward = forward


def bound(module: nn.Module) -> None:
    def forward(self: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        return type(self).forward(self, *args)

    module.forward = types.MethodType(forward, module)


def offloaded(module: nn.Module) -> None:
    """As accelerate puts its hooks on."""

    def forward(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        return module._old_forward(*args)

    module._hf_hook, module._old_forward = "hook", module.forward
    module.forward = functools.update_wrapper(functools.partial(forward, module), module._old_forward)


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


class Packed(nn.Parameter):
    """As bitsandbytes keeps its weights."""


def packed(layer: nn.Linear) -> None:
    layer.weight = Packed(layer.weight.data)


REPLACED: list[tuple[Alter, str, str]] = [
    (wrapped, "attn", "1.attn.forward was replaced"),
    (bound, "attn", "2.attn.forward was replaced"),
    (bound, "attn.qkv", "3.attn.qkv.forward was replaced"),
    (wrapped, "attn.out", "4.attn.out.forward was replaced"),
    (offloaded, "attn.qkv", "accelerate.hooks.remove_hook_from_submodules"),
    (packed, "attn.qkv", "6.attn.qkv.weight is a Packed"),
    (wrapped, "", "the Block around it has a forward that was put on it as a function"),
]


def test_computed_projections_are_left_alone_and_the_way_out_works() -> None:
    model = stack(*((alter, "attn.qkv") for alter in COMPUTED.values()))
    converted = convert(model, "qv", init="joint-svd", example_input=EXAMPLE)
    reasons = {site.fqn: site.reason for site in surgery_of(converted).refused}
    assert list(reasons) == [f"{number}.attn" for number in range(1, len(COMPUTED) + 1)]
    assert [site.fqn for site in surgery_of(converted).sites] == ["0.attn"]
    told = {site.fqn: site.refused["qv"] for site in inspect(model, example_input=EXAMPLE)[1:]}
    assert told == reasons == kept(model)
    expected = model(**EXAMPLE)
    for fqn, reason in reasons.items():
        assert reason.startswith(f"{fqn}.qkv.")
        do_as_told(model, reason)
    torch.testing.assert_close(model(**EXAMPLE), expected)
    assert not kept(model, init="calibrated")


def test_a_computed_output_projection_stands_in_the_way_of_new_weights_alone() -> None:
    alters = [COMPUTED[name] for name in ("weight norm", "pruned", "pruned bias")]
    model = stack(*((alter, "attn.out") for alter in alters))
    assert not surgery_of(convert(model, "qv", example_input=EXAMPLE)).refused
    for arguments in ({"init": "wq-refit"}, {"rank": 3}):
        reasons = kept(model, **arguments)
        assert [reason.partition(" ")[0][2:10] for reason in reasons.values()] == ["attn.out"] * len(alters)
    assert len(surgery_of(convert(model, "qv", init="joint-svd", example_input=EXAMPLE)).sites) == 1


def test_replaced_forwards_and_weights_of_a_kind_of_their_own_are_left_alone() -> None:
    model = stack(*((alter, place) for alter, place, _ in REPLACED))
    converted = convert(model, "qv", init="joint-svd", example_input=EXAMPLE)
    assert [site.fqn for site in surgery_of(converted).sites] == ["0.attn"]
    for left, (_, _, words) in zip(surgery_of(converted).refused, REPLACED, strict=True):
        assert words in left.reason
    told = [site.refused["qv"] for site in inspect(model, example_input=EXAMPLE)[1:]]
    assert told == list(kept(model).values())
    assert converted(**EXAMPLE).isfinite().all()


def test_a_forward_that_is_taken_off_and_put_on_again_runs() -> None:
    model = stack((wrapped, "attn"))
    do_as_told(model, kept(model)["1.attn"])
    converted = convert(model, "qv", example_input=EXAMPLE)
    wrapped(converted.get_submodule("1.attn"))
    converted(**EXAMPLE)
    assert converted.get_submodule("1.attn").seen == (2, 6, 20)


def test_a_model_whose_own_forward_is_a_function_is_told_what_to_delete() -> None:
    model = vit(depth=1)
    wrapped(model)
    message = refused(NothingToConvertError, lambda: plan(model, "qv"))
    do_as_told(model, message)
    # A partial of a method goes along with a copy.
    model.forward = functools.partial(model.forward)
    assert not plan(model, "qv").refused


def test_a_hook_is_in_the_way_where_its_module_changes() -> None:
    # The attention itself, the output projection and the MLP keep their widths.
    model = stack((hooked, "attn.out"), (hooked, "attn.qkv"))
    hooked(model[1].attn)
    hooked(model[1].fc)
    reasons = kept(model)
    assert list(reasons) == ["2.attn"]
    assert "2.attn.qkv has a hook" in reasons["2.attn"]
    assert list(kept(model, rank=3)) == ["1.attn", "2.attn"]
    assert [len(site.modes) for site in inspect(model, example_input=EXAMPLE)] == [4, 4, 0]
    layer = model[2].attn.qkv
    layer._forward_hooks.clear()
    # It sees the same tokens as before.
    layer.register_forward_pre_hook(lambda *_: None)
    assert not kept(model)
    layer.register_full_backward_hook(lambda *_: None)
    assert list(kept(model)) == ["2.attn"]


def test_what_cannot_be_copied_is_told_as_what_it_is() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model = stack()
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
        for action in (convert, deploy):
            message = refused(DiscoveryError, lambda action=action: action(model, example_input=EXAMPLE))
            assert "0 is sharded (FSDP)" in message
        assert "sharded (FSDP)" in str(why_stuck(model, "0.attn"))
    finally:
        dist.destroy_process_group()


def test_many_computed_weights_are_counted() -> None:
    model = stack((pruned, "attn.qkv"), (pruned, "attn.out"), (pruned, "fc"), (pruned_bias, "fc"))
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    assert str(why_computed(model, names)).endswith("; and 1 more likewise")
    assert why_computed(model, ["0", "0.norm"]) is None
