"""Measures the share of bf16 weights that an optimizer step changes, and the bytes of a file of the changes.

weight_sync.delta sends such files. The rollouts are random; the policy is the demo's, or has the shape of
SmolLM2-135M and random weights.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmarks._measure import machine, one_process
from benchmarks._steps import TOKENIZER, make_groups, smollm2
from torch import Tensor
from transformers import AutoTokenizer

from megatron_bicc import device
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.metrics import Stopwatch
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.changes import LastWeights, write_changes
from megatron_bicc.weights.hf_weights import hf_tensors, load_policy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's own options."""
    parser.add_argument("--smollm2", action="store_true", help="the shape of SmolLM2-135M instead")
    parser.add_argument("--lr", type=float, default=1e-6, help="optimizer.lr (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (%(default)s)")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Takes the steps. Returns steps: of each the share of changed elements, and of the bytes to send."""
    with TemporaryDirectory() as directory, one_process():
        learner = _learner(arguments, Path(directory))
        last, steps = LastWeights(), []
        before = _weights(learner)
        last.changes(before.items())
        elements = sum(tensor.numel() for tensor in before.values())
        for _ in range(arguments.steps):
            learner.step(make_groups(2, 12, 24, learner.policy.hf_config.vocab_size), Stopwatch())
            after = _weights(learner)
            changed = sum(int((after[name] != before[name]).sum()) for name in after)
            sent = write_changes(Path(directory) / "changes", last.changes(after.items()))
            whole = sum(tensor.nbytes for tensor in after.values())
            steps.append({"changed": changed / elements, "sent": sent / whole})
            print(f"changed {steps[-1]['changed']:.4f} of the elements; {steps[-1]['sent']:.4f} of the bytes")
            before = after
    return {"steps": steps, "elements": elements, "machine": machine()}


def _learner(a: argparse.Namespace, directory: Path) -> Learner:
    config = Config(output_dir=str(directory), algorithm="grpo")
    config.model.path, config.model.dtype = str(TOKENIZER), "bfloat16"
    config.optimizer.lr = a.lr
    config.rollout.max_new_tokens = 32
    config.train.max_tokens_per_microbatch = config.train.max_sequence_tokens = 512
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    if a.smollm2:
        config.model.path = str(directory / "model")
        smollm2().to(torch.bfloat16).save_pretrained(config.model.path)
    config = resolve(config)
    return Learner(config, load_policy(config), tokenizer)


def _weights(learner: Learner) -> dict[str, Tensor]:
    with device.megatron():
        tensors = hf_tensors(learner.policy.modules, learner.policy.hf_config)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors}
