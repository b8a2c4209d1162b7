"""Shared fixtures, and which tests see this machine's GPUs: those marked gpu, where nothing else is run.

All others compare with references in fp32 on the CPU and start more processes than there may be GPUs.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

LONGEST_FILES = (
    "test_sglang_engine",
    "test_sglang_resume",
    "test_two_hosts",
    "test_layouts",
    "test_weight_sync_servers",
    "test_weight_sync_layouts",
    "test_checkpoint_resume",
    "test_benchmark_sync",
    "test_normalisation_contract",
    "test_te_commands",
    "test_fake_cuda",
    "test_transformer_engine",
    "test_twins",
    "test_sglang_families",
    "test_requests_in_flight",
    "test_shares",
    "test_run",
    "test_report_in_browser",
    "test_planned_state",
    "test_convert_command",
    "test_rewards",
)
"""The longest first: one that began last would run alone, beside idle cores"""


def pytest_configure(config: pytest.Config) -> None:
    """Hides the GPUs from this process and all that it starts, before anything loads CUDA."""
    if config.option.markexpr != "gpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MEGATRON_BICC_DEVICE": "cpu"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files by length; the order inside a file stays."""
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the directories of support.models.MODELS, by name."""
    # imported late, here and below: it loads torch, and libraries of megatron-core that ask for CUDA
    from support.models import save_models

    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def single_process() -> None:
    """Creates megatron-core's process groups for one process."""
    from megatron_bicc import device
    from megatron_bicc.config import Config
    from megatron_bicc.model.policy import start_model_parallel

    device.start_distributed()
    start_model_parallel(Config())


@pytest.fixture
def gpu_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes this a host with one GPU for each driver; no device is asked for.

    `nvidia-smi` is a test double, a shell script on PATH; without drivers it fails.
    """

    def make(*drivers: str) -> None:
        double = tmp_path / "bin/nvidia-smi"
        double.parent.mkdir()
        double.write_text(f"#!/bin/sh\n{'; '.join(f'echo {driver}' for driver in drivers) or 'exit 9'}\n")
        double.chmod(0o755)
        monkeypatch.setenv("PATH", f"{double.parent}:{os.environ['PATH']}")
        monkeypatch.delenv("MEGATRON_BICC_DEVICE", raising=False)

    return make


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> "torch.device":
    """Makes the product call csrc's CUDA kernels, compiled for the host or on a GPU; returns the device."""
    import torch
    from support import emulated_kernels

    from megatron_bicc import device

    if request.param == "emulated":
        monkeypatch.setattr(device, "_kernels", emulated_kernels.build())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and -m gpu, which shows it to the tests")
    monkeypatch.setattr(device, "_kernels", pytest.importorskip("megatron_bicc._C_cuda"))
    return torch.device("cuda")
