"""Tests the SGLang engine against two real servers: its samples, and the faults that it tolerates.

The servers belong to another process (server_holder.py), which stands in for a trainer; the tests attach to
them. The last test kills it. Needs `make sglang`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import anyio
import numpy as np
import psutil
import pytest
import torch
from support.faulty_proxy import Fault, FaultyProxy
from support.sglang_server import PYTHON
from support.steps import make_config
from support.weight_sync import make_sync
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from megatron_bicc import device
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.errors import UserError
from megatron_bicc.rewards.registry import Completion
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.sampling import Collector
from megatron_bicc.rollout.sglang_engine import SglangEngine, make_sglang_engine
from megatron_bicc.rollout.types import Request, RolloutError, Sample, Sampling
from megatron_bicc.sglang.client import ServerClient, ServerError, ServerRefusal
from megatron_bicc.sglang.pool import check_model
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy
from megatron_bicc.weights.sync import ServerWeightSync

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "examples/tiny_policy"
LONG = Sampling(temperature=5.0, max_new_tokens=400)
"""Near-uniform samples: long, as the end is as rare as any other token"""
pytestmark = [
    pytest.mark.skipif(
        not (REPOSITORY / ".venv-sglang").exists(), reason="SGLang is not installed: make sglang"
    ),
    pytest.mark.timeout(900),
]


@dataclass
class Servers:
    """Two servers and the process that started them."""

    urls: list[str]
    holder: subprocess.Popen

    def processes(self, url: str) -> list[psutil.Process]:
        """The server's own process, then those it started."""
        port = url.rpartition(":")[2]
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            guard = "megatron_bicc.sglang.guard" in command
            if "sglang.launch_server" in command and port in command and not guard:
                return [process, *process.children(recursive=True)]
        return []


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("servers")
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/sglang/server_holder.py")]
    holder = subprocess.Popen([*command, str(directory)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    yield Servers(holder.stdout.readline().split(), holder)
    holder.kill()


@pytest.fixture(scope="module")
def learner(single_process: None) -> Learner:
    """With weights that are not those of the files that the servers read."""
    config = attach_config([])
    policy = load_policy(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.modules[0].parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return Learner(config, policy, AutoTokenizer.from_pretrained(MODEL))


def attach_config(urls: list[str], **settings: float) -> Config:
    config = make_config(MODEL, "grpo")
    config.rollout.engine, config.rollout.launch = "sglang", "attach"
    config.rollout.sglang.servers = ",".join(urls)
    config.rollout.sglang.health_timeout_s = 5.0
    config.weight_sync.keep_files = True
    for name, value in settings.items():
        setattr(config.rollout.sglang, name, value)
    return config


@contextmanager
def attached(
    urls: list[str],
    learner: Learner,
    directory: Path,
    version: int = 3,
    model: Path = MODEL,
    **settings: float,
) -> Iterator[tuple[SglangEngine, ServerWeightSync]]:
    """An engine whose servers hold the learner's weights. model: directory of its tokenizer and settings."""
    config = attach_config(urls, **settings)
    config.model.path = str(model)
    config.output_dir = str(directory)
    engine = make_sglang_engine(config, AutoTokenizer.from_pretrained(model))
    sync = make_sync(config, learner, engine.pool)
    try:
        sync.sync(version)
        yield engine, sync
    finally:
        sync.close()
        engine.close()


def requests(prompts: int, group_size: int) -> list[Request]:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 250, size=rng.integers(5, 12)).astype(np.int32) for _ in range(prompts)]
    return [Request(t, 100 * i + j) for i, t in enumerate(tokens) for j in range(group_size)]


def assert_samples_are_the_policys(
    asked: list[Request], samples: list[Sample], learner: Learner, sampling: Sampling
) -> None:
    """One sample a request, with log-probs that a forward pass confirms."""
    assert len(samples) == len(asked)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with device.megatron():
        weights = dict(hf_tensors(learner.policy.modules, learner.policy.hf_config))
    missing, unknown = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unknown, "tied, and nothing else"
    for request, sample in zip(asked, samples, strict=True):
        row = torch.tensor([*request.token_ids, *sample.token_ids])
        with torch.no_grad():
            logits = model(row[None]).logits[0, len(request.token_ids) - 1 : -1]
        log_p = (logits / sampling.temperature).log_softmax(-1)
        expected = log_p.gather(-1, torch.tensor(sample.token_ids, dtype=torch.long)[:, None])[:, 0]
        np.testing.assert_allclose(sample.log_probs, expected.numpy(), atol=1e-4)
        stopped = sample.token_ids[-1] == model.config.eos_token_id
        assert sample.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.token_ids) == sampling.max_new_tokens
        assert sample.weight_version == 3


def until(true: Callable[[], bool], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def is_idle(url: str) -> bool:
    """A server that works refuses to forget its cache."""
    try:
        anyio.run(ServerClient(url).flush_cache)
    except ServerRefusal:
        return False
    return True


def is_healthy(url: str) -> bool:
    try:
        anyio.run(ServerClient(url).get, "/health", 5.0)
    except ServerError:
        return False
    return True


def weight_version(url: str) -> str:
    return str(anyio.run(ServerClient(url).model_info)["weight_version"])


def test_samples(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    sampling = Sampling(temperature=0.7, max_new_tokens=24)
    with attached(servers.urls, learner, tmp_path) as (engine, _):
        asked = requests(6, 4)
        samples = engine.generate(asked, sampling)
        assert engine.counts() == {"rollout/resent": 0, "rollout/stale": 0}
    assert_samples_are_the_policys(asked, samples, learner, sampling)
    distinct = {tuple(sample.token_ids) for sample in samples[:4]}
    assert len(distinct) > 1, "the samples of a group are all the same"


def test_every_end_token_ends_a_sample(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    """The servers' own generation_config.json names one only."""
    model = shutil.copytree(MODEL, tmp_path / "model")
    own, others = learner.policy.hf_config.eos_token_id, list(range(40, 60))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [own, *others]}))
    with attached(servers.urls, learner, tmp_path, model=model) as (engine, _):
        samples = engine.generate(requests(6, 4), Sampling(temperature=2.0, max_new_tokens=24))
    for sample in samples:
        ended = [token in (own, *others) for token in sample.token_ids.tolist()]
        assert not any(ended[:-1])
        assert sample.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == 24
    assert any(sample.token_ids[-1] in others for sample in samples)


def assert_ends_in_flight(engine: SglangEngine, asked: list[Request], urls: list[str]) -> None:
    """Eight groups of four are aborted on the servers when their stream ends."""
    with engine.stream(LONG) as stream:
        for i in range(8):
            stream.submit(i, asked[4 * i : 4 * i + 4])
        until(lambda: not all(is_idle(url) for url in urls), 30)
        assert stream.outstanding() > 0, "every group has finished: nothing is left to abort"
    for url in urls:
        until(lambda url=url: is_idle(url), 30)


def test_what_is_not_wanted_any_more_is_aborted(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    asked = requests(8, 4)
    with attached(servers.urls, learner, tmp_path) as (engine, _):
        assert_ends_in_flight(engine, asked, servers.urls)
        assert engine.counts() == {"rollout/resent": 0, "rollout/stale": 0}
        samples = engine.generate(asked, Sampling(1.0, 8))
    assert_samples_are_the_policys(asked, samples, learner, Sampling(1.0, 8))


def every_fourth_length(completions: list[Completion]) -> np.ndarray:
    """A verifier that finds some groups all wrong."""
    return np.array([len(each.response) % 4 == 0 for each in completions], np.float32)


def test_dynamic_sampling(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    config = make_config(MODEL, "dapo")
    config.rollout.prompts_per_step, config.rollout.max_prompts_per_step = 6, 40
    prompts = [Prompt(i, [], r.token_ids, "", "", {}) for i, r in enumerate(requests(40, 1))]
    collector = Collector(config, prompts, PromptSampler(len(prompts), 6, seed=1))
    sampling, tokenizer = Sampling(0.8, 24), AutoTokenizer.from_pretrained(MODEL)
    with attached(servers.urls, learner, tmp_path) as (engine, _):
        sampler = GroupSampler(engine, every_fourth_length, tokenizer, sampling, group_size=4)
        found = [collector.step(step, sampler) for step in range(1, 6)]
    for step in found:
        assert len(step.groups) == 6
        assert all(0 < group.rewards.sum() < 4 for group in step.groups)
    assert any(len(step.sampled) > 6 for step in found), "no group was without contrast: this shows nothing"
    drawn = sum(len(step.sampled) + step.aborted for step in found)
    assert collector.state_dict()["drawn"] == drawn
    groups = [group for step in found for group in step.sampled]
    asked = [Request(group.prompt.token_ids, 0) for group in groups for _ in group.samples]
    samples = [sample for group in groups for sample in group.samples]
    assert_samples_are_the_policys(asked, samples, learner, sampling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "vocabulary is not the 300 tokens"),
        ({"vocab_size": 256}, "vocabulary is not the 256 tokens"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architecture is Qwen3ForCausalLM; model.path has Qwen2"),
    ],
)
def test_another_model_is_refused(servers: Servers, change: dict, message: str) -> None:
    ours = PretrainedConfig.from_dict(AutoConfig.from_pretrained(MODEL).to_dict() | change)
    with pytest.raises(UserError, match=f"{servers.urls[0]} serves .*{message}"):
        anyio.run(check_model, ServerClient(servers.urls[0]), ours)


def test_an_unknown_token_is_not_sent(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    with attached(servers.urls[:1], learner, tmp_path) as (engine, _):
        with pytest.raises(UserError, match="a prompt has token 264"):
            engine.generate([Request(np.array([3, 264], dtype=np.int32), 1)], LONG)
        assert engine.generate([Request(np.array([3, 263], dtype=np.int32), 1)], Sampling(1.0, 2))


def test_memory_is_released_and_taken_back(
    servers: Servers, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the weights before they are sent, the rest after that and before the server generates."""
    asked, sampling, posted, post = requests(2, 2), Sampling(1.0, 8), [], ServerClient.post

    def recorded(client: ServerClient, path: str, body: Any, timeout_s: float | None = None) -> Any:
        if client.url == servers.urls[0]:
            posted.append("+".join([path, *(body.get("tags", ()) if isinstance(body, dict) else ())]))
        return post(client, path, body, timeout_s)

    with attached(servers.urls, learner, tmp_path) as (engine, sync):
        monkeypatch.setattr(ServerClient, "post", recorded)
        with engine.memory_released():
            pass
        sync.sync(3)
        order = [
            "/release_memory_occupation",
            "/resume_memory_occupation+weights",
            "/update_weights_from_tensor",
            "/resume_memory_occupation+kv_cache+cuda_graph",
            "/generate",
        ]
        assert [posted.index(path) for path in order] == sorted(posted.index(path) for path in order)
        assert_samples_are_the_policys(asked, engine.generate(asked, sampling), learner, sampling)


@pytest.mark.parametrize("fault", ["500", "half of the JSON", "connection cut"])
def test_spoiled_answers(fault: Fault, servers: Servers, learner: Learner, tmp_path: Path) -> None:
    proxy = FaultyProxy(servers.urls[0])
    with attached([proxy.url], learner, tmp_path) as (engine, _):
        proxy.spoil(fault, 2)
        asked, sampling = requests(4, 2), Sampling(1.0, 8)
        samples = engine.generate(asked, sampling)
        assert engine.counts()["rollout/resent"] == 4
    assert_samples_are_the_policys(asked, samples, learner, sampling)


def test_no_server_left(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    proxy = FaultyProxy(servers.urls[0])
    with attached([proxy.url], learner, tmp_path, retry_timeout_s=3.0) as (engine, _):
        proxy.close()
        with pytest.raises(RolloutError, match=f"no answer after 3 s of attempts.*{proxy.url}"):
            engine.generate(requests(2, 2), LONG)


def test_stale_weights(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    async def rename() -> None:
        body = {"new_version": "2", "abort_all_requests": False}
        await ServerClient(servers.urls[1]).post("/update_weight_version", body)

    with attached(servers.urls, learner, tmp_path) as (engine, _):
        anyio.run(rename)
        asked, sampling = requests(8, 2), Sampling(1.0, 8)
        samples = engine.generate(asked, sampling)
        counts = engine.counts()
        assert counts["rollout/stale"] > 0
        assert counts["rollout/resent"] == counts["rollout/stale"]
        until(lambda: engine.generate(asked, sampling) and weight_version(servers.urls[1]) == "3")
    assert_samples_are_the_policys(asked, samples, learner, sampling)


ROUTER = """
import sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
port, *urls = sys.argv[1:]
args = RouterArgs(host="127.0.0.1", port=int(port), prometheus_port=0, worker_urls=urls, log_level="warn")
Router.from_args(args).start()
"""
"""What sglang_router.launch_router does, without importing for seconds what its other modes need"""


@contextmanager
def routed(urls: list[str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """Yields the URL and the process of SGLang's own router of these servers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = subprocess.Popen([str(PYTHON), "-c", ROUTER, port, *urls])
    yield f"http://127.0.0.1:{port}", process
    process.kill()
    process.wait()


@pytest.mark.skipif(
    not list(PYTHON.parents[1].glob("lib/python3*/site-packages/sglang_router")),
    reason="sglang-router is not in .venv-sglang: make sglang",
)
def test_a_router(
    servers: Servers, learner: Learner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples come through it, from a server that joins late, too; without it, from its workers."""
    first, late = servers.urls
    asked, sampling, through = requests(8, 4), Sampling(0.7, 24), Counter()
    generate = ServerClient.generate

    def counted(client: ServerClient, body: dict[str, Any], timeout_s: float | None = None) -> Any:
        through[client.url] += "rid" in body
        return generate(client, body, timeout_s)

    def sampled() -> set[str]:
        """Returns the URLs that were asked for samples, which are the policy's."""
        through.clear()
        assert_samples_are_the_policys(asked, engine.generate(asked, sampling), learner, sampling)
        return set(through)

    monkeypatch.setattr(ServerClient, "generate", counted)
    with routed([first]) as (router, process), attached([router], learner, tmp_path) as (engine, sync):
        assert sampled() == {router}
        anyio.run(ServerClient(late).post, "/update_weight_version", {"new_version": "2"})
        anyio.run(ServerClient(router).post, "/workers", {"url": late})
        until(lambda: len(engine.pool.own) == 2, 30)
        sync.sync(3)
        assert weight_version(late) == "3"
        assert sampled() == {router}

        assert_ends_in_flight(engine, asked, servers.urls)

        process.kill()
        assert sampled() >= {first, late}


def test_a_killed_server(servers: Servers, learner: Learner, tmp_path: Path) -> None:
    """Its requests go elsewhere; it comes back, is given the weights, and serves while the other hangs."""
    killed, other = servers.urls
    asked = requests(16, 4)
    with attached(servers.urls, learner, tmp_path) as (engine, _):
        victim = servers.processes(killed)[0]
        Timer(0.7, victim.kill).start()
        samples = engine.generate(asked, LONG)
        assert engine.counts()["rollout/resent"] > 0
        assert_samples_are_the_policys(asked, samples, learner, LONG)

        until(lambda: is_healthy(killed) and weight_version(killed) == "3")
        assert servers.processes(killed)[0].pid != victim.pid

        hanging = servers.processes(other)
        Timer(0.7, lambda: [process.suspend() for process in hanging]).start()
        try:
            samples = engine.generate(asked, LONG)
        finally:
            for process in hanging:
                process.resume()
        assert engine.counts()["rollout/resent"] > 0
    assert_samples_are_the_policys(asked, samples, learner, LONG)


def test_servers_end_with_their_trainer(servers: Servers) -> None:
    processes = [process for url in servers.urls for process in servers.processes(url)]
    assert len(processes) > 4
    files = {name for name in os.listdir("/dev/shm") if any(name in maps(p.pid) for p in processes)}
    assert files
    servers.holder.send_signal(signal.SIGKILL)
    until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes))
    until(lambda: not files & set(os.listdir("/dev/shm")), 30)


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()
