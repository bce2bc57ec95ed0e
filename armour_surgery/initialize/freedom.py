"""Which changes of basis leave an attention as it is: tried out, not inferred.

A head with random weights is given another basis for Q and K, or for V and the output projection. If the module's
output stays what it was, the basis is free, whatever the host does in between (scales, masks, relative positions);
a q-norm, a rotation or an activation shows itself by changing the output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from armour_surgery.copies import full_copy, meta_copy
from armour_surgery.hosts.attention_interface import chunks_in_one_call
from armour_surgery.initialize.weights import Stored, locate, read, read_output, write, write_output
from armour_surgery.traced import Call, OutputProjection, Role

__all__ = ["Freedom", "probe", "works_narrow"]

# In float64 a change that is free leaves an error of 1e-15 or so, and one that is not (among the hosts of the tests)
# of 0.09 at least.
_TOLERANCE = 1e-8


@dataclass(frozen=True)
class Freedom:
    """What may be done to a site's heads without changing it.

    `logits`: any invertible change of Q's and K's basis. `values`: "linear" (any invertible change of V's basis),
    "order" (V's channels may change places within a head), or "fixed".
    """

    logits: bool
    values: str


def probe(module: nn.Module, call: Call, q: Role, k: Role, v: Role, out: OutputProjection | None) -> Freedom:
    """Try changes of basis on a copy of `module` with random weights, for one call of it (shapes and types matter)."""
    trial = _Trial(_randomized(module), call)
    generator = torch.Generator().manual_seed(0)
    mix = _invertible(q.num_heads, q.head_dim, generator)
    logits = k.num_heads == q.num_heads and trial.logits_are_free(q, k, mix)
    if out is None:
        return Freedom(logits, "fixed")
    shuffle = torch.stack([torch.randperm(v.head_dim, generator=generator) for _ in range(v.num_heads)])
    order = torch.nn.functional.one_hot(shuffle, v.head_dim).double()
    for name, change in (("linear", _invertible(v.num_heads, v.head_dim, generator)), ("order", order)):
        if trial.values_are_free(v, out, change):
            return Freedom(logits, name)
    return Freedom(logits, "fixed")


class _Trial:
    """A site with random weights, what it answers, and whether it still does in another basis."""

    def __init__(self, site: nn.Module, call: Call) -> None:
        self.site = site
        self.args, self.kwargs = _random_inputs(call)
        self.answer = _answer(site, self.args, self.kwargs)

    def logits_are_free(self, q: Role, k: Role, mix: Tensor) -> bool:
        """Whether `Q M` and `K M^-T` do what Q and K do; they are put back afterwards."""
        at_q, at_k = locate(self.site, q, {}), locate(self.site, k, {})
        query, key = read(self.site, at_q), read(self.site, at_k)
        _store(self.site, at_q, query @ mix)
        _store(self.site, at_k, key @ torch.linalg.inv(mix).mT)
        free = self._unchanged()
        _store(self.site, at_q, query)
        _store(self.site, at_k, key)
        return free

    def values_are_free(self, v: Role, out: OutputProjection, change: Tensor) -> bool:
        """Whether `V M` and `M^-1 Wo` do what V and Wo do; they are put back afterwards."""
        at_v = locate(self.site, v, {})
        value, (weight, offset) = read(self.site, at_v), read_output(self.site, out)
        # The statistics that a BatchNorm gets do not matter in eval mode.
        moment = torch.eye(weight.shape[0] * weight.shape[1] + 1, dtype=torch.float64)
        _store(self.site, at_v, value @ change)
        write_output(self.site, out, torch.linalg.inv(change) @ weight, offset, moment)
        free = self._unchanged()
        _store(self.site, at_v, value)
        write_output(self.site, out, weight, offset, moment)
        return free

    def _unchanged(self) -> bool:
        return _same(_answer(self.site, self.args, self.kwargs), self.answer)


def _answer(site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    # Whole numbers are zeros here, which are no places to cut a sequence at.
    with torch.no_grad(), chunks_in_one_call(site):
        leaves = pytree.tree_leaves(site(*args, **kwargs))
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor))


def _same(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).norm() <= _TOLERANCE * wanted.norm())


def works_narrow(
    module: nn.Module,
    call: Call,
    roles: tuple[Role, Role, Role],
    shared: Role,
    rank: int,
    narrow: Callable[[nn.Module], None],
) -> bool:
    """Whether a site computes what it did after `narrow(site)`, where its heads use `rank` channels only.

    Tried on a copy with random weights in which V is what `shared` is, and all channels from `rank` on are zero.
    """
    site = _randomized(module)
    stored = [locate(site, role, {}) for role in roles]
    given = read(site, locate(site, shared, {}))
    for role, place in zip(roles, stored, strict=True):
        matrix = given.clone() if role is roles[2] else read(site, place)
        matrix[..., rank:] = 0
        matrix[:, -1] = 0  # not every role has biases, and equal roles have equal ones
        _store(site, place, matrix)
    args, kwargs = _random_inputs(call)
    narrowed = full_copy(site)
    narrow(narrowed)
    wanted, got = _answer(site, args, kwargs), _answer(narrowed, args, kwargs)
    return wanted.shape == got.shape and _same(got, wanted)


def _store(site: nn.Module, stored: Stored, matrix: Tensor) -> None:
    write(site, stored, matrix, torch.eye(matrix.shape[-2], dtype=torch.float64))


def _invertible(count: int, size: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    # Near enough to the identity to be well conditioned: rounding stays far below the tolerance.
    mix: Tensor = torch.eye(size, dtype=torch.float64) + 0.3 / size**0.5 * noise
    return mix


def _randomized(module: nn.Module) -> nn.Module:
    """A copy on the CPU in float64 and eval mode, with random parameters and the module's own buffers."""
    site = meta_copy(module, buffers=False)
    generator = torch.Generator().manual_seed(1)
    for child in site.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                size = parameter[0].numel() if parameter.ndim > 1 else 1
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / size**0.5
                child._parameters[name] = nn.Parameter(noise)
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_meta:  # a plan for a model without numbers
                noise = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
                child._buffers[name] = noise if buffer.is_floating_point() else torch.zeros_like(buffer, device="cpu")
    site.cpu().double()
    site.eval()  # timm's LeViT attention returns nothing here
    return site


def _random_inputs(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the same kind; one tensor that was given twice (to self-attention, say) still is."""
    done: dict[int, Any] = {}

    def random(leaf: Any) -> Any:
        return done.setdefault(id(leaf), _random_input(leaf))

    args, kwargs = pytree.tree_map(random, (call.args, call.kwargs))
    return args, kwargs


def _random_input(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_floating_point():
        return torch.randn(leaf.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if leaf.dtype == torch.bool:
        return torch.ones(leaf.shape, dtype=torch.bool)  # a mask that lets everything through
    return torch.zeros_like(leaf, device="cpu")
