"""Others' ways to fewer hidden channels in MLPs, made strong: their scores, and the second layer refit on images.

None of this is in the package. Each function returns a new model with at most so many parameters and leaves the
original as it is. MLPs are timm's (`fc1`, `fc2`).
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from armour_surgery.initialize.moments import Moments
from armour_surgery.measure.cost import count_params

Call = Callable[[nn.Module, Tensor], Any]
_RIDGE = 1e-3


def hidden_moments(model: nn.Module, batches: Iterable[Tensor], call: Call) -> dict[str, Tensor]:
    """`E [h 1]^T [h 1]` of every MLP's hidden channels in the original, by the MLP's name."""
    return input_moments(model, {name: mlp.fc2 for name, mlp in mlps_of(model).items()}, batches, call)


def input_moments(
    model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Tensor], call: Call
) -> dict[str, Tensor]:
    """`E [x 1]^T [x 1]` of what goes into layers of a model, by the names that they are given under."""
    moments = {name: Moments() for name in layers}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: moments[name].add(inputs[0])

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    for handle in handles:
        handle.remove()
    return {name: found.moment for name, found in moments.items()}


def mlps_of(model: nn.Module) -> dict[str, Any]:
    """timm's MLPs by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "fc1", None), nn.Linear) and isinstance(getattr(module, "fc2", None), nn.Linear)
    }


def keep_channels(mlp: Any, kept: Tensor) -> None:
    """Leave an MLP those hidden channels, with the weights that they have."""
    mlp.fc1.weight = nn.Parameter(mlp.fc1.weight.detach()[kept])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias = nn.Parameter(mlp.fc1.bias.detach()[kept])
    mlp.fc2.weight = nn.Parameter(mlp.fc2.weight.detach()[:, kept])
    mlp.fc1.out_features = mlp.fc2.in_features = len(kept)


def activity(mlp: Any, moment: Tensor) -> Tensor:
    """How much each channel gives to the output on images: its root mean square, times the norm of its column."""
    return moment.diagonal()[:-1].sqrt() * mlp.fc2.weight.detach().double().norm(dim=0)


def prune_by_activity(
    original: nn.Module, parameters: int, moments: dict[str, Tensor], *, everywhere: bool
) -> nn.Module:
    """Channels that give least on images go; `fc2` is fitted to what it gave, by ridge (in the manner of CORP, GRAIL).

    As many go in each block, or with `everywhere` those that are least of all, relative to their MLP's whole output.
    """
    model = copy.deepcopy(original)
    blocks = mlps_of(model)
    each = next(iter(blocks.values()))
    channel = each.fc1.in_features + each.fc2.out_features + 1
    gone = math.ceil((count_params(original) - parameters) / channel)
    scores = {name: activity(mlp, moments[name]) for name, mlp in blocks.items()}
    if everywhere:
        relative = {name: score / score.norm() for name, score in scores.items()}
        limit = torch.cat(list(relative.values())).kthvalue(gone).values
        kept = {name: (score > limit).nonzero().flatten() for name, score in relative.items()}
    else:
        share = math.ceil(gone / len(blocks))
        kept = {name: score.topk(len(score) - share).indices.sort().values for name, score in scores.items()}
    for name, mlp in blocks.items():
        _keep(mlp, kept[name], moments[name])
    return model.eval()


def taylor_step(model: nn.Module, image: Tensor, share: float) -> None:
    """Torch-Pruning: that share of all MLPs' hidden channels goes, by their gradients' Taylor scores; in place."""
    import torch_pruning as pruning

    hidden = tuple(mlp.fc1 for mlp in mlps_of(model).values())
    pruner = pruning.pruner.BasePruner(
        model,
        image,
        importance=pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.0,
        pruning_ratio_dict={hidden: share},
        max_pruning_ratio=0.95,
        root_module_types=[nn.Linear],
    )
    pruner.step()


def prune_by_taylor(
    original: nn.Module, parameters: int, batches: list[Tensor], moments: dict[str, Tensor]
) -> nn.Module:
    """Torch-Pruning over all MLPs together, by Taylor scores of the features (no labels), and `fc2` refit by ridge."""
    low, high = 0.0, 0.95
    found: Any = None
    while high - low > 0.002:
        share = (low + high) / 2
        model: Any = copy.deepcopy(original)
        features = model.forward_features(batches[0])
        # What the features would lose if a channel went: their own direction says where they are large.
        features.square().mean().backward()
        before = {name: mlp.fc1.weight.detach().clone() for name, mlp in mlps_of(model).items()}
        taylor_step(model, batches[0][:1], share)
        if count_params(model) <= parameters:
            found, high = (model, before), share
        else:
            low = share
    pruned, before = found
    result = copy.deepcopy(original)
    for name, mlp in mlps_of(result).items():
        left = mlps_of(pruned)[name].fc1.weight.detach()
        # Which rows are left: rows are told apart by their numbers.
        places = torch.cdist(left.double(), before[name].double()).argmin(dim=1)
        _keep(mlp, places.sort().values, moments[name])
    return result.eval()


def ridge(layer: Any, moment: Tensor, dtype: torch.dtype = torch.float64) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A Linear on fewer of its inputs: `kept -> weight [out, kept], bias`, by ridge for what it gave on images.

    With C the inputs' covariance and its ridge, and P its inverse, the weight is `C_kk^-1 C_k W`. It is worked out as
    `W_k - P_kg P_gg^-1 W_g`, g the inputs that go: the same, and cheaper the fewer go.
    """
    mean = moment[-1, :-1]
    covariance = moment[:-1, :-1] - mean[:, None] * mean
    covariance = covariance + torch.eye(len(mean), dtype=torch.float64) * (_RIDGE * covariance.diagonal().mean())
    precision = torch.linalg.inv(covariance).to(dtype)
    weight = layer.weight.detach().double().T
    bias = layer.bias.detach().double() + mean @ weight
    weight = weight.to(dtype)

    def solve(kept: Tensor) -> tuple[Tensor, Tensor]:
        goes = torch.ones(len(mean), dtype=torch.bool)
        goes[kept] = False
        given = torch.linalg.solve(precision[goes][:, goes], weight[goes])
        new = weight[kept] - precision[kept][:, goes] @ given
        return new.T.float().contiguous(), (bias - mean[kept] @ new.double()).float()

    return solve


def _keep(mlp: Any, kept: Tensor, moment: Tensor) -> None:
    """Leave an MLP those channels, and give `fc2` the ridge solution for what it gave."""
    weight, bias = ridge(mlp.fc2, moment)(kept)
    keep_channels(mlp, kept)
    mlp.fc2.weight, mlp.fc2.bias = nn.Parameter(weight), nn.Parameter(bias)
