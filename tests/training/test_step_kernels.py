"""Tests a whole step through csrc's kernels against the plain path, and what either copies to the device."""

from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support.steps import CASES, REGULARISED, TOKENIZER, hf_gradients, make_config, make_examples, to_groups
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from megatron_bicc import device
from megatron_bicc.algorithms.advantages import TokenLogProbs, advantages, token_weights
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.batch import Packer, StepValues, TrainBatch, collate, packing_settings
from megatron_bicc.training.learner import Learner, StepResult
from megatron_bicc.training.step_metrics import update_metrics
from megatron_bicc.weights.hf_weights import load_policy

ALL_TERMS = {
    "loss__correction": "token_tis",
    "loss__correction_high": 1.2,
    "loss__clip_low": 0.001,
    "loss__clip_high": 0.001,
    "optimizer__lr": 1e-3,
}
"""Besides a case's own: a correction, and edges that a second update passes"""


def learn(path: Path, case: str, **settings: object) -> tuple[list[StepResult], dict, dict[str, float]]:
    """Takes two updates; returns their results, and the second one's gradients and metrics."""
    algorithm, changes = (CASES | REGULARISED)[case]
    config = make_config(path, algorithm, **{**changes, **ALL_TERMS, **settings})
    config.train.updates_per_step = 2
    torch.manual_seed(0)
    groups = to_groups(make_examples(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), 0.8))
    policy = load_policy(config)
    results = Learner(config, policy, TOKENIZER).step(groups[::-1] + groups, Stopwatch())
    metrics = update_metrics(results[-1], config, 0)
    return results, hf_gradients(policy), metrics


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("bicc_kl_entropy_mixed", {}),
        ("bicc_rcc_mixed_conditioned", {"loss__objective": "sequence", "bicc__context_source": "pair"}),
    ],
)
def test_a_step_through_the_kernels_equals_the_plain_one(
    case, settings, kernel_device, model_dirs, single_process, monkeypatch
) -> None:
    path = model_dirs["qwen3_tied"]
    own, own_gradients, own_metrics = learn(path, case, **settings)
    monkeypatch.setattr(device, "_kernels", None)
    plain, gradients, metrics = learn(path, case, **settings)
    for mine, other in zip(own, plain, strict=True):
        assert mine.loss == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
        assert mine.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
        for trained, expected in zip(mine.trained, other.trained, strict=True):
            for field in fields(trained.ratio):
                found, wanted = (getattr(x.ratio, field.name) for x in (trained, expected))
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=field.name)
    assert own_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert sum(value for name, value in metrics.items() if name.startswith("clip/")) > 0
    for name, gradient in gradients.items():
        assert (own_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name


class CopiesToMeta(TorchDispatchMode):
    """Counts copies from the CPU to the meta device, which stands for a GPU here."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and found.is_meta:
            self.count, self.bytes = self.count + 1, self.bytes + args[0].nbytes
        return found


def copied(model: Path, budget: int) -> tuple[CopiesToMeta, int]:
    """Returns the copies of a step in both layouts, with its number of micro-batches."""
    config = make_config(model, "bicc", bicc__weight=0.5, train__max_tokens_per_microbatch=budget)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    batch = collate(to_groups(make_examples(hf, 0.8)))
    logp_T = batch.rollout_logp_T
    log_probs = TokenLogProbs(logp_T, logp_T, logp_T, logp_T)
    adv = advantages(batch.rollouts, log_probs, config)
    weight_R = token_weights(batch.lengths_R, config.loss.aggregation, 64)
    with CopiesToMeta() as copies:
        packer = Packer(batch.rollouts)
        packed = [packer.pack(s)[1] for s in packing_settings(config, hf.config, TOKENIZER)]
        values = StepValues.upload(log_probs, logp_T, adv, weight_R)
        for layout in packed:
            for one in layout:
                TrainBatch.make(one, "bilateral", 1.0, None, values)
    return copies, sum(map(len, packed))


def test_copies_to_the_device_do_not_grow_with_the_micro_batches(
    model_dirs, single_process, monkeypatch
) -> None:
    monkeypatch.setattr(device, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(device, "_kernels", ModuleType("never called: the meta device has no data"))
    path = model_dirs["qwen3_tied"]
    (few, one), (many, several) = copied(path, 4096), copied(path, 64)
    # tokens; for each of two layouts, the plan and the segments; values of tokens and rollouts
    assert several > one == 2 and few.count == many.count == 6
    monkeypatch.setattr(device, "_kernels", None)
    plain, _ = copied(path, 64)
    # rows and segments of each micro-batch in one copy; the values still go up once
    assert plain.count == several + 1
