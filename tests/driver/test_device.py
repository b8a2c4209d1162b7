"""Tests each redirection by which megatron-core runs on a CPU, so that a new version fails by name."""

import importlib.metadata
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_bicc import device
from megatron_bicc import device_cpu as cpu


@pytest.mark.parametrize("seam", cpu._seams(), ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_seam_is_where_megatron_looks(seam: tuple) -> None:
    module, name, _ = seam
    version = importlib.metadata.version("megatron-core")
    assert hasattr(module, name), (
        f"megatron-core {version} has no {module.__name__}.{name}: see device_cpu.py"
    )


def test_redirection_ends_with_its_context() -> None:
    before = torch.cuda.current_device
    with cpu.CudaOnCpu(), cpu.CudaOnCpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
    assert torch.cuda.current_device is before
    assert torch.zeros(2).type() == "torch.FloatTensor"


def test_random_state_is_the_cpu_generator() -> None:
    with cpu.CudaOnCpu():
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)


def test_split_sizes_of_any_sequence_reach_gloo(single_process: None) -> None:
    sent, received = torch.arange(3.0), torch.zeros(3)
    with cpu.CudaOnCpu():
        torch.distributed.all_to_all_single(received, sent, np.array([3]), np.array([3]))
    assert torch.equal(received, sent)


def test_name_that_megatron_forgets_without_transformer_engine_is_there() -> None:
    assert moe_utils.HAVE_TE or moe_utils.te_general_gemm is None


def test_world_size_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert device.world_size() == 6


def test_alone_a_host_is_at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert device.node_address() == "127.0.0.1"


@pytest.mark.parametrize(
    "wanted, has_cuda, is_built, chosen",
    [
        ("auto", True, True, "csrc's CUDA kernels"),
        ("auto", True, False, "plain torch: csrc's CUDA kernels are not built"),
        ("auto", False, True, "plain torch: no GPU"),
        ("torch", True, True, "plain torch, as model.kernels=torch asks"),
    ],
)
def test_kernels_are_chosen_once_and_say_why(
    monkeypatch: pytest.MonkeyPatch, wanted: str, has_cuda: bool, is_built: bool, chosen: str
) -> None:
    built = ModuleType("megatron_bicc._C_cuda") if is_built else None  # None: the import fails
    monkeypatch.setitem(sys.modules, "megatron_bicc._C_cuda", built)
    monkeypatch.delattr("megatron_bicc._C_cuda", raising=False)
    monkeypatch.setattr(device, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(device, "_kernels", None)
    assert device.choose_kernels(wanted).startswith(chosen)
    assert device.kernels() is (built if chosen == "csrc's CUDA kernels" else None)
