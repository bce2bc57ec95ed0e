"""Memory that a model holds, takes on top and keeps is counted as it is."""

import subprocess
import sys

import pytest
import torch
from quick_benchmarks import MIB
from torch import nn

from armour_surgery.benchmarking.memory import held_bytes, peak_growth


def test_what_a_model_holds_counts_shared_memory_once() -> None:
    module = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 10, bias=False))
    module[2].weight = nn.Parameter(module[0].weight.data.view(10, 20))
    assert held_bytes(module) == 4 * (200 + 20 + 4 * 20) + 8


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_the_peak_of_a_call_is_what_it_took_on_top() -> None:
    kept = torch.ones(20 * MIB // 4)

    def call() -> float:
        return float((kept + 1).sum())

    call()
    grown = peak_growth(call, torch.device("cpu"))
    assert grown is not None
    assert 19 * MIB < grown < 24 * MIB
    assert (peak_growth(lambda: None, torch.device("cpu")) or 0) < MIB
    assert peak_growth(call, torch.device("meta")) is None


def test_a_process_that_times_models_can_keep_its_memory() -> None:
    # In a process of its own: it changes what freeing means for the rest of that process.
    code = """
import torch
from pathlib import Path
from armour_surgery.benchmarking.speed import keep_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

def given_back():
    block = torch.ones(12_000_000)  # more than glibc ever keeps by itself
    before = resident()
    del block
    return before - resident()

before = given_back()
kept = keep_memory()
found = [given_back() for _ in range(8)]
assert not kept or max(found) < before / 10, (before, found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
