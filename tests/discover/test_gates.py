"""A softmax that is no attention is not told as one; attention in an unknown form is told, and never skipped."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import check, randomize
from own_attentions import D, Plain
from small_models import refused
from torch import Tensor, nn

from armour_surgery import convert, inspect
from armour_surgery.errors import NoAttentionError, NothingToConvertError
from armour_surgery.surgery.perform import surgery_of

TOKENS = torch.randn(2, 6, D, generator=torch.Generator().manual_seed(1))


class Pooling(nn.Module):
    """Positions are weighed by what a layer makes of each (GlobalContext, MobileViTv2)."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(D, 1), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(1).mT @ self.value(x)).expand_as(x)


class Branches(nn.Module):
    """Branches are weighed by what both are together (ResNeSt, SK)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gate = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.first(x), self.second(x)], 1)
        weights = torch.softmax(self.gate(both.sum(1).mean(1)).unflatten(-1, (2, D)), 1)
        return (both * weights[:, :, None]).sum(1)


class Outlook(nn.Module):
    """Neighbors are weighed by what a layer makes of the token itself, in a softmax of the host's own class."""

    class Weigh(nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return scores.softmax(-1)

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.value, self.weigh = nn.Linear(D, 6), nn.Linear(D, D), self.Weigh()

    def forward(self, x: Tensor) -> Tensor:
        return self.weigh(self.scores(x)) @ self.value(x)


GATES = [Pooling, Branches, Outlook]


def beside(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Plain(), kind())


@pytest.mark.parametrize("kind", GATES)
def test_gates_are_no_attention(kind: type[nn.Module]) -> None:
    assert [site.fqn for site in inspect(beside(kind), example_input=TOKENS)] == ["0"]
    assert surgery_of(convert(beside(kind), example_input=TOKENS)).refused == ()


@pytest.mark.parametrize("kind", GATES)
def test_a_model_of_gates_is_told_what_was_seen(kind: type[nn.Module]) -> None:
    message = refused(NoAttentionError, lambda: inspect(nn.Sequential(kind(), kind()), example_input=TOKENS))
    assert "a softmax in 0" in message
    assert "and 1 more weighs what one layer made, which is a gate" in message


@pytest.mark.parametrize("name", ["gcresnet33ts", "mobilevitv2_050", "resnest14d", "skresnet18", "lambda_resnet26t"])
def test_gates_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert "which is a gate" in refused(NoAttentionError, lambda: inspect(model))


class Unknown(Plain):
    """q, k and v by heads, and what is to be made of them."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class WrittenOut(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        return powers / powers.sum(-1, keepdim=True) @ v


class DividedLast(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        powers = (q @ k.mT).exp()
        return (powers @ v) / powers.sum(-1, keepdim=True)


class NoMatrixProduct(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q[..., :, None, :] * k[..., None, :, :]).sum(-1)
        return scores.softmax(-1) @ v


class Logarithms(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.log_softmax(q @ k.mT, -1).exp() @ v


@torch.library.custom_op("armour_tests::attend", mutates_args=())
def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


class OperatorOfOthers(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = operator(q, k, v)
        return made


class Kernel(torch.autograd.Function):
    """Stands for a kernel of Triton's: no function of torch's does the work."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.empty_like(q)


kernel: Any = Kernel.apply  # as Triton's own tutorial has it


class KernelOfOthers(Unknown):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = kernel(q, k, v)
        return made


UNKNOWN = {
    WrittenOut: "its softmax is written out (exp, and a division by the sum), which is not followed",
    DividedLast: "its softmax is written out (exp, and a division by the sum), which is not followed",
    NoMatrixProduct: "no softmax(q k^T) v was found in its forward; write both products as",
    Logarithms: "no softmax(q k^T) v was found in its forward; write both products as",
    OperatorOfOthers: "it calls armour_tests::attend, which cannot be looked into and may be attention",
    KernelOfOthers: "it calls Kernel.apply, which cannot be looked into and may be attention",
}


@pytest.mark.parametrize("kind", UNKNOWN, ids=lambda kind: kind.__name__)
def test_attention_in_an_unknown_form_is_told_beside_the_known(kind: type[nn.Module]) -> None:
    surgery = surgery_of(convert(beside(kind), example_input=TOKENS))
    assert [site.fqn for site in surgery.sites] == ["0"]
    ((fqn, reason),) = [(site.fqn, site.reason) for site in surgery.refused]
    assert fqn == "1"
    assert UNKNOWN[kind] in reason
    alone = nn.Sequential(kind())
    assert UNKNOWN[kind] in refused(NothingToConvertError, lambda: convert(alone, example_input=TOKENS))


class Apart(nn.Module):
    """The scores are made in one module, their softmax in another, and the rest around both."""

    class Scores(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q @ k.mT

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.weigh, self.inner = self.Scores(), Outlook.Weigh(), Plain()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.inner.qkv(x).chunk(3, -1))
        return self.inner.out((self.weigh(self.scores(q, k)) @ v).transpose(1, 2).flatten(2))


def test_parts_in_modules_of_their_own_are_one_attention() -> None:
    (site,) = inspect(nn.Sequential(Apart()), example_input=TOKENS)
    assert site.fqn == "0"
    assert "qv" in site.modes


class Tokens(nn.Module):
    """Draws a word for each place of what an attention of its own module made (Ovis 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Plain()
        self.words = nn.Linear(D, 9)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.words(self.attention(x)), -1)


class AttendsAgain(Plain):
    """Attends to what an attention inside of it made."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


def test_a_softmax_around_an_attention_is_not_taken_for_it() -> None:
    (site,) = inspect(Tokens(), example_input=TOKENS)
    assert site.fqn == "attention"


def test_of_two_attentions_one_in_the_other_each_has_its_own_layers() -> None:
    inner, outer = inspect(AttendsAgain(), example_input=TOKENS)
    assert (inner.fqn, outer.fqn) == ("first", "")
    assert inner.q.fqn.startswith("first.")
    assert not outer.q.fqn.startswith("first.")


@pytest.mark.parametrize("mode", ["qv", "qk", "kv"])
def test_two_attentions_one_in_the_other_are_exact(mode: str) -> None:
    errors = check(randomize(AttendsAgain().double()), mode, [{"x": TOKENS.double()}])
    assert max(errors.values()) < 1e-9
