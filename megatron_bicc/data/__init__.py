"""Prompts to train on: files, chat template, order."""

from megatron_bicc.data.prompts import Prompt, digest, load_prompts
from megatron_bicc.data.sampler import PromptSampler

__all__ = ["Prompt", "PromptSampler", "digest", "load_prompts"]
