"""Runs the kernels' tests on the host; tests/gpu/conftest.py runs the same tests on a GPU."""

from types import ModuleType

import pytest
import torch


@pytest.fixture
def where(emulated_kernels: ModuleType) -> torch.device:
    """Returns the device of the tensors; the product calls csrc's kernels on it."""
    return torch.device("cpu")
