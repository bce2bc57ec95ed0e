"""One site as the initializers see it, and the closed-form candidates for its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.initialize.closed_form import (
    Head,
    Metric,
    bound_values,
    joint_svd,
    pick_columns,
    refit_output,
    symmetric,
)
from armour_surgery.initialize.freedom import Freedom
from armour_surgery.initialize.weights import has_bias, locate, normalize, read, read_output, write
from armour_surgery.traced import OutputProjection, Role

__all__ = [
    "Problem",
    "candidates",
    "has_biases",
    "read_head",
    "truncated",
    "with_biases",
    "without_biases",
    "write_head",
]

Parts = tuple[tuple[str, int, int], ...]

# How much an error of the values counts against one of the logits, both relative to their size.
WEIGHTS = (0.3, 0.6, 1.2)


@dataclass(frozen=True)
class Problem:
    """What the initializers know of a site.

    `key` and `value` say what K and V are made of now: (letter, start, stop) of a role's dimensions. `kept` are the
    old rows that narrowed tensors still have, in their new order, by name inside the site. `grouped` names the new
    grouped projection, if there is one. `rank` is the number of channels that a head has now, where it is another than
    before; then bases are free, and `out` is there.
    """

    fqn: str
    q: Role
    k: Role
    v: Role
    out: OutputProjection | None
    freedom: Freedom
    key: Parts
    value: Parts
    kept: Mapping[str, tuple[int, ...]]
    grouped: str | None
    same_tokens: bool
    rank: int | None = None

    @property
    def narrow_out(self) -> OutputProjection | None:
        """The output projection of the converted site."""
        return self.out.narrowed(self.rank) if self.out is not None else None

    @property
    def joint(self) -> bool:
        """Whether Q and V are one matrix in a basis of our choice, so that it may have fewer columns."""
        whole = self.share("q") == (self.rank or self.q.head_dim) and self.q.head_dim == self.v.head_dim
        return self.freedom.logits and self.freedom.values == "linear" and self.key[0][0] == "k" and whole

    def share(self, letter: str) -> int:
        """How many of V's channels a head has from another role."""
        return sum(stop - start for name, start, stop in self.value if name == letter)


def read_head(module: nn.Module, problem: Problem) -> Head:
    """The weights of a site that was not converted, biases in the last rows; `out` is empty where there is none."""
    query, key, value = (read(module, locate(module, role, {})) for role in (problem.q, problem.k, problem.v))
    if problem.out is None:
        return Head(query, key, value, torch.zeros(*value.shape[::2], 0, dtype=torch.float64))
    return Head(query, key, value, read_output(module, problem.out)[0])


def has_biases(module: nn.Module, problem: Problem) -> bool:
    """Whether what Q (and with it V) is made from may have a constant; `module` is the site as it was."""
    letters = ("q", "k") if problem.share("k") else ("q",)
    return all(has_bias(locate(module, getattr(problem, letter), {})) for letter in letters)


def without_biases(head: Head) -> Head:
    """The weights without their last rows."""
    return Head(head.query[:, :-1], head.key[:, :-1], head.value[:, :-1], head.out)


def with_biases(problem: Problem, head: Head, old: Head) -> Head:
    """Weights that were found without their last rows, with them: zeros where V is made of it, and K's never matter.

    Queries that V has no part in are the old ones in another basis, and their biases come along.
    """

    def add(matrix: Tensor) -> Tensor:
        return torch.cat([matrix, matrix.new_zeros(matrix.shape[0], 1, matrix.shape[2])], dim=1)

    query = add(head.query)
    if not problem.share("q") and problem.key[0][0] == "k":
        mix = torch.linalg.lstsq(old.query[:, :-1], head.query, driver="gelsd").solution
        query[:, -1:] = old.query[:, -1:] @ mix
    return Head(query, add(head.key), add(head.value), head.out)


def write_head(module: nn.Module, problem: Problem, head: Head, moments: tuple[Tensor, Tensor]) -> None:
    """Store queries, keys and V's own channels in a converted site. `moments` are those of Q's and of K's tokens."""
    _write(module, problem, problem.q, head.query, moments[0])
    if any(letter == "k" for letter, _, _ in (*problem.key, *problem.value)):
        _write(module, problem, problem.k, head.key, moments[1])
    for letter, start, stop in problem.value:
        if letter == "v":
            _write(module, problem, problem.v, head.value[..., start:stop], moments[1], start)
        elif problem.grouped is not None:
            _write_grouped(module.get_submodule(problem.grouped), head.value[..., start:stop], moments[1])


def _write(module: nn.Module, problem: Problem, role: Role, matrix: Tensor, moment: Tensor, start: int = 0) -> None:
    stored = locate(module, role, problem.kept, start, start + matrix.shape[-1])
    write(module, stored, matrix, moment)


def _write_grouped(grouped: Any, matrix: Tensor, moment: Tensor) -> None:
    """Let a grouped projection come as near to `matrix [H, D + 1, n]` as the slices that its channels read allow.

    The least squares solution over tokens with second moment `moment [D + 1, D + 1]`, channel by channel.
    """
    wanted = matrix.mT.reshape(-1, matrix.shape[-2])
    rows, columns = grouped.reads()
    full = torch.zeros_like(wanted)
    for channel, (read_columns, target) in enumerate(zip(columns, wanted, strict=True)):
        inputs = torch.cat([read_columns, torch.tensor([wanted.shape[1] - 1])])
        gram = moment[inputs][:, inputs]
        damped = gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
        full[channel, inputs] = torch.linalg.solve(damped, moment[inputs] @ target)
    with torch.no_grad():
        weight = full.gather(1, columns)
        grouped.weight[rows] = weight.reshape(grouped.weight.shape).to(grouped.weight)
        if grouped.norm is not None:
            normalize(grouped.norm, torch.arange(len(full)), full, moment)
        elif grouped.bias is not None:
            grouped.bias.copy_(full[:, -1])


def candidates(
    problem: Problem, head: Head, queries: Metric, keys: Metric, weights: tuple[float, ...] = WEIGHTS
) -> dict[str, Head]:
    """Closed-form solutions for a site, by name. First `wq-refit`: Q and K stay, and only what follows is fitted.

    Rows of `out` follow the order of the returned `value`'s channels.
    """
    metrics = (queries, keys)
    plain = _plain(problem, head, queries, keys)
    found = {"wq-refit": plain}
    if not problem.freedom.logits:
        return found
    shared_q, shared_k = problem.share("q"), problem.share("k")
    d, e = head.query.shape[-1], head.value.shape[-1]
    if problem.key[0][0] == "q":
        found["symmetric"] = replace(head, query=symmetric(head, queries), key=symmetric(head, queries))
    elif problem.freedom.values == "linear" and max(shared_q, shared_k) == (problem.rank or d) and d == e:
        for weight in weights:
            found[f"joint {weight:g}"] = _joint(problem, head, queries, keys, weight)
    elif shared_q or (shared_k and problem.same_tokens):
        for name, ordered in _orders(problem, head, queries, keys, shared_q).items():
            for weight in weights:
                best = bound_values(ordered, *metrics, weight, of_query=shared_q, of_key=shared_k)
                found[f"{name} {weight:g}"] = _refit(problem, best, head, keys)
    return found


def _orders(problem: Problem, head: Head, queries: Metric, keys: Metric, count: int) -> dict[str, Head]:
    """The site with V's channels as they are, and, where they may move, with those first that Q replaces best."""
    found = {"bound": head}
    if problem.freedom.values != "fixed" and 0 < count < head.value.shape[-1]:
        order = pick_columns(head, count, queries, keys)
        value = head.value.gather(-1, order[:, None].expand_as(head.value))
        found["ordered"] = replace(head, value=value, out=head.out.gather(1, order[..., None].expand_as(head.out)))
    return found


def _joint(problem: Problem, head: Head, queries: Metric, keys: Metric, weight: float) -> Head:
    """`joint_svd` for a site where V is all of Q, or all of K."""
    if problem.share("q"):
        return joint_svd(head, queries, keys, weight, problem.rank)
    best = joint_svd(Head(head.key, head.query, head.value, head.out), keys, queries, weight, problem.rank)
    return Head(best.key, best.query, best.query, best.out)


def truncated(problem: Problem, head: Head, queries: Metric, keys: Metric) -> Head:
    """`wq` with fewer channels: of Q (or K) those directions that are best for the logits, serving as V as well.

    The output projection reads in them what it read in all of Q.
    """
    shared = head.query if problem.share("q") else head.key
    return _joint(problem, replace(head, value=shared), queries, keys, 0.0)


def _plain(problem: Problem, head: Head, queries: Metric, keys: Metric) -> Head:
    """`wq-refit`: the weights that `wq` takes, and the output projection fitted to them where V's basis is free."""
    if problem.rank is not None:
        return _joint(problem, head, queries, keys, 0.0)
    own = {"q": head.query, "k": head.key, "v": head.value}
    key = own[problem.key[0][0]]
    value = torch.cat([own.get(letter, head.value)[..., start:stop] for letter, start, stop in problem.value], dim=-1)
    return _refit(problem, Head(head.query, key, value, head.out), head, keys)


def _refit(problem: Problem, new: Head, old: Head, tokens: Metric) -> Head:
    if problem.freedom.values != "linear" or torch.equal(new.value, old.value):
        return new
    return replace(new, out=refit_output(new.value, old, tokens))
