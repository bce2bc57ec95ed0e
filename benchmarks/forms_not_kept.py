"""Closed forms that were tried and did not stay: each a context in which `convert` does otherwise; timm's ViTs only."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from mlp_rivals import mlps_of
from torch import Tensor, nn

from armour_surgery.initialize import block, hidden, output_metric, problem, site
from armour_surgery.initialize.closed_form import Head, Metric, joint_svd
from armour_surgery.initialize.last_layer import LastLayer
from armour_surgery.initialize.moments import Regression, with_one
from armour_surgery.initialize.taps import Stop, Taps, tokens
from armour_surgery.initialize.walk import Walk, first_tensor
from armour_surgery.initialize.weights import applied_weight

# `armour_surgery.initialize.calibrate` is the function.
CALIBRATE = importlib.import_module("armour_surgery.initialize.calibrate")


@contextmanager
def metric_of_mlps() -> Iterator[None]:
    """Errors of MLPs' outputs count by what they do to the final features too, where channels are let go."""
    moments_of, narrow, eliminate = CALIBRATE.error_moments, CALIBRATE.narrow, hidden.eliminate
    found: dict[str, output_metric.ErrorMoment] = {}
    roots: list[Tensor] = []

    def of_both(model: nn.Module, outputs: Mapping[str, Tensor], images: list[Tensor], *rest: Any) -> Any:
        found.update(moments_of(model, {n: mlp.fc2.weight for n, mlp in mlps_of(model).items()}, images, *rest))
        return moments_of(model, outputs, images, *rest)

    def narrowed(here: block.Block, one: hidden.MlpProblem, alone: bool) -> site.SiteResult:
        assert here.last is not None
        roots[:] = [found[one.fqn].root(here.last.gain.double())]
        return narrow(here, one, alone)

    def by_metric(moment: Tensor, weight: Tensor, least: int = 0) -> hidden.Elimination:
        return eliminate(moment, weight @ roots[0], least)

    with (
        patch.object(CALIBRATE, "error_moments", of_both),
        patch.object(CALIBRATE, "narrow", narrowed),
        patch.object(hidden, "eliminate", by_metric),
    ):
        yield


@contextmanager
def heads_own_weights() -> Iterator[None]:
    """Beside the candidates that there are, three in which each head has its own weight of values against logits."""
    solve = site.Site.solve

    def solve_by_heads(self: site.Site, alone: bool) -> site.SiteResult:
        def more(one: problem.Problem, head: Head, queries: Metric, keys: Metric) -> dict[str, Callable[[], Head]]:
            found = problem.candidates(one, head, queries, keys)
            weights = _weights_of_heads(self, head, queries, keys)
            for factor in (0.5, 1.0, 2.0):
                scaled: Any = factor * weights  # one number a head, where the package has one for all
                found[f"joint by heads {factor:g}"] = partial(joint_svd, head, queries, keys, scaled, one.rank)
            return found

        with patch.object(site, "candidates", more):
            return solve(self, alone)

    with patch.object(site.Site, "solve", solve_by_heads):
        yield


def _weights_of_heads(here: site.Site, head: Head, queries: Metric, keys: Metric) -> Tensor:
    """The root of what a head's output loses by its values against by its logits, both per loss of the closed form.

    Through the softmax as it is, on two batches; `[H, 1, 1]`.
    """
    new = joint_svd(head, queries, keys, 0.6, here.problem.rank)
    weight = applied_weight(here.new, here.problem.q.producer, here.problem.kept)
    by_logits, by_values = torch.zeros(len(head.query)), torch.zeros(len(head.query))
    batches = [(index, image) for index, image, held in here.data if not held][:2]
    for index, image in batches:
        got = with_one(_inputs(here.block.after, here.block.number, weight, image, here.store["converted", index]))
        for place in range(len(head.query)):
            old_one, new_one = (
                [part[place].to(got) for part in (one.query, one.key, one.value, one.out)] for one in (head, new)
            )
            attention, values = _attention(got, old_one), got @ old_one[2] @ old_one[3]
            by_logits[place] += ((_attention(got, new_one) - attention) @ values).square().sum()
            by_values[place] += (attention @ (got @ new_one[2] @ new_one[3] - values)).square().sum()
    root = keys.spread.sqrt()[:, None]
    logits = [(queries.whiten @ one.query) @ (root * (keys.whiten @ one.key)).mT for one in (head, new)]
    outputs = [queries.whiten @ one.value @ one.out for one in (head, new)]
    lost_logits, lost_values = (
        (after - before).square().sum((1, 2)) / before.square().sum((1, 2)) for before, after in (logits, outputs)
    )
    return ((by_values / lost_values) / (by_logits / lost_logits)).sqrt().double()[:, None, None]


def _attention(got: Tensor, head: list[Tensor]) -> Tensor:
    query, key = got @ head[0], got @ head[1]
    return (query @ key.mT * 64**-0.5).softmax(-1)  # DINOv2-S's scale, whatever the rank


@contextmanager
def first_layers() -> Iterator[None]:
    """Q, K, V and MLPs' first layers read the original's tokens, as far as these follow from the converted ones.

    Least squares from the converted model's tokens to the original's, by ridge towards the identity, chosen on held-out
    images; folded into the weights that read them.
    """
    run, narrow, finish, solve = block.Block.run_original, CALIBRATE.narrow, block.Block.finish, site.Site.solve
    given: dict[int, Any] = {}
    done: set[int] = set()

    def run_original(self: block.Block) -> None:
        given.update({index: self.store["original", index] for index, _, _ in self.data})
        done.clear()
        run(self)
        if self.problem is None and self.number > 0:
            refit_layer(self, "attn.qkv")  # one that stays three projections

    def refit_layer(self: block.Block, name: str) -> None:
        old, new = (walk.model.get_submodule(f"{walk.units[self.number]}.{name}") for walk in (self.before, self.after))
        layer = LastLayer(new)
        layer.write(_to_originals(self, old.get_parameter("weight"), layer.weight, given) @ layer.read())

    def refit(self: block.Block) -> None:
        if not done:
            done.add(self.number)
            refit_layer(self, "mlp.fc1")

    def narrowed(here: block.Block, *rest: Any) -> Any:
        refit(here)
        return narrow(here, *rest)

    def finished(self: block.Block, alone: bool) -> bool:
        refit(self)
        return finish(self, alone)

    def solved(self: site.Site, alone: bool) -> site.SiteResult:
        if self.block.number == 0:
            return solve(self, alone)  # what it gets is the original's
        watched = [applied_weight(self.old, self.problem.q.producer, {})]
        watched.append(applied_weight(self.new, self.problem.q.producer, self.problem.kept))
        change = _to_originals(self.block, *watched, given)

        def read(module: nn.Module, one: problem.Problem) -> Head:
            head = problem.read_head(module, one)
            return Head(change @ head.query, change @ head.key, change @ head.value, head.out)

        with patch.object(site, "read_head", read):
            return solve(self, alone)

    with (
        patch.object(block.Block, "run_original", run_original),
        patch.object(block.Block, "finish", finished),
        patch.object(CALIBRATE, "narrow", narrowed),
        patch.object(site.Site, "solve", solved),
    ):
        yield


def _to_originals(here: block.Block, old: Tensor, new: Tensor, given: dict[int, Any]) -> Tensor:
    """`[D + 1, D + 1]`: what the converted model's `[x 1]` must be multiplied by to be most like the original's."""
    width = old.shape[1]
    regression = Regression(torch.eye(width + 1, width, dtype=torch.float64), biases=True)
    for index, image, held in here.data:
        wanted = _inputs(here.before, here.number, old, image, given[index])
        got = _inputs(here.after, here.number, new, image, here.store["converted", index])
        weights = here.data.weights(wanted.shape[1])
        rows = None if weights is None else weights.repeat(len(wanted), 1)
        regression.add(got.flatten(0, 1), wanted.flatten(0, 1), held, weights=rows)
    constant = torch.eye(width + 1, dtype=torch.float64)[:, -1:]
    return torch.cat([regression.solve()[0], constant], dim=1)


def _inputs(walk: Walk, number: int, weight: Tensor, image: Tensor, arguments: Any) -> Tensor:
    """What goes into a weight when a unit is run on those arguments, `[B, N, D]`."""
    seen: list[Tensor] = []

    def tap(source: Tensor, _: Callable[[], Tensor]) -> Tensor:
        seen.append(tokens(source, weight))
        raise Stop

    try:
        with Taps({weight: tap}):
            walk.run(number, image, arguments)
    except Stop:
        pass
    return seen[0]


@contextmanager
def tokens_by_size() -> Iterator[None]:
    """In the last layer's fit, a token counts by the inverse of its energy in the original's stream, centered."""
    watch = block.Block._watch_last

    def by_size(
        self: block.Block, layer: LastLayer, branch: Any, regression: Regression, stride: int, keep: bool
    ) -> bool:
        add, order = regression.add, iter([index for index, _, _ in self.data])

        def weighted(inputs: Tensor, targets: Tensor, held: bool, missing: Tensor, rows: Tensor | None) -> None:
            index = next(order)
            stream = first_tensor(self.store["original", index])
            chosen, _ = self.data.thinned(stream.shape[:2], index % stride, stride)
            energy = stream.flatten(0, 1)[chosen].var(-1, keepdim=True)
            weights = energy.mean() / energy
            add(inputs, targets, held, missing, weights if rows is None else rows.to(weights) * weights)

        with patch.object(regression, "add", weighted):
            return watch(self, layer, branch, regression, stride, keep)

    with patch.object(block.Block, "_watch_last", by_size):
        yield
