"""Runs the tests of tests/kernels on a GPU."""

import pytest
import torch

from megatron_bicc import device


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Returns the device of the tensors; the product calls csrc's kernels on it."""
    csrc = pytest.importorskip("megatron_bicc._C_cuda", reason="built without nvcc")
    monkeypatch.setattr(device, "_kernels", csrc)
    return torch.device("cuda")
