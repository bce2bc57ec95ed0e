"""Choose the weights of a converted model from the original's weights alone, by closed forms."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.altered import run_weightless
from armour_surgery.copies import alias, meta_copy
from armour_surgery.initialize.closed_form import Head, Metric, loss, make_metric
from armour_surgery.initialize.problem import (
    Problem,
    candidates,
    has_biases,
    read_head,
    truncated,
    with_biases,
    without_biases,
    write_head,
)
from armour_surgery.initialize.site import SiteResult
from armour_surgery.initialize.weights import read_output, write_output
from armour_surgery.shapes import RememberedShapes

__all__ = ["from_weights"]


def from_weights(
    original: nn.Module, converted: nn.Module, problems: list[Problem], init: str, run: Callable[[nn.Module], Any]
) -> list[SiteResult]:
    """Closed forms without data, in place: tokens are taken to be what the LayerNorm before a site makes of noise.

    `wq-refit` keeps Q and K and fits the output projection to what V is now; `joint-svd` chooses all of them, and is
    never worse in what it minimizes. `wq` is for sites whose heads get fewer channels: it keeps the best of Q's. The
    moment is `diag(weight^2) + bias bias^T`, and the identity where no LayerNorm of the tokens' width comes before.
    `run(model)` runs a model on meta tensors. Residuals are the root of the mean relative squared error of logits and
    values, in that metric.
    """
    norms = _norms_before(original, problems, run)
    results = []
    for problem in problems:
        old, new = original.get_submodule(problem.fqn), converted.get_submodule(problem.fqn)
        head = read_head(old, problem)
        biases = has_biases(old, problem)
        queries, keys = _implied_moments(original, norms.get(problem.fqn), head)
        metrics = queries.metric(biases), keys.metric(biases)
        fitted = head if biases else without_biases(head)
        heads = _candidates(problem, fitted, metrics, init)
        tokens = problem.of_values(*metrics)
        errors = {name: loss(candidate, fitted, *metrics, tokens=tokens) for name, candidate in heads.items()}
        name = min(errors, key=errors.__getitem__)
        best = heads[name] if biases else with_biases(problem, heads[name], head)
        write_head(new, problem, best, (queries.moment, keys.moment))
        _write_output(old, new, problem, best)
        results.append(SiteResult(problem.fqn, (errors[name] / 2) ** 0.5, (name,)))
    return results


@dataclass(frozen=True)
class _Implied:
    """What is taken to be the moment of tokens with a last entry 1, and that of the same tokens centered."""

    moment: Tensor
    centered: Tensor

    def metric(self, biases: bool) -> Metric:
        """The metric of the tokens, with or without their last entry."""
        size = slice(None) if biases else slice(-1)
        return make_metric(self.moment[size, size], self.centered[size, size])


def _candidates(problem: Problem, head: Head, metrics: tuple[Metric, Metric], init: str) -> dict[str, Head]:
    """The weights that an init chooses from, by name."""
    if init == "wq":
        return {"wq": truncated(problem, head, *metrics)}
    # Without images nothing says how much values count, so they count as much as logits.
    makers = candidates(problem, head, *metrics, weights=(1.0,))
    return {name: make() for name, make in makers.items() if init != "wq-refit" or name == init}


def _write_output(old: nn.Module, new: nn.Module, problem: Problem, head: Head) -> None:
    """Store a site's output projection, where it is known; its constant stays."""
    if problem.out is None or problem.narrow_out is None or not head.out.numel():
        return
    heads, channels, _ = head.out.shape
    # A BatchNorm that follows gets the statistics of white results: nothing is known of theirs.
    white = torch.eye(heads * channels + 1, dtype=torch.float64)
    write_output(new, problem.narrow_out, head.out, read_output(old, problem.out)[1], white)


def _implied_moments(model: nn.Module, norm: str | None, head: Head) -> tuple[_Implied, _Implied]:
    """Those of Q's tokens and of K's."""
    queries = _implied_moment(model, norm, head.query.shape[1])
    # Tokens of K are as wide as Q's almost everywhere; where not, nothing is known of them.
    if head.key.shape[1] == head.query.shape[1]:
        return queries, queries
    return queries, _implied_moment(model, None, head.key.shape[1])


def _implied_moment(model: nn.Module, norm: str | None, width: int) -> _Implied:
    """The moment of `[x 1]`, and that of x centered, for x = LayerNorm of noise; both `[width, width]`."""
    weight = torch.ones(width - 1, dtype=torch.float64)
    bias = torch.zeros_like(weight)
    if norm is not None:
        module = model.get_submodule(norm)
        weight = module.get_parameter("weight").detach().double().cpu()
        # An RMSNorm has none.
        if isinstance(getattr(module, "bias", None), Tensor):
            bias = module.get_parameter("bias").detach().double().cpu()
    centered = torch.diag(torch.cat([weight.square(), weight.new_zeros(1)]))
    mean = torch.cat([bias, bias.new_ones(1)])
    return _Implied(centered + mean[:, None] * mean, centered)


def _norms_before(model: nn.Module, problems: list[Problem], run: Callable[[nn.Module], Any]) -> dict[str, str]:
    """For each site the last module that was called before it and has one weight per channel of its tokens."""
    widths: dict[str, int] = {}
    for problem in problems:
        weight = model.get_submodule(problem.fqn).get_parameter(problem.q.producer.weight)
        widths[problem.fqn] = weight.shape[1]
    try:
        return run_weightless(partial(meta_copy, model), lambda skeleton: _norms_called(skeleton, widths, run))
    except Exception:
        # It looks at numbers: see `discover/record.py`, which came to the same.
        return _norms_called(alias(model), widths, run)


def _norms_called(skeleton: nn.Module, widths: dict[str, int], run: Callable[[nn.Module], Any]) -> dict[str, str]:
    """`_norms_before` on a copy without weights; `widths` are those of the sites' tokens."""
    skeleton.eval()  # timm's LeViT attention returns nothing here
    called: list[tuple[str, int]] = []  # so far, with their channels
    norms: dict[str, str] = {}
    for name, module in skeleton.named_modules():

        def note(child: nn.Module, _: Any, name: str = name) -> None:
            if name in widths:
                for earlier, channels in reversed(called):
                    if channels == widths[name]:
                        norms[name] = earlier
                        break
            called.append((name, _channels(child)))

        module.register_forward_pre_hook(note)
    with torch.no_grad(), RememberedShapes():
        run(skeleton)
    return norms


def _channels(module: nn.Module) -> int:
    """How many channels a normalization of tokens scales; 0 for any other module, BatchNorm among them."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or "running_mean" in module._buffers:
        return 0
    return weight.numel()
