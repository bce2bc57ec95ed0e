"""Building a host from a folder costs little more than the weights that came with it."""

import threading
import time
from typing import Any

import pytest
import torch
from named_hosts import TINY
from small_models import refused

from armour_surgery.errors import SchemaError
from armour_surgery.hosts import build
from armour_surgery.hosts.limits import Limits
from armour_surgery.records import Source

BEIT = "beit_base_patch16_224"
SMALL_FILE = Limits(numbers=100_000, tensors=30)

HUNGRY: dict[str, tuple[Source, str]] = {
    "blocks": (Source("timm", TINY, {"depth": 20_000, "embed_dim": 12, "num_heads": 3}), "parameters"),
    "tables": (Source("timm", BEIT, {"img_size": 3_000, "depth": 1, "embed_dim": 12, "num_heads": 3}), "GiB"),
    "positions": (Source("timm", TINY, {"img_size": 400_000, "depth": 1, "embed_dim": 12, "num_heads": 3}), "GiB"),
    "width": (Source("timm", TINY, {"embed_dim": 1_000_000, "num_heads": 1}), "GiB"),
    "labels": (Source("transformers", "ViTModel", {"num_labels": 10**9}), "'num_labels'"),
    "rates": (Source("timm", TINY, {"depth": 10**10}), "'depth'"),
    "stages": (Source("timm", "swin_tiny_patch4_window7_224", {"depths": [1] * 1_000_000}), "list of 1000000"),
    "window": (Source("timm", "swin_tiny_patch4_window7_224", {"img_size": 2_000, "window_size": 500}), "GiB"),
    "in-a-list": (Source("timm", TINY, {"img_size": [10**9, 10**9]}), "'img_size'"),
    "attribute": (Source("timm", TINY, {"depth": 1}, {"blocks.0.attn.num_heads": 10**9}), "num_heads"),
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_a_host_that_would_take_more_than_its_weights_is_refused_before_it_does(kind: str) -> None:
    source, word = HUNGRY[kind]
    before = time.process_time()
    message = refused(SchemaError, lambda: build(source, SMALL_FILE))
    assert word in message
    assert time.process_time() - before < 10


def test_the_same_model_with_its_own_weights_is_built() -> None:
    source = Source("timm", BEIT, {"img_size": 96, "depth": 2, "embed_dim": 12, "num_heads": 3})
    sizes = {name: tensor.shape for name, tensor in build(source).state_dict().items()}
    limits = Limits(sum(map(torch.Size.numel, sizes.values())), len(sizes))
    before = torch.get_rng_state()
    built = build(source, limits)
    assert {name: tensor.shape for name, tensor in built.state_dict().items()} == sizes
    assert torch.equal(torch.get_rng_state(), before)
    index = built.blocks[1].attn.relative_position_index
    assert torch.equal(index, build(source).blocks[1].attn.relative_position_index)


def test_a_loop_in_python_that_does_not_end_is_left() -> None:
    limits = Limits(0, -198)  # 20 s, and a tenth of a second less for each of these
    state: dict[str, Any] = {"steps": 0, "tidied": False}

    def loop() -> None:
        with limits.in_time():
            try:
                while True:
                    try:
                        state["steps"] += 1
                    except Exception:
                        continue
            finally:
                state["tidied"] = True

    threads = threading.active_count()
    message = refused(SchemaError, loop)
    assert "processor time" in message
    assert state["tidied"]
    assert threading.active_count() == threads


def test_time_that_others_spend_does_not_count() -> None:
    with Limits(0, -199).in_time():
        time.sleep(0.4)


def test_errors_inside_are_what_they_were() -> None:
    def fail() -> None:
        with Limits(0, 0).in_time():
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
