"""Tests what a weight sync makes of the requests in flight on a real server, in each rollout.pause.

Needs `make sglang`.
"""

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from support.sglang_server import PYTHON, SglangServer
from support.steps import make_config
from support.weight_sync import make_sync, move, stream
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from megatron_bicc.config import PauseMode
from megatron_bicc.rollout.sglang_engine import make_sglang_engine
from megatron_bicc.rollout.types import Request, Sample, Sampling
from megatron_bicc.sglang.client import ServerClient
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

MODEL = Path(__file__).parents[2] / "examples/tiny_policy"
LONG = Sampling(temperature=3.0, max_new_tokens=200)
"""Near-uniform samples: long, as the end is as rare as any other token"""
SHORT = Sampling(temperature=0.8, max_new_tokens=6)
OLD, NEW = 4, 5
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="SGLang is not installed: make sglang"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    one = SglangServer(MODEL, tmp_path_factory.mktemp("server") / "log")
    one.start()
    yield one
    one.kill()


@pytest.fixture(scope="module")
def learner(single_process: None) -> Learner:
    config = make_config(MODEL, "grpo")
    return Learner(config, load_policy(config), AutoTokenizer.from_pretrained(MODEL))


def with_weights(learner: Learner) -> PreTrainedModel:
    """Hugging Face's model with a copy of the policy's weights."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.load_state_dict({name: tensor.clone() for name, tensor in stream(learner)}, strict=False)
    return model


def groups(count: int, size: int) -> list[list[Request]]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 250, size=9 + i).astype(np.int32) for i in range(count)]
    return [[Request(tokens, seed) for seed in range(size)] for tokens in prompts]


def log_probs(
    prompt: np.ndarray,
    sample: Sample,
    temperature: float,
    old: PreTrainedModel,
    new: PreTrainedModel,
    keeps_cache: bool,
) -> np.ndarray:
    """Each token's log-prob under the weights of its version, by Hugging Face: float32 [T].

    keeps_cache: those of the new version read keys and values that the old weights computed, of all tokens
    but the last one before the change, which had not been read.
    """
    row = torch.tensor([*prompt, *sample.token_ids])[None]
    first, change = len(prompt) - 1, int((sample.token_versions() == OLD).sum())
    with torch.no_grad():
        logits = old(row).logits[0]
        if change < len(sample.token_ids):
            read, cache = (first + change, DynamicCache()) if keeps_cache and change else (0, None)
            if read:
                old(row[:, :read], past_key_values=cache, use_cache=True)
            later = new(row[:, read:], past_key_values=cache).logits[0]
            logits[first + change :] = later[first + change - read :]
    log_p = (logits[first:-1] / temperature).log_softmax(-1)
    return log_p.gather(-1, torch.tensor(sample.token_ids, dtype=torch.long)[:, None])[:, 0].numpy()


def wait_for_tokens(url: str, count: int) -> None:
    """Until the running requests of a server have that many tokens."""
    end = time.monotonic() + 60
    while anyio.run(ServerClient(url).get, "/v1/loads")["loads"][0]["num_used_tokens"] < count:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("mode", "method"), [("in_place", "distributed"), ("retract", "tensor"), ("abort", "disk")]
)
def test_a_response_goes_on_with_new_weights(
    mode: PauseMode, method: str, server: SglangServer, learner: Learner, tmp_path: Path
) -> None:
    """The sync's own probe and an evaluation see the new weights only, while older requests are in flight."""
    config = copy.deepcopy(learner.config)
    config.output_dir = str(tmp_path)
    config.rollout.engine, config.rollout.launch = "sglang", "attach"
    config.rollout.sglang.servers = server.url
    config.rollout.max_staleness, config.rollout.pause = 2, mode
    config.weight_sync.method = method
    server.wait()
    engine = make_sglang_engine(config, AutoTokenizer.from_pretrained(MODEL))
    sync = make_sync(config, learner, engine.pool)
    asked = groups(3, 4)
    sync.sync(OLD)
    old = with_weights(learner)
    move(learner, NEW)
    new = with_weights(learner)
    with engine.stream(LONG) as one:
        for key, group in enumerate(asked):
            one.submit(key, group)
        wait_for_tokens(server.url, 12 * 20)
        sync.sync(NEW)
        evaluated = engine.generate(sum(asked, []), SHORT)
        assert one.outstanding() == 3, "nothing was in flight any more"
        found = dict(one.next(60) for _ in asked)
    counts = engine.counts()
    sync.close()
    engine.close()

    assert counts == {"rollout/resent": 0, "rollout/stale": 0}
    for request, sample in zip(sum(asked, []), evaluated, strict=True):
        assert (sample.weight_version, sample.versions) == (NEW, None)
        wanted = log_probs(request.token_ids, sample, SHORT.temperature, old, new, keeps_cache=False)
        np.testing.assert_allclose(sample.log_probs, wanted, atol=1e-4)
    responses = [(group[0].token_ids, sample) for key, group in enumerate(asked) for sample in found[key]]
    assert len(responses) == 12
    for prompt, sample in responses:
        versions = sample.token_versions()
        assert set(versions) <= {OLD, NEW} and (np.diff(versions) >= 0).all()
        assert sample.weight_version == versions[0]
        ended = sample.token_ids == old.config.eos_token_id
        assert not ended[:-1].any()
        assert sample.finish_reason == ("stop" if ended[-1] else "length")
        assert ended[-1] or len(ended) == LONG.max_new_tokens
        wanted = log_probs(prompt, sample, LONG.temperature, old, new, keeps_cache=mode == "in_place")
        np.testing.assert_allclose(sample.log_probs, wanted, atol=1e-4)
    mixed = [sample for _, sample in responses if sample.versions is not None]
    assert len(mixed) > 4 and sum((sample.versions == NEW).sum() for sample in mixed) > 100
