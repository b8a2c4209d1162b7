"""Tests a policy's passes with the kernels against plain torch: log-probs, loss, every gradient."""

from pathlib import Path

import pytest
import torch
from support.emulated_kernels import calls_of_kernels
from support.models import make_model
from support.steps import TOKENIZER, make_config, make_examples, to_groups
from torch import Tensor

from megatron_bicc import device
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.packing.pack import pack
from megatron_bicc.training.batch import collate, packing_settings
from megatron_bicc.weights.hf_weights import load_policy


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.4])
def test_passes_equal_plain_torch(
    kernel_device: torch.device,
    entropy_coefficient: float,
    model_dirs: dict[str, Path],
    single_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    csrc = device.kernels()
    monkeypatch.setattr(device, "_kernels", None)  # rows come from the packer's plain path in both runs
    config = make_config(model_dirs["qwen3_untied"], "bicc", loss__entropy_coefficient=entropy_coefficient)
    policy = load_policy(config)
    _, conditioned = packing_settings(config, policy.hf_config, TOKENIZER)
    groups = to_groups(make_examples(make_model("qwen3_untied"), 0.8))
    packed = pack(collate(groups).rollouts, conditioned, dp_size=1, rank=0)
    batches = [PackedBatch.make(batch, kernel_device) for batch in packed.micro_batches]

    def loss(index: int, logp_A: Tensor, entropy_A: Tensor) -> Tensor:
        weight_A = torch.linspace(-1.0, 1.0, len(logp_A), device=kernel_device)
        return (weight_A * (logp_A - entropy_coefficient * entropy_A)).sum()

    def run() -> tuple[list[Tensor], float, list[Tensor]]:
        found = policy.log_probs(batches)
        total = policy.accumulate_gradients(batches, loss)
        return found, total, [p.main_grad.clone() for p in policy.modules[0].parameters()]

    expected = run()
    monkeypatch.setattr(device, "_kernels", csrc)
    called = calls_of_kernels(monkeypatch)
    found = run()
    assert {"merge", "add_gradients", "logit_statistics", "logit_gradient"} <= set(called)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
    for ours, theirs in zip(found[0] + found[2], expected[0] + expected[2], strict=True):
        assert (ours - theirs).norm() <= 2e-5 * theirs.norm()
