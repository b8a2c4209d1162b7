"""Tests logits and log-probs under tensor parallel, and that weights refused by one process fail on both.

tests/model/test_logits_match_hf.py has logits of one process.
"""

import shutil
from pathlib import Path

import pytest
import torch
from model.logits_worker import BROKEN_TENSOR
from safetensors.torch import load_file, save_file
from support.torchrun import torchrun

WORKER = Path(__file__).with_name("logits_worker.py")
TINY_POLICY = Path(__file__).parents[2] / "examples/tiny_policy"


@pytest.fixture
def broken(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A model with a NaN in the last row of a tensor that tensor parallel cuts by rows."""
    path = shutil.copytree(model_dirs["qwen3_untied"], tmp_path / "broken")
    tensors = load_file(path / "model.safetensors")
    tensors[BROKEN_TENSOR][-1] = torch.nan
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def test_two_processes_give_the_logits_of_transformers(model_dirs: dict[str, Path], broken: Path) -> None:
    """The tiny policy, and untied embeddings with head_dim != hidden / heads and a vocabulary that is odd."""
    torchrun(2, WORKER, broken, TINY_POLICY, model_dirs["qwen3_untied"])
