"""Profiles a training step of the tiny policy: the five most expensive operations, by torch's profiler."""

import argparse
from typing import Any

from benchmarks._measure import machine, one_process
from benchmarks._steps import TOKENIZER, make_groups
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer

from megatron_bicc import device
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds no options."""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Profiles the second of two steps of BICC with RCC: 16 groups of 8 short responses.

    Returns:
        total_ms and, under "top", name, ms, share and calls of the operations with the most self time.
    """
    config = Config(algorithm="bicc")
    config.model.path = str(TOKENIZER)
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    config.train.max_sequence_tokens, config.train.max_tokens_per_microbatch = 256, 4096
    config = resolve(config)
    with one_process():
        learner = Learner(config, load_policy(config), AutoTokenizer.from_pretrained(TOKENIZER))
        groups = make_groups(16, 24, 60, learner.policy.hf_config.vocab_size)
        learner.step(groups, Stopwatch())
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * device.has_cuda()
        with profile(activities=activities) as profiler:
            learner.step(groups, Stopwatch())
    attribute = "self_device_time_total" if device.has_cuda() else "self_cpu_time_total"
    times_us = {event: getattr(event, attribute) for event in profiler.key_averages()}
    total = sum(times_us.values())
    top = [
        {"name": event.key, "ms": time_us / 1e3, "share": time_us / total, "calls": event.count}
        for event, time_us in sorted(times_us.items(), key=lambda item: -item[1])[:TOP]
    ]
    print(f"{'operation':65}{'share':>8}{'ms':>10}{'calls':>8}")
    for row in top:
        print(f"{row['name'][:64]:65}{row['share']:>8.1%}{row['ms']:>10.2f}{row['calls']:>8}")
    return {"top": top, "total_ms": total / 1e3, "machine": machine()}
