"""What is patched for a moment is patched for one thread, and comes back."""

import threading
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch

from armour_surgery.patching import as_users_draw, on_cpu_by_default, one_at_a_time, patched


def in_a_thread(action: Callable[[], object]) -> list[object]:
    """What an action in another thread returned; empty if it is still at it after a moment."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(action()), daemon=True)
    thread.start()
    thread.join(0.2)
    return results


def test_a_patch_is_for_one_thread() -> None:
    def before() -> str:
        return "before"

    owner = SimpleNamespace(function=before)
    with patched(owner, "function", lambda: "patched"):
        assert owner.function() == "patched"
        assert in_a_thread(lambda: owner.function()) == ["before"]
    assert owner.function is before


def test_a_patch_ends_with_an_error() -> None:
    owner = SimpleNamespace(function=len)
    with pytest.raises(ZeroDivisionError), patched(owner, "function", lambda: 1 / 0):
        owner.function()
    assert owner.function is len


def test_patches_of_one_thread_are_nested() -> None:
    owner = SimpleNamespace(function=lambda: 1)
    with patched(owner, "function", lambda: 2):
        with patched(owner, "function", lambda: 3):
            assert owner.function() == 3
        assert owner.function() == 2
    assert owner.function() == 1


def test_another_thread_waits_with_its_patch() -> None:
    owner = SimpleNamespace(function=lambda: "before")
    entered = threading.Event()

    def patch() -> None:
        with patched(owner, "function", lambda: "other"):
            entered.set()

    with one_at_a_time():
        assert in_a_thread(patch) == []
        assert not entered.is_set()
    assert entered.wait(5)


def test_what_a_user_draws_is_on_the_users_default_device() -> None:
    @on_cpu_by_default
    def devices(items: Iterable[torch.Tensor]) -> list[str]:
        found = []
        for item in as_users_draw(items):
            found += [torch.empty(1).device.type, item.device.type]
        return found

    @on_cpu_by_default
    def through_another() -> list[str]:
        return devices(torch.empty(1) for _ in range(2))

    with torch.device("meta"):
        assert devices(torch.empty(1) for _ in range(2)) == ["cpu", "meta"] * 2
        assert through_another() == ["cpu", "meta"] * 2
        assert torch.empty(1).device.type == "meta"
    assert devices(torch.empty(1) for _ in range(2)) == ["cpu", "cpu"] * 2
