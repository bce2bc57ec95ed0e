"""Run a model one part at a time over stored activations, so that each part sees what the parts before it now give.

The model is called as a whole, by its own forward; *units* are the modules that hold one site each, in the order they
run. To start at a unit, everything called before it answers with tensors of NaN of the right shape, and the unit is
given the arguments that it had been called with; to stop, the next unit's call is caught. So the cost of a part is
that of the part, in whatever library, and what has to be kept is one unit's arguments per batch.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from armour_surgery.errors import CalibrationError

__all__ = [
    "STANDS_IN",
    "Arguments",
    "Store",
    "Walk",
    "first_tensor",
    "outermost_parts",
    "units_of",
    "with_first_tensor",
]

_LISTS = (nn.ModuleList, nn.ModuleDict)
# Marks a forward that only stands for a module's own.
STANDS_IN = "stands_in_for_a_module"
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Arrived(Exception):
    """The next unit was called; carries its arguments."""

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self.arguments = arguments


@dataclass(frozen=True)
class _InFile:
    """A tensor that was written to a file, under this name, and where it is to be when it is read."""

    name: str
    device: torch.device


class Store:
    """Values by key; in memory up to `budget` bytes, in files of a temporary folder beyond that."""

    def __init__(self, budget: int = 2**30) -> None:
        self._budget = budget
        self._memory: dict[Any, Any] = {}
        self._sizes: dict[Any, int] = {}  # of what is in memory
        self._files: dict[Any, tuple[Path, list[Any], Any]] = {}  # tensors' file, other leaves, and their tree
        self._written = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __setitem__(self, key: Any, value: Any) -> None:
        self.drop(key)
        leaves, form = pytree.tree_flatten(value)
        tensors = {str(id(leaf)): leaf for leaf in leaves if isinstance(leaf, Tensor)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.has_room(size):
            self._memory[key], self._sizes[key] = value, size
            return
        rest = [_InFile(str(id(leaf)), leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._files[key] = (self._write(tensors), rest, form)

    def _write(self, tensors: dict[str, Tensor]) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="armour-calibration-")
        self._written += 1
        path = Path(self._folder.name) / f"{self._written}.safetensors"
        try:
            # Tensors may be views of one another, which a file of tensors cannot say.
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(
                f"calibration could not keep its activations in {path.parent}: {error}. Free space there, name "
                "another folder in the environment variable TMPDIR, or use fewer images"
            ) from error
        return path

    def __getitem__(self, key: Any) -> Any:
        if key in self._memory:
            return self._memory[key]
        path, leaves, form = self._files[key]
        tensors = load_file(path)
        for leaf in leaves:
            if isinstance(leaf, _InFile):
                tensors[leaf.name] = tensors[leaf.name].to(leaf.device)
        # What was one tensor, given twice, is one again.
        whole = [tensors[leaf.name] if isinstance(leaf, _InFile) else leaf for leaf in leaves]
        return pytree.tree_unflatten(whole, form)

    def pop(self, key: Any, default: Any) -> Any:
        """A value, which is forgotten; the `default` if it is not there."""
        if key not in self._memory and key not in self._files:
            return default
        value = self[key]
        self.drop(key)
        return value

    def drop(self, key: Any) -> None:
        """Forget a value, if it is there."""
        self._memory.pop(key, None)
        self._sizes.pop(key, None)
        written = self._files.pop(key, None)
        if written is not None:
            written[0].unlink(missing_ok=True)

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes would stay in memory."""
        return sum(self._sizes.values()) + size <= self._budget

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._memory.clear()
        if self._folder is not None:
            self._folder.cleanup()


def units_of(model: nn.Module, sites: list[str]) -> list[str]:
    """For each site, the largest module around it that holds no other of them: the parts to go through one by one."""
    return [_unit_of(model, site, [other for other in sites if other != site]) for site in sites]


def _unit_of(model: nn.Module, site: str, others: list[str]) -> str:
    taken: set[str] = set()
    for other in others:
        taken.update(_paths_to(other))
    for path in _paths_to(site):
        # A list of modules is never called, so it is no part of the way.
        if path not in taken and not isinstance(model.get_submodule(path), _LISTS):
            return path
    return site


def _paths_to(fqn: str) -> list[str]:
    """`a.b.c` -> `a`, `a.b`, `a.b.c`: the modules that hold a module, and itself, outermost first."""
    parts = fqn.split(".")
    return [".".join(parts[:size]) for size in range(1, len(parts) + 1)]


def outermost_parts(model: nn.Module, units: Sequence[str]) -> tuple[set[str], list[str]]:
    """Names of the modules around units, the model's own "" among them, and of the outermost that are none of these.

    The former run as they are, and call the latter, which are units and whatever lies beside them.
    """
    around = {""}
    for unit in units:
        around.update(_paths_to(unit)[:-1])
    around -= set(units)
    names = [name for name, _ in model.named_modules()]
    # What lies deeper runs, or not, with the module around it.
    return around, [name for name in names if name not in around and name.rpartition(".")[0] in around]


class Walk:
    """One model, its units, and how to call it. The model must be in eval mode; it is left as it was.

    `call(model, batch)` calls the model on one batch of images.
    """

    def __init__(self, model: nn.Module, units: list[str], call: Callable[[nn.Module, Tensor], Any]) -> None:
        self.model = model
        self.units = units
        self.call = call
        self._modules = dict(model.named_modules())
        self._parts = outermost_parts(model, units)[1]
        # Modules that answer instead of running, per unit to start at: those called before it, outermost.
        self._before: list[set[str]] = []
        self._answers: dict[int, dict[str, Any]] = {}  # by batch size

    def start(self, batch: Tensor) -> list[Arguments]:
        """Run the whole model once and learn its order; returns every unit's arguments.

        Raises:
            CalibrationError: a unit is not called exactly once, or not in the given order.
        """
        arguments: dict[str, Arguments] = {}
        order: list[str] = []
        answers = self._answers.setdefault(len(batch), {})
        handles = []
        for name in self._parts:
            module = self._modules[name]

            def before(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                order.append(name)
                if name in self.units:
                    arguments[name] = (args, kwargs)

            def after(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
                answers[name] = pytree.tree_map(_shape_only, output)

            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        try:
            with torch.no_grad():
                self.call(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        if [name for name in order if name in self.units] != self.units:
            raise CalibrationError(
                f"calibration goes through a model part by part, but {type(self.model).__name__} does not call "
                f"{', '.join(self.units[:3])} ... once each and in this order; use init 'joint-svd', which needs no run"
            )
        self._before = [set(order[: order.index(unit)]) for unit in self.units]
        in_order = [arguments[unit] for unit in self.units]
        self._check(batch, in_order)
        return in_order

    def begin(self, batch: Tensor) -> Arguments:
        """The first unit's arguments for a batch; `start` is called by itself where the batch's size is new."""
        if len(batch) not in self._answers:
            return self.start(batch)[0]
        try:
            with _forward(self._modules[self.units[0]], _arrive), torch.no_grad():
                self.call(self.model, batch)
        except _Arrived as arrived:
            return arrived.arguments
        raise CalibrationError(f"{self.units[0]} was not reached a second time; its model depends on its input")

    def unit(self, number: int) -> nn.Module:
        """The module that unit `number` is."""
        module: nn.Module = self._modules[self.units[number]]
        return module

    def is_past(self, number: int) -> bool:
        """Whether unit `number` does not run when any later one is."""
        return all(self.units[number] in before for before in self._before[number + 1 :])

    def skipped(self, number: int) -> set[str]:
        """Modules that answer instead of running when unit `number` is run."""
        return self._before[number]

    def _check(self, batch: Tensor, arguments: list[Arguments]) -> None:
        """Skipping what comes before a unit must not change what the next one gets; else less is skipped, or nothing.

        A host may use in a later block what it computed before the first one (a mask, a table of positions).
        """
        if self._leads_on(batch, arguments):
            return
        for index, before in enumerate(self._before):
            self._before[index] = before & set(self.units[:index])
        if not self._leads_on(batch, arguments):
            self._before = [set() for _ in self.units]

    def _leads_on(self, batch: Tensor, arguments: list[Arguments]) -> bool:
        """Whether every unit, run on its arguments, leads to those of the next one."""
        for number, (given, following) in enumerate(itertools.pairwise(arguments)):
            if not _equal(self.run(number, batch, given), following):
                return False
        return True

    def run(self, number: int, batch: Tensor, arguments: Arguments) -> Arguments | Any:
        """Run unit `number` on stored arguments; returns the next unit's arguments (of the last unit, its output).

        `batch` only tells the model the size of its input.
        """
        with self._answering(number, len(batch)), self._given(number, arguments), torch.no_grad():
            try:
                self.call(self.model, batch)
            except _Arrived as arrived:
                return arrived.arguments
        raise CalibrationError(f"{self.units[number]} was not reached a second time; its model depends on its input")

    @contextmanager
    def _given(self, number: int, arguments: Arguments) -> Iterator[None]:
        """Inside, unit `number` runs on those arguments, whatever it is called with, and what comes next is caught."""
        unit = self._modules[self.units[number]]
        forward = unit.forward
        last = number + 1 == len(self.units)

        # A host may write into what it is given; what is stored is given more than once.
        clones: dict[int, Tensor] = {}

        def clone(leaf: Any) -> Any:
            # One tensor that is given twice still is: queries that are the keys are other code than equal ones.
            return clones.setdefault(id(leaf), leaf.clone()) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(clone, arguments)

        def run(*_: Any, **__: Any) -> Any:
            output = forward(*args, **kwargs)
            if last:
                raise _Arrived(((output,), {}))
            return output

        with ExitStack() as stack:
            stack.enter_context(_forward(unit, run))
            if not last:
                stack.enter_context(_forward(self._modules[self.units[number + 1]], _arrive))
            yield

    @contextmanager
    def _answering(self, number: int, size: int) -> Iterator[None]:
        """Inside, what comes before unit `number` answers with tensors of NaN, for a batch of `size`."""
        answers = self._answers[size]

        def answer(name: str) -> Callable[..., Any]:
            return _standing_in(lambda *_, **__: pytree.tree_map(_no_answer, answers[name]))

        with ExitStack() as stack:
            for name in self._before[number]:
                stack.enter_context(_forward(self._modules[name], answer(name)))
            yield


def _standing_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    setattr(forward, STANDS_IN, True)
    return forward


@_standing_in
def _arrive(*args: Any, **kwargs: Any) -> Any:
    raise _Arrived((args, kwargs))


def first_tensor(arguments: Any) -> Tensor:
    """The activations among a unit's arguments or outputs: its first tensor."""
    leaf: Tensor = next(leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor))
    return leaf


def with_first_tensor(arguments: Any, tensor: Tensor) -> Any:
    """The same arguments or outputs with another tensor in the place of their first, wherever that is given."""
    leaves, form = pytree.tree_flatten(arguments)
    first = first_tensor(arguments)
    return pytree.tree_unflatten([tensor if leaf is first else leaf for leaf in leaves], form)


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run something else for a while."""
    # Among the instance's own attributes it hides the class's method, and hooks are called as ever.
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:  # somebody replaced it on the instance before
            module.__dict__["forward"] = own


class _Shape:
    """What is remembered of a tensor: shape (the batch first) and type."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(tensor.shape), tensor.dtype, tensor.device


def _shape_only(leaf: Any) -> Any:
    return _Shape(leaf) if isinstance(leaf, Tensor) else leaf


def _no_answer(leaf: Any) -> Any:
    """A tensor that cannot be taken for the answer: memory that was just freed may still hold it."""
    if not isinstance(leaf, _Shape):
        return leaf
    plain = not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)
    return torch.full(leaf.shape, 0 if plain else float("nan"), dtype=leaf.dtype, device=leaf.device)


def _equal(first: Any, second: Any) -> bool:
    """Whether two trees hold equal tensors; of other leaves only the types count: not all can be compared."""
    ours, theirs = pytree.tree_leaves(first), pytree.tree_leaves(second)
    return len(ours) == len(theirs) and all(map(_equal_leaf, ours, theirs))


def _equal_leaf(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second)
