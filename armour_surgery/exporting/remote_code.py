"""A modeling file beside the weights of a converted transformers model, which loads it without this tool.

The file has the generated forwards of the attentions, and a class that builds the stock model and changes it to what
the surgery made of it; all else it imports from transformers.
"""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armour_surgery import __version__, hosts
from armour_surgery.copies import align
from armour_surgery.errors import ExportError
from armour_surgery.exporting.globals_of_code import Preamble, names_in
from armour_surgery.hosts.gone import placeholders, with_placeholders, with_stand_ins
from armour_surgery.hosts.library_config import CONFIG
from armour_surgery.hosts.library_folder import MODELING, auto_class
from armour_surgery.hosts.transformers_marks import stock_config_class
from armour_surgery.records import Source
from armour_surgery.rewrite.emit import ArmourAttention, write_forward
from armour_surgery.rewrite.torch_attention import reset_parameters
from armour_surgery.surgery.perform import surgery_of

__all__ = ["write_remote_code"]

_HEAD = '''"""{name} after Armour surgery ({mode}): one projection of each attention serves for two.

Written by armour-surgery {version} for transformers {transformers}; it needs torch and transformers, and not that tool.
The attentions below know the ways of calling them that were seen when this was written, and refuse others.
"""

from __future__ import annotations

'''

_UNKNOWN = """
def unknown_call(module):
    raise NotImplementedError(
        f"{type(module).__name__} was called in a way (a mask, an argument, an image size) that this file was not "
        "written for; armour_surgery.load of this folder takes it"
    )
"""

_ATTENTION = '''
class {name}({host}):
    """{host} in mode {mode}."""

{members}{forward}
'''

# What torch's own layer is asked by those that go past its forward, and by who draws weights; see `answers_of`.
_OF_TORCH = """    _qkv_same_embed_dim = property(lambda self: False)
    _reset_parameters = reset_parameters

"""

_MODEL = """
# What the surgery took away, the shapes of what it left smaller, what else it changed, and the attentions.
GONE = {gone}
SHAPES = {shapes}
VALUES = {values}
ATTENTIONS = {attentions}


class {config}({stock_config}):
    model_type = "{model_type}"


class {model}({stock}):
    config_class = {config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for name in GONE:
            fqn, _, child = name.rpartition(".")
            setattr(self.get_submodule(fqn), child, None)
        for name, shape in SHAPES.items():
            fqn, _, child = name.rpartition(".")
            owner = self.get_submodule(fqn)
            tensor = getattr(owner, child)
            smaller = tensor.detach()[tuple(slice(size) for size in shape)].clone()
            setattr(owner, child, nn.Parameter(smaller) if isinstance(tensor, nn.Parameter) else smaller)
        for name, values in VALUES.items():
            for key, value in values.items():
                setattr(self.get_submodule(name), key, value)
        for name, attention in ATTENTIONS.items():
            self.get_submodule(name).__class__ = attention
        known = set(self._keys_to_ignore_on_load_unexpected or ())
        self._keys_to_ignore_on_load_unexpected = known | set(map(re.escape, placeholders(self)))

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def _init_weights(self, module):
        with_stand_ins(super()._init_weights, module)

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, state_dict=with_placeholders(self, state_dict), **kwargs)
"""

# What that class calls.
_OF_MODEL = {
    "re": re,
    "nn": nn,
    "align": align,
    "placeholders": placeholders,
    "with_placeholders": with_placeholders,
    "with_stand_ins": with_stand_ins,
}


def write_remote_code(model: nn.Module, source: Source, folder: Path) -> str:
    """Write the modeling file, and name it in the folder's config; returns the name of the auto class that finds it.

    Raises:
        ExportError: the surgery made something of the model that the file cannot say.
    """
    kind = type(model)
    auto = auto_class(model)
    stock = hosts.build(source)
    (folder / f"{MODELING}.py").write_text(_text(model, stock), encoding="utf-8")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["architectures"] = [f"Armour{kind.__name__}"]
    config["auto_map"] = {
        "AutoConfig": f"{MODELING}.{type(model.config).__name__}",
        auto: f"{MODELING}.Armour{kind.__name__}",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return auto


def _text(model: nn.Module, stock: nn.Module) -> str:
    kind = type(model)
    config: Any = model.config
    stock_config = stock_config_class(type(config))
    preamble = Preamble(f"the forward of {kind.__name__}")
    for name, value in _OF_MODEL.items():
        preamble.add(name, value)
    for cls in (kind, stock_config):
        preamble.add(cls.__name__, cls)
    classes: dict[str, str] = {}  # text by name
    names: dict[type, str] = {}
    attentions = {}
    for fqn, module in model.named_modules():
        if isinstance(module, ArmourAttention):
            cls = type(module)
            if cls not in names:
                names[cls] = f"{cls.__name__}{len(names)}"
                classes[names[cls]] = _attention(module, names[cls], preamble)
            attentions[fqn] = names[cls]
    gone, shapes, values = _changes(model, stock)
    head = _HEAD.format(
        name=kind.__name__,
        mode=", ".join(sorted({site.mode for site in surgery_of(model).sites})),
        version=__version__,
        transformers=importlib.metadata.version("transformers"),
    )
    table = "{\n" + "".join(f"    {fqn!r}: {name},\n" for fqn, name in attentions.items()) + "}"
    body = _MODEL.format(
        gone=_literal(gone),
        shapes=_literal(shapes),
        values=_literal(values),
        attentions=table,
        config=type(config).__name__,
        stock_config=stock_config.__name__,
        model_type=type(config).model_type,
        model=f"Armour{kind.__name__}",
        stock=kind.__name__,
    )
    blocks = [head + "\n".join(sorted(preamble.imports)), *preamble.definitions, _UNKNOWN, *classes.values(), body]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def _attention(module: ArmourAttention, name: str, preamble: Preamble) -> str:
    scope: dict[str, Any] = {}
    source, forward = write_forward(type(module).armour_variants, f"<{name}>", "unknown_call(self)", scope)
    for read in sorted(names_in(forward.__code__)):
        if read in scope and read != "forward":
            preamble.add(read, scope[read])
    host = next(
        base for base in type(module).__mro__ if issubclass(base, nn.Module) and not issubclass(base, ArmourAttention)
    )
    preamble.add(host.__name__, host)
    indented = "".join(f"    {line}\n" if line.strip() else "\n" for line in source.splitlines())
    members = ""
    if issubclass(host, nn.MultiheadAttention):
        preamble.add("reset_parameters", reset_parameters)
        members = _OF_TORCH
    return _ATTENTION.format(
        name=name, host=host.__name__, mode=type(module).armour_mode, members=members, forward=indented
    )


def _changes(
    model: nn.Module, stock: nn.Module
) -> tuple[list[str], dict[str, tuple[int, ...]], dict[str, dict[str, Any]]]:
    """What makes the stock model's modules the converted one's: names that go, new shapes, and plain attributes."""
    gone: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, dict[str, Any]] = {}
    left = dict(model.named_modules())
    for fqn, module in stock.named_modules():
        now = left.pop(fqn, None)
        if now is None:
            if not any(f"{fqn}.".startswith(f"{above}.") for above in gone):
                gone.append(fqn)
            continue
        if type(now) is not type(module) and not isinstance(now, ArmourAttention):
            raise _unsaid(fqn, f"a {type(module).__name__} became a {type(now).__name__}")
        for name, tensor in _own_tensors(module).items():
            after = getattr(now, name, None)
            place = f"{fqn}.{name}" if fqn else name
            if after is None:
                gone.append(place)
            elif after.shape != tensor.shape:
                shapes[place] = tuple(after.shape)
        changed = {
            name: value
            for name, value in vars(now).items()
            if isinstance(value, int) and name in vars(module) and vars(module)[name] != value and name != "training"
        }
        if changed:
            values[fqn] = changed
    if left:
        fqn = next(iter(left))
        raise _unsaid(fqn, f"it is a new {type(left[fqn]).__name__}")
    return gone, shapes, values


def _unsaid(fqn: str, what: str) -> ExportError:
    return ExportError(
        f"{fqn}: {what}, which --remote-code cannot write; export without it, or convert to another mode"
    )


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    own = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def _literal(value: dict[str, Any] | list[str]) -> str:
    """A dict or list with an entry a line."""
    if not value:
        return repr(value)
    if isinstance(value, list):
        return "[\n" + "".join(f"    {item!r},\n" for item in value) + "]"
    return "{\n" + "".join(f"    {key!r}: {item!r},\n" for key, item in value.items()) + "}"
