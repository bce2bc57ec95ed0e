"""Small random models of many libraries, in which no two sizes are equal: what is mixed up shows.

Four heads of twelve channels, forty-eight channels, sixteen patches (and a class token or two), batches of two and
five: an axis that is taken for another one gives another shape. Dropout is on wherever the host has any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers
from oracle import randomize
from timm.models.beit import Beit
from timm.models.levit import Levit
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["CASES", "HostCase", "case"]

EVEN = ("qv", "qk", "qk-diag", "kv")
WIDE = ("qk", "qk-diag", "concat-half", "concat-full", "concat-key", "grouped", "grouped-shuffled")


@dataclass(frozen=True)
class HostCase:
    """One tiny host: how to build it and what may be fed to it.

    `modes` are all that fit at least one of its sites. `inputs` are (batch, image size) pairs; the first one is what
    conversions see. `extra` are keyword arguments for the calls at another image size than the first.
    `norms` says that it holds BatchNorm.
    """

    id: str
    make: Callable[[], nn.Module]
    modes: tuple[str, ...] = EVEN
    inputs: tuple[tuple[int, int], ...] = ((2, 32), (5, 32))
    argument: str = "x"
    extra: tuple[tuple[str, Any], ...] = ()
    norms: bool = False
    sites: int = 2

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with random parameters, the same at every call, in eval mode."""
        torch.manual_seed(0)
        model = randomize(self.make())
        if self.norms:
            self._calibrate(model)
        return model.to(dtype).eval()

    def _calibrate(self, model: nn.Module) -> None:
        """Statistics of real activations: with random ones all tokens end up alike, and attention means nothing."""
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model.train()(**self.batches()[0])
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum

    @property
    def auto(self) -> str:
        """The mode that `auto` takes."""
        return next(mode for mode in ("qv", "concat-half", "kv") if mode in self.modes)

    def batches(self, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """Keyword arguments for its forward, one set for each of `inputs`."""
        generator = torch.Generator().manual_seed(3)
        first = self.inputs[0][1]
        return [
            {
                self.argument: torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype),
                **(dict(self.extra) if size != first else {}),
            }
            for batch, size in self.inputs
        ]

    def example(self) -> dict[str, torch.Tensor]:
        """What conversions are shown."""
        batch, size = self.inputs[0]
        return {self.argument: torch.empty(batch, 3, size, size, device="meta")}


VIT: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 7,
    "attn_drop_rate": 0.2,
    "proj_drop_rate": 0.1,
}
ANY_SIZE: dict[str, Any] = {**VIT, "dynamic_img_size": True}
SIZES = ((2, 32), (5, 32), (2, 40))
HF: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.2,
}
CLIP = {name: value for name, value in HF.items() if not name.endswith("_prob")} | {"attention_dropout": 0.2}
INTERPOLATE = (("interpolate_pos_encoding", True),)


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **arguments)


def _hf(kind: str, name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**arguments))
        return model

    return make


def _levit(use_conv: bool) -> Callable[[], nn.Module]:
    # Keys of 8 and values of 16 channels; 36 and 9 tokens: BatchNorm never sees a single one.
    return lambda: Levit(
        img_size=96,
        embed_dim=(24, 36),
        key_dim=8,
        depth=(1, 1),
        num_heads=(3, 5),
        attn_ratio=2.0,
        mlp_ratio=2.0,
        num_classes=7,
        use_conv=use_conv,
        drop_path_rate=0.1,
        drop_rate=0.1,
    )


def _hf_case(kind: str, name: str, *, id: str | None = None, **options: Any) -> HostCase:
    arguments = options.pop("arguments", HF)
    return HostCase(
        id or f"hf-{kind.lower()}",
        _hf(kind, name, **arguments),
        **{"argument": "pixel_values", "inputs": SIZES, "extra": INTERPOLATE, **options},
    )


CASES: dict[str, HostCase] = {
    one.id: one
    for one in (
        HostCase("vit", _timm("vit_tiny_patch16_224", **ANY_SIZE), inputs=SIZES),
        HostCase("vit-qk-norm", _timm("vit_tiny_patch16_224", **ANY_SIZE, qk_norm=True), inputs=SIZES),
        HostCase("deit", _timm("deit_tiny_patch16_224", **ANY_SIZE, drop_path_rate=0.1), inputs=SIZES),
        HostCase("deit-distilled", _timm("deit_tiny_distilled_patch16_224", **ANY_SIZE), inputs=SIZES),
        HostCase("deit3", _timm("deit3_small_patch16_224", **ANY_SIZE), inputs=SIZES),
        HostCase("eva", _timm("eva_giant_patch14_224", **ANY_SIZE), inputs=SIZES),
        HostCase("eva02", _timm("eva02_tiny_patch14_224", **ANY_SIZE), inputs=SIZES),
        HostCase("beit", _timm("beit_base_patch16_224", **VIT)),
        HostCase("beit-shared-bias", lambda: Beit(**VIT, use_shared_rel_pos_bias=True)),
        HostCase("dinov2", _timm("vit_small_patch14_reg4_dinov2", **ANY_SIZE), inputs=SIZES),
        HostCase("levit", _levit(False), WIDE, ((4, 96), (7, 96)), norms=True, sites=3),
        HostCase("levit-conv", _levit(True), WIDE, ((4, 96), (7, 96)), norms=True, sites=3),
        HostCase(
            "swin",
            _timm(
                "swin_tiny_patch4_window7_224",
                img_size=64,
                window_size=4,
                embed_dim=40,
                depths=(2,),
                num_heads=(4,),
                num_classes=7,
                attn_drop_rate=0.2,
                proj_drop_rate=0.1,
                strict_img_size=False,
            ),
            inputs=((2, 64), (5, 64), (2, 96)),
        ),
        _hf_case("ViT", "ViTForImageClassification"),
        _hf_case("DeiT", "DeiTForImageClassificationWithTeacher"),
        _hf_case(
            "Levit",
            "LevitForImageClassification",
            arguments={
                "image_size": 96,
                "hidden_sizes": [24, 36],
                "num_attention_heads": [3, 5],
                "depths": [1, 1],
                "key_dim": [8, 8],
                "attention_ratio": [2, 2],
                "mlp_ratio": [2, 2],
                "down_ops": [["Subsample", 8, 3, 4, 2, 2]],
            },
            modes=WIDE,
            inputs=((4, 96), (7, 96)),
            extra=(),
            norms=True,
            sites=3,
        ),
        _hf_case("Dinov2", "Dinov2Model", extra=()),
        _hf_case(
            "Beit",
            "BeitModel",
            arguments=HF | {"use_relative_position_bias": True},
        ),
        _hf_case("CLIPVision", "CLIPVisionModel", arguments=CLIP, id="hf-clip"),
        _hf_case(
            "Swin",
            "SwinModel",
            arguments={
                "image_size": 64,
                "patch_size": 4,
                "embed_dim": 40,
                "depths": [2],
                "num_heads": [4],
                "window_size": 4,
                "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.2,
            },
            inputs=((2, 64), (5, 64), (2, 96)),
        ),
        _hf_case("DINOv3ViT", "DINOv3ViTModel", arguments=CLIP, id="hf-dinov3", extra=()),
        _hf_case("SiglipVision", "SiglipVisionModel", arguments=CLIP, id="hf-siglip", sites=3),
        _hf_case(
            "Segformer",
            "SegformerModel",
            arguments={
                "num_encoder_blocks": 2,
                "hidden_sizes": [24, 36],
                "num_attention_heads": [3, 4],
                "depths": [1, 1],
                "sr_ratios": [2, 1],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "mlp_ratios": [2, 2],
                "hidden_dropout_prob": 0.1,
                "attention_probs_dropout_prob": 0.2,
            },
            inputs=((2, 64), (5, 64), (2, 96)),
            extra=(),
        ),
    )
}


def case(name: str) -> HostCase:
    """The case of that id."""
    return CASES[name]
