"""Each pass of `deploy` alone: its work is gone, the function is the same, and what it must not touch stays."""

import copy
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from deployed import double, worst
from oracle import outputs, randomize, relative_error
from timm.layers import BatchNormAct2d
from timm.models.vision_transformer import VisionTransformer
from tiny_hosts import CASES
from torch import nn

from armour_surgery import deploy
from armour_surgery.deployment import drop_dead_tokens_pass
from armour_surgery.discover.dataflow import follow_model
from armour_surgery.errors import NothingToDeployError


def ran(model: nn.Module, example: dict[str, torch.Tensor]) -> Counter[str]:
    """How often each function of torch ran."""
    return Counter(call.name for call in follow_model(model, example).calls)


@pytest.mark.parametrize(
    ("name", "passes", "gone"),
    [
        ("levit", "fold-batch-norm", "batch_norm"),
        ("hf-levit", "fold-batch-norm", "batch_norm"),
        ("dinov2", "fold-layer-scale", "mul"),
        ("beit", "fold-layer-scale", "mul"),
        ("levit", "fuse-attention", "softmax"),
        ("levit-conv", "fuse-attention", "softmax"),
        ("levit", "fold-batch-norm fold-scale", "mul"),
        ("beit", "precompute", "index"),
    ],
)
def test_its_work_is_gone_and_the_function_is_the_same(name: str, passes: str, gone: str) -> None:
    model, example = double(name, False)
    deployed = deploy(model, example_input=example, passes=passes.split())
    assert {place.name for place in deployed.deployment.done} == set(passes.split())
    assert worst(name, model, deployed) < 1e-12
    if gone == "index":
        assert ran(model, example).total() > ran(deployed, example).total()
        assert {key for key, _ in deployed.blocks[0].attn.named_buffers()} >= {"precomputed_0"}
        assert deployed.state_dict().keys() == model.state_dict().keys()
    else:
        assert ran(model, example)[gone] > 0
        assert ran(deployed, example)[gone] == 0


def test_layer_norms_are_bare_and_the_last_one_is_not() -> None:
    model, example = double("vit", False)
    deployed = deploy(model, example_input=example, passes="fold-layer-norm")
    assert deployed.blocks[0].norm1.weight is None
    assert deployed.norm.weight is not None
    batch = CASES["vit"].batches(torch.float64)[0]["x"]
    with torch.no_grad():
        assert relative_error([model.forward_features(batch)], [deployed.forward_features(batch)]) < 1e-12


def test_wide_values_are_fused_without_a_copy_of_queries() -> None:
    model, example = double("levit", False)
    deployed = deploy(model, example_input=example, passes="fuse-attention")
    code = deployed.stages[0].blocks[0].attn.code
    assert code.count("functional.pad") == 1
    assert ran(deployed, example)["scaled_dot_product_attention"] == 3


def test_keys_of_their_own_lose_their_bias() -> None:
    model, example = double("hf-vit", False)
    deployed = deploy(model, example_input=example, passes="drop-key-bias")
    assert worst("hf-vit", model, deployed) < 1e-12
    lost = {name for name, _ in model.named_parameters()} - {name for name, _ in deployed.named_parameters()}
    assert len(lost) == 2
    assert all("k" in name and name.endswith("bias") for name in lost)


def test_where_keys_serve_as_values_their_scale_stays() -> None:
    from armour_surgery import convert

    model, example = double("levit", False)
    converted = convert(model, "concat-full", example_input=example)
    converted.eval()
    deployed = deploy(converted, example_input=example, compiled=True)
    kept = {(place.name, place.fqn): place.reason for place in deployed.deployment.kept}
    assert kept["fold-scale", "stages.0.blocks.0.attn"] == "K serves as V too"
    assert worst("levit", converted, deployed) < 1e-12


def test_dropout_and_shells_are_gone() -> None:
    model, example = double("levit", False)
    deployed = deploy(model, example_input=example, passes=["fold-batch-norm", "remove-idle-modules"])
    assert isinstance(deployed.stages[0].blocks[0].attn.qkv, nn.Linear)
    assert not any(isinstance(module, nn.Dropout) for module in deployed.modules())
    assert worst("levit", model, deployed) < 1e-12


class Shell(nn.Module):
    """One projection, and idle modules beside it."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.before, self.projection = nn.Sequential(nn.Sequential(nn.Identity())), projection
        self.after, self.beside = nn.Dropout(0.5), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.projection(self.before(x)))


def test_what_lies_inside_of_a_module_that_is_gone_is_gone_with_it() -> None:
    idle = nn.Sequential(nn.Sequential(nn.Sequential(nn.Dropout(0.5))))
    deployed = folded(Net([idle, Shell(nn.Linear(9, 6)), Shell(Shell(nn.Linear(6, 5)))]), passes="remove-idle-modules")
    assert [type(layer) for layer in deployed.layers] == [nn.Identity, nn.Linear, nn.Linear]
    assert len(list(deployed.modules())) == 5


def test_a_stem_has_its_channels_last() -> None:
    model, example = double("levit", False)
    deployed = deploy(model, example_input=example, passes="channels-last")
    weights = [module.weight for module in deployed.stem.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert worst("levit", model, deployed) < 1e-12
    plain, example = double("vit", False)
    with pytest.raises(NothingToDeployError, match="does not overlap"):
        deploy(plain, example_input=example, passes="channels-last")


@pytest.mark.parametrize(
    ("name", "converted", "kept"), [("vit", False, 1), ("vit", True, 1), ("deit-distilled", False, 2)]
)
def test_only_tokens_that_the_head_reads_are_computed_to_the_end(name: str, converted: bool, kept: int) -> None:
    model, example = double(name, converted)
    deployed = deploy(model, example_input=example, passes="drop-dead-tokens")
    assert worst(name, model, deployed) < 1e-12  # another image size takes the host's own way
    norm = [call for call in follow_model(deployed, example).calls if call.name == "layer_norm"][-1]
    assert norm.outputs[0].shape[1] == kept
    batch = CASES[name].batches(torch.float64)[0]["x"]
    with torch.no_grad():
        assert torch.equal(model.forward_features(batch), deployed.forward_features(batch))


def test_where_all_tokens_are_read_beside_the_first_all_are_computed() -> None:
    shared, example = double("vit", False)
    model = copy.deepcopy(shared)
    model.__class__ = _WithTokens
    with pytest.raises(NothingToDeployError, match="the model's output needs all its tokens"):
        deploy(model, example_input=example, passes="drop-dead-tokens")


class _WithTokens(VisionTransformer):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The class, and the tokens."""
        x = self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))
        return self.head(x[:, 0]), x


@pytest.mark.parametrize(
    "name",
    [
        "hf-swin",  # an average of all
        "beit",  # an average of all but the first
    ],
)
def test_the_whole_model_is_not_followed_where_nothing_reads_the_first_tokens(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes minutes where sizes are computed from sizes."""

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(drop_dead_tokens_pass, "trace", never)
    model, example = double(name, False)
    with pytest.raises(NothingToDeployError, match="nothing after it reads only its first tokens"):
        deploy(model, example_input=example, passes="drop-dead-tokens")


def test_keys_behind_a_norm_are_not_scaled() -> None:
    model, example = double("levit", False)
    with pytest.raises(NothingToDeployError, match="fold it first"):
        deploy(model, example_input=example, passes="fold-scale")


class Net(nn.Module):
    """Layers in a row, in eval mode, with parameters and statistics that are all different."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        randomize(self)
        self.double().eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Twice(Net):
    """Something else reads what the first layer makes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.layers[0](x)
        return self.layers[1](made) + made


class Written(Net):
    """What the first layer makes is written into before the norm reads it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.layers[0](x)
        F.relu(made[:, :2], inplace=True)
        return self.layers[1](made)


class Cut(Net):
    """How much of an image it looks at is told in numbers, as transformers' NaFlex models are told their grids."""

    def forward(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        height, width = size.tolist()
        if height == 0:
            raise ValueError("no image")
        return self.layers(x[:, :, :height, :width])


class Masked(Net):
    """Half of what it answers is masked."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).masked_fill(torch.arange(x.shape[-1]) > 4, float("-inf"))


IMAGE = torch.randn(3, 4, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def folded(net: nn.Module, image: torch.Tensor = IMAGE, passes: str = "fold-batch-norm") -> nn.Module:
    deployed = deploy(net, example_input={"x": image}, passes=passes)
    with torch.no_grad():
        assert relative_error(outputs(net, {"x": image}), outputs(deployed, {"x": image})) < 1e-12
    return deployed


# Small nets of one peculiarity each.


def test_batch_norm_goes_into_the_convolution_before_it() -> None:
    deployed = folded(Net([nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)]))
    assert type(deployed.layers[1]) is nn.Identity
    assert deployed.layers[0].bias is not None


def test_batch_norm_goes_into_the_grouped_convolution_before_it() -> None:
    assert type(folded(Net([nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)])).layers[1]) is nn.Identity


def test_batch_norm_goes_into_the_layer_after_it_and_into_those_on_both_sides() -> None:
    flat = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    deployed = folded(Net([nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)]), flat)
    assert [type(layer) for layer in deployed.layers][::3] == [nn.Identity, nn.Identity]
    assert type(folded(Net([nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 3)])).layers[0]) is nn.Identity


@pytest.mark.parametrize("passes", ["fold-batch-norm", None])
@pytest.mark.parametrize("given", [torch.tensor([5, 4]), torch.tensor([7, 9])])
def test_a_model_that_looks_at_numbers_is_run_on_those_of_its_example(given: torch.Tensor, passes: str | None) -> None:
    net = Cut([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)])
    deployed = deploy(net, example_input={"x": IMAGE, "size": given}, passes=passes)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert type(net.layers[1]) is nn.BatchNorm2d
    for size in (given, torch.tensor([6, 3])):
        example = {"x": IMAGE, "size": size}
        with torch.no_grad():
            assert relative_error(outputs(net, example), outputs(deployed, example)) < 1e-12


def test_what_is_masked_in_the_answer_stays_masked() -> None:
    net = Masked([nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)])
    deployed = deploy(net, example_input={"x": IMAGE}, passes="fold-batch-norm")
    assert type(deployed.layers[1]) is nn.Identity
    assert deployed.deployment.error < 1e-12
    with torch.no_grad():
        assert torch.equal(deployed(IMAGE).isinf(), net(IMAGE).isinf())


def test_the_activation_in_a_norm_stays() -> None:
    deployed = folded(Net([nn.Conv2d(4, 6, 3), BatchNormAct2d(6, act_layer=nn.ReLU), nn.Conv2d(6, 5, 1)]))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deployed.modules())
    assert any(isinstance(module, nn.ReLU) for module in deployed.modules())


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (lambda: Net([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)]), "pads with zeros"),
        (lambda: Net([nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)]), "is grouped"),
        (lambda: Net([nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)]), "relu"),
        (lambda: Twice([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]), "add in the model reads it"),
        (lambda: Written([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]), "returns it"),
        (lambda: Net([nn.Conv2d(4, 6, 3), norm := nn.BatchNorm2d(6), nn.ReLU(), norm]), "more than this norm"),
        (lambda: Net([one := nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), one]), "used more than once"),
        (lambda: Net([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)]), "no statistics"),
    ],
)
def test_a_norm_that_cannot_go_anywhere_stays(net, reason: str) -> None:
    with pytest.raises(NothingToDeployError, match=reason):
        folded(net())
