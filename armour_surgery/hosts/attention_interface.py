"""transformers' attention interface: the one public place where its models hand over q, k and v.

A transformers attention looks its function up in `ALL_ATTENTION_FUNCTIONS` at every call, by
`config._attn_implementation`. Traced code must go on doing that (a user switches to "eager" to see attention maps), so
while a module is traced the look-up returns a stand-in that stays one call in the graph.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from armour_surgery.patching import patched

__all__ = ["attention_interface", "is_interface", "names_attention_function", "noted_interfaces", "traced_interfaces"]


def attention_interface(default: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the attention function that `module.config` names, as the host would: `(module, q, k, v, mask, ...)`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, default)
    return function(module, *args, **kwargs)


def names_attention_function(config: Any) -> bool:
    """Whether a module's attribute is a config by which transformers looks its attention function up."""
    return isinstance(getattr(config, "_attn_implementation", None), str)


def is_interface(target: Any) -> bool:
    """Whether a graph node's target is the attention interface; its args are (default, module, q, k, v, mask, ...)."""
    return target is attention_interface


@contextmanager
def traced_interfaces() -> Iterator[None]:
    """While open, attention functions that transformers' modules look up are kept as calls by a tracer."""

    def stand_in(function: Callable[..., Any], name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            proxy = next((argument for argument in args if isinstance(argument, fx.Proxy)), None)
            if proxy is None:
                # Nobody traces this call: it is one on real tensors in between.
                return function(module, *args, **kwargs)
            return proxy.tracer.create_proxy("call_function", attention_interface, (default, module, *args), kwargs)

        return called

    with _looked_up(stand_in):
        yield


@contextmanager
def noted_interfaces(note: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """While open, `note` is told of each module that calls an attention function, and of that function's name."""

    def stand_in(function: Callable[..., Any], name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            note(module, name)
            return function(module, *args, **kwargs)

        return called

    with _looked_up(stand_in):
        yield


@contextmanager
def _looked_up(stand_in: Callable[[Callable[..., Any], str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While open, a look-up gives what `stand_in` makes of the function, the name asked for, and the default.

    Does nothing unless transformers is in use: importing it takes seconds and a timm model does not need it.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        yield
        return
    interfaces = type(modeling.ALL_ATTENTION_FUNCTIONS)
    original = interfaces.get_interface

    def get_interface(self: Any, name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        return stand_in(original(self, name, default), name, default)

    with patched(interfaces, "get_interface", get_interface):
        yield
