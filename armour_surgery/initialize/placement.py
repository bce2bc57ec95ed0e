"""Where a model's numbers are while it is calibrated: at home, and those of the part that runs where it is computed.

A model may be larger than the device that computes, and its weights of a type in which nothing can be fitted. So each
part of it is brought to the device, in an exact type, when it runs, and goes home afterwards: what is there at a time
is a block or two, whatever the model's size.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from armour_surgery.initialize.walk import STANDS_IN, outermost_parts

__all__ = ["EXACT", "Placement"]

# Types in which moments can be gathered without loss that matters.
EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class _Home:
    """A tensor that is away, and what it holds at home."""

    tensor: Tensor
    numbers: Tensor


class Placement:
    """Brings parts of models to `device` and back. Tensors keep their identity; only what they hold changes place.

    Without `moves` everything stays where it is, as it is, and all methods do nothing.
    """

    def __init__(self, device: torch.device, *, moves: bool) -> None:
        self.device = device
        self.moves = moves
        self._away: dict[int, _Home] = {}
        # Modules and tensors that stay away until who holds them lets go.
        self._held: set[int] = set()

    @contextmanager
    def attached(self, model: nn.Module, units: Collection[str]) -> Iterator[None]:
        """Inside, the model can be run: its parts come when they are called, and go when they are done.

        `units` are its blocks. What is directly in modules around them, and modules beside them that are of another
        kind and no larger (embeddings, norms, heads), is on the device all the time: hosts use it from outside, were it
        only to ask for its type.
        """
        if not self.moves:
            yield
            return
        around, parts = outermost_parts(model, list(units))
        blocks = [model.get_submodule(unit) for unit in units]
        kinds, largest = set(map(type, blocks)), max(map(_size, blocks))
        handles: list[RemovableHandle] = []
        staying: list[Tensor] = []
        for name in around:
            staying += _own_tensors(model.get_submodule(name))
        for name in parts:
            part = model.get_submodule(name)
            if name not in units and type(part) not in kinds and _size(part) <= largest:
                staying += _tensors(part)
                continue
            handles.append(part.register_forward_pre_hook(self._before))
            handles.append(part.register_forward_hook(self._after, always_call=True))
        # Those that another model shares, and brought here before, are its to take home.
        staying = [tensor for tensor in staying if id(tensor) not in self._away]
        # A block may share them, and is not to take them home.
        held = set(map(id, staying))
        self._held |= held
        try:
            self._bring(staying)
            yield
        finally:
            self._held -= held
            for handle in handles:
                handle.remove()
            self._send_home(staying)

    @contextmanager
    def held(self, module: nn.Module, *, written: bool) -> Iterator[None]:
        """Inside, a module's tensors are on the device; if they may be `written` to, what was is then so at home too.

        A module may be given tensors of other sizes inside; they come home as the ones of that name were there.
        """
        if not self.moves or id(module) in self._held:
            yield
            return
        kinds = {name: (tensor.device, tensor.dtype) for name, tensor in _named(module)}
        mine = [tensor for tensor in _tensors(module) if id(tensor) not in self._away]
        held = {id(module), *map(id, mine)}
        self._held |= held
        try:
            # Copies, also where nothing else changes: the other model may share these numbers.
            self._bring(mine, copies=written)
            yield
        finally:
            self._held -= held
            self._send_home(mine, written)
            for name, tensor in _named(module):
                if name in kinds:
                    tensor.data = tensor.data.to(*kinds[name])

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Inside, gradients can be taken through parts that have gone home: what they need of them comes again."""
        if not self.moves:
            yield
            return

        def pack(saved: Tensor) -> Any:
            place = saved.untyped_storage().data_ptr()
            for home in self._away.values():
                if home.tensor.untyped_storage().data_ptr() == place:
                    return home.tensor, saved.size(), saved.stride(), saved.storage_offset()
            return saved

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            tensor, size, stride, offset = packed
            return self._there(tensor).as_strided(size, stride, offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def forget(self, module: nn.Module, others: Iterable[nn.Module]) -> None:
        """Let go of the numbers of a module that will not be run again, but for those that `others` hold too."""
        kept: set[int] = set()
        for other in others:
            kept.update(map(id, _tensors(other)))
        for tensor in _tensors(module):
            if id(tensor) not in kept:
                # Its shape stays, of which parameters are counted.
                tensor.data = tensor.data.new_empty(()).expand(tensor.shape)

    def _before(self, module: nn.Module, _: object) -> None:
        # What only stands for the module in a walk needs no numbers.
        if id(module) not in self._held and not hasattr(vars(module).get("forward"), STANDS_IN):
            self._bring(_tensors(module))

    def _after(self, module: nn.Module, *_: object) -> None:
        self._send_home(tensor for tensor in _tensors(module) if id(tensor) not in self._held)

    def _bring(self, tensors: Iterable[Tensor], copies: bool = False) -> None:
        for tensor in tensors:
            if id(tensor) in self._away:
                continue
            there = self._there(tensor, copies)
            self._away[id(tensor)] = _Home(tensor, tensor.data)
            tensor.data = there

    def _there(self, tensor: Tensor, copies: bool = False) -> Tensor:
        """What a tensor holds, on the device and in an exact type."""
        inexact = tensor.is_floating_point() and tensor.dtype not in EXACT
        return tensor.data.to(self.device, torch.float32 if inexact else tensor.dtype, copy=copies)

    def _send_home(self, tensors: Iterable[Tensor], written: bool = False) -> None:
        for tensor in tensors:
            home = self._away.pop(id(tensor), None)
            if home is None:
                continue
            # What is as it was goes on sharing memory with the other model.
            changed = written and not torch.equal(home.numbers.to(tensor), tensor.data)
            tensor.data = tensor.data.to(home.numbers) if changed else home.numbers


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in _named(module)]


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Those that are directly in a module."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _size(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in _tensors(module))
