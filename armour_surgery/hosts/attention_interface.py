"""transformers' attention interface: the one public place where its models hand over q, k and v.

A transformers attention looks its function up in `ALL_ATTENTION_FUNCTIONS` at every call, by
`config._attn_implementation`. Traced code must go on doing that (a user switches to "eager" to see attention maps), so
while a module is traced the look-up returns a stand-in that stays one call in the graph.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from armour_surgery.patching import patched

__all__ = [
    "attention_interface",
    "attention_of_chunks",
    "chunks_in_one_call",
    "is_interface",
    "names_attention_function",
    "noted_interfaces",
    "traced_interfaces",
]

# How a packed sequence is told by an attention to a kernel that takes one, and what it asks before it does.
_CHUNKS = "cu_seq_lens_q"
_ASKED = "is_flash_attention_requested"


def attention_interface(default: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the attention function that `module.config` names, as the host would: `(module, q, k, v, mask, ...)`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, default)
    return function(module, *args, **kwargs)


def attention_of_chunks(
    default: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> Any:
    """What `attention_interface` does, on a sequence that several images are packed into, none of which sees another.

    Flash attention takes it whole; for every other function the sequence is cut, as the hosts do.
    """
    if query.is_meta:  # where there are no numbers, one chunk has the shapes of many
        return attention_interface(default, module, query, key, value, *args, **kwargs)
    if _asks_for_flash(default, module):
        packing = {_CHUNKS: cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        longest = int((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).max()) if max_length_q is None else max_length_q
        kwargs = {**kwargs, **packing, "max_length_q": longest, "max_length_k": max_length_k or longest}
        return attention_interface(default, module, query, key, value, *args, **kwargs)
    lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
    found, maps = [], []
    for chunk in zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True):
        heads, weights = attention_interface(default, module, *chunk, *args, **kwargs)
        found.append(heads)
        maps.append(weights)
    return torch.cat(found, dim=1), None if maps[0] is None else tuple(maps)


def _asks_for_flash(default: Callable[..., Any], module: nn.Module) -> bool:
    # The host's own function, by way of its default attention: transformers moves it from file to file.
    asked = getattr(sys.modules[default.__module__], _ASKED)
    return bool(asked(module.config))


@contextmanager
def chunks_in_one_call(module: nn.Module) -> Iterator[set[str]]:
    """While open, a packed sequence goes to attention functions in one call in `module`, with the places of its cuts.

    So do the hosts with flash attention alone. For other functions they cut it, into as many chunks as there are
    images, which no graph can hold; `attention_of_chunks` does that when the generated code runs. Gives the names of
    the hosts' files where that is so.
    """
    files: set[str] = set()
    for child in module.modules():
        for cls in type(child).__mro__:
            forward = vars(cls).get("forward")
            takes_chunks = forward is not None and "cu_seqlens" in inspect.signature(forward).parameters
            if takes_chunks and hasattr(sys.modules.get(cls.__module__), _ASKED):
                files.add(cls.__module__)
    with ExitStack() as stack:
        for file in sorted(files):
            stack.enter_context(patched(sys.modules[file], _ASKED, lambda *_, **__: True))
        yield files


def names_attention_function(config: Any) -> bool:
    """Whether a module's attribute is a config by which transformers looks its attention function up."""
    return isinstance(getattr(config, "_attn_implementation", None), str)


def is_interface(target: Any) -> bool:
    """Whether a graph node's target is the attention interface; its args are (default, module, q, k, v, mask, ...)."""
    return target is attention_interface or target is attention_of_chunks


@contextmanager
def traced_interfaces(module: nn.Module) -> Iterator[None]:
    """While open, attention functions that transformers' modules look up are kept as calls by a tracer of `module`."""

    def stand_in(function: Callable[..., Any], name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            proxy = next((argument for argument in args if isinstance(argument, fx.Proxy)), None)
            if proxy is None:
                # Nobody traces this call: it is one on real tensors in between.
                return function(module, *args, **kwargs)
            interface: Callable[..., Any] = attention_interface
            # Text models hand such places to functions that pay no heed to them.
            if default.__module__ in files and kwargs.get(_CHUNKS) is not None:
                interface = attention_of_chunks
            return proxy.tracer.create_proxy("call_function", interface, (default, module, *args), kwargs)

        return called

    with chunks_in_one_call(module) as files, _looked_up(stand_in):
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
