"""Draws a synthetic step: lengths and rewards from given statistics, packed as a run packs its rollouts.

Shape suffixes: B groups, R rollouts.
"""

import math
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.algorithms.advantages import has_contrast, regularises
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.packing.pack import plan_step
from megatron_bicc.packing.types import Layout, RolloutBatch, StepPlan
from megatron_bicc.training.batch import packing_settings

CHARACTERS_PER_TOKEN = 4


class UnknownTokenizer:
    """Replaces a missing tokenizer: about four characters of English per token, no end token."""

    eos_token_id = None

    def get_added_vocab(self) -> dict[str, int]:
        """Returns no tokens."""
        return {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Returns as many token ids, all 0, as the text would have."""
        return [0] * math.ceil(len(text) / CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class SyntheticUpdate:
    """One optimizer step of the synthetic step, on the groups that a run would train."""

    log_probs: StepPlan
    """Plain layout over which log-probs of the old and the reference policy are computed"""
    trained: dict[Layout, StepPlan]
    """The layouts that are trained: plain, bilateral or both"""


@dataclass(frozen=True)
class SyntheticStep:
    """A packed step."""

    groups: int
    groups_with_contrast: int
    prompt_tokens: int
    """Over all groups, each prompt once"""
    response_tokens: int
    """Over all rollouts"""
    longest_response: int
    updates: list[SyntheticUpdate]


def synthetic_step(
    config: Config,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | UnknownTokenizer,
    data_parallel: int,
) -> SyntheticStep:
    """Draws a step from `config.synthetic` and the run's seed, and packs it as the learner does.

    Raises UserError if the run could not pack it, or if no group would be trained.
    """
    rollouts = draw_rollouts(config, np.random.default_rng(config.seed))
    contrast_B = has_contrast(rollouts.rewards_R, rollouts.group_offsets_B, config.reward.threshold)
    taken_B = np.ones_like(contrast_B) if regularises(config) else contrast_B
    if not taken_B.any():
        raise UserError(
            f"synthetic.pass_rate is {config.synthetic.pass_rate}; no group has right and wrong rollouts: "
            "choose one nearer to 0.5"
        )
    plain, bilateral = packing_settings(config, hf_config, tokenizer)
    weight = config.bicc.weight if config.bicc.enabled else 0.0
    size = len(contrast_B) // config.train.updates_per_step
    updates = []
    for start in range(0, len(contrast_B), size):
        kept = [g for g in range(start, start + size) if taken_B[g]]
        if not kept:
            continue
        part = _choose(rollouts, kept)
        trained: dict[Layout, StepPlan] = {}
        if weight > 0 and contrast_B[kept].any():
            trained["bilateral"] = plan_step(part, bilateral, data_parallel)
        if weight < 1 or regularises(config):
            trained["plain"] = plan_step(part, plain, data_parallel)
        updates.append(
            SyntheticUpdate(trained.get("plain") or plan_step(part, plain, data_parallel), trained)
        )
    return SyntheticStep(
        groups=len(contrast_B),
        groups_with_contrast=int(contrast_B.sum()),
        prompt_tokens=len(rollouts.prompt_tokens),
        response_tokens=len(rollouts.tokens),
        longest_response=int(np.diff(rollouts.offsets_R).max()),
        updates=updates,
    )


def draw_rollouts(config: Config, rng: np.random.Generator) -> RolloutBatch:
    """Draws scored groups of tokens 0: lengths log-normal, rewards 0 or 1, all independent."""
    c, groups, size = config.synthetic, config.rollout.prompts_per_step, config.rollout.group_size
    prompt_mean = c.prompt_tokens or max(1, config.data.max_prompt_tokens // 4)
    response_mean = c.response_tokens or max(1, config.rollout.max_new_tokens // 2)
    prompts_B = _lengths(rng, groups, prompt_mean, c.prompt_sigma, config.data.max_prompt_tokens)
    lengths_R = _lengths(rng, groups * size, response_mean, c.response_sigma, config.rollout.max_new_tokens)
    right_R = rng.random(groups * size) < c.pass_rate
    return _batch(prompts_B, lengths_R, np.arange(groups + 1) * size, right_R.astype(np.float32))


def _lengths(rng: np.random.Generator, count: int, mean: float, sigma: float, longest: int) -> np.ndarray:
    """Draws int64 [count], log-normal with the given mean, clipped to 1..longest, which moves the mean."""
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)


def _choose(rollouts: RolloutBatch, groups: list[int]) -> RolloutBatch:
    """Returns the given groups of a drawn batch."""
    bounds = rollouts.group_offsets_B
    members = np.concatenate([np.arange(bounds[g], bounds[g + 1]) for g in groups])
    return _batch(
        np.diff(rollouts.prompt_offsets_B)[groups],
        np.diff(rollouts.offsets_R)[members],
        np.concatenate([[0], np.cumsum(np.diff(bounds)[groups])]),
        rollouts.rewards_R[members],
    )


def _batch(
    prompts_B: np.ndarray, lengths_R: np.ndarray, group_offsets_B: np.ndarray, rewards_R: np.ndarray
) -> RolloutBatch:
    offsets = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # noqa: E731
    return RolloutBatch(
        prompt_tokens=np.zeros(prompts_B.sum(), np.int32),
        prompt_offsets_B=offsets(prompts_B),
        tokens=np.zeros(lengths_R.sum(), np.int32),
        offsets_R=offsets(lengths_R),
        group_offsets_B=group_offsets_B.astype(np.int64),
        rewards_R=rewards_R,
    )
