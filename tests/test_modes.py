"""Which mode `auto` takes, and what it says where it takes none."""

import pytest
import timm
import torch
from own_attentions import Plain, Wide
from torch import nn
from written_attentions import CrossAttention, EinopsPacked, FewAsk, SharedKeysRepeated

from armour_surgery import convert, inspect
from armour_surgery.modes import AUTO, choose
from armour_surgery.surgery.conversion import sensitivities
from armour_surgery.surgery.perform import surgery_of

TOKENS = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))


class BetweenTwo(CrossAttention):
    """Keys and values are of the tokens' own neighbors."""

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x, x.roll(1, 1) * 2)


class FewAskWide(FewAsk):
    """Learned tokens ask, and values are twice as wide as keys."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = nn.Linear(self.q.in_features, 3 * self.q.out_features)
        self.out = nn.Linear(2 * self.q.out_features, self.q.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.q(self.tokens.expand(x.shape[0], -1, -1)).unflatten(-1, (3, -1)).transpose(1, 2)
        kv = self.kv(x).unflatten(-1, (3, -1)).transpose(1, 2)
        k, v = kv.tensor_split((q.shape[-1],), dim=-1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(EinopsPacked, "qv"), (Wide, "concat-half"), (SharedKeysRepeated, "kv"), (BetweenTwo, "kv"), (FewAsk, "kv")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_auto_takes_the_first_that_fits(kind: type[nn.Module], mode: str) -> None:
    model = kind()
    tokens = torch.randn(2, 6, next(m for m in model.modules() if isinstance(m, nn.Linear)).in_features)
    (site,) = surgery_of(convert(model, example_input=tokens)).sites
    assert site.mode == mode


def test_one_sentence_says_why_neither_fits() -> None:
    (site,) = inspect(FewAskWide(), example_input=TOKENS)
    mode, reason = choose(site, AUTO)
    assert mode is None
    assert reason == (
        "not concat-half: downsampling attention: Q is made from 2 tokens and V from 6, so one projection cannot serve "
        "as both (the paper leaves these blocks alone too); and not kv: K has 4 channels a head and V has 8; this mode "
        "needs equal sizes"
    )


def test_where_one_token_asks_nothing_is_sampled() -> None:
    model = timm.create_model("cait_xxs24_224", depth=1, embed_dim=48, img_size=64, num_classes=5)
    asking = inspect(model)[-1]
    assert asking.refused["qv"] == "Q and V are made from different tokens (1 and 17)"
    assert choose(asking, AUTO) == ("kv", "")


class Blocks(nn.Module):
    """Attentions, one after the other, on patches of images."""

    def __init__(self, *attentions: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 4, 4)
        self.attentions = nn.ModuleList(attentions)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).mT
        for attention in self.attentions:
            x = x + attention(x).mean(1, keepdim=True)
        return x


IMAGES = torch.randn(12, 3, 12, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("init", ["wq-refit", "joint-svd", "calibrated"])
def test_shared_heads_are_left_alone_where_weights_are_chosen_head_by_head(init: str) -> None:
    torch.manual_seed(0)
    model = Blocks(Plain(), SharedKeysRepeated()).eval()
    calibration = IMAGES.split(4) if init == "calibrated" else None
    surgery = surgery_of(convert(model, init=init, calibration=calibration, example_input=(2, 3, 12, 12)))
    assert [site.fqn for site in surgery.sites] == ["attentions.0"]
    (left,) = surgery.refused
    assert left.reason == (
        "it has 4 heads of Q for 2 of K, and only init 'wq' without a rank is there for that; use it and train"
    )
    assert len(surgery_of(convert(model, example_input=(2, 3, 12, 12))).sites) == 2


def test_few_queries_are_enough_to_calibrate_keys() -> None:
    """Learned tokens are the same in every image, and there are fewer of them than channels."""
    torch.manual_seed(0)
    model = Blocks(Plain(), FewAsk()).eval()
    armour = convert(model, init="calibrated", calibration=IMAGES.split(4), example_input=(2, 3, 12, 12))
    first, second = surgery_of(armour).sites
    assert (first.mode, second.mode) == ("qv", "kv")
    assert second.residual is not None
    assert second.residual < 0.5


def test_sites_are_measured_in_the_modes_that_auto_may_take() -> None:
    torch.manual_seed(0)
    model = Blocks(Plain(), FewAsk(), SharedKeysRepeated()).eval()
    options = sensitivities(model, calibration=IMAGES.split(4), example_input=(2, 3, 12, 12))
    ways = [("attentions.0", "qv"), ("attentions.0", "kv"), ("attentions.1", "kv")]
    assert [(option.fqn, option.mode) for option in options] == ways
