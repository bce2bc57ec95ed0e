"""What is found out about one architecture."""

import pytest
import torch
from own_attentions import D, Hidden, PerHead
from timm.layers import GlobalContext
from torch import Tensor, nn

from armour_surgery.coverage import examine
from armour_surgery.coverage.examine import Examiner, plain_reason

EXAMPLE = {"x": torch.empty(2, 7, D, device="meta")}


def test_an_attention_that_converts() -> None:
    outcome = Examiner().examine("own", "one", Hidden(PerHead()), EXAMPLE)
    assert (outcome.attention, outcome.convert_auto, outcome.convert_any, outcome.exact) == (True,) * 4
    (kind,) = outcome.kinds
    assert (kind.host, kind.fqn, kind.count, kind.auto) == ("PerHead", "inner", 1, "qv")
    assert set(kind.modes) == {"qv", "qk", "qk-diag", "kv"}
    assert kind.modes["qk-diag"] is None
    assert kind.reason is None


def test_sites_that_are_alike_are_one_kind() -> None:
    model = nn.Sequential(*(Hidden(PerHead()) for _ in range(3)))
    outcome = Examiner().examine("own", "three", model, {"input": EXAMPLE["x"]})
    assert [(kind.fqn, kind.count) for kind in outcome.kinds] == [("0.inner", 3)]


def test_other_sizes_are_tried_in_the_mode_that_auto_takes() -> None:
    examiner = Examiner()
    examiner.examine("own", "short", Hidden(PerHead()), EXAMPLE)
    outcome = examiner.examine("own", "long", Hidden(PerHead()), {"x": torch.empty(2, 9, D, device="meta")})
    assert set(outcome.kinds[0].modes) == {"qv"}
    assert outcome.exact


def test_what_is_known_is_not_tried_again_and_has_the_name_of_the_place_where_it_is() -> None:
    examiner = Examiner()
    first = examiner.examine("own", "one", Hidden(PerHead()), EXAMPLE)
    model = nn.Sequential(nn.LayerNorm(D), Hidden(PerHead()))
    again = examiner.examine("own", "other", model, {"input": EXAMPLE["x"]})
    assert again.kinds[0].fqn == "1.inner"
    assert again.kinds[0].modes == first.kinds[0].modes


class OverChannels(nn.Module):
    """Attention that `auto` cannot take: its queries attend over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (v @ (q.mT @ k).softmax(-1)).contiguous()


def test_attention_that_is_refused_has_its_reason() -> None:
    outcome = Examiner().examine("own", "channels", Hidden(OverChannels()), EXAMPLE)
    assert outcome.attention
    assert not outcome.convert_any
    assert not outcome.exact
    assert outcome.kinds[0].host == "OverChannels"
    assert outcome.kinds[0].reason


@pytest.mark.parametrize("model", [nn.Sequential(GlobalContext(12)), nn.Sequential(nn.Conv2d(12, 12, 1))])
def test_what_has_no_attention_is_not_counted_as_such(model: nn.Module) -> None:
    outcome = Examiner().examine("own", "none", model, {"input": torch.empty(2, 12, 5, 5, device="meta")})
    assert not outcome.attention
    assert outcome.kinds == ()
    assert outcome.error is None


def test_modules_in_which_no_attention_was_are_not_run_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def gate(**flags: bool) -> nn.Module:
        model = nn.Sequential(GlobalContext(12))
        vars(model[0]).update(flags)
        return model

    example = {"input": torch.empty(2, 12, 5, 5, device="meta")}
    examiner, judged = Examiner(), []
    examiner.examine("own", "first", gate(), example)
    monkeypatch.setattr(examine, "attention_cores", lambda model, *_, **__: judged.append(model) or [])
    examiner.examine("own", "second", gate(), example)
    assert judged == []
    examiner.examine("own", "goes another way", gate(fused=True), example)
    assert len(judged) == 1


def test_equal_reasons_are_equal_whatever_they_name() -> None:
    first = plain_reason("Q is made from 49 tokens and V from 196; blocks.0.attn has 3 heads")
    assert first == plain_reason("Q is made from 16 tokens and V from 49; stages.1.blocks.2.attn has 12 heads")
    assert first == "Q is made from N tokens and V from N; NAME has N heads"
