"""Tests that a gradient, weight, log-prob or reward that is not finite ends the run before it is used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.scripted import PROMPTS, Words
from support.steps import TOKENIZER, make_config
from torch import Tensor

from megatron_bicc.errors import NotFiniteError
from megatron_bicc.model.policy import Policy
from megatron_bicc.rollout.collect import GroupSampler
from megatron_bicc.rollout.local import LocalEngine
from megatron_bicc.rollout.types import RolloutError, Sample, Sampling
from megatron_bicc.weights.hf_weights import load_policy
from megatron_bicc.weights.sync import EngineWeightSync

NAN, INF = float("nan"), float("inf")


def make_policy(path: Path, dtype: str, clip_grad: float) -> Policy:
    """With the random gradients of a step accumulated."""
    config = make_config(path, "grpo")
    config.model.dtype, config.optimizer.lr, config.optimizer.clip_grad = dtype, 1e-3, clip_grad
    config.optimizer.weight_decay = 0.1
    policy = load_policy(config)
    for parameter in policy.chunks[0].parameters():
        parameter.main_grad.normal_()
    return policy


def held(policy: Policy) -> list[Tensor]:
    """A copy of the weights, the main weights, Adam's moments and counts, and where the schedule is."""
    adam = policy.optimizer.chained_optimizers[0].optimizer
    main = [parameter for group in adam.param_groups for parameter in group["params"]]
    moments = [x for parameter in main for _, x in sorted(adam.state[parameter].items())]
    schedule = [torch.tensor([policy.scheduler.num_steps, policy.learning_rate()])]
    return [x.detach().clone() for x in (*policy.modules[0].parameters(), *main, *moments, *schedule)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_changes_nothing(
    dtype: str, clip_grad: float, model_dirs: dict[str, Path], single_process: None
) -> None:
    """Nor does a finite one whose norm overflows; the next good one is taken."""
    policy = make_policy(model_dirs["qwen3_tied"], dtype, clip_grad)
    before = held(policy)
    # the last norm is a single tensor of a few values
    gradient = policy.modules[0].decoder.final_layernorm.weight.main_grad
    for bad, said in ((NAN, "model.norm.weight"), (-INF, "model.norm.weight"), (1e20, "float32 can")):
        good = gradient.clone()
        gradient[0] = bad
        with pytest.raises(NotFiniteError, match=f"{said}.*left as they were"):
            policy.update()
        assert all(torch.equal(now, x) for now, x in zip(held(policy), before, strict=True))
        gradient.copy_(good)
    assert np.isfinite(policy.update())
    after = held(policy)
    assert not torch.equal(after[0], before[0])
    assert all(x.isfinite().all() for x in after)


def test_weights_that_are_not_finite_are_not_sent(model_dirs: dict[str, Path], single_process: None) -> None:
    """By name; the engine keeps what it had."""
    path = model_dirs["qwen3_tied"]
    policy = make_policy(path, "float32", 1.0)
    engine = LocalEngine(str(path), TOKENIZER, torch.float32, torch.device("cpu"), 1)
    policy.modules[0].decoder.layers[1].mlp.linear_fc2.weight.data[0, 0] = INF
    with pytest.raises(NotFiniteError, match=r"not finite: model.layers.1.mlp.down_proj.weight$"):
        EngineWeightSync(policy, engine).sync(1)
    assert engine.version == 0
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())


@pytest.mark.parametrize(
    ("log_prob", "reward", "said"),
    [
        (NAN, 0.0, "sample 1 of the prompt of row 8: the engine's log-prob of token 0 is nan"),
        (-INF, 0.0, "log-prob of token 0 is -inf"),
        (-1.0, NAN, "sample 1 of the prompt of row 8: the verifier's reward is nan"),
        (-1.0, INF, "reward is inf"),
    ],
)
def test_rollouts_are_checked_where_nothing_is_learned_from_them(
    log_prob: float, reward: float, said: str
) -> None:
    """All are wrong: no step would be taken, and none would look."""
    samples = [Sample(np.zeros(1, np.int32), np.array([p], np.float32), "stop", 0) for p in (-1.0, log_prob)]
    rewards = np.array([0.0, reward], np.float32)
    sampler = GroupSampler(None, lambda completions: rewards, Words(), Sampling(1.0, 1), 2)
    with pytest.raises(RolloutError, match=said):
        sampler.scored([PROMPTS[7]], samples)
