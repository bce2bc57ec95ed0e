"""One site as the initializers see it, and the closed-form candidates for its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
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

# (letter, start, stop) of a role's dimensions, in order.
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

    def of_values(self, queries: Metric, keys: Metric) -> Metric:
        """The metric of the tokens that V is made from: those of the role that it shares."""
        return queries if self.share("q") else keys


def read_head(module: nn.Module, problem: Problem) -> Head:
    """The weights of a site that was not converted, biases in the last rows; `out` is empty where there is none."""
    query, key, value = (read(module, locate(module, role, {})) for role in (problem.q, problem.k, problem.v))
    if problem.out is not None:
        out, _ = read_output(module, problem.out)
    else:
        heads, _, value_dim = value.shape
        out = torch.zeros(heads, value_dim, 0, dtype=torch.float64)
    return Head(query, key, value, out)


def has_biases(module: nn.Module, problem: Problem) -> bool:
    """Whether what Q (and with it V) is made from may have a constant; `module` is the site as it was."""
    roles = (problem.q, problem.k) if problem.share("k") else (problem.q,)
    return all(has_bias(locate(module, role, {})) for role in roles)


def without_biases(head: Head) -> Head:
    """The weights without their last rows."""
    return replace(head, query=head.query[:, :-1], key=head.key[:, :-1], value=head.value[:, :-1])


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
    # K is still there where K or a part of V is made of it.
    letters = [letter for letter, _, _ in (*problem.key, *problem.value)]
    if "k" in letters:
        _write(module, problem, problem.k, head.key, moments[1])
    for letter, start, stop in problem.value:
        if letter == "v":
            _write(module, problem, problem.v, head.value[..., start:stop], moments[1], start)
        elif problem.grouped is not None:
            # V's other channels follow from Q and K, or come from the grouped projection.
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
        # What the channel reads, and the constant.
        inputs = torch.cat([read_columns, torch.tensor([wanted.shape[1] - 1])])
        gram = moment[inputs][:, inputs]
        # Damped, because channels that never differ between tokens leave the system singular.
        damped = gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(inputs), dtype=torch.float64)
        full[channel, inputs] = torch.linalg.solve(damped, moment[inputs] @ target)
    with torch.no_grad():
        weight = full.gather(1, columns)
        grouped.weight[rows] = weight.reshape(grouped.weight.shape).to(grouped.weight)
        offset = full[:, -1]
        if grouped.norm is not None:
            offset = normalize(grouped.norm, torch.arange(len(full)), full, moment)
        if grouped.bias is not None:
            grouped.bias.copy_(offset)


def candidates(
    problem: Problem, head: Head, queries: Metric, keys: Metric, weights: tuple[float, ...] = WEIGHTS
) -> dict[str, Callable[[], Head]]:
    """Closed-form solutions for a site, by name, each worked out when it is called, since all take much memory.

    First `wq-refit`: Q and K stay, and only what follows is fitted. Rows of `out` follow the order of the returned
    `value`'s channels.
    """
    makers: dict[str, Callable[[], Head]] = {"wq-refit": partial(_plain, problem, head, queries, keys)}
    if not problem.freedom.logits:
        return makers
    if problem.key[0][0] == "q":
        makers["symmetric"] = partial(_symmetric, head, queries)
    elif _is_joint(problem, head):
        for weight in weights:
            makers[f"joint {weight:g}"] = partial(_joint, problem, head, queries, keys, weight)
    elif problem.share("q") or problem.share("k"):
        for name, ordered in _orders(problem, head, queries, keys).items():
            for weight in weights:
                makers[f"{name} {weight:g}"] = partial(_bound, problem, head, ordered, queries, keys, weight)
    return makers


def _symmetric(head: Head, queries: Metric) -> Head:
    """Q and K as one matrix."""
    shared = symmetric(head, queries)
    return replace(head, query=shared, key=shared)


def _bound(problem: Problem, head: Head, ordered: Head, queries: Metric, keys: Metric, weight: float) -> Head:
    """`bound_values` for a site whose channels of V are `ordered`."""
    from_q, from_k = problem.share("q"), problem.share("k")
    bound = bound_values(ordered, queries, keys, weight, of_query=from_q, of_key=from_k)
    return _refit(problem, bound, head, problem.of_values(queries, keys))


def _is_joint(problem: Problem, head: Head) -> bool:
    """Whether V is all of Q or all of K, in a basis of our choice: then `joint_svd` has the best solution."""
    key_dim, value_dim = head.query.shape[-1], head.value.shape[-1]
    if problem.freedom.values != "linear" or key_dim != value_dim:
        return False
    return max(problem.share("q"), problem.share("k")) == (problem.rank or key_dim)


def _orders(problem: Problem, head: Head, queries: Metric, keys: Metric) -> dict[str, Head]:
    """The site with V's channels as they are, and, where they may move, with those first that Q or K replaces best."""
    heads = {"bound": head}
    count = problem.share("q") or problem.share("k")
    if problem.freedom.values != "fixed" and 0 < count < head.value.shape[-1]:
        if problem.share("q"):
            order = pick_columns(head, count, queries, keys)
        else:
            order = pick_columns(_turned(head), count, keys, queries)
        value = head.value.gather(-1, order[:, None].expand_as(head.value))
        out = head.out.gather(1, order[..., None].expand_as(head.out))
        heads["ordered"] = replace(head, value=value, out=out)
    return heads


def _joint(problem: Problem, head: Head, queries: Metric, keys: Metric, weight: float) -> Head:
    """`joint_svd` for a site where V is all of Q, or all of K."""
    if problem.share("q"):
        return joint_svd(head, queries, keys, weight, problem.rank)
    # K goes in as Q, and comes out as K again.
    best = joint_svd(_turned(head), keys, queries, weight, problem.rank)
    return Head(best.key, best.query, best.query, best.out)


def _turned(head: Head) -> Head:
    """The head with Q and K in each other's place: what the closed forms call queries is what V shares."""
    return Head(head.key, head.query, head.value, head.out)


def truncated(problem: Problem, head: Head, queries: Metric, keys: Metric) -> Head:
    """`wq` with fewer channels: of Q (or K) those directions that are best for the logits, serving as V as well.

    The output projection reads in them what it read in all of Q.
    """
    shared = head.query if problem.share("q") else head.key
    # Weight 0: directions are chosen for the logits alone.
    return _joint(problem, replace(head, value=shared), queries, keys, 0.0)


def _plain(problem: Problem, head: Head, queries: Metric, keys: Metric) -> Head:
    """`wq-refit`: the weights that `wq` takes, and the output projection fitted to them where V's basis is free."""
    if problem.rank is not None:
        return _joint(problem, head, queries, keys, 0.0)
    own = {"q": head.query, "k": head.key, "v": head.value}
    key = own[problem.key[0][0]]
    # Channels of a grouped projection have a letter of their own, and are fitted to V's.
    pieces = [own.get(letter, head.value)[..., start:stop] for letter, start, stop in problem.value]
    return _refit(
        problem, Head(head.query, key, torch.cat(pieces, dim=-1), head.out), head, problem.of_values(queries, keys)
    )


def _refit(problem: Problem, new: Head, old: Head, tokens: Metric) -> Head:
    """The head with its output projection fitted to its values, where that may be and these are new."""
    if problem.freedom.values != "linear" or torch.equal(new.value, old.value):
        return new
    return replace(new, out=refit_output(new.value, old, tokens))
