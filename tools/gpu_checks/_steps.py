"""Runs optimizer steps of small random policies on fixed rollouts, and compares them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_checks._check import REPOSITORY, torchrun
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

WORKER = REPOSITORY / "tools/gpu_checks/_steps_worker.py"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}
Rollouts = tuple[int, int, int]
"""Groups of 8, mean length of their responses and longest one, in tokens"""
ON_CPU = {"MEGATRON_BICC_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Step:
    """A step's outcome."""

    loss: float
    grad_norm: float
    gradients: dict[str, torch.Tensor]
    """float32, whole, by Hugging Face name"""
    facts: dict[str, Any]
    """layers, the class of a layer's linear; peak_bytes on a GPU; resume_difference and nan_refused where
    settings has checkpoint.every"""


def save_models(directory: Path) -> None:
    """Writes the random policies `dense` and `moe` into the directory."""
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**SIZES)).save_pretrained(directory / "dense")
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    }
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts)).save_pretrained(directory / "moe")


def step(
    directory: Path,
    name: str,
    processes: int,
    settings: dict[str, Any],
    model: str = "dense",
    rollouts: Rollouts = (4, 30, 100),
    **variables: str,
) -> Step:
    """Runs a step of `directory`/`model` by torchrun and returns its outcome.

    name: of the result's files in the directory. settings: by dotted name. variables: of the environment.
    """
    order = {
        "model": str(directory / model),
        "settings": settings,
        "rollouts": rollouts,
        "out": str(directory / name),
    }
    torchrun(processes, WORKER, json.dumps(order), **variables)
    facts = json.loads((directory / f"{name}.json").read_text())
    gradients = load_file(directory / f"{name}.safetensors")
    return Step(facts.pop("loss"), facts.pop("grad_norm"), gradients, facts)


def loss_error(found: Step, expected: Step) -> float:
    """Returns the relative difference of the losses."""
    return abs(found.loss - expected.loss) / abs(expected.loss)


def gradient_error(found: Step, expected: Step) -> float:
    """Returns the largest relative difference, over tensors, of the gradients."""
    assert found.gradients.keys() == expected.gradients.keys()
    return max(
        float((found.gradients[name] - truth).norm() / truth.norm())
        for name, truth in expected.gradients.items()
    )


def smallest_cosine(found: Step, expected: Step) -> float:
    """Returns the smallest cosine, over tensors, between the gradients."""
    assert found.gradients.keys() == expected.gradients.keys()
    return min(
        float(torch.cosine_similarity(found.gradients[name].flatten(), truth.flatten(), dim=0))
        for name, truth in expected.gradients.items()
    )
