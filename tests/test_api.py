"""The Python interface: names, signatures, and what convert, plan and inspect promise."""

import copy
import inspect as python_inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

import armour_surgery
from armour_surgery import ArmourError, AttentionSite, SurgeryPlan, convert, inspect, load, plan, save
from armour_surgery.errors import (
    AlreadyConvertedError,
    ExampleInputError,
    FolderError,
    NoAttentionError,
    NothingToConvertError,
    PatternError,
    SpecializationError,
    UsageError,
)
from armour_surgery.modes import MODES
from armour_surgery.surgery.order import INITS


def vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **{**sizes, **arguments})
    return model.eval()


class Own(nn.Module):
    """A user's own network around an attention of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 8, 8)
        self.mixer = Attention(48, 4, qkv_bias=True)
        self.head = nn.Linear(48, 5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(self.mixer(self.stem(pictures).flatten(2).mT).mean(1))


class TwoInputs(Own):
    def forward(self, pictures: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(pictures) * scale


def surgery_of(model: nn.Module) -> SurgeryPlan:
    surgery = model.surgery
    assert isinstance(surgery, SurgeryPlan)
    return surgery


def refused(kind: type[ArmourError], action: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


def test_the_public_names() -> None:
    functions = ["benchmark", "convert", "deploy", "inspect", "load", "plan", "redundancy", "save", "sensitivities"]
    documented = ["ArmourError", "AttentionSite", "SurgeryPlan", *functions]
    assert armour_surgery.__all__ == documented
    assert armour_surgery.__all__ == sorted(armour_surgery.__all__)
    assert all(getattr(armour_surgery, name).__doc__ for name in documented)
    assert armour_surgery.convert is convert
    assert python_inspect.isfunction(armour_surgery.inspect)
    with pytest.raises(AttributeError, match="has no attribute 'finetune_everything'"):
        armour_surgery.finetune_everything  # noqa: B018
    namespace: dict[str, Any] = {}
    exec("from armour_surgery import *", namespace)
    assert set(documented) <= set(namespace)


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert armour_surgery.__version__ == version("armour-surgery")


ORDERS = """
import importlib, itertools, sys, types
modules = sys.argv[1:]
def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "armour_surgery"]:
        del sys.modules[name]
from armour_surgery import __all__ as public_names
# Alone, those that could hide something: a module in the package's own folder takes the name that it has itself.
alone = [one for one in modules if one.rpartition(".")[2] in public_names or ".cli." in one]
assert len(alone) > 5
for order in (modules, modules[::-1], *([one] for one in alone)):
    forget()
    for name in order:
        importlib.import_module(name)
    from armour_surgery import convert, inspect, load, plan, save
    for public in (convert, inspect, load, plan, save):
        assert isinstance(public, types.FunctionType), (order, public)
    import armour_surgery
    for name in armour_surgery.__all__:
        assert not isinstance(getattr(armour_surgery, name), types.ModuleType), (order, name)
print("fine", len(modules))
"""


def test_submodules_do_not_hide_the_public_names() -> None:
    """Importing `armour_surgery.X` puts X into the package, and must not put a module over a function."""
    root = Path(armour_surgery.__file__).parent
    modules = [f"armour_surgery.{path.stem}" for path in sorted(root.glob("*.py")) if "__" not in path.stem]
    modules += [f"armour_surgery.{path.parent.name}" for path in sorted(root.glob("*/__init__.py"))]
    names = ("bench", "convert", "inspect", "redundancy", "paper", "demo")
    modules += [f"armour_surgery.cli.{name}" for name in names]
    done = subprocess.run([sys.executable, "-c", ORDERS, *modules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fine")


def test_importing_the_package_alone_is_cheap() -> None:
    code = "import sys, armour_surgery; print(sorted({'torch', 'timm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


CONTRACT = {
    "model": python_inspect.Parameter.empty,
    "mode": "auto",
    "init": "wq",
    "include": None,
    "exclude": None,
    "inplace": False,
    "example_input": None,
}


def test_the_signature_of_convert() -> None:
    parameters = python_inspect.signature(convert).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    positional = python_inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [name for name, kind in kinds.items() if kind is positional] == ["model", "mode"]
    assert {kind for name, kind in kinds.items() if name not in ("model", "mode")} == {
        python_inspect.Parameter.KEYWORD_ONLY
    }
    assert {name: parameters[name].default for name in CONTRACT} == CONTRACT
    assert set(parameters) - set(CONTRACT) <= {
        "calibration",
        "calibration_images",
        "max_loss",
        "progress",
        "rank",
        "reconstruct",
        "source",
    }
    assert list(python_inspect.signature(save).parameters)[:2] == ["model", "path"]
    assert list(python_inspect.signature(load).parameters) == ["path"]
    with pytest.raises(TypeError):
        convert(vit(), "qv", "wq")  # type: ignore[misc]


# convert


def test_the_original_stays_and_the_copy_is_of_its_class() -> None:
    model = vit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    converted = convert(model, mode="qv")
    assert converted is not model
    assert type(converted) is type(model)
    assert not hasattr(model, "surgery")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    kept = converted.state_dict()
    assert all(torch.equal(kept[key], before[key]) for key in kept if "qkv" not in key)


def test_inplace_returns_the_same_object() -> None:
    model = vit()
    expected = convert(model)
    blocks = list(model.children())
    converted = convert(model, inplace=True)
    assert converted is model
    assert all(a is b for a, b in zip(blocks, model.children(), strict=True))
    assert surgery_of(model) == surgery_of(expected)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), expected(x))


def test_the_surgery_survives_deepcopy() -> None:
    converted = convert(vit())
    twin = copy.deepcopy(converted)
    assert surgery_of(twin) == surgery_of(converted)
    twin.blocks[0].attn.qkv.weight.data.zero_()  # type: ignore[union-attr, index]
    assert converted.blocks[0].attn.qkv.weight.abs().sum() > 0  # type: ignore[union-attr, index]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(converted)(x), converted(x))


@pytest.mark.parametrize("mode", ["auto", "qv", "qk", "qk-diag", "kv"])
def test_the_plan_is_what_convert_does(mode: str) -> None:
    model = vit()
    wanted = plan(model, mode)
    done = surgery_of(convert(model, mode))
    assert all(site.residual is None for site in wanted.sites)
    assert all(site.residual is not None for site in done.sites)
    blank = replace(done, sites=tuple(replace(site, residual=None) for site in done.sites))
    assert wanted == blank
    assert not hasattr(model, "surgery")


def test_the_plan_takes_the_same_arguments() -> None:
    model = Own().eval()
    wanted = plan(model, "kv", include="mix*", example_input=(1, 3, 32, 32))
    done = surgery_of(convert(model, "kv", include="mix*", example_input=(1, 3, 32, 32)))
    assert wanted == replace(done, sites=tuple(replace(site, residual=None) for site in done.sites))


@pytest.mark.parametrize("again", [convert, inspect, plan], ids=lambda function: function.__name__)
def test_a_converted_model_is_refused(again: Callable[[nn.Module], Any]) -> None:
    converted = convert(vit(), include="blocks.1*")
    message = refused(AlreadyConvertedError, lambda: again(converted))
    assert "blocks.1.attn" in message
    del converted.surgery
    assert "blocks.1.attn" in refused(AlreadyConvertedError, lambda: again(converted))
    assert "block.blocks.1.attn" in refused(AlreadyConvertedError, lambda: again(nn.ModuleDict({"block": converted})))


def test_a_refused_conversion_in_place_leaves_the_model_alone() -> None:
    model = vit()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for arguments in ({"mode": "concat-half"}, {"include": "nowhere"}, {"init": "magic"}, {"mode": "magic"}):
        refused(ArmourError, lambda options=arguments: convert(model, inplace=True, **options))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not hasattr(model, "surgery")
    convert(model, inplace=True)


def test_unknown_modes_and_inits_are_wrong_usage() -> None:
    message = refused(UsageError, lambda: convert(vit(), "vq"))
    assert "'vq'" in message
    assert all(name in message for name in ("auto", *MODES))
    message = refused(UsageError, lambda: convert(vit(), init="magic"))
    assert "'magic'" in message
    assert all(name in message for name in INITS)


def test_a_mode_that_fits_nowhere_says_why() -> None:
    message = refused(NothingToConvertError, lambda: convert(vit(), "concat-half"))
    assert "'concat-half'" in message
    assert "blocks.0.attn" in message
    assert "use qv" in message


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet18"), lambda: nn.Linear(4, 4)], ids=["conv", "mlp"])
def test_a_model_without_attention(make: Callable[[], nn.Module]) -> None:
    example = None if make().__class__ is not nn.Linear else torch.zeros(2, 4)
    message = refused(NoAttentionError, lambda: convert(make(), example_input=example))
    assert "no attention" in message
    refused(NoAttentionError, lambda: inspect(make(), example_input=example))


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


# example_input


EXAMPLES: dict[str, Any] = {
    "tensor": torch.zeros(1, 3, 32, 32),
    "meta": torch.zeros(4, 3, 32, 32, device="meta"),
    "shape": (1, 3, 32, 32),
    "size": torch.Size((3, 3, 32, 32)),
    "dict": {"pictures": torch.zeros(1, 3, 32, 32)},
}


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


def test_several_inputs() -> None:
    example = {"pictures": torch.zeros(2, 3, 32, 32), "scale": torch.ones(())}
    converted = convert(TwoInputs().eval(), example_input=example)
    assert surgery_of(converted).params_after < surgery_of(converted).params_before
    assert converted(torch.zeros(1, 3, 32, 32), torch.tensor(2.0)).shape == (1, 5)


def test_a_users_own_model_cannot_be_saved_and_is_told_why(tmp_path: Path) -> None:
    converted = convert(Own(), example_input=(1, 3, 32, 32))
    assert surgery_of(converted).source is None
    message = refused(FolderError, lambda: save(converted, tmp_path / "out"))
    assert "Own" in message
    assert "state_dict" in message
    assert list(tmp_path.iterdir()) == []


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


# Numbers


def test_nothing_is_lost_where_the_weights_were_equal() -> None:
    model = vit()
    with torch.no_grad():
        for block in model.blocks:  # type: ignore[union-attr]
            block.attn.qkv.weight[96:] = block.attn.qkv.weight[:48]
    assert [site.residual for site in surgery_of(convert(model, "qv")).sites] == [0.0] * 3
    assert all(site.residual > 0.5 for site in surgery_of(convert(model, "kv")).sites)  # type: ignore[operator]


@pytest.mark.parametrize(("mode", "old", "new"), [("qv", "v", "q"), ("kv", "v", "k"), ("qk", "k", "q")])
def test_the_residual_is_the_relative_distance_of_the_merged_weights(mode: str, old: str, new: str) -> None:
    model = vit(depth=1)
    weight = model.blocks[0].attn.qkv.weight  # type: ignore[union-attr, index]
    with torch.no_grad():
        # By hand: q = 1, k = 3, v = 4 everywhere.
        weight[:48], weight[48:96], weight[96:] = 1.0, 3.0, 4.0
    values = {"q": 1.0, "k": 3.0, "v": 4.0}
    [site] = surgery_of(convert(model, mode)).sites
    assert site.residual == pytest.approx(abs(values[old] - values[new]) / values[old], rel=1e-6)


def test_the_residual_of_random_weights() -> None:
    model = vit(depth=1)
    query, _, value = model.blocks[0].attn.qkv.weight.detach().double().chunk(3)  # type: ignore[union-attr, index]
    [site] = surgery_of(convert(model, "qv")).sites
    assert site.residual == pytest.approx(float((value - query).norm() / value.norm()), rel=1e-6)


def test_weights_that_are_zero_have_no_residual() -> None:
    model = vit(depth=1)
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)  # type: ignore[union-attr, index, arg-type]
    [site] = surgery_of(convert(model, "qv")).sites
    assert site.residual == 0.0


def test_deit_tiny_has_the_papers_numbers() -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    surgery = plan(model, "qv")
    assert (surgery.params_before, surgery.params_after) == (5_717_416, 5_272_744)
    assert (surgery.macs_before, surgery.macs_after) == (1_253_683_200, 1_166_536_704)
    assert len(surgery.sites) == 12
    assert surgery.refused == ()
    saved = 192 * 192 + 192
    assert {site.params_before - site.params_after for site in surgery.sites} == {saved}
    assert {site.macs_before - site.macs_after for site in surgery.sites} == {197 * 192 * 192}
    assert surgery.params_before == sum(parameter.numel() for parameter in model.parameters())


def test_the_counts_are_those_of_the_converted_model() -> None:
    for mode in ("qv", "qk", "kv"):
        converted = convert(vit(), mode)
        surgery = surgery_of(converted)
        assert surgery.params_after == sum(parameter.numel() for parameter in converted.parameters())
        change = sum(site.params_before - site.params_after for site in surgery.sites)
        assert surgery.params_before - surgery.params_after == change
        assert surgery.macs_before - surgery.macs_after == sum(s.macs_before - s.macs_after for s in surgery.sites)


# inspect


def test_inspect_tells_every_mode_once() -> None:
    sites = inspect(vit())
    assert [site.fqn for site in sites] == [f"blocks.{index}.attn" for index in range(3)]
    for site in sites:
        assert set(site.modes) | set(site.refused) == set(MODES)
        assert not set(site.modes) & set(site.refused)
        assert all(reason and "\n" not in reason for reason in site.refused.values())
        contract = {"fqn", "kind", "num_heads", "key_dim", "value_dim", "modes", "refused"}
        assert contract <= set(site.to_dict())
        assert site.kind == "self-attention"
        assert site.q is not None
        assert site.q.fqn == "blocks.0.attn.qkv".replace("0", site.fqn.split(".")[1])
        assert [len(head) for head in site.q.channels] == [12] * 4


def test_inspect_needs_no_weights() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert [site.fqn for site in inspect(model)] == ["blocks.0.attn"]
