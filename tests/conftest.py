"""Shared fixtures."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from support import emulated_kernels as emulated
from support.models import save_models

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel

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
    "test_twins",
    "test_sglang_families",
    "test_shares",
    "test_run",
    "test_report_in_browser",
    "test_planned_state",
    "test_convert_command",
    "test_rewards",
)
"""The longest first: one that began last would run alone, beside idle cores"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts files by length; the order inside a file stays."""
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the directories of support.models.MODELS, by name."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def single_process() -> None:
    """Creates megatron-core's process groups for one process."""
    device.start_distributed()
    start_model_parallel(Config())


@pytest.fixture(
    params=[
        "emulated",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
            ],
        ),
    ]
)
def kernel_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Makes the product call csrc's CUDA kernels, compiled for the host or on a GPU; returns the device."""
    if request.param == "emulated":
        monkeypatch.setattr(device, "_kernels", emulated.build())
        return torch.device("cpu")
    from megatron_bicc import _C_cuda

    monkeypatch.setattr(device, "_kernels", _C_cuda)
    return torch.device("cuda")


@pytest.fixture
def emulated_kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes the product call csrc's CUDA kernels, compiled for the host, on CPU tensors."""
    monkeypatch.setattr(device, "_kernels", emulated.build())
    return device.kernels()
