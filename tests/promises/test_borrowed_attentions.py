"""What other libraries do with attention is followed exactly."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from borrowed_attentions import BORROWED, PadsLogits
from oracle import check, randomize
from own_attentions import D, tokens
from small_models import refused
from torch import nn

from armour_surgery import convert
from armour_surgery.discover import find_sites
from armour_surgery.errors import ArmourError
from armour_surgery.traced import SeenSite

EVERY = [(kind, mode) for kind, modes in BORROWED.items() for mode in modes]


def host(kind: Callable[[], nn.Module]) -> nn.Module:
    return randomize(nn.Sequential(nn.LayerNorm(D), kind())).double().eval()


@functools.cache
def searched(kind: Callable[[], nn.Module]) -> tuple[nn.Module, list[SeenSite]]:
    """A host that nobody changes, searched once for all modes that are tried on it."""
    model = host(kind)
    return model, find_sites(model, {"input": tokens()})


@pytest.mark.parametrize("kind", BORROWED, ids=lambda kind: kind.__name__)
def test_the_modes_that_fit(kind: Callable[[], nn.Module]) -> None:
    _, (found,) = searched(kind)
    assert tuple(mode for mode in found.site.modes if mode != "qk-diag") == BORROWED[kind]


@pytest.mark.parametrize(("kind", "mode"), EVERY, ids=lambda value: getattr(value, "__name__", value))
def test_surgery_changes_nothing_where_the_projections_are_equal(kind: Callable[[], nn.Module], mode: str) -> None:
    batches = [{"input": tokens()}, {"input": tokens(5)}, {"input": tokens(3, 5)}, {"input": tokens(1)}]
    model, sites = searched(kind)
    errors = check(model, mode, batches, sites)
    assert max(errors.values()) <= 1e-12, errors


@pytest.mark.parametrize("kind", BORROWED, ids=lambda kind: kind.__name__)
def test_gradients_and_copies(kind: Callable[[], nn.Module]) -> None:
    converted = convert(host(kind), BORROWED[kind][0], example_input=tokens())
    converted = copy.deepcopy(converted).train()
    converted(tokens(3)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in converted.parameters())


def test_padding_leaves_sizes_open() -> None:
    """One branch serves all batches: what pads needs no size for a number."""
    code = convert(host(PadsLogits), "qv", example_input=tokens())[1].code
    assert "x.shape[0] ==" not in code
    assert "x.shape[1] ==" not in code


def test_nested_tensors_are_refused_with_a_reason() -> None:
    """Images of different sizes as one nested tensor (NaViT): it cannot be recorded, and that is said."""

    class Nests(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = next(iter(BORROWED))()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(torch.nested.nested_tensor([x[0], x[1, 1:]], layout=torch.jagged))

    message = refused(ArmourError, lambda: convert(Nests(), "qv", example_input=tokens(2).float()))
    assert "nested" in message.lower() or "could not run" in message
