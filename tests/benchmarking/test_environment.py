"""What a benchmark ran on is recorded, and no path of the machine with it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from armour_surgery.benchmarking import environment as surroundings


def test_the_environment_is_recorded_and_names_no_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = json.loads(json.dumps(surroundings.environment().to_dict()))
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert {"timm", "transformers", "armour_surgery", "load"} <= found.keys()
    if hasattr(os, "sched_getaffinity"):
        assert found["affinity"] == sorted(os.sched_getaffinity(0))
    assert str(Path.home()) not in json.dumps(found)
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        words = ("git", "-C", str(checkout), "rev-parse", "--short=12", "HEAD")
        head = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        assert found["commit"].removesuffix("-dirty") == head
    monkeypatch.setattr(surroundings, "_CHECKOUT", tmp_path)
    assert surroundings.environment().commit is None
