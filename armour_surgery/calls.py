"""How a model is given its inputs: by the names that its forward has for them, or in their order where it has none.

And which of its modules are running meanwhile.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from armour_surgery.examples import arguments_of, part_of
from armour_surgery.patching import one_at_a_time

__all__ = ["first_name", "given_in_order", "run", "running", "without_fast_paths"]


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Call a model with inputs by name, or that part of it which they name."""
    model, inputs = model.get_submodule(part_of(inputs)), arguments_of(inputs)
    in_order = given_in_order(model, inputs)
    by_name = {name: value for name, value in inputs.items() if name not in in_order}
    return model(*(inputs[name] for name in in_order), **by_name)


def given_in_order(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that `forward` takes by their order alone, as one does that is written `forward(self, *args)`.

    These are the names of what it takes so, and where it takes no keywords, every name that it does not have.
    """
    parameters = _parameters(model)
    kinds = {parameter.kind for parameter in parameters.values()}
    unnamed = inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD not in kinds
    chosen = []
    for name in names:
        if name in parameters:
            by_order = parameters[name].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        else:
            by_order = unnamed
        if by_order:
            chosen.append(name)
    return tuple(chosen)


def first_name(model: nn.Module) -> str | None:
    """What `forward` calls its first input, be it `args`; None where it takes nothing, or only keywords of any name."""
    for name, parameter in _parameters(model).items():
        return None if parameter.kind is inspect.Parameter.VAR_KEYWORD else name
    return None


@contextmanager
def running(
    model: nn.Module,
    entered: Callable[[str, tuple[Any, ...], dict[str, Any]], None] | None = None,
    left: Callable[[str, Any], None] | None = None,
) -> Iterator[list[str]]:
    """The fully qualified names of the modules that are running, outermost first, while the context is open.

    `entered` is told of every call and what it is given, `left` of what came of it.
    """
    stack: list[str] = []

    def enter(fqn: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.append(fqn)
        if entered is not None:
            entered(fqn, args, kwargs)

    def leave(fqn: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stack.pop()
        if left is not None:
            left(fqn, output)

    handles = []
    for fqn, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, fqn), with_kwargs=True))
        # Also after an error, which a host may catch and go on: the stack has to stay in step.
        handles.append(module.register_forward_hook(partial(leave, fqn), always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """While open, torch's encoder layers run step by step, and not in one kernel.

    That kernel, and the nested tensors that go with it, exist on no meta device, and its products are not counted.
    """
    # The setting is for all threads, which compute the same without it; but of two that overlap the second would put
    # back what the first had set.
    with one_at_a_time():
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
