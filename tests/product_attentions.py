"""Projections without a layer: parameters that tokens are multiplied by."""

import torch
import torch.nn.functional as F
from own_attentions import D, H, K
from torch import Tensor, nn
from written_attentions import join, split

__all__ = ["FOLLOWED", "REFUSED"]

I = H * K  # noqa: E741 - the inner width


class Given(nn.Module):
    """Parameters of some shapes; `out` is behind the heads."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.randn(3 * I))
        self.out = nn.Linear(I, D)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(join(F.scaled_dot_product_attention(q, k, v)))


class TimesPacked(Given):
    def __init__(self) -> None:
        super().__init__((D, 3 * I))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*map(split, (x @ self.weights[0]).chunk(3, -1)))


class TimesPackedWithBias(TimesPacked):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*map(split, (torch.matmul(x, self.weights[0]) + self.bias).chunk(3, -1)))


class TimesEach(Given):
    def __init__(self) -> None:
        super().__init__(*[(D, I)] * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*(split(x @ weight) for weight in self.weights))


class LinearTurned(TimesPacked):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*map(split, F.linear(x, self.weights[0].t(), self.bias).chunk(3, -1)))


class EinsumEach(Given):
    def __init__(self) -> None:
        super().__init__((D, H, K), (H, D, K), (D, H, K))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.weights
        return self.attend(
            torch.einsum("bnd,dhk->bhnk", x, q),
            torch.einsum("bnd,hdk->bhnk", x, k),
            torch.einsum("bnd,dhk->bhnk", x, v),
        )


class EinsumStacked(Given):
    def __init__(self) -> None:
        super().__init__((3, H, D, K))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*torch.einsum("bnd,shdk->sbhnk", x, self.weights[0]).unbind(0))


class EinsumHeadByHead(Given):
    def __init__(self) -> None:
        super().__init__((D, H, 3 * K))

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*torch.einsum("bnd,dhk->bhnk", x, self.weights[0]).chunk(3, -1))


class RotatedQueries(nn.Module):
    """A product with a parameter that is no projection: channels of a head are mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * I), nn.Linear(I, D)
        self.turn = nn.Parameter(torch.randn(K, K))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        return self.out(join(F.scaled_dot_product_attention(q @ self.turn, k @ self.turn, v)))


class UsedTwice(TimesPacked):
    """The weight is read for something else too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weights[0].mean()


FOLLOWED = (
    TimesPacked, TimesPackedWithBias, TimesEach, LinearTurned, EinsumEach, EinsumStacked, EinsumHeadByHead,
    RotatedQueries,
)  # fmt: skip
REFUSED: dict[type[nn.Module], str] = {
    UsedTwice: "its forward also uses weights.0 for something other than attention",
}
