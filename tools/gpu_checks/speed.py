"""benchmarks of attention, log-probs and a step, with MFU; a step's peak memory against the plan's"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_checks._check import Check, at_least, at_most, gpu_count, noted, run_command, skipped
from gpu_checks._steps import SIZES, step
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.planning.cost import GPUS, Cluster, Sizes, memory_of
from megatron_bicc.planning.shards import build_shards

TOKEN_RATIO = 0.9
"""Least share of the token ratio that shared prefixes must save in time"""
ROWS = 8192
"""Rows of a micro-batch of the memory check"""


def run(out: Path) -> Iterator[Check]:
    """Yields ratios, and MFU and memory on a GPU."""
    on_gpu = gpu_count() > 0
    sizes = ["--hidden", 4096, "--layers", 2, "--scale", 1] if on_gpu else []
    tflops = _peak_tflops()
    peak = ["--peak-tflops", tflops] if tflops else []
    for case in _benchmark("attention", out, *sizes, *peak)["cases"]:
        share = case["speedup"] / case["token_ratio"]
        yield at_least(f"attention, {case['name']}: share of the token ratio", share, TOKEN_RATIO)
        if tflops:
            yield noted(f"attention, {case['name']}: MFU", case["mfu_shared"])
    sizes = ["--hidden", 4096] if on_gpu else ["--rows", 1024, "--time-rows", 128]
    figures = _benchmark("logprob", out, *sizes)
    yield at_most("log-probs: time over dense", figures["time_ratio"], 1.0)
    yield at_most("log-probs: peak memory over dense", figures["peak_ratio"], 0.5)
    sizes = ["--hidden", 2048, "--layers", 4, "--groups", 8, "--mean-length", 800] if on_gpu else []
    yield at_most(
        "BICC step: time over GRPO's, of the token ratio", _benchmark("step", out, *sizes)["excess"], 1.1
    )
    if not on_gpu:
        yield skipped("peak memory against the plan", "needs a GPU")
        return
    measured, planned = _peak_memory(out)
    yield at_most("peak memory over the plan's", measured / planned, 1.05)
    yield at_least("peak memory over the plan's, from below", measured / planned, 0.6)


def _benchmark(name: str, out: Path, *arguments: Any) -> dict[str, Any]:
    file = out / f"benchmark_{name}.json"
    run_command([sys.executable, "tools/benchmark.py", name, *arguments, "--json", file])
    return json.loads(file.read_text())


def _peak_tflops() -> float | None:
    """Returns the peak of bf16 products of the first GPU, where the planner knows it."""
    name = torch.cuda.get_device_name(0) if gpu_count() else ""
    known = [gpu.bf16_flops / 1e12 for part, gpu in GPUS.items() if part.split("-")[0] in name]
    return known[0] if known else None


def _peak_memory(out: Path) -> tuple[float, float]:
    """Returns bytes, measured and planned, of a step of full micro-batches on one GPU."""
    torch.manual_seed(0)
    hf_config = Qwen3Config(
        **SIZES | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 8}
    )
    directory = out / "memory"
    Qwen3ForCausalLM(hf_config).save_pretrained(directory)
    settings = {
        "model.dtype": "bfloat16",
        "train.max_tokens_per_microbatch": ROWS,
        "train.max_sequence_tokens": ROWS,
    }
    found = step(out, "memory_step", 1, settings, "memory", rollouts=(8, 400, 1000))
    config = Config(algorithm="bicc")
    config.model.path = str(directory)
    config.train = replace(config.train, max_tokens_per_microbatch=ROWS, max_sequence_tokens=ROWS)
    (shard,) = build_shards(resolve(config), hf_config, 1, ranks=(0,))
    memory = memory_of(shard, Sizes.of(hf_config), config, 1, Cluster(GPUS["H100"]))
    return found.facts["peak_bytes"], memory.peak - memory.reserve
