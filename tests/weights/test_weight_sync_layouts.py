"""Tests weight sync from every kind of layout into a real server of two tensor-parallel ranks."""

import signal
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from support.models import make_model
from support.sglang_server import PYTHON, SglangServer
from support.steps import TOKENIZER, make_config
from support.torchrun import run_job
from support.two_steps import assert_engine_followed, train_on
from support.weight_sync import TOKENS, hf_log_probs, make_sync, served
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_bicc.config import SglangConfig
from megatron_bicc.rollout.sglang_engine import NOTHING, Routing, generate_body, read_samples
from megatron_bicc.rollout.types import Request, Sample, Sampling
from megatron_bicc.sglang.client import ServerClient
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
def servers(path: Path) -> Iterator[list[SglangServer]]:
    """TP=2 and TP=1; they start while the trainers do."""
    both = [
        SglangServer(
            path, path.parent / f"server{size}.log", tensor_parallel=size, routing=size == 2, changes=True
        )
        for size in (2, 1)
    ]
    for server in both:
        server.start()
    yield both
    for server in both:
        server.kill()


@pytest.fixture(scope="module")
def server(servers: list[SglangServer]) -> SglangServer:
    """TP=2."""
    return servers[0]


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


def test_servers_of_two_sizes(
    servers: list[SglangServer], model: PreTrainedModel, path: Path, single_process: None, tmp_path: Path
) -> None:
    """In one sync; each rank of each server has the right parameters."""
    for server in servers:
        server.wait()
    config = make_config(path, "grpo")
    config.output_dir = str(tmp_path)
    learner = Learner(config, load_policy(config), TOKENIZER)
    urls = [server.url for server in servers]
    pool = ServerPool(urls, urls, SglangConfig())
    for version, config.weight_sync.method in ((30, "auto"), (31, "distributed")):
        sync = make_sync(config, learner, pool)
        assert sync.sync(version) > 0 and not pool.reasons()
        assert sync._confirmed == {(2, torch.float32), (1, torch.float32)}
        for client in pool.own:
            log_probs, found = served(pool.portal, client, TOKENS)
            assert found == str(version)
            assert np.abs(log_probs - hf_log_probs(model, TOKENS)).max() < 1e-4
        sync.close()

    config.weight_sync.method, config.weight_sync.delta = "auto", True
    sync = make_sync(config, learner, pool)
    whole = sync.sync(40)
    assert not sync.changes.takers
    for method, version in (("tensor", 41), ("disk", 42)):
        for module in learner.policy.modules:
            for parameter in module.parameters():
                parameter.data.view(-1)[version % 9 :: 50] += 0.02
        sync._confirmed.clear()  # compares all parameters
        sync.methods = dict.fromkeys(urls, method)
        assert sync.sync(version) == whole and not pool.reasons()
        assert sync._confirmed == {(2, torch.float32), (1, torch.float32)}
        assert sync.changes.takers == set(urls)
        assert 0 < sync.changes.nbytes < whole / 8
    pool.portal.call(pool.own[0].post, "/update_weight_version", {"new_version": "41"})
    assert sync.sync(43) == whole and not pool.reasons()
    assert sync.changes.takers == {urls[1]}
    sync.close()
    pool.close()


def test_two_steps_of_training(
    server: SglangServer, path: Path, single_process: None, tmp_path: Path
) -> None:
    """With the server's routing in every pass; it is that of Hugging Face, of a cached prompt as well."""
    server.wait()
    assert_engine_followed(train_on(server.url, path, tmp_path, "model.routing_replay=engine"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/hf", dtype=torch.float32)
    prompt = np.arange(2, 22, dtype=np.int32)
    for _ in range(2):
        for sample in asked(server, [Request(prompt, seed) for seed in range(3)], model):
            assert len(sample.experts) == len(sample.token_ids)
            if sample.prompt_experts is not None:
                found = np.concatenate([sample.prompt_experts, sample.experts])
                tokens = [*prompt, *sample.token_ids[:-1]]
                np.testing.assert_array_equal(np.sort(found), np.sort(chosen(model, tokens)))


def asked(server: SglangServer, requests: list[Request], model: PreTrainedModel) -> list[Sample]:
    """A group's samples with routing, of the weights after two steps."""
    body = generate_body(requests, Sampling(1.0, 12, routing=True), (1,), [NOTHING] * len(requests))
    answer = anyio.run(ServerClient(server.url).generate, body)
    routing = Routing.of(model.config, len(requests[0].token_ids))
    return read_samples(answer, len(requests), ["2"], model.config.vocab_size, (1,), routing)


def chosen(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """The experts of each token, [tokens, layers, experts per token]."""
    found: list[torch.Tensor] = []
    hooks = [
        block.mlp.gate.register_forward_hook(lambda *call: found.append(call[2][2]))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found, 1).numpy()
