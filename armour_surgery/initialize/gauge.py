"""A head's basis, fixed: the one in which a block of its projection's weight is the identity.

For any invertible `B [d, d]` a head is unchanged by `S -> S B, P -> P B^-T, Wo -> B^-1 Wo`, where `S` serves as Q and V
and `P` is K (and so for other roles). With G the rows of S that read `d` channels of the tokens, `B = G^-1` makes these
rows the identity, which need not be stored: `H d^2` parameters fewer, and as many products a token.

Source: basis decomposition, arXiv 2510.01718.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from armour_surgery.initialize.weights import locate
from armour_surgery.traced import Role

__all__ = ["LARGEST_CONDITION", "Heads", "best_block", "changed", "relative_error", "why_unwritable"]

# Blocks begin at multiples of this, which hardware likes; of larger ones, where there would be more than this.
_STEP = 8
_BLOCKS = 64
# Beyond it, rounding in float32 (6e-8) is no longer small.
LARGEST_CONDITION = 1e6
# Tokens that an error is measured on.
_TOKENS = 64


@dataclass(frozen=True)
class Heads:
    """The matrices of a converted site, in float64, biases in the last rows.

    `roles` has those of the roles that are still there, `[H, D + 1, d]` each, by letter. `key` names the role that
    makes K, and `value` says of what V is made: (letter, start, stop) of a role's dimensions. `out` is `[H, e, E]`.
    """

    roles: Mapping[str, Tensor]
    key: str
    value: tuple[tuple[str, int, int], ...]
    out: Tensor


def why_unwritable(module: nn.Module, role: Role, *, biases: bool) -> str | None:
    """Why a site's role cannot be stored in any basis; None where it can. `biases` says whether its bias matters."""
    stored = locate(module, role, {})
    if stored.norm is not None:
        return f"{stored.norm} acts on single channels of what {role.producer.fqn} makes"
    if not biases:
        return None
    parameters = dict(module.named_parameters())
    channels = set(itertools.chain.from_iterable(role.channels))
    own = [piece for piece in role.producer.bias if not channels.isdisjoint(range(piece.start, piece.stop))]
    others = [piece for piece in own if piece.tensor not in parameters]
    computed = any(piece.node.target is not torch.zeros_like for piece in others)
    if computed or any(len({entry is None for entry in head}) > 1 for head in stored.biases):
        return f"a part of the bias of {role.producer.fqn} is no parameter"
    return None


def best_block(matrix: Tensor) -> tuple[int, float]:
    """Where the block of d channels begins whose rows of `matrix [H, D + 1, d]` are conditioned best.

    Also the condition number, the largest of all heads'; infinite where a head has no inverse there.
    """
    width = matrix.shape[-1]
    channels = matrix.shape[1] - 1
    last = channels - width
    starts = sorted({*range(0, last + 1, _STEP * math.ceil((last + 1) / (_STEP * _BLOCKS))), last})
    conditions = []
    for start in starts:
        values = torch.linalg.svdvals(matrix[:, start : start + width])
        # 0 / 0 is not a number, which compares with nothing.
        conditions.append(float((values[:, 0] / values[:, -1]).nan_to_num(torch.inf, torch.inf).max()))
    best = min(range(len(starts)), key=conditions.__getitem__)
    return starts[best], conditions[best]


def changed(heads: Heads, letter: str, start: int) -> Heads:
    """The same heads in the basis in which rows `start` to `start + d` of a role are the identity."""
    matrix = heads.roles[letter]
    block = matrix[:, start : start + matrix.shape[-1]]
    roles = {**heads.roles, letter: torch.linalg.solve(block, matrix, left=False)}
    partner = {"q": "k", "k": "q"}.get(letter, "")
    if partner in roles:
        roles[partner] = roles[partner] @ block.mT
    pieces = []
    for name, rows in _rows_of_out(heads):
        if name == letter:
            rows = block @ rows
        elif name == partner:
            rows = torch.linalg.solve(block.mT, rows)
        pieces.append(rows)
    return replace(heads, roles=roles, out=torch.cat(pieces, 1))


def _rows_of_out(heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """What the output projection reads of V's parts, one after the other."""
    filled = 0
    for name, start, stop in heads.value:
        yield name, heads.out[:, filled : filled + stop - start]
        filled += stop - start


def relative_error(heads: Heads, wanted: Heads, dtype: torch.dtype, block: tuple[str, int] | None = None) -> float:
    """How far logits and outputs of values are from the `wanted` ones, where heads compute in a type.

    The larger of the two, on tokens of noise; `block` is (letter, start) of a projection with a fixed gauge.
    """
    width = max(matrix.shape[1] for matrix in wanted.roles.values()) - 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TOKENS, width, generator=generator, dtype=torch.float64).to(dtype)
    errors = []
    exact = _computed(wanted, tokens.double(), None)
    for got, want in zip(_computed(heads, tokens, block), exact, strict=True):
        errors.append(float((got.double() - want).norm() / want.norm()))
    return max(errors)


def _computed(heads: Heads, tokens: Tensor, block: tuple[str, int] | None) -> tuple[Tensor, Tensor]:
    """Logits `[H, N, N]`, and what V gives the output `[H, N, E]`, in the tokens' type."""
    made: dict[str, Tensor] = {}
    for letter, matrix in heads.roles.items():
        weight, bias = matrix[:, :-1].to(tokens.dtype), matrix[:, -1:].to(tokens.dtype)
        # Tokens of Q and of K may differ in width.
        read = tokens[:, : weight.shape[1]]
        if block is None or block[0] != letter:
            made[letter] = read @ weight + bias
            continue
        start, stop = block[1], block[1] + weight.shape[2]
        others = [channel for channel in range(read.shape[1]) if not start <= channel < stop]
        made[letter] = read[:, others] @ weight[:, others] + bias + read[:, start:stop]
    given = torch.zeros((), dtype=tokens.dtype)
    for (name, start, stop), (_, rows) in zip(heads.value, _rows_of_out(heads), strict=True):
        if name in made:  # a grouped projection stays as it is
            given = given + made[name][..., start:stop] @ rows.to(tokens.dtype)
    return made["q"] @ made[heads.key].mT, given
