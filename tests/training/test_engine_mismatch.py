"""Tests an engine that computes another model than the policy: a warning, or a stop before any update."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import make_model
from support.steps import TOKENIZER, make_config
from support.two_steps import odd

from megatron_bicc.algorithms.advantages import TokenLogProbs
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt, PromptSampler
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.rollout.local import LocalEngine
from megatron_bicc.rollout.sampling import Collected, Collector
from megatron_bicc.rollout.types import Group, Request, Sampling
from megatron_bicc.startup import Inputs
from megatron_bicc.train import Trainer
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.step_metrics import EngineMismatch, MismatchCheck, current_log_probs
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import EngineWeightSync


def configured(dtype: str, temperature: float = 1.0) -> Config:
    config = Config()
    config.model.dtype, config.rollout.temperature = dtype, temperature
    return config


def log_probs(difference_T: np.ndarray) -> list[TokenLogProbs]:
    """Of a policy whose log-probs differ from the engine's by so much."""
    mu_T = np.full(len(difference_T), -2.0)
    return [TokenLogProbs(mu_T + difference_T, None, mu_T, -mu_T)]


def noise(size: float, tokens: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, size, tokens)


@pytest.mark.parametrize(
    ("dtype", "temperature", "experts", "difference_T", "expected"),
    [
        ("float32", 1.0, False, noise(1e-6), ""),
        ("float32", 1.0, False, noise(1e-4), ""),
        ("float32", 1.0, False, noise(0.02), "warned"),
        ("float32", 1.0, False, noise(0.4), "stopped"),
        ("float32", 0.1, False, noise(1e-3), ""),
        ("bfloat16", 1.0, False, noise(0.05), ""),
        ("bfloat16", 1.0, False, noise(0.3), "warned"),
        ("bfloat16", 0.1, False, noise(0.3), ""),
        ("bfloat16", 1.0, False, noise(1.5), "stopped"),
        # a router's other choice for one token in a hundred
        ("bfloat16", 1.0, True, np.where(np.arange(4000) % 100, noise(0.02), 1.33), ""),
        # one token of weight 22,000: over any bound, and no sign of another model
        ("bfloat16", 1.0, True, np.where(np.arange(4000), noise(0.02), 10.0), "warned"),
    ],
)
def test_what_rounding_explains(
    dtype: str,
    temperature: float,
    experts: bool,
    difference_T: np.ndarray,
    expected: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    check, found = MismatchCheck(configured(dtype, temperature), experts), ""
    try:
        check.step(1, log_probs(difference_T))
    except EngineMismatch as error:
        assert "\n" not in str(error)
        found = "stopped"
    assert (found or ("warned" if caplog.messages else "")) == expected
    if caplog.messages:
        assert "step 1: rollout engine and policy differ: kl/rollout_old is " in caplog.messages[0]


def test_later_steps_warn_once_until_it_is_well_again(caplog: pytest.LogCaptureFixture) -> None:
    check = MismatchCheck(configured("float32"), experts=False)
    for step, size in enumerate((1e-6, 0.4, 0.4, 1e-6, 0.4), 1):
        check.step(step, log_probs(noise(size)))
    assert [message.split(":")[0] for message in caplog.messages] == ["step 2", "step 5"]


def test_16_bits_are_supposed_where_the_engine_may_have_them(caplog: pytest.LogCaptureFixture) -> None:
    for launch, arguments in (("attach", ""), ("spawn", "--quantization fp8"), ("spawn", "")):
        config = configured("float32")
        config.rollout.engine, config.rollout.launch = "sglang", launch
        config.rollout.sglang.server_args = arguments
        MismatchCheck(config, experts=False).step(1, log_probs(noise(0.02)))
    assert len(caplog.messages) == 1


def sampled(engine: LocalEngine, temperature: float) -> list[Group]:
    """Two groups of four, rewards by turns."""
    groups = []
    for i in range(2):
        prompt = np.arange(2 + i, 8 + i, dtype=np.int32)
        samples = engine.generate([Request(prompt, seed) for seed in range(4)], Sampling(temperature, 30))
        rewards = np.array([1, 0, 1, 0], np.float32)
        groups.append(Group(Prompt(i, [], prompt, "", "", {}), samples, [""] * 4, rewards))
    return groups


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_cache_that_drops_tokens(
    temperature: float, tmp_path: Path, single_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    """With a real engine and policy: agreement in fp32, then an engine with a window of 8 tokens."""
    caplog.set_level(logging.WARNING, "megatron_bicc")
    make_model("llama3").save_pretrained(tmp_path)
    config = make_config(tmp_path, "grpo", rollout__temperature=temperature)
    config.output_dir = str(tmp_path)
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    tokenizer = type("Tokenizer", (), {"eos_token_id": 1, "pad_token_id": 0, "get_added_vocab": dict})
    engine = LocalEngine(str(tmp_path), tokenizer, torch.float32, torch.device("cpu"), 8)
    collector = Collector(config, [], PromptSampler(1, 1, 0))
    inputs = Inputs(config, TOKENIZER, odd, [], [], {}, collector, None)
    sync = EngineWeightSync(policy, engine)

    def step(number: int = 1) -> None:
        trainer = Trainer(inputs, policy, learner, engine, sync)
        trainer.step = number
        groups = sampled(engine, temperature)
        trainer.learn(Collected(groups, groups, carried=0, leftover=0, aborted=0), Stopwatch())

    step()
    assert not caplog.messages
    engine.model.config.sliding_window = 8
    step(2)  # sampled with the weights of version 0, not 1: they may differ
    before = policy.scheduler.num_steps
    with pytest.raises(EngineMismatch, match="they compute different models"):
        step()
    assert policy.scheduler.num_steps == before


def test_only_whole_responses_of_the_newest_version_are_compared() -> None:
    old_T = np.arange(6, dtype=np.float32)
    rollouts = SimpleNamespace(offsets_R=np.array([0, 2, 4, 6]))
    batch = SimpleNamespace(rollouts=rollouts, versions_T=np.array([3, 3, 2, 3, 2, 2], np.int32))
    update = SimpleNamespace(batch=batch, log_probs=TokenLogProbs(old_T, None, old_T + 1, old_T))
    (found,) = current_log_probs([update], 3)
    assert (found.old_T.tolist(), found.rollout_T.tolist()) == ([0, 1], [1, 2])
    assert current_log_probs([update], 4) == []
