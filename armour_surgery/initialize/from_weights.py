"""Choose the weights of a converted model so that it keeps working: from its weights alone, or from images too."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.copies import meta_copy
from armour_surgery.initialize.batches import HELD_OUT
from armour_surgery.initialize.calibrate import calibrate
from armour_surgery.initialize.closed_form import loss, make_metric
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
from armour_surgery.initialize.reconstruct import reconstruct
from armour_surgery.initialize.site import SiteResult
from armour_surgery.initialize.weights import read_output, write_output

__all__ = ["HELD_OUT", "Problem", "SiteResult", "calibrate", "from_weights", "reconstruct"]


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
        width = head.query.shape[1]
        moment, centered = _implied_moment(original, norms.get(problem.fqn), width)
        # Tokens of K are as wide as Q's almost everywhere; where not, nothing is known of them.
        plain = (moment, centered)
        other = plain if head.key.shape[1] == width else _implied_moment(original, None, head.key.shape[1])
        biases = has_biases(old, problem)
        size = slice(None) if biases else slice(-1)
        queries, keys = (make_metric(pair[0][size, size], pair[1][size, size]) for pair in (plain, other))
        cut = head if biases else without_biases(head)
        if init == "wq":
            chosen = {"wq": truncated(problem, cut, queries, keys)}
        else:
            found = candidates(problem, cut, queries, keys, (1.0,))
            chosen = {"wq-refit": found["wq-refit"]} if init == "wq-refit" else found
        errors = {name: loss(one, cut, queries, keys) for name, one in chosen.items()}
        name = min(errors, key=lambda one: errors[one])
        best = chosen[name] if biases else with_biases(problem, chosen[name], head)
        write_head(new, problem, best, (moment, other[0]))
        if problem.out is not None and problem.narrow_out is not None and best.out.numel():
            unit = torch.eye(best.out.shape[0] * best.out.shape[1] + 1, dtype=torch.float64)
            write_output(new, problem.narrow_out, best.out, read_output(old, problem.out)[1], unit)
        results.append(SiteResult(problem.fqn, (errors[name] / 2) ** 0.5, (name,)))
    return results


def _implied_moment(model: nn.Module, norm: str | None, width: int) -> tuple[Tensor, Tensor]:
    """The moment of `[x 1]`, and that of x centered, for x = LayerNorm of noise; both `[width, width]`."""
    weight = torch.ones(width - 1, dtype=torch.float64)
    bias = torch.zeros_like(weight)
    if norm is not None:
        module = model.get_submodule(norm)
        weight = module.get_parameter("weight").detach().double().cpu()
        if isinstance(getattr(module, "bias", None), Tensor):
            bias = module.get_parameter("bias").detach().double().cpu()
    centered = torch.diag(torch.cat([weight.square(), weight.new_zeros(1)]))
    mean = torch.cat([bias, bias.new_ones(1)])
    return centered + mean[:, None] * mean, centered


def _norms_before(model: nn.Module, problems: list[Problem], run: Callable[[nn.Module], Any]) -> dict[str, str]:
    """For each site the last module that was called before it and has one weight per channel of its tokens."""
    skeleton = meta_copy(model)
    skeleton.eval()  # timm's LeViT attention returns nothing here
    called: list[str] = []
    found: dict[str, str] = {}
    widths = {
        problem.fqn: model.get_submodule(problem.fqn).get_parameter(problem.q.producer.weight).shape[1]
        for problem in problems
    }
    for name, module in skeleton.named_modules():

        def note(child: nn.Module, _: Any, name: str = name) -> None:
            if name in widths:
                fitting = (one for one in reversed(called) if _channels(skeleton.get_submodule(one)) == widths[name])
                previous = next(fitting, None)
                if previous is not None:
                    found[name] = previous
            called.append(name)

        module.register_forward_pre_hook(note)
    with torch.no_grad():
        run(skeleton)
    return found


def _channels(module: nn.Module) -> int:
    """How many channels a normalization of tokens scales; 0 for any other module, BatchNorm among them."""
    weight = module._parameters.get("weight")
    normalizes = weight is not None and weight.ndim == 1 and "running_mean" not in module._buffers
    return weight.numel() if normalizes and weight is not None else 0
