"""Several threads may convert, load and call models at the same time, and the others notice nothing of it."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from saved_models import armour
from shared_hosts import built, converted_host, example
from small_models import vit
from torch import Tensor, nn

from armour_surgery import convert, load, save
from armour_surgery.copies import full_copy

THREADS = 3
Result = TypeVar("Result")
# Everything that is patched, or set for all threads, while a module is traced, run or counted, or a host is built.
PATCHED: list[Callable[[], object]] = [
    lambda: nn.Module.__call__,
    lambda: nn.Module.__getattr__,
    lambda: nn.Module.register_parameter,
    lambda: F.has_torch_function,
    lambda: torch.fx._symbolic_trace._wrapped_fns_to_patch,
    torch.backends.mha.get_fastpath_enabled,
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
]


class Bystander(threading.Thread):
    """Builds and runs networks that have nothing to do with surgery, until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stopped = threading.Event()
        self.rounds = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        batch, query = torch.ones(2, 6), torch.ones(3, 2, 8)
        while not self.stopped.wait(0.001):  # the others need the interpreter too
            try:
                network = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
                assert all(parameter.device.type == "cpu" for parameter in network.parameters())
                assert type(network(batch)) is Tensor
                attention = nn.MultiheadAttention(8, 2)
                assert type(attention(query, query, query)[0]) is Tensor
                self.rounds += 1
            except Exception as error:
                self.failure = error
                return


@pytest.fixture(autouse=True)
def _nobody_notices() -> Iterator[None]:
    """Threads take turns all the time; a bystander goes on well; and all that was patched is as it was."""
    before = [read() for read in PATCHED]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    bystander = Bystander()
    bystander.start()
    try:
        yield
    finally:
        bystander.stopped.set()
        bystander.join()
        sys.setswitchinterval(interval)
    assert [read() for read in PATCHED] == before
    assert bystander.failure is None
    assert bystander.rounds > 1


def at_once(action: Callable[[int], Result]) -> list[Result]:
    """What each of several threads gets that start together."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Result:
        barrier.wait()
        return action(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_conversions_at_once() -> None:
    names = ["vit", "hf-vit", "vit"]
    wanted = [converted_host(name).state_dict() for name in names]
    models = [full_copy(built(name)[0]) for name in names]
    made = at_once(lambda number: convert(models[number], example_input=example(names[number])))
    for armour_model, state in zip(made, wanted, strict=True):
        found = armour_model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(value, found[key]) for key, value in state.items())


def test_loads_at_once(tmp_path: Path) -> None:
    model = armour("hf-vit")
    save(model, tmp_path / "saved")
    wanted = model.state_dict()
    for loaded in at_once(lambda _: load(tmp_path / "saved")):
        assert all(torch.equal(value, wanted[key]) for key, value in loaded.state_dict().items())


def test_first_calls_of_new_kinds_at_once() -> None:
    """Two threads are the first with a mask, and one is the first without."""
    model = vit(depth=1)
    attention, alone = convert(model).blocks[0].attn, convert(model).blocks[0].attn
    tokens = torch.randn(2, 17, 48)
    calls: list[dict[str, Any]] = [{"attn_mask": torch.zeros(17, 17)}, {"attn_mask": torch.zeros(17, 17)}]
    calls.append({"is_causal": True})
    wanted = [alone(tokens, **call) for call in calls]
    found = at_once(lambda number: attention(tokens, **calls[number]))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(type(attention).armour_variants) == len(type(alone).armour_variants)
