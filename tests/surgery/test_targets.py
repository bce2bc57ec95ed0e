"""What may be converted: a model that was not, fed an example that fits, at the sites that patterns choose."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_attentions import SHAPE, D, Hidden, PerHead
from small_models import Own, refused, surgery_of, vit
from timm.layers import Attention
from tiny_hosts import CASES
from torch import nn

from armour_surgery import AttentionSite, convert, inspect, plan
from armour_surgery.errors import (
    AlreadyConvertedError,
    ExampleInputError,
    PatternError,
    SpecializationError,
    UsageError,
)


class TwoInputs(Own):
    def forward(self, pictures: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(pictures) * scale


@pytest.mark.parametrize("again", [convert, inspect, plan], ids=lambda function: function.__name__)
def test_a_converted_model_is_refused(again: Callable[[nn.Module], Any]) -> None:
    converted = convert(vit(), include="blocks.1*")
    message = refused(AlreadyConvertedError, lambda: again(converted))
    assert "blocks.1.attn" in message
    del converted.surgery
    assert "blocks.1.attn" in refused(AlreadyConvertedError, lambda: again(converted))
    assert "block.blocks.1.attn" in refused(AlreadyConvertedError, lambda: again(nn.ModuleDict({"block": converted})))


# include and exclude


@pytest.mark.parametrize(
    ("include", "exclude", "wanted"),
    [
        (None, None, [0, 1, 2]),
        ("blocks.0*", None, [0]),
        ("blocks.0", None, [0]),
        (["blocks.0", "blocks.2.attn"], None, [0, 2]),
        (None, "blocks.1*", [0, 2]),
        ("*.attn", ["blocks.1*", "blocks.2*"], [0]),
        ("blocks.[01].attn", "blocks.0", [1]),
        ("*", None, [0, 1, 2]),
        (("blocks.2.attn",), (), [2]),
    ],
)
def test_patterns(include: Any, exclude: Any, wanted: list[int]) -> None:
    surgery = plan(vit(), include=include, exclude=exclude)
    assert [site.fqn for site in surgery.sites] == [f"blocks.{index}.attn" for index in wanted]


def test_patterns_may_be_any_iterable() -> None:
    def generate() -> Any:
        yield "blocks.0*"
        yield "blocks.2*"

    assert [site.fqn for site in plan(vit(), include=generate()).sites] == ["blocks.0.attn", "blocks.2.attn"]
    assert [site.fqn for site in plan(vit(), exclude=generate()).sites] == ["blocks.1.attn"]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(option: str) -> None:
    arguments: dict[str, Any] = {option: ["blocks.0*", "layers.0*"]}
    message = refused(PatternError, lambda: convert(vit(), **arguments))
    assert "'layers.0*'" in message
    assert "blocks.0.attn" in message
    assert "blocks.2.attn" in message


def test_patterns_that_leave_nothing() -> None:
    message = refused(PatternError, lambda: convert(vit(), exclude="*"))
    assert "exclude" in message
    message = refused(PatternError, lambda: convert(vit(), include=[]))
    assert "include" in message


EXAMPLES: dict[str, Any] = {
    "tensor": torch.zeros(1, 3, 32, 32),
    "meta": torch.zeros(4, 3, 32, 32, device="meta"),
    "shape": (1, 3, 32, 32),
    "size": torch.Size((3, 3, 32, 32)),
    "dict": {"pictures": torch.zeros(1, 3, 32, 32)},
}


# example_input


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_users_own_model(kind: str) -> None:
    model = Own().eval()
    [site] = inspect(model, example_input=EXAMPLES[kind])
    assert isinstance(site, AttentionSite)
    assert (site.fqn, site.num_heads, site.key_dim, site.value_dim) == ("mixer", 4, 12, 12)
    assert set(site.modes) == {"qv", "qk", "qk-diag", "kv"}
    converted = convert(model, example_input=EXAMPLES[kind])
    assert type(converted) is Own
    assert isinstance(converted.mixer, Attention)
    assert converted.mixer.qkv.weight.shape == (96, 48)  # type: ignore[union-attr]
    x = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = copy.deepcopy(model)
        # V made equal to Q is what qv stands for.
        expected.mixer.qkv.weight[96:] = expected.mixer.qkv.weight[:48]
        expected.mixer.qkv.bias[96:] = expected.mixer.qkv.bias[:48]
        assert torch.allclose(converted(x), expected(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_shape_is_of_the_models_own_type(dtype: torch.dtype) -> None:
    converted = convert(Own().to(dtype), example_input=(1, 3, 32, 32))
    assert converted.mixer.qkv.weight.shape == (96, 48)  # type: ignore[union-attr]
    assert converted.mixer.qkv.weight.dtype == dtype  # type: ignore[union-attr]


def test_several_inputs() -> None:
    example = {"pictures": torch.zeros(2, 3, 32, 32), "scale": torch.ones(())}
    converted = convert(TwoInputs().eval(), example_input=example)
    assert surgery_of(converted).params_after < surgery_of(converted).params_before
    assert converted(torch.zeros(1, 3, 32, 32), torch.tensor(2.0)).shape == (1, 5)


def test_without_an_example_the_message_asks_for_it() -> None:
    for action in (convert, inspect, plan):
        message = refused(ExampleInputError, lambda function=action: function(Own()))
        assert "Own" in message
        assert "example_input" in message


WRONG: dict[str, Any] = {
    "shape-of-three": (3, 32, 32),
    "zero": (0, 3, 32, 32),
    "float": (1, 3, 32.5, 32),
    "text-size": (1, 3, 32, "x"),
    "overflow": (1, 3, 10**9, 10**10),
    "channels": (1, 5, 32, 32),
    "too-small": (1, 3, 4, 4),
    "list": [1, 3, 32, 32],
    "number": 5,
    "text": "image",
    "dict-of-shapes": {"pictures": (1, 3, 32, 32)},
    "other-name": {"images": torch.zeros(1, 3, 32, 32)},
    "empty": {},
    "scalar": torch.tensor(3.0),
    "integers": torch.zeros(1, 3, 32, 32, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_example_is_explained(kind: str) -> None:
    message = refused(ExampleInputError, lambda: convert(Own(), example_input=WRONG[kind]))
    assert "example_input" in message


def test_a_wrong_example_for_a_known_model() -> None:
    message = refused(ExampleInputError, lambda: convert(vit(), example_input=(1, 3, 64, 64)))
    assert "VisionTransformer" in message
    assert "(2, 3, 64, 64)" in message


def test_the_example_is_not_run_on_the_users_weights() -> None:
    """No forward of the original, no hook, no gradient, no random number."""
    model = Own().train()
    calls: list[str] = []
    model.mixer.register_forward_hook(lambda *_: calls.append("hook"))
    state = torch.get_rng_state()
    example = torch.zeros(1, 3, 32, 32)
    convert(model, example_input=example)
    assert calls == []
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.mixer.training


class Picky(nn.Module):
    """An attention that looks at the number of tokens, and at the numbers in a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor, flag: torch.Tensor | None = None) -> torch.Tensor:
        if x.shape[1] % 2 or (flag is not None and flag.sum() > 0):
            x = x * 2
        q, k, v = (layer(x).unflatten(2, (4, 12)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class PickyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = Picky()

    def forward(self, x: torch.Tensor, flag: torch.Tensor | None = None) -> torch.Tensor:
        return self.mixer(x, flag)


def test_a_call_that_cannot_be_followed_is_explained_and_not_guessed() -> None:
    converted = convert(PickyNet().eval(), example_input={"x": torch.zeros(2, 17, 48)})
    assert converted(torch.zeros(1, 19, 48)).shape == (1, 19, 48)
    try:
        assert converted(torch.zeros(1, 16, 48)).shape == (1, 16, 48)
    except SpecializationError as error:
        assert "example_input" in str(error)  # noqa: PT017
    message = refused(SpecializationError, lambda: converted(torch.zeros(1, 16, 48), torch.ones(1)))
    assert "ArmourPicky" in message
    assert "contents of a tensor" in message


def test_examples_in_every_form() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, D, 4, 4)
            self.inner = PerHead()

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.inner(self.patch(image).flatten(2).transpose(1, 2))

    model = Image()
    forms: list[Any] = [(1, 3, 8, 12), torch.empty(1, 3, 8, 12), {"image": torch.empty(2, 3, 8, 12)}]
    sites = [inspect(model, example_input=form) for form in forms]
    assert sites[0] == sites[1] == sites[2]
    assert sites[0][0].q.tokens == 6
    with pytest.raises(ExampleInputError, match="example_input"):
        inspect(model)
    for wrong in ((3, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(ExampleInputError, match="not a shape"):
            inspect(model, example_input=wrong)
    with pytest.raises(ExampleInputError, match=r"could not run on inputs of shape.*\(2, 5, 8, 8\)"):
        inspect(model, example_input=(2, 5, 8, 8))


def test_wrong_names_are_told() -> None:
    model = Hidden(PerHead())
    with pytest.raises(UsageError, match="unknown mode 'vq'; choose one of auto, qv"):
        convert(model, "vq", example_input=torch.empty(SHAPE))
    with pytest.raises(UsageError, match="unknown init 'best'"):
        convert(model, init="best", example_input=torch.empty(SHAPE))
    for option in ("include", "exclude"):
        with pytest.raises(PatternError, match="matches none of the 1 attention sites"):
            convert(model, example_input=torch.empty(SHAPE), **{option: "blocks.*"})
    with pytest.raises(PatternError, match="leave none"):
        convert(model, example_input=torch.empty(SHAPE), exclude=["inner"])
    assert convert(model, example_input=torch.empty(SHAPE), include="inn*").surgery.sites[0].fqn == "inner"


def test_a_rank_for_a_site_that_there_is_not() -> None:
    host = CASES["vit"]
    with pytest.raises(PatternError, match="'blocks.7.attn', which is none of the 2"):
        convert(host.build(), "qv", rank={"blocks.7.attn": 8}, example_input=host.example())
    with pytest.raises(PatternError, match="'blocks.0.attn', which is none of the 1"):
        convert(host.build(), "qv", rank={"blocks.0.attn": 8}, exclude="blocks.0", example_input=host.example())
