"""What counts as softmax(QK)V, told from what numbers come from."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from armour_surgery.coverage.softmax import attention_cores

B, N, D = 2, 7, 12


class Computes(nn.Module):
    """Projections to q, k and v, and a function of them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.mix = (nn.Linear(D, D) for _ in range(4))
        self.mix = nn.Linear(N, N)
        self.query = nn.Parameter(torch.zeros(1, 3, D))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.q(x), self.k(x), self.v(x))


def plain(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def fused(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def written_out(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = torch.einsum("bid,bjd->bij", q, k).exp()
    return torch.einsum("bij,bjd->bid", e / e.sum(-1, keepdim=True), v)


def talking_heads(own: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return own.mix(own.mix(q @ k.mT).softmax(-1)) @ v


def learned_query(own: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (own.query.expand(B, -1, -1) @ k.mT).softmax(-1) @ v


def element_by_element(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q[:, :1] * k).sum(-1, keepdim=True)
    return logits.softmax(1).mT @ v


def gate(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) * v


def pooling(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q[..., :1].softmax(1).mT @ v


def linear_attention(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(1).mT @ v)


def no_softmax(_: Computes, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu() @ v


@pytest.mark.parametrize("function", [plain, fused, written_out, talking_heads, learned_query, element_by_element])
def test_attention_is_seen(function: Callable[..., Tensor]) -> None:
    model = nn.Sequential(nn.Linear(D, D), Computes(function))
    cores = attention_cores(model, {"input": torch.empty(B, N, D, device="meta")}, numbers=False)
    assert cores == [frozenset({"", "1"})]


@pytest.mark.parametrize("function", [gate, pooling, linear_attention, no_softmax])
def test_what_is_no_attention_is_not(function: Callable[..., Tensor]) -> None:
    cores = attention_cores(Computes(function), {"x": torch.empty(B, N, D, device="meta")}, numbers=False)
    assert cores == []


class LooksAtNumbers(Computes):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if float(x.sum()) == 0 else x)


def test_models_that_look_at_numbers_get_some() -> None:
    model, example = LooksAtNumbers(plain), {"x": torch.empty(B, N, D, device="meta")}
    assert attention_cores(model, example, numbers=False) is None
    assert attention_cores(model, example, numbers=True) == [frozenset({""})]


def test_a_softmax_in_a_module_of_its_own_belongs_to_it_too() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.soft = Softmax()

        def forward(self, x: Tensor) -> Tensor:
            return self.soft(x @ x.mT) @ x

    cores = attention_cores(Uses(), {"x": torch.empty(B, N, D, device="meta")}, numbers=False)
    assert cores == [frozenset({"", "soft"})]
