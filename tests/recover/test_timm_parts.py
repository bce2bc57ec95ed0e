"""What is taken of timm does what its authors' training scripts do."""

import numpy as np
import pytest
import timm
import torch
from pictures import SIZE
from PIL import Image
from tiny_hosts import case
from torch import nn

from armour_surgery import convert
from armour_surgery.errors import UsageError
from armour_surgery.hosts.preprocessing import Preprocessing
from armour_surgery.recover.loading import seeded
from armour_surgery.recover.recipe import AugmentPart, OptimizerPart, SchedulePart
from armour_surgery.recover.timm_parts import make_optimizer, make_scheduler, set_drop_path, training_transform

PREP = Preprocessing(SIZE, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


# Transforms


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["random-resized", "pad", "none"])
def test_transforms_give_what_the_model_takes(channels: int, crop: str) -> None:
    prep = Preprocessing((channels, 12, 10), (0.4,) * channels, (0.2,) * channels)
    augment = AugmentPart(crop=crop, auto="rand-m9-mstd0.5-inc1", erase=1.0, padding=2)  # type: ignore[arg-type]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 14, 3), dtype=np.uint8))
    transform = training_transform(prep, augment)
    with seeded(1):
        first = transform(picture)
    assert first.shape == (channels, 12, 10)
    assert first.dtype is torch.float32
    with seeded(1):
        assert torch.equal(first, transform(picture))
    with seeded(2):
        assert not torch.equal(first, transform(picture))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="augment.auto='rand-q9'"):
        training_transform(PREP, AugmentPart(auto="rand-q9"))


# Rates and decay


def test_drop_path_rises_as_timm_builds_it() -> None:
    def rates(model: nn.Module) -> list[float]:
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]  # type: ignore[union-attr]

    arguments = {"img_size": 32, "depth": 4, "embed_dim": 48, "num_heads": 4}
    wanted = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, **arguments)
    model = timm.create_model("vit_tiny_patch16_224", **arguments)
    set_drop_path(model, 0.3)
    assert rates(model) == pytest.approx(rates(wanted))
    assert rates(model)[-1] == pytest.approx(0.3)


def test_weight_decay_spares_vectors_and_layer_decay_scales_depth() -> None:
    model = convert(case("deit-distilled").build(), "qv")
    optimizer = make_optimizer(model, OptimizerPart(weight_decay=0.05), 1e-3)
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name in ("pos_embed", "cls_token", "dist_token")
        assert (id(parameter) in free) == spared, name
    groups = make_optimizer(model, OptimizerPart(layer_decay=0.5), 1e-3).param_groups
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales[-1] == 1.0
    assert len(scales) == 4


def test_rates_follow_deits_loop_or_every_update() -> None:
    def rates(part: SchedulePart, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1e-3)
        set_rates = make_scheduler(optimizer, part, 4)
        found = []
        for step in range(steps):
            set_rates(step)
            found.append(optimizer.param_groups[0]["lr"])
        return found

    deit = rates(SchedulePart(epochs=300, warmup_epochs=5, per="epoch", warmup_lr=1e-6, min_lr=1e-5), 1200)
    # DeiT steps its schedule with epoch e after epoch e: the first two have the start of the warm-up.
    assert deit[0] == deit[7] == pytest.approx(1e-6)
    assert deit[8] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 5)
    assert max(deit) == pytest.approx(1e-3, rel=1e-2)
    assert deit[-1] == pytest.approx(1e-5, rel=0.02)
    each = rates(SchedulePart(epochs=2, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.0), 8)
    assert each[:3] == pytest.approx([0.0, 5e-4, each[2]])
    assert each[2] == max(each)
    assert each[-1] < 1e-4
