"""Functions that stop a tracer and need not: attention may be inside of them, or they only ask what something is."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import _symbolic_trace

from armour_surgery.discover.nodes import value_of
from armour_surgery.patching import patched

__all__ = ["followed_functions"]


@contextmanager
def followed_functions() -> Iterator[None]:
    """While open, functions that fx keeps as one call are followed like a host's own code: attention may be inside.

    These are `F.multi_head_attention_forward`, and whatever a host registered with `torch.fx.wrap`. Two functions that
    ask what something is, and put nothing into the graph, get values in place of proxies.
    """
    # `F.multi_head_attention_forward` asks first whether an argument stands in for a tensor, and hands the whole call
    # over to it if so; told that none does, it goes on to its own code. `torch.fx.wrap` has a list of its own.
    functional: Any = F
    original = functional.has_torch_function
    dtype_of = functional._none_or_dtype
    check: Any = torch._check_with  # behind torch._check and its like, in which hosts state what they expect
    wrapped = _symbolic_trace._wrapped_fns_to_patch

    def check_value(error_type: Any, condition: Any, message: Any) -> None:
        check(error_type, value_of(condition), message)

    def has_torch_function(arguments: Iterable[Any]) -> bool:
        caller = sys._getframe(2).f_code.co_name  # past what keeps a patch to its thread
        return caller != "multi_head_attention_forward" and bool(original(arguments))

    with (
        patched(functional, "has_torch_function", has_torch_function),
        patched(functional, "_none_or_dtype", lambda mask: dtype_of(value_of(mask))),
        patched(torch, "_check_with", check_value),
    ):
        _symbolic_trace._wrapped_fns_to_patch = {}
        try:
            yield
        finally:
            _symbolic_trace._wrapped_fns_to_patch = wrapped
