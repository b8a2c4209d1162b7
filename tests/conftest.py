"""Shared fixtures."""

from pathlib import Path

import pytest
from support.models import save_models

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.model.policy import start_model_parallel


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Returns the directories of support.models.MODELS, by name."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def single_process() -> None:
    """Creates megatron-core's process groups for one process."""
    device.start_distributed()
    start_model_parallel(Config())
