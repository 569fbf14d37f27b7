"""What every test runs under: fixed seeds, one thread per worker, and no GPU test where there is no GPU."""

from __future__ import annotations

import os
import random

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores. Set before torch is imported, so that the processes that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
