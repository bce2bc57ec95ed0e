"""Hosts to compare, which no test changes."""

import pytest
from tiny_hosts import CASES
from torch import nn


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    return CASES["vit"].build()
