"""One thread, one seed per test, and reproducible random examples."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch by the name of the test, so that a test does not depend on its neighbours."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
