"""Tests bf16 weights with fp32 main weights: rounding errors of the shared layout and of the optimizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.layout import row_batch
from support.models import make_model
from support.steps import TOKENIZER, make_config, make_examples, to_groups

from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.policy import Policy
from megatron_bicc.packing.pack import pack
from megatron_bicc.rollout.types import Group
from megatron_bicc.training.batch import collate, packing_settings
from megatron_bicc.weights.hf_weights import load_policy

FAMILY = "qwen3_untied"
Pieces = list[tuple[PackedBatch, np.ndarray]]
"""Packed micro-batches, each with the index of its rows' tokens"""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that bf16 holds exactly, so that only arithmetic differs between types."""
    path = tmp_path_factory.mktemp("bf16")
    make_model(FAMILY).bfloat16().float().save_pretrained(path)
    return path


def make_policy(path: Path, dtype: str, lr: float = 0.0) -> Policy:
    config = make_config(path, "grpo")
    config.model.dtype, config.optimizer.lr = dtype, lr
    return load_policy(config)


def pieces(groups: list[Group], policy: Policy) -> Pieces:
    config = make_config(Path(), "grpo")
    plain, _ = packing_settings(config, policy.hf_config, TOKENIZER)
    packed = pack(collate(groups).rollouts, plain, dp_size=1, rank=0)
    return [(PackedBatch.make(b, torch.device("cpu")), b.gather_A) for b in packed.micro_batches]


def one_row_a_response(groups: list[Group], tokens: int) -> Pieces:
    """Ordinary causal rows; those of prompts are given the index `tokens`, which stands for no token."""
    batches, first = [], 0
    for prompt, response in ((g.prompt.token_ids, s.token_ids) for g in groups for s in g.samples):
        gather = np.r_[np.full(len(prompt) - 1, tokens), first : first + len(response)]
        batches.append((row_batch(np.concatenate([prompt, response])), gather))
        first += len(response)
    return batches


def differentiate(policy: Policy, pieces: Pieces, weight_T: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """Log-probs [T] and the gradient of their weighted sum, all parameters in one vector."""

    logps: list[torch.Tensor] = []

    def loss(index: int, logp_N: torch.Tensor, entropy_N: torch.Tensor) -> torch.Tensor:
        assert index == len(logps)
        logps.append(logp_N.detach())
        return (logp_N * torch.from_numpy(weight_T[pieces[index][1]])).sum()

    policy.accumulate_gradients([packed for packed, _ in pieces], loss)
    logp_T = np.zeros(len(weight_T))
    for (_, gather), logp_N in zip(pieces, logps, strict=True):
        logp_T[gather] = logp_N.double().numpy()
    gradients = [p.main_grad.double().flatten() for p in policy.modules[0].parameters()]
    logp_T[weight_T == 0] = 0.0
    return logp_T, torch.cat(gradients)


def test_errors_are_no_larger_than_of_one_row_a_response(model_dir: Path, single_process: None) -> None:
    groups = to_groups(make_examples(make_model(FAMILY), 0.8))
    exact, rounded = make_policy(model_dir, "float32"), make_policy(model_dir, "bfloat16")
    shared = pieces(groups, exact)
    tokens = sum(len(gather) for _, gather in shared)
    alone = one_row_a_response(groups, tokens)
    weight_T = np.append(np.random.default_rng(0).normal(size=tokens), 0.0).astype(np.float32)

    true_logp, true_gradient = differentiate(exact, alone, weight_T)
    found = {
        name: differentiate(rounded, layout, weight_T)
        for name, layout in [("shared", shared), ("alone", alone)]
    }
    error = {name: np.linalg.norm(logp - true_logp) for name, (logp, _) in found.items()}
    gradient_error = {name: float((g - true_gradient).norm()) for name, (_, g) in found.items()}
    assert 0 < error["shared"] <= 1.01 * error["alone"]
    assert 0 < gradient_error["shared"] <= 1.01 * gradient_error["alone"]


def test_updates_below_the_resolution_of_bf16_add_up(model_dir: Path, single_process: None) -> None:
    lr, updates = 1e-4, 20
    policy = make_policy(model_dir, "bfloat16", lr)
    batches = pieces(to_groups(make_examples(make_model(FAMILY), 0.8)), policy)
    before = policy.host_copy()
    weight_T = np.ones(sum(len(gather) for _, gather in batches), np.float32)
    for _ in range(updates):
        differentiate(policy, batches, weight_T)
        policy.update()
    moved = torch.cat(
        [(a.float() - b.float()).abs().flatten() for a, b in zip(policy.host_copy(), before, strict=True)]
    )
    # Adam moves a weight by about lr an update while its gradient keeps its sign; bf16 resolves 1e-3 at 0.2
    assert moved.mean() == pytest.approx(lr * updates, rel=0.3)
