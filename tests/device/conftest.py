"""Kernels are tested with as many threads as the machine has cores, as programs call them."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """All cores for a test here, whatever the environment says for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)
