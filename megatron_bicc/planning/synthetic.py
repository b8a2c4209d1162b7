"""A step that no policy has sampled: its lengths and rewards are drawn from given statistics, then packed.

Shape suffixes: G groups, R rollouts.
"""

import math
from dataclasses import dataclass

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megatron_bicc.algorithms.advantages import has_contrast, regularises
from megatron_bicc.config import Config
from megatron_bicc.errors import UserError
from megatron_bicc.packing.pack import plan_step
from megatron_bicc.packing.plan import StepPlan
from megatron_bicc.packing.types import RolloutBatch
from megatron_bicc.training.batch import packing_settings

CHARACTERS_A_TOKEN = 4


class UnknownTokenizer:
    """Counts for a tokenizer that is not there: about four characters of English a token, no end token."""

    eos_token_id = None

    def get_added_vocab(self) -> dict[str, int]:
        """No tokens."""
        return {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """As many tokens as the text may take; their ids mean nothing."""
        return [0] * math.ceil(len(text) / CHARACTERS_A_TOKEN)


@dataclass(frozen=True)
class Update:
    """One optimiser step of the synthetic step, of the groups that a run's would take."""

    plain: StepPlan
    """Log-probs of the old and the reference policy are taken over it"""
    trained: dict[bool, StepPlan]
    """By whether a context stands before the responses"""


@dataclass(frozen=True)
class SyntheticStep:
    """A packed step."""

    groups: int
    groups_with_contrast: int
    prompt_tokens: int
    """Of all groups, each prompt once"""
    response_tokens: int
    """Of all rollouts"""
    longest_response: int
    updates: list[Update]


def synthetic_step(
    config: Config,
    hf_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | UnknownTokenizer,
    data_parallel: int,
) -> SyntheticStep:
    """Draws a step by `config.synthetic` and the run's seed, and packs it as the learner does.

    Raises UserError for a packing that the run could not do, or where there is nothing to learn.
    """
    rollouts = draw_rollouts(config, np.random.default_rng(config.seed))
    contrast_G = has_contrast(rollouts.rewards_R, rollouts.group_offsets_B, config.reward.threshold)
    taken_G = np.ones_like(contrast_G) if regularises(config) else contrast_G
    if not taken_G.any():
        raise UserError(
            f"synthetic.pass_rate is {config.synthetic.pass_rate}; no group has right and wrong rollouts: "
            "choose one nearer to 0.5"
        )
    plain, bilateral = packing_settings(config, hf_config, tokenizer)
    weight = config.bicc.weight if config.bicc.enabled else 0.0
    size = len(contrast_G) // config.train.updates_per_step
    updates = []
    for start in range(0, len(contrast_G), size):
        kept = [g for g in range(start, start + size) if taken_G[g]]
        if not kept:
            continue
        part = _choose(rollouts, kept)
        plans = {
            conditioned: plan_step(part, settings, data_parallel)
            for conditioned, settings, trained in (
                (True, bilateral, weight > 0 and contrast_G[kept].any()),
                (False, plain, weight < 1 or regularises(config)),
            )
            if trained
        }
        updates.append(Update(plans.get(False) or plan_step(part, plain, data_parallel), plans))
    return SyntheticStep(
        groups=len(contrast_G),
        groups_with_contrast=int(contrast_G.sum()),
        prompt_tokens=len(rollouts.prompt_tokens),
        response_tokens=len(rollouts.tokens),
        longest_response=int(np.diff(rollouts.offsets_R).max()),
        updates=updates,
    )


def draw_rollouts(config: Config, rng: np.random.Generator) -> RolloutBatch:
    """Scored groups of meaningless tokens; lengths are log-normal, rewards 0 or 1, all independent."""
    c, groups, size = config.synthetic, config.rollout.prompts_per_step, config.rollout.group_size
    prompt_mean = c.prompt_tokens or max(1, config.data.max_prompt_tokens // 4)
    response_mean = c.response_tokens or max(1, config.rollout.max_new_tokens // 2)
    prompts_G = _lengths(rng, groups, prompt_mean, c.prompt_sigma, config.data.max_prompt_tokens)
    lengths_R = _lengths(rng, groups * size, response_mean, c.response_sigma, config.rollout.max_new_tokens)
    right_R = rng.random(groups * size) < c.pass_rate
    return _batch(prompts_G, lengths_R, np.arange(groups + 1) * size, right_R.astype(np.float32))


def _lengths(rng: np.random.Generator, count: int, mean: float, sigma: float, longest: int) -> np.ndarray:
    """int64 [count], log-normal of that mean, within 1 and `longest`; cutting moves the mean."""
    drawn = rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)


def _choose(rollouts: RolloutBatch, groups: list[int]) -> RolloutBatch:
    """The given groups of a batch whose tokens mean nothing."""
    bounds = rollouts.group_offsets_B
    members = np.concatenate([np.arange(bounds[g], bounds[g + 1]) for g in groups])
    return _batch(
        np.diff(rollouts.prompt_offsets_B)[groups],
        np.diff(rollouts.offsets_R)[members],
        np.concatenate([[0], np.cumsum(np.diff(bounds)[groups])]),
        rollouts.rewards_R[members],
    )


def _batch(
    prompts_G: np.ndarray, lengths_R: np.ndarray, group_offsets_B: np.ndarray, rewards_R: np.ndarray
) -> RolloutBatch:
    offsets = lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)  # noqa: E731
    return RolloutBatch(
        prompt_tokens=np.zeros(prompts_G.sum(), np.int32),
        prompt_offsets_B=offsets(prompts_G),
        tokens=np.zeros(lengths_R.sum(), np.int32),
        offsets_R=offsets(lengths_R),
        group_offsets_B=group_offsets_B.astype(np.int64),
        rewards_R=rewards_R,
    )
