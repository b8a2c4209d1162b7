"""Settings of the policy: its weights, its prompts, its layout over processes, its training."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ModelConfig:
    """The policy."""

    path: str = ""
    """Hugging Face directory of the policy: config.json, tokenizer and safetensors."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in the forward and backward pass; the optimiser keeps fp32 copies."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping."""


@dataclass
class DataConfig:
    """Prompts to train on."""

    train: str = ""
    """Training prompts: .parquet or .jsonl in the DAPO-Math-17k, GSM8K or MATH schema."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in tokens, chat template included."""
    overlong_prompts: Literal["error", "drop"] = "error"
    """What to do with a longer prompt."""
    instruction: str = ""
    """Text put after every training question, such as how to mark the final answer."""
    control_tokens: Literal["refuse", "text", "keep"] = "refuse"
    """A control token in a prompt's text, <|im_end|>: an error, ordinary text, or the control token."""
    date: str = ""
    """Date that a chat template gets for today's, YYYY-MM-DD; empty: that of the run's first start."""


@dataclass
class ParallelConfig:
    """How the policy is laid out over the processes; data parallel takes what is left."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallel beside tensor parallel."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks a pipeline stage."""
    expert: int = 1
    """Expert-parallel size."""
    context: int = 1
    """Context-parallel size; only 1 is supported."""
    silence_seconds: float = 30.0
    """A host that is not heard of for so long, at least 5, ends the run; 0 waits for collectives to fail."""


@dataclass
class TrainConfig:
    """The shape of a training step."""

    steps: int = 100
    """Batches of rollouts to learn from."""
    updates_per_step: int = 1
    """Optimiser steps that a batch of rollouts is cut into, by groups."""
    max_sequence_tokens: int = 4096
    """Longest training sequence: prompt, context and response together."""
    max_tokens_per_microbatch: int = 16384
    """Rows that a packed micro-batch may hold."""


@dataclass
class OptimizerConfig:
    """Adam with decoupled weight decay, by megatron-core's distributed optimizer."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate that a decaying schedule reaches after the last optimizer step; no floor of warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """W optimiser steps of linear warm-up: step u has u / W of the peak."""
    beta1: float = 0.9
    """Adam's first decay."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of all matrices, embeddings and experts included; none of norms and biases."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 is off."""
