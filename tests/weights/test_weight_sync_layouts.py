"""Tests weight sync from every kind of layout into a real server of two tensor-parallel ranks."""

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import make_model
from support.sglang_server import PYTHON, SglangServer
from support.steps import TOKENIZER, make_config
from support.torchrun import run_job
from support.two_steps import assert_engine_followed, train_on
from support.weight_sync import TOKENS, hf_log_probs, make_sync, served
from transformers import PreTrainedModel

from megatron_bicc.config import SglangConfig
from megatron_bicc.sglang.pool import ServerPool
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

pytestmark = [
    pytest.mark.timeout(900),  # a busy machine needs minutes to start a server
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-sglang: make sglang"),
]
WORKER = Path(__file__).with_name("weight_sync_worker.py")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """With experts, whose inner dimension the server has to pad."""
    return make_model("qwen3_moe")


@pytest.fixture(scope="module")
def path(model_dirs: dict[str, Path]) -> Path:
    """Its directory."""
    return model_dirs["qwen3_moe"]


@pytest.fixture(scope="module")
def server(path: Path) -> Iterator[SglangServer]:
    """TP=2; it starts while the trainers do."""
    server = SglangServer(path, path.parent / "server.log", tensor_parallel=2)
    server.start()
    yield server
    server.kill()


def test_layouts_and_a_trainer_killed_in_mid_sync(
    server: SglangServer, model: PreTrainedModel, path: Path, single_process: None, tmp_path: Path
) -> None:
    """weight_sync_worker.py syncs from all of its layouts; its first process ends by kill -9.

    The next trainer finds the server paused, in the middle of an update.
    """
    done = run_job(2, WORKER, path, tmp_path, server.url)
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    assert (tmp_path / "finished").read_text() == "dp2, pp2, ep2, tp2, cp2 ep2, tp2 ep2"

    config = make_config(path, "grpo")
    config.output_dir = str(tmp_path)
    learner = Learner(config, load_policy(config), TOKENIZER)
    pool = ServerPool([server.url], [server.url], SglangConfig())
    sync = make_sync(config, learner, pool)
    assert sync.sync(20) > 0 and not pool.reasons()
    assert sync._confirmed == {(2, torch.float32)}
    log_probs, version = served(pool.portal, pool.own[0], TOKENS)
    sync.close()
    pool.close()
    assert version == "20"
    assert np.abs(log_probs - hf_log_probs(model, TOKENS)).max() < 1e-4


def test_two_steps_of_training(
    server: SglangServer, path: Path, single_process: None, tmp_path: Path
) -> None:
    server.wait()
    assert_engine_followed(train_on(server.url, path, tmp_path))
