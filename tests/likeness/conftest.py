"""Hosts to compare, which no test changes."""

import pytest
from shared_hosts import built
from torch import nn


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    return built("vit")[0]
