"""A wrapper around a model is named wherever a model is taken, with the way to the model inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import Own, refused, vit
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from armour_surgery import benchmark, convert, deploy, inspect, plan, redundancy, save, sensitivities
from armour_surgery.errors import AlreadyConvertedError, UsageError
from armour_surgery.hosts.wrappers import refuse_wrapped


def stand_in(module: str, name: str) -> Callable[[nn.Module], nn.Module]:
    """A wrapper that needs several processes, or a library that is not here: told by where its class is from."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    base = type(name, (nn.Module,), {"forward": forward, "__module__": module})
    users = type("Mine", (base,), {"__module__": "mine"})

    def wrap(model: nn.Module) -> nn.Module:
        wrapper: nn.Module = users()
        wrapper.module = model
        return wrapper

    return wrap


DDP = stand_in("torch.nn.parallel.distributed", "DistributedDataParallel")
WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (nn.DataParallel, r"pass model\.module$"),
    "compiled": (torch.compile, r"OptimizedModule .* pass model\._orig_mod$"),
    "averaged": (AveragedModel, r"AveragedModel .* pass model\.module$"),
    "EMA": (ModelEmaV2, r"pass model\.module$"),
    "EMA 3": (ModelEmaV3, r"pass model\.module$"),
    "DDP": (DDP, r"pass model\.module$"),
    "FSDP": (
        stand_in("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
        "before it was sharded",
    ),
    "PEFT": (stand_in("peft.peft_model", "PeftModel"), r"pass model\.merge_and_unload\(\)$"),
    "LoRA": (stand_in("peft.tuners.tuners_utils", "BaseTuner"), r"pass model\.merge_and_unload\(\)$"),
    "several": (lambda model: DDP(torch.compile(model)), r"pass model\.module\._orig_mod$"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_named_with_the_way_inside(kind: str) -> None:
    wrap, way = WRAPPERS[kind]
    with pytest.raises(UsageError, match=way):
        refuse_wrapped(wrap(vit()))


@pytest.mark.parametrize("example", [None, (2, 3, 32, 32)], ids=["no example", "an example"])
@pytest.mark.parametrize("function", [convert, inspect, plan, sensitivities, redundancy, deploy])
def test_everything_that_takes_a_model_refuses_a_wrapper(function: Callable[..., Any], example: Any) -> None:
    message = refused(UsageError, lambda: function(nn.DataParallel(vit()), example_input=example))
    assert "DataParallel is a wrapper" in message


def test_a_wrapper_around_a_converted_model_is_neither_saved_nor_converted(tmp_path: Any) -> None:
    wrapped = nn.DataParallel(convert(vit()))
    assert "pass model.module" in refused(UsageError, lambda: save(wrapped, tmp_path / "out"))
    assert "module.blocks.0.attn" in refused(AlreadyConvertedError, lambda: convert(wrapped))
    assert "pass model.module" in refused(UsageError, lambda: benchmark({"one": vit(), "two": wrapped}))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_whole_and_in_parts() -> None:
    traced = torch.jit.trace(nn.Linear(3, 4), torch.zeros(2, 3))
    assert "this TopLevelTracedModule is TorchScript" in refused(UsageError, lambda: inspect(traced))
    model = Own()
    model.stem = torch.jit.script(nn.Sequential(nn.Conv2d(3, 48, 8, 8)))
    assert "stem in this Own is TorchScript" in refused(
        UsageError, lambda: convert(model, example_input=(2, 3, 32, 32))
    )


@pytest.mark.parametrize("wrap", [nn.Identity, lambda model: nn.Sequential(model)], ids=["none", "a container"])
def test_what_is_no_wrapper_is_none(wrap: Callable[[nn.Module], nn.Module]) -> None:
    refuse_wrapped(wrap(vit()))
    Named = type("DataParallel", (nn.Module,), {"__module__": "mine"})
    refuse_wrapped(Named())
