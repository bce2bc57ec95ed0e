"""Closed forms for the shared weight of an attention (Armour modes), batched over heads, in float64.

Words: H heads, D tokens' width with a last entry 1 for biases, d key_dim, e value_dim, E the width that the output
projection makes. A *metric* is the basis in which tokens are white: errors count where tokens are.

Two facts carry everything. A head is unchanged by `Wq -> Wq M, Wk -> Wk M^-T` and by `Wv -> Wv M, Wo -> M^-1 Wo`, so
only the products `Wq Wk^T` and `Wv Wo` matter; and adding a constant over the keys changes no softmax, so errors in
the keys count only as far as they differ within an image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Head",
    "Metric",
    "bound_values",
    "joint_svd",
    "loss",
    "make_metric",
    "pick_columns",
    "rank_losses",
    "refit_output",
    "symmetric",
]

# What stands in for a zero that divides: a head may have no logits, or no values, at all.
_ZERO = 1e-300


@dataclass(frozen=True)
class Metric:
    """The tokens' second moment `C = T^-1 T^-T`, and that of tokens centered over each image, `T^-1 diag(spread) T^-T`.

    `whiten` is `T [D, D]`'s transpose applied to weights: `white = whiten @ W` has `|white|^2 = E |x W|^2`.
    """

    whiten: Tensor
    color: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Head:
    """Weights of all heads of a site: `query [H, D, d]`, `key [H, D, d]`, `value [H, D, e]`, `out [H, e, E]`."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def make_metric(moment: Tensor, centered: Tensor, damping: float = 1e-6) -> Metric:
    """The metric of tokens with second moment `moment [D, D]` and, centered over each image, `centered [D, D]`.

    Both are damped by `damping` times their mean diagonal, so that directions which no token took stay bounded; by more
    where sums in single precision left such directions below zero.
    """
    identity = torch.eye(len(moment), dtype=torch.float64)
    size = moment.diagonal().mean()
    lower, failed = torch.linalg.cholesky_ex(moment + damping * size * identity)
    while int(failed) and damping < 1:
        damping *= 10
        lower, failed = torch.linalg.cholesky_ex(moment + damping * size * identity)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    # The last entry of a token is always 1: centered, it is 0, and a constant over keys costs nothing.
    spread, basis = torch.linalg.eigh(inverse @ centered @ inverse.T)
    floor = damping * max(float(spread.max()), _ZERO)
    return Metric(basis.T @ lower.T, inverse.T @ basis, spread.clamp(min=floor))


def joint_svd(head: Head, queries: Metric, keys: Metric, weight: float, rank: int | None = None) -> Head:
    """The best `S` with `Wq Wk^T ~ S P^T` and `Wv Wo ~ S R` (Eckart-Young); Q and V then share S.

    Minimizes `|T (Wq Wk^T - S P^T) Lc|^2 / a + weight^2 |T (Wv Wo - S R)|^2 / b` exactly, where a and b are the
    norms of what is approximated. Where Wq and Wv span the same space, nothing is lost.

    Returns `query = value = S [H, D, r]`, `key = P [H, D, r]` about as large, `out = R [H, r, E]`: the same in whatever
    basis a head is given.
    """
    d = head.query.shape[-1]
    rank = rank or d
    basis, both, target, right_key, small_key = _joint_target(head, queries, keys, weight)
    logits = both[..., :d] @ small_key.mT
    left = torch.linalg.svd(target, full_matrices=False)[0][..., :rank]
    left = left * _signs(queries.color @ (basis @ left))
    # Queries as large as keys: neither over- or underflows in half precision. The size is that of a product, so that
    # what is fitted later does not depend on the basis that a head came in.
    size = (_norm(logits) / rank**0.5).sqrt()
    shared = queries.color @ (basis @ left) * size
    back = left.mT / size
    white_key = right_key @ (small_key @ both[..., :d].mT @ back.mT)
    key = keys.color @ (white_key / keys.spread.sqrt()[:, None])
    return Head(shared, key, shared, back @ both[..., d:] @ head.out)


def rank_losses(head: Head, queries: Metric, keys: Metric, weight: float = 0.6) -> Tensor:
    """What `joint_svd` loses with 1, 2, .. d channels a head, relative to what it loses with all d: `[d]`.

    The squared singular values that are left out, summed over heads.
    """
    values = torch.linalg.svdvals(_joint_target(head, queries, keys, weight)[2]).square()
    values = values / values.sum(-1, keepdim=True).clamp(min=_ZERO)
    tails = 1 - values.cumsum(-1)[..., : head.query.shape[-1]]
    # Rounding can leave the last tails at or below zero, and the last one divides.
    lost = tails.clamp(min=1e-12).sum(0)
    relative: Tensor = lost / lost[-1]
    return relative


def _joint_target(
    head: Head, queries: Metric, keys: Metric, weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The two products that share a factor, beside each other in an orthonormal basis, and what made them."""
    d = head.query.shape[-1]
    # Products of thin matrices: in bases of their own columns the rest is d by d, and D by D is never made.
    basis, both = torch.linalg.qr(queries.whiten @ torch.cat([head.query, head.value], dim=-1))
    right_key, small_key = torch.linalg.qr(keys.spread.sqrt()[:, None] * (keys.whiten @ head.key))
    _, small_out = torch.linalg.qr(head.out.mT)
    logits = both[..., :d] @ small_key.mT
    output = both[..., d:] @ small_out.mT
    scale = weight * _norm(logits) / _norm(output).clamp(min=_ZERO)
    return basis, both, torch.cat([logits, scale * output], dim=-1), right_key, small_key


def refit_output(shared: Tensor, head: Head, tokens: Metric) -> Tensor:
    """`R [H, r, E]`: the least squares solution of `Wv Wo ~ S R` for a given `S [H, D, r]`."""
    white = tokens.whiten @ shared
    mix: Tensor = torch.linalg.lstsq(white, tokens.whiten @ head.value, driver="gelsd").solution
    return mix @ head.out


def pick_columns(head: Head, count: int, queries: Metric, keys: Metric) -> Tensor:
    """Which `count` of V's channels span the logits best, greedily, best first; the others follow: `[H, e]`.

    Each step takes the channel which, made orthogonal to those taken before, explains most of `T Wq Wk^T Lc`.
    """
    logits = (queries.whiten @ head.query) @ (keys.spread.sqrt()[:, None] * (keys.whiten @ head.key)).mT
    left = torch.linalg.qr(queries.whiten @ head.query)[0]
    rest = left.mT @ logits
    columns = left.mT @ (queries.whiten @ head.value)
    full = (queries.whiten @ head.value).square().sum(dim=-2)
    # The part of a channel that lies outside of what Q spans explains nothing, and counts for its length.
    outside = (full - columns.square().sum(dim=-2)).clamp(min=0)
    order: list[Tensor] = []
    taken = torch.zeros(head.value.shape[0], head.value.shape[-1], dtype=torch.bool)
    rows = torch.arange(len(taken))
    for _ in range(count):
        length = columns.square().sum(dim=-2) + outside
        gain = (columns.mT @ rest).square().sum(dim=-1) / length.clamp(min=_ZERO)
        best = gain.masked_fill(taken, -1.0).argmax(dim=-1)
        taken[rows, best] = True
        order.append(best)
        # Gram-Schmidt: what this channel explains is taken out of the logits and of the other channels.
        unit = torch.nn.functional.normalize(columns[rows, :, best], dim=-1)[..., None]
        rest = rest - unit @ (unit.mT @ rest)
        columns = columns - unit @ (unit.mT @ columns)
    chosen = torch.stack(order, dim=-1)
    others = torch.stack([(~row).nonzero().flatten() for row in taken])
    return torch.cat([chosen, others], dim=-1)


def bound_values(
    head: Head, queries: Metric, keys: Metric, weight: float, *, of_query: int, of_key: int, steps: int = 60
) -> Head:
    """Q and K that also serve as channels of V, where V's basis is not free (an activation follows it).

    V's channels `[: of_query]` are to be Q's, and `[of_query : of_query + of_key]` K's. Alternating least squares for
    `|T (Wq Wk^T - S P^T) Lc|^2 / a + weight^2 (|T (Wv' - S)|^2 + |T (Wv'' - P)|^2) / b`.

    Needs `of_query` in (0, d) and `of_key` in (0, d), and one metric for Q and K where neither is 0.
    Returns the site's weights with `query = S`, `key = P` and V's channels replaced; `out` is as it was.
    """
    root = keys.spread.sqrt()[:, None]
    white_q, white_k = queries.whiten @ head.query, keys.whiten @ head.key
    # V is made from the tokens of the role that it shares.
    white_v = (queries if of_query else keys).whiten @ head.value
    target_q, target_k = white_v[..., :of_query], white_v[..., of_query : of_query + of_key]
    inner = (white_q.mT @ white_q) @ ((root * white_k).mT @ (root * white_k))
    energy = inner.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].clamp(min=_ZERO)
    bound = target_q.square().sum((-2, -1)) + target_k.square().sum((-2, -1))
    pull = weight**2 * energy / bound[:, None, None].clamp(min=_ZERO)
    identity = torch.eye(head.query.shape[-1], dtype=torch.float64)
    # Start from the point of Q's gauge that is nearest to V.
    mix = torch.linalg.lstsq(white_q, target_q, driver="gelsd").solution if of_query else identity.expand_as(inner)
    s = white_q @ mix
    p = torch.zeros_like(white_k)
    for _ in range(steps):
        # Where K alone is bound, queries never move, and the first keys stay the best.
        if of_query or not bool(p.any()):
            p = _keys_for(s, white_q, white_k, target_k, keys.spread, pull)
        if of_query:
            gram = (root * p).mT @ (root * p)
            s = (white_q @ ((root * white_k).mT @ (root * p)) + pull * target_q) @ torch.linalg.inv(
                gram + pull * identity
            )
    query, key = queries.color @ s, keys.color @ _keys_for(s, white_q, white_k, target_k, keys.spread, pull)
    shared = [query[..., :of_query]] if of_query else []
    shared += [key[..., :of_key]] if of_key else []
    return Head(query, key, torch.cat([*shared, head.value[..., of_query + of_key :]], dim=-1), head.out)


def _keys_for(s: Tensor, white_q: Tensor, white_k: Tensor, target: Tensor, spread: Tensor, pull: Tensor) -> Tensor:
    """The best keys for given queries: `spread p G + pull p = spread Wk (Wq^T s) + pull target`, in G's basis."""
    gram, basis = torch.linalg.eigh(s.mT @ s)
    right = spread[:, None] * (white_k @ (white_q.mT @ s))
    drag = pull if target.shape[-1] else torch.zeros_like(pull)
    if target.shape[-1]:
        right = right + pull * target
    bottom = spread[:, None] * gram[..., None, :] + drag
    # A direction that no query takes leaves its key free; the floor keeps it bounded.
    floor = 1e-12 * bottom.amax(dim=(-2, -1), keepdim=True)
    keys: Tensor = ((right @ basis) / torch.maximum(bottom, floor)) @ basis.mT
    return keys


def symmetric(head: Head, tokens: Metric) -> Tensor:
    """The best `S [H, D, d]` with `Wq Wk^T ~ S S^T`: the positive part of the symmetric part, in the metric.

    Of the symmetric part's eigenvalues only positive ones can be had; where fewer than d are, columns are zero.
    """
    white = (tokens.whiten @ head.query) @ (tokens.whiten @ head.key).mT
    # eigh gives eigenvalues in ascending order: the last d are the largest.
    values, vectors = torch.linalg.eigh((white + white.mT) / 2)
    d = head.query.shape[-1]
    shared: Tensor = tokens.color @ (vectors[..., -d:] * values[..., None, -d:].clamp(min=0).sqrt())
    return shared * _signs(shared)


def loss(
    new: Head, old: Head, queries: Metric, keys: Metric, weight: float = 1.0, *, tokens: Metric | None = None
) -> float:
    """What `joint_svd` minimizes, averaged over heads: relative squared errors of logits and values.

    `tokens` are those that V is made from, Q's by default.
    """
    root = keys.spread.sqrt()[:, None]

    def logits(head: Head) -> Tensor:
        return (queries.whiten @ head.query) @ (root * (keys.whiten @ head.key)).mT

    def values(head: Head) -> Tensor:
        return (tokens or queries).whiten @ head.value @ head.out

    def error(got: Tensor, wanted: Tensor) -> Tensor:
        return _norm(got - wanted).square() / _norm(wanted).square().clamp(min=_ZERO)

    of_logits = error(logits(new), logits(old))
    of_values = error(values(new), values(old))
    return float((of_logits + weight**2 * of_values).mean())


def _signs(columns: Tensor) -> Tensor:
    """With which each column's largest entry is positive: a singular vector's sign is rounding's choice."""
    largest = columns.abs().argmax(dim=-2, keepdim=True)
    return columns.gather(-2, largest).sign()


def _norm(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm[:, None, None]
