"""Makes a learner with a small random policy, and scored rollouts for it."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megatron_bicc import device
from megatron_bicc.algorithms.presets import resolve
from megatron_bicc.config import Config
from megatron_bicc.data.prompts import Prompt
from megatron_bicc.rollout.types import Group, Sample
from megatron_bicc.training.learner import Learner
from megatron_bicc.weights.hf_weights import load_policy

TOKENIZER = Path(__file__).parents[2] / "examples/tiny_policy"
PROMPT, GROUP_SIZE, LOG_STD = 50, 8, 0.8


def make_learner(
    algorithm: str, hidden: int, layers: int, max_sequence_tokens: int, vocab_size: int | None = None
) -> Learner:
    """Returns a learner in fp32 on a CPU, bf16 on a GPU; the process groups must exist.

    vocab_size: by default the tokenizer's.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = random_model(hidden, layers, vocab_size or len(tokenizer))
    config = Config(algorithm=algorithm)
    config.model.dtype = "bfloat16" if device.has_cuda() else "float32"
    config.train.max_sequence_tokens = max_sequence_tokens
    config.train.max_tokens_per_microbatch = 4 * max_sequence_tokens
    with TemporaryDirectory() as path:
        model.save_pretrained(path)
        config.model.path = path
        config = resolve(config)
        return Learner(config, load_policy(config), tokenizer)


def random_model(hidden: int, layers: int, vocab_size: int) -> Qwen3ForCausalLM:
    """Returns a dense model with heads of 64."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=8 * hidden // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(1, hidden // 128),
            head_dim=64,
        )
    )


def smollm2() -> LlamaForCausalLM:
    """Returns a model of the shape of SmolLM2-135M, with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    )


def make_groups(groups: int, mean_length: int, longest: int, vocab_size: int) -> list[Group]:
    """Returns groups of 8, half of them right, with lognormal response lengths."""
    random = np.random.default_rng(0)
    drawn = random.lognormal(math.log(mean_length) - LOG_STD**2 / 2, LOG_STD, (groups, GROUP_SIZE))
    lengths = np.clip(drawn.astype(int), 1, longest)
    draw = lambda length: random.integers(2, vocab_size, length).astype(np.int32)  # noqa: E731
    return [
        Group(
            Prompt(i, [], draw(PROMPT), "", "", {}),
            [Sample(draw(n), np.full(n, -3.0, np.float32), "stop", 0) for n in lengths[i]],
            [""] * GROUP_SIZE,
            (np.arange(GROUP_SIZE) % 2).astype(np.float32),
        )
        for i in range(groups)
    ]
