"""Held-out evaluation: pass@1, sampled."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_bicc.data import Prompt
from megatron_bicc.rewards import Verifier
from megatron_bicc.rollout.collect import collect_groups
from megatron_bicc.rollout.types import Engine, Sampling


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on a set of prompts."""

    pass_at_1: float
    """Mean over prompts of the share of correct samples"""
    standard_error: float
    """Of that mean, over prompts"""


def evaluate(
    prompts: list[Prompt],
    engine: Engine,
    verifier: Verifier,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    samples: int,
    seed: int,
    threshold: float,
) -> Evaluation:
    """pass@1 averaged over `samples` samples a prompt; the same seeds at every call. Collective."""
    groups = collect_groups(
        prompts, engine, verifier, tokenizer, sampling, samples, seed=(seed, "evaluation")
    )
    share = np.array([(group.rewards > threshold).mean() for group in groups])
    return Evaluation(float(share.mean()), float(share.std(ddof=1) / len(share) ** 0.5))
