"""Attention modules with more than one softmax: head by head, in a cascade, or one attention after another."""

import torch
import torch.nn.functional as F
from own_attentions import D, H, K
from torch import Tensor, nn
from written_attentions import Packed, join, split

__all__ = ["FOLLOWED", "REFUSED", "AtOnce", "Cascade", "HeadByHead"]

I = H * K  # noqa: E741 - the inner width


class HeadByHead(Packed):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        found = []
        for head in range(H):
            own = slice(head * K, (head + 1) * K)
            found.append((q[..., own] @ k[..., own].mT * self.scale).softmax(-1) @ v[..., own])
        return self.out(torch.cat(found, -1))


class AtOnce(Packed):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(join(F.scaled_dot_product_attention(*self.heads(x))))


class PackedHeadByHead(Packed):
    """A head's three lie side by side, and nobody takes them apart before its turn."""

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for packed in self.qkv(x).chunk(H, -1):
            q, k, v = packed.split(K, -1)
            found.append(F.scaled_dot_product_attention(q, k, v))
        return self.out(torch.cat(found, -1))


class ManyProjections(nn.Module):
    """Every head has projections of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleDict({name: nn.Linear(D, K) for name in "qkv"}) for _ in range(H))
        self.out = nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for head in self.heads:
            q, k, v = (head[name](x) for name in "qkv")
            found.append((q @ k.mT * K**-0.5).softmax(-1) @ v)
        return self.out(torch.cat(found, -1))


class Cascade(nn.Module):
    """As in EfficientViT: each head gets its share of the channels, and what the head before it found."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(K, 3 * K) for _ in range(H))
        self.near = nn.ModuleList(nn.Conv1d(K, K, 3, padding=1, groups=K) for _ in range(H))
        self.enter, self.out = nn.Linear(D, I), nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for index, own in enumerate(self.enter(x).chunk(H, -1)):
            given = own + found[-1] if found else own
            q, k, v = self.parts[index](given).split(K, -1)
            q = self.near[index](q.mT).mT
            found.append((q @ k.mT).softmax(-1) @ v)
        return self.out(torch.cat(found, -1))


class TwoFromOne(nn.Module):
    """Two attentions with heads of their own, all from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Linear(D, 6 * I), nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, a, b, c = self.all(x).unflatten(-1, (6, H, K)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(a, b, c)
        return self.out(join(found))


class SelfThenCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mid = nn.Linear(D, 3 * I), nn.Linear(I, D)
        self.q, self.kv, self.out = nn.Linear(D, I), nn.Linear(D, 2 * I), nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        own = x + self.mid(join(F.scaled_dot_product_attention(q, k, v)))
        k, v = map(split, self.kv(x).chunk(2, -1))
        return self.out(join(F.scaled_dot_product_attention(split(self.q(own)), k, v)))


class TokensThenChannels(nn.Module):
    """The second attends over channels, and stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mid = nn.Linear(D, 3 * I), nn.Linear(I, D)
        self.other, self.out = nn.Linear(D, 3 * I), nn.Linear(I, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        x = x + self.mid(join(F.scaled_dot_product_attention(q, k, v)))
        q, k, v = map(split, self.other(x).chunk(3, -1))
        return self.out(join(v @ (q.mT @ k).softmax(-1).mT))


class SameLayersTwice(Packed):
    """One projection for two attentions on other tokens."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            q, k, v = self.heads(x)
            x = x + self.out(join(F.scaled_dot_product_attention(q, k, v)))
        return x


class TokensAndChannels(Packed):
    """Both at once, from the same numbers."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        over_channels = v @ (q.mT @ k).softmax(-1).mT
        return self.out(join(F.scaled_dot_product_attention(q, k, v) + over_channels))


class ThroughAgents(Packed):
    """Pooled queries ask, and answer the others: what they found is made from the first one's values."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        agents = q.unflatten(2, (2, -1)).mean(2)
        found = F.scaled_dot_product_attention(agents, k, v)
        return self.out(join(F.scaled_dot_product_attention(q, agents, found)))


ALL_THREE = ("qv", "qk", "kv")
FOLLOWED: dict[type[nn.Module], tuple[str, ...]] = {
    HeadByHead: ALL_THREE,
    PackedHeadByHead: ALL_THREE,
    ManyProjections: ALL_THREE,
    Cascade: ALL_THREE,
    TwoFromOne: ALL_THREE,
    SelfThenCross: ("kv",),
    TokensThenChannels: ALL_THREE,
}
REFUSED: dict[type[nn.Module], str] = {
    SameLayersTwice: "its forward holds several attentions that share qkv",
    TokensAndChannels: "its queries attend over channels, not over tokens",
    ThroughAgents: "its forward holds several attentions that share qkv",
}
