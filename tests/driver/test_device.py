"""Tests each redirection by which megatron-core runs on a CPU, so that a new version fails by name."""

import importlib.metadata
import os

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe import moe_utils

from megatron_bicc import device
from megatron_bicc import device_cpu as cpu
from megatron_bicc.config import Config
from megatron_bicc.sglang.process import _environment
from megatron_bicc.train import main


@pytest.mark.parametrize("seam", cpu._seams(), ids=lambda seam: f"{seam[0].__name__}.{seam[1]}")
def test_seam_is_where_megatron_looks(seam: tuple) -> None:
    module, name, _ = seam
    version = importlib.metadata.version("megatron-core")
    assert hasattr(module, name), (
        f"megatron-core {version} has no {module.__name__}.{name}: see device_cpu.py"
    )


def test_kernels_run_in_order_for_trainers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert os.environ[name] == "1"
    assert name not in _environment(Config(), 0)
    monkeypatch.setenv(name, "8")
    device.limit_connections()
    assert os.environ[name] == "8"


def test_redirection_ends_with_its_context() -> None:
    before = torch.cuda.current_device
    with cpu.CudaOnCpu(), cpu.CudaOnCpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.zeros(2).to("cuda:0").device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        assert not torch.zeros(2, pin_memory=True).is_pinned()
        assert not torch.zeros(2).pin_memory().is_pinned()
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
