"""What others would do with the same model and the same images: simpler shared weights, low rank, pruning.

None of this is in the package. Each function returns a new model and leaves the original as it is; images only come in
as batches that are passed over once.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from mlp_rivals import keep_channels, mlps_of
from torch import Tensor, nn

from armour_surgery import convert
from armour_surgery.discover import find_sites
from armour_surgery.initialize.closed_form import Head, Metric, joint_svd, refit_output
from armour_surgery.initialize.moments import Moments
from armour_surgery.initialize.problem import Problem, has_biases, read_head, with_biases, without_biases, write_head
from armour_surgery.initialize.taps import Taps, tokens
from armour_surgery.initialize.weights import read_output, write_output
from armour_surgery.measure.cost import count_params
from armour_surgery.surgery.operation import prepare
from armour_surgery.surgery.problems import problems_of

Example = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor], Any]


def mean_of_shared(original: nn.Module, mode: str, example: Example) -> nn.Module:
    """V's channels that go and the channels that serve in their place both become the mean of the two."""

    def choose(problem: Problem, head: Head) -> Head:
        own = {"q": head.query, "k": head.key, "v": head.value.clone()}
        place = 0
        for letter, start, stop in problem.value:
            ours = slice(place, place + stop - start)
            if letter in ("q", "k"):
                shared = own[letter].clone()
                shared[..., start:stop] = (shared[..., start:stop] + head.value[..., ours]) / 2
                own[letter] = shared
                own["v"][..., ours] = shared[..., start:stop]
            place = ours.stop
        return Head(own["q"], own["k"], own["v"], head.out)

    return _converted(original, mode, example, choose)


def svd_without_whitening(original: nn.Module, mode: str, example: Example) -> nn.Module:
    """The best shared weight if all tokens were white noise: the same SVD in the identity metric. For `qv`."""

    def choose(problem: Problem, head: Head) -> Head:
        size = head.query.shape[1]
        identity = torch.eye(size, dtype=torch.float64)
        plain = Metric(identity, identity, torch.ones(size, dtype=torch.float64))
        return joint_svd(head, plain, plain, 1.0)

    return _converted(original, mode, example, choose)


def refit_on_images(
    original: nn.Module, mode: str, example: Example, batches: Iterable[Tensor], call: Call
) -> nn.Module:
    """Q's weight serves as V, and the output projection is fitted by least squares on the images' tokens. For `qv`."""
    problems = _problems(original, mode, example)
    moments = {problem.fqn: Moments() for problem in problems}

    def watch(fqn: str, weight: Tensor) -> Callable[[Tensor, Callable[[], Tensor]], Tensor]:
        def tap(source: Tensor, product: Callable[[], Tensor]) -> Tensor:
            moments[fqn].add(tokens(source, weight))
            return product()

        return tap

    taps: dict[Tensor, Any] = {}
    for problem in problems:
        weight = original.get_submodule(problem.fqn).get_parameter(problem.q.producer.weight)
        taps[weight] = watch(problem.fqn, weight)
    with Taps(taps), torch.no_grad():
        for batch in batches:
            call(original, batch)

    def choose(problem: Problem, head: Head) -> Head:
        metric = moments[problem.fqn].metric(biases=head.query.shape[1] == moments[problem.fqn].moment.shape[0])
        return Head(head.query, head.key, head.query, refit_output(head.query, head, metric))

    return _converted(original, mode, example, choose)


def _problems(original: nn.Module, mode: str, example: Example) -> list[Problem]:
    return problems_of(original, prepare(original, find_sites(original, example), mode).operations)


def _converted(original: nn.Module, mode: str, example: Example, choose: Callable[[Problem, Head], Head]) -> nn.Module:
    """The converted model with the weights that `choose` gives each site."""
    converted = convert(original, mode, init="wq", example_input=example).eval()
    for problem in _problems(original, mode, example):
        old, new = original.get_submodule(problem.fqn), converted.get_submodule(problem.fqn)
        head, biases = read_head(old, problem), has_biases(old, problem)
        best = choose(problem, head if biases else without_biases(head))
        best = best if biases else with_biases(problem, best, head)
        # Moments only say what statistics a BatchNorm shows in train mode.
        unit = torch.eye(head.query.shape[1], dtype=torch.float64)
        write_head(new, problem, best, (unit, unit))
        if problem.out is not None and best.out is not head.out:
            size = best.out.shape[0] * best.out.shape[1] + 1
            offset = read_output(old, problem.out)[1]
            write_output(new, problem.out, best.out, offset, torch.eye(size, dtype=torch.float64))
    return converted


def in_attention(fqn: str) -> bool:
    """Whether a layer of a ViT belongs to attention."""
    return any(part in ("attn", "attention") for part in fqn.split("."))


def in_blocks(fqn: str) -> bool:
    """Whether it belongs to a block."""
    return "blocks." in fqn or "layer." in fqn


def feature_pca(
    original: nn.Module,
    parameters: int,
    batches: Iterable[Tensor],
    call: Call,
    chosen: Callable[[str], bool],
    *,
    by_variance: bool,
    pivoted: bool = False,
) -> tuple[nn.Module, int]:
    """Low rank in the manner of AAFM: `y = Wx + b` becomes `mean + U U^T (y - mean)`, stored as two thin Linears.

    U are the leading principal components of a layer's outputs on the images. `chosen(fqn)` says which Linears take
    part. With `by_variance` each keeps the same share of its outputs' variance, and stays whole where two factors would
    be no smaller; without, each keeps the same share of its parameters. The share is the largest for which the model
    has at most `parameters` parameters.

    With `pivoted` the size is that of PIFA (arXiv 2501.19090), which keeps r rows of the product and says the others by
    them: r (m + n - r) numbers instead of r (m + n), and the same outputs. The model that is returned is stored as
    factors, and one as small as it counts only if it were stored so.

    Returns the model and how many of its layers were factored.
    """
    layers = {
        name: module for name, module in original.named_modules() if isinstance(module, nn.Linear) and chosen(name)
    }
    components = _components(layers, original, batches, call)
    total = count_params(original)

    def ranks(lost: float) -> dict[str, int]:
        found = {}
        for name, (energy, _, _) in components.items():
            outputs, inputs = layers[name].weight.shape
            # Where as many numbers are needed as for the layer itself.
            even = min(outputs, inputs) if pivoted else outputs * inputs / (outputs + inputs)
            kept = energy.cumsum(0) / energy.sum()
            rank = int((kept < 1 - lost).sum()) + 1 if by_variance else max(1, int((1 - lost) * even))
            if rank < even:
                found[name] = min(rank, len(energy))
        return found

    def size(found: dict[str, int]) -> int:
        shapes = {name: layers[name].weight.shape for name in found}
        saved = 0
        for name, (outputs, inputs) in shapes.items():
            rank = found[name]
            saved += outputs * inputs - rank * (outputs + inputs - (rank if pivoted else 0))
        return total - saved

    low, high = -14.0, 0.0  # log10 of the share that is lost
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if size(ranks(10**middle)) <= parameters else (middle, high)
    found = ranks(10**high)

    model = copy.deepcopy(original)
    for name, rank in found.items():
        _, basis, mean = components[name]
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _factored(layers[name], basis[:, :rank], mean))
    return model.eval(), len(found)


def _components(
    layers: dict[str, nn.Linear], model: nn.Module, batches: Iterable[Tensor], call: Call
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """For each layer the variances along the principal components of its outputs, these components, and the mean."""
    moments = {name: Moments() for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # The smaller side says it all: outputs are a linear image of the inputs.
            seen = inputs[0] if output.shape[-1] > inputs[0].shape[-1] else output
            moments[name].add(seen.reshape(len(seen), -1, seen.shape[-1]))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    components = {}
    for name, layer in layers.items():
        moment = moments[name].moment
        mean = moment[-1, :-1]
        covariance = moment[:-1, :-1] - mean[:, None] * mean
        weight = layer.weight.detach().double()
        if weight.shape[0] > weight.shape[1]:
            mean = weight @ mean + (0.0 if layer.bias is None else layer.bias.detach().double())
            covariance = weight @ covariance @ weight.T
        energy, basis = torch.linalg.eigh(covariance)
        components[name] = energy.flip(0).clamp(min=0), basis.flip(1), mean
    return components


def _factored(layer: nn.Linear, basis: Tensor, mean: Tensor) -> nn.Module:
    rank = basis.shape[1]
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features)
    offset = (0.0 if layer.bias is None else layer.bias.detach().double()) - mean
    with torch.no_grad():
        first.weight.copy_(basis.T @ layer.weight.detach().double())
        second.weight.copy_(basis)
        second.bias.copy_(basis @ (basis.T @ offset) + mean)
    return nn.Sequential(first, second)


def prune_smallest(original: nn.Module, parameters: int) -> nn.Module:
    """Global unstructured magnitude pruning: the smallest weights of all Linears are zero until `parameters` are left.

    Nothing gets faster or smaller by that: the matrices keep their shapes.
    """
    model = copy.deepcopy(original)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    count = count_params(original) - parameters
    limit = torch.cat([weight.detach().abs().flatten() for weight in weights]).kthvalue(count).values
    with torch.no_grad():
        for weight in weights:
            weight.masked_fill_(weight.abs() <= limit, 0.0)
    return model.eval()


def prune_mlp_channels(original: nn.Module, parameters: int) -> nn.Module:
    """Structured magnitude pruning: every MLP (`fc1`, `fc2`) loses its weakest hidden channels, as many in each block.

    A channel's strength is the norm of its row in fc1 times that of its column in fc2. This does get faster.
    """
    model = copy.deepcopy(original)
    blocks = list(mlps_of(model).values())
    channel = sum(block.fc1.in_features + block.fc2.out_features + (block.fc1.bias is not None) for block in blocks)
    count = math.ceil((count_params(original) - parameters) / channel)
    for block in blocks:
        strength = block.fc1.weight.detach().norm(dim=1) * block.fc2.weight.detach().norm(dim=0)
        kept = strength.topk(len(strength) - count).indices.sort().values
        keep_channels(block, kept)
    return model.eval()
