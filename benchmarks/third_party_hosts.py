"""Models of other libraries, each with the package that it comes from, and a builder of a small one of its kind.

`benchmarks/third_party_coverage.py` examines them; `docs/coverage-third-party.md` is what came of it. Sizes are small,
since every attention of a class is written alike; where the package names its models, one of those is taken.
"""

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

__all__ = ["HOSTS", "Host", "load", "requirements"]

Shape = tuple[int, ...]
IMAGE = (3, 64, 64)


@dataclass(frozen=True)
class Host:
    """One host: `path` ("module:callable") is called with `arguments`, and the model is fed `inputs`.

    `package` is what pip has to install: the package, and what it forgot to ask for.

    `inputs` maps names of its forward to shapes without the batch; one shape alone is for the first argument. `part` is
    the submodule that is examined, if it is not the whole.
    """

    package: str
    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: Shape | Mapping[str, Shape] = IMAGE
    positional: tuple[Any, ...] = ()
    part: str = ""


VIT = {"image_size": 64, "patch_size": 8, "num_classes": 10, "dim": 96, "depth": 2, "heads": 3, "mlp_dim": 128}
CLIP = {"image_size": 64, "frames": 4, "frame_patch_size": 2, "image_patch_size": 8, "num_classes": 10, "dim": 96,
        "heads": 3, "mlp_dim": 128}  # fmt: skip
VIDEO = (3, 4, 64, 64)


def _vit_pytorch(path: str, inputs: Shape = IMAGE, **arguments: Any) -> Host:
    return Host("vit-pytorch", f"vit_pytorch.{path}", {**VIT, **arguments}, inputs)


def _without(names: str, **arguments: Any) -> dict[str, Any]:
    """The common arguments without some, for those who call them otherwise."""
    return {**{name: value for name, value in VIT.items() if name not in names.split()}, **arguments}


def _einops_hosts() -> dict[str, Host]:
    """vit-pytorch: einops everywhere, and nearly every variant that was published."""
    plain = {
        "vit": "vit:ViT",
        "simple_vit": "simple_vit:SimpleViT",
        "deepvit": "deepvit:DeepViT",
        "learnable_memory_vit": "learnable_memory_vit:ViT",
        "rvt": "rvt:RvT",
        "normalized_vit": "normalized_vit:nViT",
        "parallel_vit": "parallel_vit:ViT",
        "jumbo_vit": "jumbo_vit:JumboViT",
        "vit_5": "vit_5:ViT",
        "vit_small_dataset": "vit_for_small_dataset:ViT",
        "vit_decorr": "vit_with_decorr:ViT",
        "vit_keel": "vit_with_keel_post_ln:ViT",
        "vit_patch_dropout": "vit_with_patch_dropout:ViT",
        "vit_patch_merger": "vit_with_patch_merger:ViT",
        "simple_vit_qk_norm": "simple_vit_with_qk_norm:SimpleViT",
        "simple_vit_registers": "simple_vit_with_register_tokens:SimpleViT",
        "simple_vit_value_residual": "simple_vit_with_value_residual:SimpleViT",
        "simple_vit_relative": "simple_vit_with_relative_proj_pos_bias:SimpleViT",
        "simple_vit_specialized_cls": "simple_vit_with_specialized_cls:SimpleViT",
        "simple_vit_patch_dropout": "simple_vit_with_patch_dropout:SimpleViT",
        "simple_vit_sparse_gating": "simple_vit_with_sparse_gating:SimpleViTWithSparseGating",
        "simple_flash_attn_vit": "simple_flash_attn_vit:SimpleViT",
        "simple_vit_attn_residual": "simple_vit_attn_residual:SimpleViTAttnResidual",
        "simple_vit_cross_depth": "attn_residual_with_dca_simple_vit:SimpleViT",
        "simple_vit_orthogonal_residual": "simple_vit_orthog_residual_update:SimpleViT",
        "mp3": "mp3:ViT",
        "vit_detpool": "vit_detpool:ViTDetPool",
    }
    hosts = {f"vit-pytorch {name}": _vit_pytorch(path) for name, path in plain.items()}
    others = {
        "ats_vit": ("ats_vit:ViT", {**VIT, "max_tokens_per_depth": (32, 16)}, IMAGE),
        "cait": ("cait:CaiT", {**VIT, "cls_depth": 1}, IMAGE),
        "cross_vit": ("cross_vit:CrossViT", {"image_size": 64, "num_classes": 10, "sm_dim": 48, "lg_dim": 96,
                                             "sm_patch_size": 8, "depth": 1, "lg_enc_depth": 1}, IMAGE),
        "crossformer": ("crossformer:CrossFormer", {"num_classes": 10, "dim": (32, 64, 96, 128),
                                                    "depth": (1, 1, 1, 1), "global_window_size": (8, 4, 2, 1)},
                        (3, 224, 224)),
        "cvt": ("cvt:CvT", {"num_classes": 10}, IMAGE),
        "hyper_connections": ("simple_vit_with_hyper_connections:SimpleViT", {**VIT, "num_residual_streams": 2}, IMAGE),
        "simple_uvit": ("simple_uvit:SimpleUViT", VIT, IMAGE),
        "levit": ("levit:LeViT", {"image_size": 224, "num_classes": 10, "dim": (64, 96, 128), "depth": 1,
                                  "heads": (2, 3, 4), "mlp_mult": 2}, (3, 224, 224)),
        "look_vit": ("look_vit:LookViT", {"dim": 96, "image_size": 64, "num_classes": 10, "depth": 1, "patch_size": 16,
                                          "highres_patch_size": 8, "heads": 3}, IMAGE),
        "max_vit": ("max_vit:MaxViT", {"num_classes": 10, "dim": 64, "depth": (1, 1, 1, 1)}, (3, 224, 224)),
        "mobile_vit": ("mobile_vit:MobileViT", {"image_size": (64, 64), "dims": [48, 64, 80], "num_classes": 10,
                       "channels": [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 96]}, IMAGE),
        "nest": ("nest:NesT", _without("mlp_dim depth", image_size=64, patch_size=4, num_hierarchies=3,
                                       block_repeats=(1, 1, 1)), IMAGE),
        "pit": ("pit:PiT", {**VIT, "depth": (1, 1)}, IMAGE),
        "regionvit": ("regionvit:RegionViT", {"dim": (32, 64, 96, 128), "depth": (1, 1, 1, 1), "window_size": 7,
                                              "num_classes": 10, "tokenize_local_3_conv": False}, (3, 224, 224)),
        "scalable_vit": ("scalable_vit:ScalableViT", {"num_classes": 10, "dim": 64, "heads": (2, 4, 8, 16),
                         "depth": (1, 1, 1, 1), "ssa_dim_key": (40, 40, 40, 32), "reduction_factor": (8, 4, 2, 1),
                         "window_size": (64, 32, None, None)}, (3, 256, 256)),
        "sep_vit": ("sep_vit:SepViT", {"num_classes": 10, "dim": 32, "dim_head": 32, "heads": (1, 2, 4, 8),
                                       "depth": (1, 1, 1, 1), "window_size": 7}, (3, 224, 224)),
        "simple_vit_3d": ("simple_vit_3d:SimpleViT", {**CLIP, "depth": 2}, VIDEO),
        "vit_3d": ("vit_3d:ViT", {**CLIP, "depth": 2}, VIDEO),
        "vivit": ("vivit:ViViT", {**CLIP, "spatial_depth": 1, "temporal_depth": 1}, VIDEO),
        "vivit_moss": ("vivit_with_moss:ViViT", {**CLIP, "spatial_depth": 1, "temporal_depth": 1}, VIDEO),
        "max_vit_registers": ("max_vit_with_registers:MaxViT", {"num_classes": 10, "dim": 64, "depth": (1, 1)},
                              (3, 112, 112)),
        "jet_vit": ("jet_vit:JetViT", {**VIT, "dim_head": 32}, IMAGE),
        "looped_vit": ("looped_vit:LoopedViT", {**_without("depth"), "pre_loop_depth": 1, "num_looped_blocks": 1,
                                                "post_loop_depth": 1, "loop_depth": 2}, IMAGE),
        "vat_siglip": ("vat_siglip:SigLIP", {"image_size": 64, "patch_size": 8, "dim": 96, "depth": 2, "heads": 3,
                                             "mlp_dim": 128}, IMAGE),
        "t2t": ("t2t:T2TViT", _without("patch_size", image_size=64), IMAGE),
        "twins_svt": ("twins_svt:TwinsSVT", {"num_classes": 10, "s3_depth": 1, "s4_depth": 1}, (3, 224, 224)),
        "xcit": ("xcit:XCiT", {**VIT, "cls_depth": 1}, IMAGE),
        "cct": ("cct:CCT", {"img_size": 64, "embedding_dim": 96, "num_layers": 2, "num_heads": 3, "num_classes": 10},
                IMAGE),
        "vit_nd_rotary": ("vit_nd_rotary:ViTND", _without("image_size", ndim=2, input_shape=64), IMAGE),
    }  # fmt: skip
    for name, (path, arguments, inputs) in others.items():
        hosts[f"vit-pytorch {name}"] = Host("vit-pytorch", f"vit_pytorch.{path}", arguments, inputs)
    return hosts


def _ultralytics(name: str) -> Host:
    return Host("ultralytics", "ultralytics.nn.tasks:DetectionModel", {"cfg": f"{name}.yaml", "verbose": False},
                (3, 128, 128))  # fmt: skip


HOSTS: dict[str, Host] = {
    **_einops_hosts(),
    "open_clip ViT-B-32": Host("open_clip_torch", "open_clip:create_model", {"model_name": "ViT-B-32"},
                               (3, 224, 224), part="visual"),
    "open_clip coca ViT-B-32": Host("open_clip_torch", "open_clip:create_model", {"model_name": "coca_ViT-B-32"},
                                    (3, 224, 224), part="visual"),
    "open_clip EVA02-B-16": Host("open_clip_torch", "open_clip:create_model", {"model_name": "EVA02-B-16"},
                                 (3, 224, 224), part="visual"),
    "open_clip RN50": Host("open_clip_torch", "open_clip:create_model", {"model_name": "RN50"}, (3, 224, 224),
                           part="visual"),
    "clip ViT-B/32": Host("clip-anytorch setuptools<81", "clip.model:VisionTransformer",
                          {"input_resolution": 64, "patch_size": 8, "width": 96, "layers": 2, "heads": 3,
                           "output_dim": 48}),
    "monai ViT": Host("monai", "monai.networks.nets:ViT",
                      {"in_channels": 1, "img_size": (32, 32, 32), "patch_size": (8, 8, 8), "hidden_size": 96,
                       "mlp_dim": 128, "num_layers": 2, "num_heads": 3}, (1, 32, 32, 32)),
    "monai UNETR": Host("monai", "monai.networks.nets:UNETR",
                        {"in_channels": 1, "out_channels": 2, "img_size": (32, 32, 32), "hidden_size": 96,
                         "mlp_dim": 128, "num_heads": 3}, (1, 32, 32, 32)),
    "monai SwinUNETR": Host("monai", "monai.networks.nets:SwinUNETR",
                            {"in_channels": 1, "out_channels": 2, "feature_size": 24}, (1, 64, 64, 64)),
    "monai TransChex cross-attention": Host("monai", "monai.networks.blocks:CrossAttentionBlock",
                                            {"hidden_size": 96, "num_heads": 3, "dropout_rate": 0.0},
                                            {"x": (16, 96), "context": (16, 96)}),
    "kornia ViT": Host("kornia", "kornia.models.vit:VisionTransformer",
                       {"image_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}),
    "kornia MobileViT": Host("kornia", "kornia.models.vit_mobile:MobileViT", {}, (3, 256, 256)),
    "kornia TinyViT": Host("kornia", "kornia.models.tiny_vit:TinyViT", {"img_size": 224}, (3, 224, 224)),
    "x-transformers ViT": Host("x-transformers", "third_party_hosts:x_transformer_vit"),
    "x-transformers flash": Host("x-transformers", "third_party_hosts:x_transformer_vit", {"attn_flash": True}),
    "x-transformers rotary": Host("x-transformers", "third_party_hosts:x_transformer_vit", {"rotary_pos_emb": True}),
    "x-transformers q/k-norm": Host("x-transformers", "third_party_hosts:x_transformer_vit", {"attn_qk_norm": True}),
    "x-transformers one head of keys": Host("x-transformers", "third_party_hosts:x_transformer_vit",
                                            {"attn_kv_heads": 1}),
    "x-transformers talking heads": Host("x-transformers", "third_party_hosts:x_transformer_vit",
                                         {"attn_pre_talking_heads": True}),
    "x-transformers memory keys": Host("x-transformers", "third_party_hosts:x_transformer_vit",
                                       {"attn_num_mem_kv": 2}),
    "x-transformers gated values": Host("x-transformers", "third_party_hosts:x_transformer_vit",
                                        {"attn_gate_values": True}),
    "kornia SAM encoder": Host("kornia", "kornia.models.sam.architecture.image_encoder:ImageEncoderViT",
                               {"img_size": 128, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3,
                                "use_rel_pos": True, "window_size": 7, "global_attn_indexes": (1,)}, (3, 128, 128)),
    "monai ViT 2-D with a class": Host("monai", "monai.networks.nets:ViT",
                                       {"in_channels": 3, "img_size": (64, 64), "patch_size": (8, 8), "num_heads": 3,
                                        "hidden_size": 96, "mlp_dim": 128, "num_layers": 2, "spatial_dims": 2,
                                        "classification": True, "qkv_bias": True}),
    "monai SwinUNETR 2-D": Host("monai", "monai.networks.nets:SwinUNETR",
                                {"in_channels": 1, "out_channels": 2, "feature_size": 24, "spatial_dims": 2},
                                (1, 64, 64)),
    "monai masked autoencoder": Host("monai", "monai.networks.nets:MaskedAutoEncoderViT",
                                     {"in_channels": 1, "img_size": (16, 16, 16), "patch_size": (4, 4, 4),
                                      "hidden_size": 96, "mlp_dim": 128, "num_layers": 2, "num_heads": 3,
                                      "decoder_hidden_size": 48, "decoder_num_heads": 3, "decoder_num_layers": 1,
                                      "decoder_mlp_dim": 64}, (1, 16, 16, 16)),
    "segment-anything decoder": Host("segment-anything", "segment_anything.modeling:TwoWayTransformer",
                                     {"depth": 1, "embedding_dim": 96, "num_heads": 3, "mlp_dim": 128},
                                     {"image_embedding": (96, 8, 8), "image_pe": (96, 8, 8),
                                      "point_embedding": (5, 96)}),
    "segment-anything encoder": Host("segment-anything", "segment_anything.modeling:ImageEncoderViT",
                                     {"img_size": 128, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3,
                                      "use_rel_pos": True, "window_size": 7, "global_attn_indexes": (1,)},
                                     (3, 128, 128)),
    "sam2 Hiera": Host("sam2", "sam2.modeling.backbones.hieradet:Hiera",
                       {"embed_dim": 48, "num_heads": 1, "stages": (1, 2, 2, 1), "global_att_blocks": (4,)},
                       (3, 256, 256)),
    "hiera": Host("hiera-transformer", "hiera:hiera_tiny_224", {"pretrained": False}, (3, 224, 224)),
    "dinov2": Host("dinov2", "dinov2.models.vision_transformer:vit_small", {"img_size": 112, "patch_size": 14},
                   (3, 112, 112)),
    "self-attention-cv ViT": Host("self-attention-cv", "self_attention_cv:ViT",
                                  {"img_dim": 64, "patch_dim": 8, "num_classes": 10, "dim": 96, "blocks": 2,
                                   "heads": 3, "dim_linear_block": 128}),
    "vformer VanillaViT": Host("vformer", "vformer.models.classification:VanillaViT",
                               {"img_size": 64, "patch_size": 8, "embedding_dim": 96, "depth": 2, "num_heads": 3,
                                "n_classes": 10}),
    "vformer CCT": Host("vformer", "vformer.models.classification:CCT",
                        {"img_size": 64, "patch_size": 4, "embedding_dim": 96, "num_layers": 2, "num_heads": 3,
                         "head_dim": 32, "decoder_config": (96,), "n_classes": 10}),
    "vformer CrossViT": Host("vformer", "vformer.models.classification:CrossViT",
                             {"img_size": 64, "patch_size_s": 8, "patch_size_l": 16, "n_classes": 10, "depth_s": 1,
                              "depth_l": 1, "latent_dim_s": 48, "latent_dim_l": 96, "cross_dim_head_s": 16,
                              "cross_dim_head_l": 16}),
    "vformer ConvVT": Host("vformer", "vformer.models.classification:ConvVT",
                           {"img_size": 64, "embedding_dim": [32, 48, 96], "num_heads": [1, 2, 3],
                            "depth": [1, 1, 1], "n_classes": 10}),
    "vformer PVTv2": Host("vformer", "vformer.models.classification:PVTClassificationV2",
                          {"img_size": 64, "embedding_dims": [16, 32, 48, 64], "num_heads": [1, 2, 3, 4],
                           "depths": [1, 1, 1, 1], "n_classes": 10, "qk_scale": None}),
    "vformer Swin": Host("vformer", "vformer.models.classification:SwinTransformer",
                         {"img_size": 64, "patch_size": 4, "in_channels": 3, "n_classes": 10, "embedding_dim": 48,
                          "depths": [2, 1], "num_heads": [3, 4], "window_size": 4}),
    "vformer ViViT": Host("vformer", "vformer.models.classification:ViViTModel2",
                          {"img_size": 64, "in_channels": 3, "patch_size": 8, "embedding_dim": 96, "num_frames": 4,
                           "depth": 1, "num_heads": 3, "head_dim": 32, "n_classes": 10, "mlp_dim": 128},
                          (4, 3, 64, 64)),
    "self-attention-cv UNETR": Host("self-attention-cv", "self_attention_cv:UNETR",
                                    {"img_shape": (32, 32, 32), "input_dim": 1, "output_dim": 2, "embed_dim": 96,
                                     "patch_size": 16, "num_heads": 3, "base_filters": 4, "ext_layers": [1, 2, 3, 4],
                                     "dim_linear_block": 128}, (1, 32, 32, 32)),
    "rfdetr backbone": Host("rfdetr pydeprecate supervision", "third_party_hosts:windowed_dinov2"),
    "segmentation-models DPT": Host("segmentation-models-pytorch", "segmentation_models_pytorch:DPT",
                                    {"encoder_name": "tu-vit_tiny_patch16_224", "encoder_weights": None,
                                     "dynamic_img_size": True}, (3, 128, 128)),
    "segmentation-models mit_b0": Host("segmentation-models-pytorch", "segmentation_models_pytorch:Segformer",
                                       {"encoder_name": "mit_b0", "encoder_weights": None}, (3, 128, 128)),
    "lightly MAE decoder": Host("lightly", "lightly.models.modules:MAEDecoderTIMM",
                                {"num_patches": 64, "patch_size": 8, "embed_dim": 96, "decoder_embed_dim": 48,
                                 "decoder_depth": 2, "decoder_num_heads": 3}, (65, 96)),
    "pytorchvideo MViT": Host("pytorchvideo tabulate", "pytorchvideo.models.vision_transformers:"
                              "create_multiscale_vision_transformers",
                              {"spatial_size": 64, "temporal_size": 8, "depth": 2, "head_num_classes": 10},
                              (3, 8, 64, 64)),
    "ultralytics YOLO11n": _ultralytics("yolo11n"),
    "ultralytics YOLO12n": _ultralytics("yolo12n"),
    "ultralytics YOLOv10n": _ultralytics("yolov10n"),
    "ultralytics YOLO26n": _ultralytics("yolo26n"),
    "ultralytics RT-DETR": Host("ultralytics", "ultralytics.nn.tasks:RTDETRDetectionModel",
                                {"cfg": "rtdetr-l.yaml", "verbose": False}, (3, 256, 256)),
}  # fmt: skip


def x_transformer_vit(**options: Any) -> nn.Module:
    """x-transformers takes its layers as an object; `options` are theirs."""
    from x_transformers import Encoder, ViTransformerWrapper

    layers = Encoder(dim=96, depth=2, heads=3, attn_dim_head=32, **options)
    return ViTransformerWrapper(image_size=64, patch_size=8, num_classes=10, attn_layers=layers)


def windowed_dinov2() -> nn.Module:
    """RF-DETR takes its backbone's sizes as an object."""
    from rfdetr.models.backbone import dinov2_with_windowed_attn as written

    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
    config = written.WindowedDinov2WithRegistersConfig(**sizes, num_windows=2, num_register_tokens=0)
    return written.WindowedDinov2WithRegistersModel(config)


def requirements() -> list[str]:
    """What pip has to install."""
    packages: set[str] = set()
    for host in HOSTS.values():
        packages.update(host.package.split())
    return sorted(packages)


def load(library: str, name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A host, and an example of what it is fed. `library` is what all of them are counted as."""
    host = HOSTS[name]
    module, _, function = host.path.partition(":")
    torch.manual_seed(0)
    # Some tell what they build, and stdout is for one JSON document.
    with redirect_stdout(sys.stderr):
        model = getattr(import_module(module), function)(*host.positional, **host.arguments)
    model = model.get_submodule(host.part).eval()
    return model, _example(model, host.inputs)


def _example(model: nn.Module, inputs: Shape | Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    from armour_surgery.calls import first_name

    by_name = inputs if isinstance(inputs, Mapping) else {first_name(model) or "x": inputs}
    return {name: torch.empty(2, *shape, device="meta") for name, shape in by_name.items()}


if __name__ == "__main__":
    print("\n".join(requirements()))
