"""Tests the metrics of a step on GPUs, with a double of one: FLOPs by hand, memory, speed."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.steps import TOKENIZER, make_config, make_examples, to_groups
from transformers import AutoModelForCausalLM

from megatron_bicc import device
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.model.flops import peak_flops
from megatron_bicc.training.learner import Learner
from megatron_bicc.training.step_metrics import gpu_metrics
from megatron_bicc.weights.hf_weights import load_policy


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_of_a_gpu_by_its_name(gpu: str, peak: float | None) -> None:
    assert peak_flops(gpu) == peak


def test_figures_are_those_of_the_steps_passes(
    model_dirs: dict[str, Path], single_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of BICC with RCC: old and reference log-probs in the plain layout, training in the bilateral."""
    path = model_dirs["qwen3_tied"]
    config = make_config(path, "bicc")
    policy = load_policy(config)
    learner = Learner(config, policy, TOKENIZER)
    model = AutoModelForCausalLM.from_pretrained(path)
    results = learner.step(to_groups(make_examples(model, 0.8)), Stopwatch())
    assert gpu_metrics(results, 2.0, policy.hf_config, config) == {}  # on a CPU
    monkeypatch.setattr(device, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(device, "take_peak_bytes", lambda: 5_000_000_000)
    fp32 = gpu_metrics(results, 2.0, policy.hf_config, config)
    assert fp32.keys() == {"memory/peak_gb", "perf/rows_per_gpu_second"}
    config.model.dtype = "bfloat16"
    found = gpu_metrics(results, 2.0, policy.hf_config, config)
    (result,) = results
    (trained,) = result.trained
    plain, again = result.passes
    assert plain is again and plain.settings.layout == "plain" and trained.layout == "bilateral"
    flops = 2 * forward(plain, policy.hf_config) + 3 * forward(trained.plan, policy.hf_config)
    assert found == {
        "memory/peak_gb": 5.0,
        "perf/rows_per_gpu_second": trained.plan.stats["tokens_packed"] / 2.0,
        "perf/mfu": pytest.approx(flops / (2.0 * 989e12)),
    }
    assert gpu_metrics([], 0.0, policy.hf_config, config) == {"memory/peak_gb": 5.0}


def forward(plan: SimpleNamespace, c: SimpleNamespace) -> int:
    """FLOPs by a loop over micro-batches: 2 for each weight and row, 4 for each pair and channel."""
    heads, channels = c.num_attention_heads, c.head_dim
    attention = c.hidden_size * channels * (2 * heads + 2 * c.num_key_value_heads)
    weights = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    total = 0
    for batch in plan.ranks[0]:
        pairs = sum(n * (n + 1) // 2 for n in np.diff(batch.cu_seqlens).tolist())
        sides = zip(np.diff(batch.cu_prefix).tolist(), np.diff(batch.cu_response_side).tolist(), strict=True)
        pairs += sum(prefix * rows for prefix, rows in sides)
        total += 2 * weights * batch.num_rows + 4 * c.num_hidden_layers * heads * channels * pairs
        total += 2 * c.hidden_size * c.vocab_size * batch.num_response_rows
    return total
