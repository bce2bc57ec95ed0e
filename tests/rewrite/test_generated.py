"""A class that was made while the program runs is copied, and says what to do where it cannot go."""

import abc
import copy
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from own_attentions import SHAPE, Hidden, Plain, ReadsWidth
from small_models import refused
from torch import nn

from armour_surgery import convert, deploy
from armour_surgery.errors import UsageError


class Abstract(Plain, abc.ABC):
    """An attention whose class has a class of its own."""


KINDS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "converted": (
        lambda: convert(Hidden(Plain()), example_input=torch.empty(SHAPE)),
        r"armour_surgery.save .* state_dict",
    ),
    "deployed": (
        lambda: deploy(Hidden(ReadsWidth()).eval(), example_input=torch.empty(SHAPE)),
        r"deploy\(\) was given",
    ),
    "abstract": (lambda: convert(Hidden(Abstract()), example_input=torch.empty(SHAPE)), "armour_surgery.load"),
}
WRITERS: dict[str, Callable[[nn.Module], Any]] = {
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "another process": ForkingPickler.dumps,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied_and_nowhere_pickled(kind: str) -> None:
    make, way = KINDS[kind]
    model = make().eval()
    for write in WRITERS.values():
        with pytest.raises(UsageError, match=rf"(Plain|Abstract|ReadsWidth) cannot be pickled .* {way}"):
            write(model)
    x = torch.randn(SHAPE)
    for copied in (copy.deepcopy(model), copy.copy(model), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(copied(x), model(x))
        assert type(copied.inner) is type(model.inner)
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused_with_what_there_is_instead() -> None:
    model = convert(Hidden(Plain()), example_input=torch.empty(SHAPE)).eval()
    assert "torch.export.export" in refused(UsageError, lambda: torch.jit.script(model))
    x = torch.randn(SHAPE)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x))
