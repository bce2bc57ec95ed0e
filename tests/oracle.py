"""The exactness oracle: where the merged projections are already equal, surgery must change nothing.

It needs neither weights nor data nor knowledge of an architecture: it copies rows of whatever discovery found.
"""

import copy

import torch
import torch.utils._pytree as pytree
from torch import nn

from armour_surgery.discover import find_sites
from armour_surgery.discover.match import all_above
from armour_surgery.modes import get_mode
from armour_surgery.records import RefusedSite
from armour_surgery.rewrite.contract import parts_of
from armour_surgery.surgery.conversion import convert
from armour_surgery.traced import SeenSite, TracedSite


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and every statistic a value of its own: zero biases and unit scales hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim > 1 and "table" not in name and "attention_biases" not in name:
                tensor.copy_(noise / max(1, tensor[0].numel()) ** 0.5)
            elif "scale" in name or "gamma" in name or name.endswith("weight"):
                tensor.copy_(1 + 0.2 * noise)
            elif not name.endswith(("k_bias", "inv_freq", "freqs", "bands", "periods")):
                tensor.copy_(0.3 * noise)
    return model


def merge(
    model: nn.Module, mode: str, example: dict[str, torch.Tensor], sites: list[SeenSite] | None = None
) -> list[str]:
    """Copy, at every site that the mode fits, the rows of the role that stays over those of the role that goes.

    `sites` are what `find_sites` found before, to save the time. Returns the sites' names.
    """
    merged = []
    for found in find_sites(model, example) if sites is None else sites:
        if isinstance(found, RefusedSite) or mode not in found.site.modes:
            continue
        merged.append(found.site.fqn)
        for traced in found.traced.members:
            _merge(model.get_submodule(found.site.fqn), traced, mode)
    return merged


def _merge(module: nn.Module, traced: TracedSite, mode: str) -> None:
    sizes = {letter: getattr(traced, letter).head_dim for letter in "qkv"}
    for letter, names in (("k", get_mode(mode).key), ("v", get_mode(mode).value)):
        role, filled = getattr(traced, letter), 0
        for part in parts_of(names, letter, sizes):
            rows = [c for head in role.channels for c in head[filled : filled + part.size]]
            filled += part.size
            if part.letter.startswith("grouped"):
                _keep_own_groups(module, role, rows, part.letter.endswith("shuffled"))
            elif part.letter != letter:
                source = getattr(traced, part.letter)
                from_rows = [c for head in source.channels for c in head[part.start : part.stop]]
                _copy(module, source.producer, from_rows, role.producer, rows)
                if "k" in (letter, part.letter):
                    _drop_computed_bias(module, source.producer, from_rows)
                    _drop_computed_bias(module, role.producer, rows)


def _rows(producer, module: nn.Module, name: str, rows: list[int]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A view of a tensor, and where in it these rows are, whichever axes run over a projection's channels."""
    tensor, axes = _tensor(module, name), producer.out_axes or (0,)
    front = tensor.movedim(axes, tuple(range(len(axes))))
    places = torch.tensor(rows, dtype=torch.long) + producer.first_row
    return front, torch.unravel_index(places, front.shape[: len(axes)])


def _tensors(producer, module: nn.Module, rows: list[int]) -> list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Where rows of each of a projection's tensors are stored, tensor by tensor."""
    places = [_rows(producer, module, name, rows) for name in producer.rows]
    return places + [_bias_entry(producer, module, row) for row in rows if producer.bias]


def _bias_entry(producer, module: nn.Module, row: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Where the bias of a row is stored."""
    piece = next(p for p in producer.bias if p.start <= row < p.stop)
    # A bias that is computed has its rows where the parameter that it is computed from has them.
    name = piece.tensor or next(str(node.target) for node in all_above(piece.node) if node.op == "get_attr")
    return _tensor(module, name), (torch.tensor([piece.first_row + row - piece.start]),)


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(owner), attribute)


def _short(producer, name: str) -> str:
    return "weight" if name == producer.weight else name.removeprefix(f"{producer.fqn}.")


def _copy(module, source, from_rows, target, to_rows) -> None:
    with torch.no_grad():
        if source is target or (source.bias and target.bias):
            pairs = zip(_tensors(source, module, from_rows), _tensors(target, module, to_rows), strict=True)
            for (a, i), (b, j) in pairs:
                b[j] = a[i].clone()
            return
        # Separate modules: tensors correspond by their short names; a bias that only one has counts as zero.
        own = {_short(source, name): _rows(source, module, name, from_rows) for name in source.rows}
        for name in target.rows:
            values = own.pop(_short(target, name), None)
            tensor, places = _rows(target, module, name, to_rows)
            tensor[places] = 0.0 if values is None else values[0][values[1]].clone()
        for left, places in own.values():
            left[places] = 0.0
        for producer, rows in ((source, from_rows), (target, to_rows)):
            for row in rows if producer.bias and not (source.bias and target.bias) else ():
                tensor, place = _bias_entry(producer, module, row)
                tensor[place] = 0.0


def _drop_computed_bias(module, producer, rows: list[int]) -> None:
    """Zeros for a bias that is computed at every call: what is computed for K (zeros, mostly) it is for K alone."""
    if any(piece.tensor is None for piece in producer.bias):
        with torch.no_grad():
            for row in rows:
                tensor, place = _bias_entry(producer, module, row)
                tensor[place] = 0.0


def _keep_own_groups(module, role, rows: list[int], shuffle: bool) -> None:
    import math

    weight = _tensor(module, role.producer.weight)
    channels, inputs = len(rows), weight.shape[1]
    common = math.gcd(channels, inputs)
    groups = max(n for n in range(1, role.num_heads + 1) if common % n == 0)
    with torch.no_grad():
        for index, row in enumerate(rows):
            group = index % groups if shuffle else index * groups // channels
            keep = torch.zeros(inputs, dtype=torch.bool)
            keep[group * inputs // groups : (group + 1) * inputs // groups] = True
            weight[row, ~keep] = 0.0


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], seed: int = 1) -> list[torch.Tensor]:
    """All tensors that a model returns, with a fixed seed for its dropout."""
    torch.manual_seed(seed)
    result = model(**batch)
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def relative_error(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value, over all outputs."""
    assert len(expected) == len(got)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(expected, got, strict=True))


def check(model: nn.Module, mode: str, batches: list[dict[str, torch.Tensor]], **options) -> dict[str, float]:
    """Run the oracle on a whole model: worst relative error in eval and in train mode over the batches."""
    model = copy.deepcopy(model)
    example = {name: value.to("meta") for name, value in batches[0].items()}
    merged = merge(model, mode, example)
    converted = convert(model, mode, example_input=example, **options)
    assert [site.fqn for site in converted.surgery.sites] == merged
    assert all(site.residual == 0.0 for site in converted.surgery.sites)
    errors = {}
    for name, training in (("eval", False), ("train", True)):
        worst = 0.0
        for batch in batches:
            a, b = copy.deepcopy(model), copy.deepcopy(converted)
            a.train(training)
            b.train(training)
            with torch.no_grad():
                worst = max(worst, relative_error(outputs(a, batch), outputs(b, batch)))
        errors[name] = worst
    return errors
